package e2e

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/rollout"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// TestProxyRollout brings another Envoy to five tenants on both nodes from a registry,
// step by step, and then the version before by another rollout, under load of all
// protocols: no request fails and no connection is reset. Connections that were there
// before go on until the deadline that their namespace sets, and not beyond.
func TestProxyRollout(t *testing.T) {
	registry := startRegistry(t)
	thereImage, there := pushEnvoy(t, registry, olderEnvoy)
	backImage, back := pushEnvoy(t, registry, newEnvoy)
	c, d, f := newTeam(t, "e2e-c"), newTeam(t, "e2e-d"), newTeam(t, "e2e-f")
	all := append([]string{c.name, d.name, f.name}, tenants...)
	setDrain(t, c.name, drain)

	const rate = 240 // of each
	over := make(chan struct{})
	load := []struct {
		protocol string
		from, to harness.Pod
		port     int
	}{
		{"http", e.pod(webA, 0), e.pod(webB, 1), app.HTTPPort},
		{"h2c", e.pod(webB, 0), c.pod(c.web, 1), app.HTTPPort},
		{"grpc", c.pod(c.web, 0), d.pod(d.web, 1), app.GRPCPort},
		{"tcp", d.pod(d.web, 0), f.pod(f.web, 1), app.GreetPort},
		{"http", f.pod(f.web, 1), e.pod(webA, 0), app.HTTPPort},
	}
	results := make(chan loaded, len(load))
	for _, l := range load {
		startLoadUntil(t, results, over, l.protocol+" of "+l.from.Namespace, l.from, "--protocol", l.protocol, "--connections", "32", "--rate", fmt.Sprint(rate),
			"--new-connection-ratio", "0.5", hostPort(l.to.IPv4, l.port))
	}
	const connections = 10
	held := beginUntil(t, over, "connections that were there before", c.pod(c.web, 0), "hold", "--connections", fmt.Sprint(connections), "--interval", "200ms", "--timeout", "15s",
		hostPort(c.pod(c.batch, 1).IPv4, app.GreetPort))

	rollOut(t, "e2e-there", fmt.Sprintf("version: %s, image: %q", olderEnvoy, thereImage), "{namespaces: [e2e-a], weight: 20, approval: true}, {tenantsPercent: 60, weight: 50}, {weight: 100}")
	phase(t, "e2e-there", v1alpha1.RolloutWaiting, "step 1 of 3", "20 %", "approvedSteps")
	servingVersions(t, "e2e-a", newEnvoy, there)
	servingVersions(t, "e2e-b", newEnvoy)
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "owners to be told", func(context.Context) error {
		a, b := upgradeOf(t, "e2e-a"), upgradeOf(t, "e2e-b")
		if a == nil || a.Weight != 20 || a.Verdict != "Healthy" || a.From != newEnvoy || a.To != there || b == nil || b.Verdict != "NotYet" {
			return fmt.Errorf("e2e-a %+v, e2e-b %+v", a, b)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	var out bytes.Buffer
	approved := time.Now()
	if err := rollout.Approve(t.Context(), e.Client, "", &out); err != nil {
		t.Fatal(err)
	}
	first, latest := leaving(t, c.name, newEnvoy)
	if first.Before(approved.Add(drain - time.Second)) { // it is told in whole seconds
		t.Errorf("the proxies that leave end %s after the approval, their namespace lets connections go on for %s", first.Sub(approved), drain)
	}
	phase(t, "e2e-there", v1alpha1.RolloutSucceeded)
	for _, tenant := range all {
		servingVersions(t, tenant, there)
	}
	planned(t, there)
	turned := time.Now()

	rollOut(t, "e2e-back", fmt.Sprintf("version: %s, image: %q", newEnvoy, backImage), "{weight: 50}, {weight: 100}")
	phase(t, "e2e-back", v1alpha1.RolloutSucceeded)
	for _, tenant := range all {
		servingVersions(t, tenant, back)
	}
	ended := time.Now()
	// Those that were there before end by their deadline, nobody else ends them.
	select {
	case <-held.ended:
	case <-time.After(time.Until(latest) + 20*time.Second):
	}
	close(over)
	out.Reset()
	if err := rollout.History(t.Context(), e.Client, ended, &out); err != nil {
		t.Error(err)
	}
	t.Logf("back took %s:\n%s", ended.Sub(turned).Round(time.Second), &out)

	exchanges, opened, seconds := 0, 0, 1
	for range cap(results) {
		l := <-results
		r := l.result
		exchanges, opened, seconds = exchanges+r.Exchanges, opened+r.Connections, max(seconds, l.seconds())
		t.Logf("%s: %d exchanges on %d connections, p99 %.1f ms, max %.1f ms", l.what, r.Exchanges, r.Connections, r.Latency.P99, r.Latency.Max)
		if l.err != nil || r.Failures.Total > 0 || r.Exchanges == 0 {
			t.Errorf("%s: %v, %d failures %v, first %+v, last %+v", l.what, l.err, r.Failures.Total, r.Failures.ByKind, r.Failures.First, r.Failures.Last)
		}
		if r.Connections < r.Exchanges/2 {
			t.Errorf("%s: %d exchanges on %d connections, want half of them on new ones", l.what, r.Exchanges, r.Connections)
		}
	}
	// How many a machine can do is no matter of a test; 1,000 is what it is about.
	t.Logf("together %.0f requests/s, %.0f of them on new connections", float64(exchanges)/float64(seconds), float64(opened)/float64(seconds))

	<-held.outcome // they may all have ended before they were told to
	h := held.result
	if h.Connections != connections || h.Held > 0 || h.Failures.Total != connections {
		t.Errorf("%d connections, %d of them held beyond the deadline, %d ended: %+v", h.Connections, h.Held, h.Failures.Total, h.Failures)
	} else {
		t.Logf("the proxies were to end from %s to %s, the connections did from %s to %s", first.Format(time.TimeOnly), latest.Format(time.TimeOnly), h.Failures.First.At.Format(time.TimeOnly), h.Failures.Last.At.Format(time.TimeOnly))
		// Nodes' clocks may differ by a second.
		if h.Failures.First.At.Before(first.Add(-time.Second)) {
			t.Errorf("a connection ended %s before the deadline of its namespace: %+v", first.Sub(h.Failures.First.At), h.Failures.First)
		}
	}
	if err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "an event that says that the upgrade goes well", func(ctx context.Context) error {
		events, err := e.Kube.CoreV1().Events("e2e-a").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, ev := range events.Items {
			if ev.Reason == "UpgradeHealthy" && strings.Contains(ev.Message, there) && ev.InvolvedObject.Kind == "TenantProxy" {
				return nil
			}
		}
		return fmt.Errorf("none of %d is", len(events.Items))
	}); err != nil {
		t.Error(err)
	}
	// What follows their end is no other test's business.
	if _, err := e.Kubectl(t.Context(), "", "delete", "proxyrollout", "e2e-there", "e2e-back"); err != nil {
		t.Fatal(err)
	}
	for _, tenant := range all {
		onlyVersion(t, tenant, newEnvoy)
	}
}

// drain is for how long connections may go on in a proxy that is replaced, longer than
// by default.
const drain = 25 * time.Second

// setDrain has a namespace say so, and waits until its nodes know.
func setDrain(t *testing.T, namespace string, drain time.Duration) {
	t.Helper()
	if err := e.Apply(t.Context(), fmt.Sprintf("apiVersion: mesh.bulkhead.dev/v1alpha1\nkind: IsolationPolicy\nmetadata: {name: drain, namespace: %s}\nspec: {upgrades: {drain: %s}}\n", namespace, drain)); err != nil {
		t.Fatal(err)
	}
	eachPlanned(t, "the drain of "+namespace, func(tenant v1alpha1.NodeTenant) error {
		if tenant.Name == namespace && tenant.DrainSeconds != int64(drain/time.Second) {
			return fmt.Errorf("%d s", tenant.DrainSeconds)
		}
		return nil
	})
}

// planned waits until a version is that of all tenants' plans.
func planned(t *testing.T, version string) {
	t.Helper()
	eachPlanned(t, "plans to have the version", func(tenant v1alpha1.NodeTenant) error {
		if tenant.Version != version || tenant.Canary != nil {
			return fmt.Errorf("%+v", tenant)
		}
		return nil
	})
}

// eachPlanned waits until the tests' tenants are so in the plans of all nodes.
func eachPlanned(t *testing.T, what string, so func(v1alpha1.NodeTenant) error) {
	t.Helper()
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, what, func(ctx context.Context) error {
		for _, node := range e.nodes {
			var np v1alpha1.NodeProxy
			if err := e.Client.Get(ctx, client.ObjectKey{Name: node}, &np); err != nil {
				return err
			}
			for _, tenant := range np.Spec.Tenants {
				if !strings.HasPrefix(tenant.Name, "e2e-") {
					continue
				}
				if err := so(tenant); err != nil {
					return fmt.Errorf("%s: %w", node, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// leaving waits until a tenant's proxies of a version leave on all nodes, and returns
// when the first and the last of them end at the latest.
func leaving(t *testing.T, tenant, version string) (first, last time.Time) {
	t.Helper()
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, tenant+"'s Envoy "+version+" to leave", func(ctx context.Context) error {
		first, last = time.Time{}, time.Time{}
		for _, node := range e.nodes {
			until, err := leavingUntil(ctx, node, tenant, version)
			if err != nil {
				return err
			}
			if first.IsZero() || until.Before(first) {
				first = until
			}
			if until.After(last) {
				last = until
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return first, last
}

func leavingUntil(ctx context.Context, node, tenant, version string) (time.Time, error) {
	i, err := inspect(ctx, node)
	if err != nil {
		return time.Time{}, err
	}
	for _, t := range i.Tenants {
		for _, g := range t.Generations {
			if t.Name == tenant && g.Version == version && g.DrainUntil != nil {
				return *g.DrainUntil, nil
			}
		}
	}
	return time.Time{}, fmt.Errorf("it doesn't on %s", node)
}
