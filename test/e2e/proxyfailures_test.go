package e2e

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// tenantProxy is what the owner of a tenant sees.
func (e *env) tenantProxy(ctx context.Context, tenant string) (p v1alpha1.TenantProxy, stable metav1.Condition, err error) {
	if err := e.Client.Get(ctx, client.ObjectKey{Namespace: tenant, Name: tenant}, &p); err != nil {
		return p, stable, err
	}
	c := meta.FindStatusCondition(p.Status.Conditions, v1alpha1.ConditionStable)
	if c == nil {
		return p, stable, fmt.Errorf("%s has the conditions %+v", tenant, p.Status.Conditions)
	}
	return p, *c, nil
}

// failureOn is a tenant's last failure on a node, nil if there was none.
func failureOn(p v1alpha1.TenantProxy, node string) *v1alpha1.ProxyFailure {
	for _, n := range p.Status.Nodes {
		if n.Node == node {
			return n.Failure
		}
	}
	return nil
}

// warnings counts how often a tenant was warned for a reason.
func (e *env) warnings(ctx context.Context, tenant, reason string) (n int, last string, err error) {
	list, err := e.Kube.CoreV1().Events(tenant).List(ctx, metav1.ListOptions{})
	if err != nil {
		return 0, "", err
	}
	for _, ev := range list.Items {
		if o := ev.InvolvedObject; ev.Reason == reason && ev.Type == corev1.EventTypeWarning && o.Kind == "TenantProxy" && o.Name == tenant {
			n += max(1, int(ev.Count))
			if ev.Series != nil {
				n += int(ev.Series.Count)
			}
			last = ev.Message
		}
	}
	return n, last, nil
}

