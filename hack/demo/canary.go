package main

import (
	"context"
	"fmt"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// showCanary lets a second generation of one tenant's proxy, another version of
// Envoy, take half of the new connections and give them back.
func (d *demo) showCanary(ctx context.Context) error {
	tenant, node, version := teams[2], d.nodes[0], "1.39.3"
	d.step("A second generation of %s's proxy on %s, Envoy %s, takes half of the new connections", tenant, node, version)
	first, err := d.Proxy(ctx, node, tenant)
	if err != nil {
		return err
	}
	if err := d.setCanary(ctx, node, tenant, version, 50); err != nil {
		return err
	}
	var both harness.Proxy
	err = harness.Wait(ctx, 30*time.Second, 200*time.Millisecond, "the second generation", func(ctx context.Context) error {
		if both, err = d.Proxy(ctx, node, tenant); err != nil {
			return err
		}
		if len(both.Generations) != 2 || both.Weight != 50 {
			return fmt.Errorf("%d generations, weight %d", len(both.Generations), both.Weight)
		}
		return nil
	})
	d.checkErr(err, "two Envoys run side by side")
	if err != nil {
		return nil
	}
	const connections = 200
	old, canary, err := d.countNew(ctx, node, tenant, connections)
	d.checkErr(err, "%d new connections and more, each answered", connections)
	// Binomial: of 200 and more, less than 35 % on one side come once in 50,000 runs.
	least := (old + canary) * 35 / 100
	d.check(old >= least && canary >= least && old+canary >= connections, "of the new connections %d went to the old generation, %d to the new one", old, canary)
	if err := d.setCanary(ctx, node, tenant, version, 0); err != nil {
		return err
	}
	err = harness.Wait(ctx, 15*time.Second, 100*time.Millisecond, "the weight to be 0", func(ctx context.Context) error {
		p, err := d.Proxy(ctx, node, tenant)
		if err == nil && p.Weight != 0 {
			err = fmt.Errorf("weight is %d", p.Weight)
		}
		return err
	})
	d.checkErr(err, "weight 0: one map entry")
	_, canary, err = d.countNew(ctx, node, tenant, connections)
	d.checkErr(err, "%d new connections and more, each answered", connections)
	d.check(canary == 0, "after giving back, %d of them went to the new generation", canary)
	if err := d.setCanary(ctx, node, tenant, "", 0); err != nil {
		return err
	}
	err = harness.Wait(ctx, 60*time.Second, 300*time.Millisecond, "the second generation to end", func(ctx context.Context) error {
		p, err := d.Proxy(ctx, node, tenant)
		if err == nil && len(p.Generations) != 1 {
			err = fmt.Errorf("%d generations", len(p.Generations))
		}
		if err == nil && p.Generations[0].PID != first.Generations[0].PID {
			err = fmt.Errorf("pid %d, was %d", p.Generations[0].PID, first.Generations[0].PID)
		}
		return err
	})
	d.checkErr(err, "the second generation has ended, the first is the process that it was")
	return nil
}

// setCanary owns the canary of one tenant on one node as a rollout would: by
// server-side apply under a field manager of its own. No version takes it away.
func (d *demo) setCanary(ctx context.Context, node, tenant, version string, weight int) error {
	spec := ""
	if version != "" {
		spec = fmt.Sprintf("spec: {tenants: [{name: %s, canary: {version: %q, weight: %d}}]}\n", tenant, version, weight)
	}
	_, err := d.Kubectl(ctx, fmt.Sprintf("apiVersion: mesh.bulkhead.dev/v1alpha1\nkind: NodeProxy\nmetadata: {name: %s}\n%s", node, spec),
		"apply", "--server-side", "--field-manager", "demo", "-f", "-")
	return err
}

// countNew makes new connections from the tenant's pod and counts, by the
// kernel's own counters, which generation took them.
func (d *demo) countNew(ctx context.Context, node, tenant string, n int) (old, canary int, err error) {
	before, err := d.Proxy(ctx, node, tenant)
	if err != nil {
		return 0, 0, err
	}
	target := address(d.pod(webC, 1).IPv4, app.HTTPPort)
	r, err := d.Load(ctx, d.pod(webC, 0), make(chan struct{}), "load", "--connections", "4", "--rate", fmt.Sprint(n/4), "--new-connection-ratio", "1", "--duration", "7s", target)
	if err == nil && (r.Failures.Total > 0 || r.Exchanges < n) {
		err = fmt.Errorf("%d answered, %d failed", r.Exchanges, r.Failures.Total)
	}
	after, inspectErr := d.Proxy(ctx, node, tenant)
	if inspectErr != nil {
		return 0, 0, inspectErr
	}
	return int(after.Steered[0] - before.Steered[0]), int(after.Steered[1] - before.Steered[1]), err
}
