package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// enforced waits until the kernels of all nodes have the limits of a tenant, and returns
// how long that took: less than 2 s where nothing else keeps the machine busy.
func (e *env) enforced(t *testing.T, tenant string, want v1alpha1.Limits) time.Duration {
	t.Helper()
	begin := time.Now()
	err := harness.Wait(t.Context(), patience, 20*time.Millisecond, "limits of "+tenant, func(ctx context.Context) error {
		for _, node := range e.nodes {
			var np v1alpha1.NodeProxy
			if err := e.Client.Get(ctx, client.ObjectKey{Name: node}, &np); err != nil {
				return err
			}
			told := false
			for _, s := range np.Status.Tenants {
				have := s.Limits
				have.CPUWeight, have.Concurrency = 0, 0 // the kernel's, and Envoy's, own
				told = told || s.Name == tenant
				if s.Name == tenant && have != want {
					return fmt.Errorf("%s: %+v, %q", node, s.Limits, s.Unenforced)
				}
			}
			if !told {
				return fmt.Errorf("%s doesn't tell of %s", node, tenant)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(begin)
	t.Logf("%+v after %s", want, took.Round(time.Millisecond))
	return took
}

// soon fails unless one of several changes was enforced within 2 s. A busy machine is
// late now and then; what agents do only when they look at all again, every 10 s, is
// late each time.
func soon(t *testing.T, took []time.Duration) {
	t.Helper()
	if slices.Min(took) > 2*time.Second {
		t.Errorf("no change was enforced within 2 s: %s", took)
	}
}

// A policy, its topology's ceilings, and their end, in place.
func TestLimitsFollowPolicies(t *testing.T) {
	e.goesOn(t)
	const unlimited = 512 // pids
	e.enforced(t, "e2e-a", v1alpha1.Limits{Pids: unlimited})
	remove := func(ctx context.Context) error {
		_, err := e.Kubectl(ctx, "", "delete", "isolationpolicy", "-n", "e2e-a", "--all", "--wait=true")
		return err
	}
	ceilings := func(ctx context.Context, limits string) error {
		_, err := e.Kubectl(ctx, "", "patch", "meshtopology", "e2e", "--type=merge", "--patch", `{"spec":{"limits":`+limits+`}}`)
		return err
	}
	t.Cleanup(func() {
		for _, err := range []error{remove(context.Background()), ceilings(context.Background(), "null")} {
			if err != nil {
				t.Error(err)
			}
		}
	})
	if err := e.Apply(t.Context(), `
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: IsolationPolicy
metadata: {name: limits, namespace: e2e-a}
spec:
  cpu: {limit: 900m}
  memory: {max: 300Mi}
  pids: 200
  connections: {concurrent: 500, newPerSecond: 100, newDirectPerSecond: 900}
  bandwidth: {egress: 20Mi, ingress: 30Mi}
`); err != nil {
		t.Fatal(err)
	}
	want := v1alpha1.Limits{CPUMillis: 900, MemoryMax: 300 << 20, Pids: 200, Connections: 500, NewConnections: 100, NewDirect: 900, Egress: 20 << 20, Ingress: 30 << 20}
	took := []time.Duration{e.enforced(t, "e2e-a", want)}
	policy := func(accepted, ready string) {
		t.Helper()
		var p v1alpha1.IsolationPolicy
		err := harness.Wait(t.Context(), patience, 50*time.Millisecond, "the policy's status", func(ctx context.Context) error {
			if err := e.Client.Get(ctx, client.ObjectKey{Namespace: "e2e-a", Name: "limits"}, &p); err != nil {
				return err
			}
			a, r := meta.FindStatusCondition(p.Status.Conditions, v1alpha1.ConditionAccepted), meta.FindStatusCondition(p.Status.Conditions, v1alpha1.ConditionReady)
			if a == nil || r == nil || a.Reason != accepted || r.Reason != ready || len(p.Status.Nodes) != len(e.nodes) {
				return fmt.Errorf("%+v", p.Status)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	policy("Accepted", "Enforced")
	if err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "what each node says of the policy", func(ctx context.Context) error {
		var p v1alpha1.IsolationPolicy
		if err := e.Client.Get(ctx, client.ObjectKey{Namespace: "e2e-a", Name: "limits"}, &p); err != nil {
			return err
		}
		for _, n := range p.Status.Nodes {
			if n.Tenant != "e2e-a" || n.Limits.Connections != 500 || n.Hits == nil || n.Hits.Since == nil {
				return fmt.Errorf("on %s is told %+v", n.Node, n)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	mustCall(t, e.pod(webA, 0), e.pod(webA, 0).IPv4, "tcp", hostPort(e.pod(webB, 1).IPv4, app.GreetPort))

	if err := ceilings(t.Context(), `{"ceilings":{"cpu":{"limit":"500m"},"connections":{"concurrent":200}},"node":{"pids":4000}}`); err != nil {
		t.Fatal(err)
	}
	want.CPUMillis, want.Connections = 500, 200
	took = append(took, e.enforced(t, "e2e-a", want))
	policy("Capped", "Enforced")
	if err := harness.Wait(t.Context(), patience, 50*time.Millisecond, "the node's bound", func(ctx context.Context) error {
		var np v1alpha1.NodeProxy
		if err := e.Client.Get(ctx, client.ObjectKey{Name: e.nodes[0]}, &np); err != nil {
			return err
		}
		if np.Status.Limits.Pids != 4000 {
			return fmt.Errorf("%+v %q", np.Status.Limits, np.Status.Unenforced)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	for _, want.Pids = range []int64{210, 220, 230} {
		if _, err := e.Kubectl(t.Context(), "", "patch", "isolationpolicy", "limits", "-n", "e2e-a", "--type=merge", "--patch", fmt.Sprintf(`{"spec":{"pids":%d}}`, want.Pids)); err != nil {
			t.Fatal(err)
		}
		took = append(took, e.enforced(t, "e2e-a", want))
	}
	if err := ceilings(t.Context(), "null"); err != nil {
		t.Fatal(err)
	}
	if err := remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	soon(t, append(took, e.enforced(t, "e2e-a", v1alpha1.Limits{Pids: unlimited})))
}

// TestLimitsAboveTheNode: limits that no node has bound nothing, and say so; a policy
// that is deleted gives the topology's defaults back. Both in place.
func TestLimitsAboveTheNode(t *testing.T) {
	e.goesOn(t)
	limits := func(ctx context.Context, limits string) error {
		_, err := e.Kubectl(ctx, "", "patch", "meshtopology", "e2e", "--type=merge", "--patch", `{"spec":{"limits":`+limits+`}}`)
		return err
	}
	t.Cleanup(func() {
		if err := limits(context.Background(), "null"); err != nil {
			t.Error(err)
		}
	})
	e.removeIn(t, "e2e-a", "isolationpolicy", "above")
	if err := limits(t.Context(), `{"defaults":{"memory":{"max":"400Mi"},"pids":300},"ceilings":{"memory":{"max":"1Ti"},"cpu":{"limit":"1024"},"pids":32768}}`); err != nil {
		t.Fatal(err)
	}
	defaults := v1alpha1.Limits{CPUMillis: 1024_000, MemoryMax: 400 << 20, Pids: 300}
	took := []time.Duration{e.enforced(t, "e2e-a", defaults)}
	if err := e.Apply(t.Context(), `
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: IsolationPolicy
metadata: {name: above, namespace: e2e-a}
spec: {cpu: {limit: 1000}, memory: {max: 900Gi}, pids: 32768}
`); err != nil {
		t.Fatal(err)
	}
	took = append(took, e.enforced(t, "e2e-a", v1alpha1.Limits{CPUMillis: 1000_000, MemoryMax: 900 << 30, Pids: 32768}))
	err := harness.Wait(t.Context(), patience, 50*time.Millisecond, "the policy's owner to be told", func(ctx context.Context) error {
		var p v1alpha1.IsolationPolicy
		if err := e.Client.Get(ctx, client.ObjectKey{Namespace: "e2e-a", Name: "above"}, &p); err != nil {
			return err
		}
		r := meta.FindStatusCondition(p.Status.Conditions, v1alpha1.ConditionReady)
		if r == nil || r.Reason != "PartlyEnforced" {
			return fmt.Errorf("%+v", p.Status)
		}
		for _, says := range []string{"cpu limit 1000000m: the node has only", "memory max 966367641600: the node has only"} {
			if !strings.Contains(r.Message, says) {
				return fmt.Errorf("%q doesn't say %q", r.Message, says)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for _, from := range []harness.Pod{e.pod(webA, 0), e.pod(webB, 0)} {
		mustCall(t, from, from.IPv4, "tcp", hostPort(e.pod(webA, 1).IPv4, app.GreetPort))
	}
	if _, err := e.Kubectl(t.Context(), "", "delete", "isolationpolicy", "above", "--namespace=e2e-a", "--wait=true"); err != nil {
		t.Fatal(err)
	}
	soon(t, append(took, e.enforced(t, "e2e-a", defaults)))
}