// isToldOf waits until the owner of e2e-a is told why its proxy ended on a node, by
// condition, status and event, and sees that nobody is of e2e-b's.
func (e *env) isToldOf(t *testing.T, node, cause string, warnedBefore int, says ...string) {
	t.Helper()
	said := func(by string) error {
		for _, text := range append(says, node) {
			if !strings.Contains(by, text) {
				return fmt.Errorf("%q isn't said by %q", text, by)
			}
		}
		return nil
	}
	inCondition := false // which may be over before the event is there
	err := harness.Wait(t.Context(), patience, 100*time.Millisecond, "the owner to be told of "+cause, func(ctx context.Context) error {
		if !inCondition {
			p, stable, err := e.tenantProxy(ctx, "e2e-a")
			if err != nil {
				return err
			}
			f := failureOn(p, node)
			if stable.Status != metav1.ConditionFalse || stable.Reason != cause || f == nil || f.Cause != cause {
				return fmt.Errorf("%+v, %+v", stable, f)
			}
			if err := said(stable.Message); err != nil {
				return err
			}
			inCondition = true
		}
		n, event, err := e.warnings(ctx, "e2e-a", cause)
		if err == nil && n <= warnedBefore {
			err = fmt.Errorf("%d warnings as before", n)
		}
		if err == nil {
			err = said(event)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, stable, err := e.tenantProxy(t.Context(), "e2e-b"); err != nil || stable.Status != metav1.ConditionTrue {
		t.Errorf("the other tenant is told %+v, %v", stable, err)
	}
	if n, event, err := e.warnings(t.Context(), "e2e-b", cause); err != nil || n > 0 && strings.Contains(event, "e2e-a") {
		t.Errorf("the other tenant is warned: %q, %v", event, err)
	}
}

// recovers waits until a failure is over, and still known.
func (e *env) recovers(t *testing.T, node, cause string) {
	t.Helper()
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "the proxy to have recovered", func(ctx context.Context) error {
		p, stable, err := e.tenantProxy(ctx, "e2e-a")
		if err != nil {
			return err
		}
		if f := failureOn(p, node); stable.Status != metav1.ConditionTrue || f == nil || !f.Recovered || f.Cause != cause {
			return fmt.Errorf("%+v, %+v", stable, f)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// others are the processes of all tenants but e2e-a's on a node.
func (e *env) others(t *testing.T, node string) map[string]string {
	t.Helper()
	all := e.processes(context.WithoutCancel(t.Context()), t)
	maps.DeleteFunc(all, func(process, _ string) bool { return strings.HasPrefix(process, node+" e2e-a ") })
	return all
}

func (e *env) othersGoOn(t *testing.T, node string) {
	t.Helper()
	before := e.others(t, node)
	t.Cleanup(func() {
		if after := e.others(t, node); !maps.Equal(before, after) {
			t.Errorf("other proxies were %v, are %v", before, after)
		}
	})
}

// TestOwnerIsToldOfEnds ends a tenant's Envoy, and then again and again: its owner reads
// why, with the last that Envoy wrote, and nobody else is concerned. Other signals than
// this one end nothing, for Envoy is the init of its namespace; its own crashes are
// isolation's matter.
func TestOwnerIsToldOfEnds(t *testing.T) {
	e.roots.loadEnded(t)
	const cause = "Killed"
	node, tenant := e.nodes[0], "e2e-a"
	e.othersGoOn(t, node)
	var last harness.Generation // that was killed
	kill := func() {
		t.Helper()
		var now harness.Generation
		began := time.Now()
		err := harness.Wait(t.Context(), patience, 50*time.Millisecond, "the proxy to serve", func(ctx context.Context) error {
			p, err := e.Proxy(ctx, node, tenant)
			if err != nil {
				return err
			}
			if g := p.Generations; len(g) != 1 || !g[0].Serving || g[0].PID == last.PID {
				return fmt.Errorf("%+v", p.Generations)
			}
			now = p.Generations[0]
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if last.PID != 0 {
			t.Logf("it is seen to serve again after %s, with %d restarts", time.Since(began).Round(10*time.Millisecond), now.Restarts)
			if now.Restarts <= last.Restarts {
				t.Errorf("%d restarts, before its end %d", now.Restarts, last.Restarts)
			}
		}
		if _, err := e.AgentExec(t.Context(), node, "kill", "--signal", "KILL", strconv.Itoa(now.PID)); err != nil {
			t.Fatal(err)
		}
		last = now
	}
	warned := func() (n int, event string) {
		t.Helper()
		n, event, err := e.warnings(t.Context(), tenant, cause)
		if err != nil {
			t.Fatal(err)
		}
		return n, event
	}

	since := time.Now().Add(-time.Second)
	mustCall(t, e.pod(webB, 0), e.pod(webB, 0).IPv4, "tcp", hostPort(e.pod(webA, 0).IPv4, app.GreetPort))
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "the proxy to write of it", func(ctx context.Context) error {
		entries, err := e.AccessLog(ctx, node, tenant)
		if err == nil && !slices.ContainsFunc(entries, func(a harness.Access) bool { return a.Time.After(since) }) {
			err = fmt.Errorf("%d lines, none of them new", len(entries))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	before, _ := warned()
	kill()
	e.isToldOf(t, node, cause, before, "killed by SIGKILL", "no other tenant is concerned", "last it wrote: ")
	p, _, err := e.tenantProxy(t.Context(), tenant)
	if err != nil {
		t.Fatal(err)
	}
	before, event := warned()
	if f := failureOn(p, node); f == nil || f.Log == "" || !strings.Contains(event, f.Log) {
		t.Errorf("%+v, told as %q", f, event)
	} else {
		t.Logf("told: %s", event)
	}
	e.recovers(t, node, cause)

	for range 3 {
		kill()
	}
	// Events of one reason are one that is counted, with the text of the first.
	e.isToldOf(t, node, cause, before, "killed by SIGKILL", "no other tenant is concerned")
	e.recovers(t, node, cause)
	for _, from := range []harness.Pod{e.pod(webA, 0), e.pod(webB, 0)} {
		mustCall(t, from, from.IPv4, "tcp", hostPort(e.pod(webA, 1).IPv4, app.GreetPort))
	}
}

// TestOwnerIsToldOfOutOfMemory has a tenant hold more connections than its memory
// allows: its owner reads it in the TenantProxy and in the policy that set the bound, and
// gets the topology's bound back when the policy goes, without another start.
func TestOwnerIsToldOfOutOfMemory(t *testing.T) {
	e.roots.loadEnded(t)
	const most, greedy = 80 << 20, 6000 // each takes about 20 KiB
	node, tenant := e.nodes[0], "e2e-a"
	e.othersGoOn(t, node)
	warned, _, err := e.warnings(t.Context(), tenant, "OutOfMemory")
	if err != nil {
		t.Fatal(err)
	}
	e.removeIn(t, tenant, "isolationpolicy", "small")
	if err := e.Apply(t.Context(), "apiVersion: mesh.bulkhead.dev/v1alpha1\nkind: IsolationPolicy\nmetadata: {name: small, namespace: e2e-a}\nspec: {memory: {max: 80Mi}}\n"); err != nil {
		t.Fatal(err)
	}
	e.enforced(t, tenant, v1alpha1.Limits{MemoryMax: most, Pids: 512})
	before := e.policyNode(t, "small", node)

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, err := e.Load(ctx, e.pod(webA, 0), make(chan struct{}), "hold", fmt.Sprint("--connections=", greedy), "--interval=5s", "--duration=60s", "--timeout=10s",
			hostPort(e.pod(webB, 1).IPv4, app.GreetPort))
		t.Logf("the greedy tenant's connections end with %v", err)
	}()
	t.Cleanup(func() { cancel(); <-ended })
	e.isToldOf(t, node, "OutOfMemory", warned, "out of memory", "no other tenant is concerned")
	cancel()
	<-ended
	err = harness.Wait(t.Context(), patience, 200*time.Millisecond, "the policy's owner to be told", func(ctx context.Context) error {
		n, err := e.policyNodeNow(ctx, "small", node)
		if err != nil {
			return err
		}
		if n.Limits.MemoryMax != most || n.Hits == nil || n.Hits.OOMKills <= before.Hits.OOMKills || n.Hits.Last == nil || n.Hits.Last.Before(n.Hits.Since) {
			return fmt.Errorf("%+v, hits %+v", n, n.Hits)
		}
		t.Logf("hits: %+v", *n.Hits)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	e.recovers(t, node, "OutOfMemory")

	e.goesOn(t)
	if _, err := e.Kubectl(t.Context(), "", "delete", "isolationpolicy", "small", "--namespace="+tenant, "--wait=true"); err != nil {
		t.Fatal(err)
	}
	e.enforced(t, tenant, v1alpha1.Limits{Pids: 512})
	for _, from := range []harness.Pod{e.pod(webA, 0), e.pod(webB, 0)} {
		mustCall(t, from, from.IPv4, "tcp", hostPort(e.pod(webA, 1).IPv4, app.GreetPort))
	}
}
