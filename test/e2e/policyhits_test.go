package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// policyNodeNow is what a policy of e2e-a says of a node. Hits are there once the agent
// has read them.
func (e *env) policyNodeNow(ctx context.Context, name, node string) (v1alpha1.EnforcedLimits, error) {
	var p v1alpha1.IsolationPolicy
	if err := e.Client.Get(ctx, client.ObjectKey{Namespace: "e2e-a", Name: name}, &p); err != nil {
		return v1alpha1.EnforcedLimits{}, err
	}
	for _, n := range p.Status.Nodes {
		if n.Node == node && n.Tenant == "e2e-a" && n.Hits != nil && n.Hits.Since != nil {
			return n, nil
		}
	}
	return v1alpha1.EnforcedLimits{}, fmt.Errorf("%s isn't told of in %+v", node, p.Status)
}

func (e *env) policyNode(t *testing.T, name, node string) (n v1alpha1.EnforcedLimits) {
	t.Helper()
	err := harness.Wait(t.Context(), patience, 100*time.Millisecond, "the policy to tell of "+node, func(ctx context.Context) (err error) {
		n, err = e.policyNodeNow(ctx, name, node)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestHitsAreTold has a tenant meet its limits on one node: its policy says how often and
// since when, and of no other node; a neighbour notices nothing; and what was in force
// goes with the policy, while connections go on.
func TestHitsAreTold(t *testing.T) {
	e.roots.loadEnded(t)
	e.goesOn(t)
	e.removeIn(t, "e2e-a", "isolationpolicy", "met")
	if err := e.Apply(t.Context(), `
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: IsolationPolicy
metadata: {name: met, namespace: e2e-a}
spec: {cpu: {limit: 100m}, connections: {newPerSecond: 5}}
`); err != nil {
		t.Fatal(err)
	}
	e.enforced(t, "e2e-a", v1alpha1.Limits{CPUMillis: 100, NewConnections: 5, Pids: 512})
	before, beside := e.policyNode(t, "met", e.nodes[0]), e.policyNode(t, "met", e.nodes[1])
	shed := func(node string) uint64 {
		t.Helper()
		p, err := e.Proxy(t.Context(), node, "e2e-b")
		if err != nil {
			t.Fatal(err)
		}
		return p.Drops["tooFast"]
	}
	neighbours := shed(e.nodes[0]) + shed(e.nodes[1])

	results, over := make(chan loaded, 2), make(chan struct{})
	to := hostPort(e.pod(webB, 1).IPv4, app.HTTPPort)
	startLoadUntil(t, results, over, "the neighbour", e.pod(webB, 0), "--connections", "8", "--new-connection-ratio", "0.5", to)
	// As fast as it can, and many at once.
	startLoadUntil(t, results, over, "the tenant", e.pod(webA, 0), "--connections", "32", "--rate", "0", to)
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "the owner to be told", func(ctx context.Context) error {
		n, err := e.policyNodeNow(ctx, "met", e.nodes[0])
		if err != nil {
			return err
		}
		had, h := before.Hits, n.Hits
		switch {
		case h.NewConnections <= had.NewConnections, h.CPUThrottled <= had.CPUThrottled, h.CPUThrottledMillis <= had.CPUThrottledMillis,
			!h.Since.Equal(had.Since), h.Last == nil || h.Last.Before(h.Since) || had.Last != nil && !had.Last.Before(h.Last):
			return fmt.Errorf("%+v, before %+v", *h, *had)
		}
		t.Logf("hits: %+v", *h)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if now := e.policyNode(t, "met", e.nodes[1]); now.Hits.NewConnections != beside.Hits.NewConnections {
		t.Errorf("%s is told of, too: %+v, before %+v", e.nodes[1], *now.Hits, *beside.Hits)
	}
	if _, err := e.Kubectl(t.Context(), "", "delete", "isolationpolicy", "met", "--namespace=e2e-a", "--wait=true"); err != nil {
		t.Fatal(err)
	}
	e.enforced(t, "e2e-a", v1alpha1.Limits{Pids: 512})
	close(over)
	for range cap(results) {
		l := <-results
		r := l.result
		t.Logf("%s: %d exchanges on %d connections, %d failures", l.what, r.Exchanges, r.Connections, r.Failures.Total)
		if r.Exchanges == 0 || l.what == "the neighbour" && (l.err != nil || r.Failures.Total > 0) {
			t.Errorf("%s: %v; %d exchanges, first failure %+v", l.what, l.err, r.Exchanges, r.Failures.First)
		}
	}
	if now := shed(e.nodes[0]) + shed(e.nodes[1]); now != neighbours {
		t.Errorf("%d of the neighbour's connections were shed", now-neighbours)
	}
}
