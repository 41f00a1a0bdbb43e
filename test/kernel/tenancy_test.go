package kernel

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// The pods of a node get other tenants while they talk, and get them back: 1,000
// connections go on to their ends in the proxies that they began in, and of those
// that begin all the time, in each direction, none fails. Those have other ports of
// the server than the held ones, whose ports the next proxy could take again (decision 31).
func TestTenantsChange(t *testing.T) { eachRedirection(t, testTenantsChange) }

func testTenantsChange(t *testing.T, l *lab.Lab) {
	const rate, heldPort = 25, 8092
	n := l.Node1
	// A request that is in a tunnel and not at its pod yet isn't a connection that a proxy
	// waits for, and on a busy machine takes seconds. A tunnel that nobody has used since may
	// bring one when the time is over: later than all that is tried here.
	n.Args = append(n.Args, "--linger", "20s")
	n.Kill()
	n.Start()
	n.WaitReady()
	for _, h := range []*lab.Host{l.A1, l.A2, l.B1, l.B2, l.Outside} {
		l.ServeGreeting(h, heldPort)
	}
	type way struct {
		what string
		from *lab.Host
		to   lab.Pair
		// held connections; further ones begin at a rate.
		held int
	}
	type running struct {
		way
		stop func(any)
	}
	var held, begun []running
	for _, w := range []way{
		{"to a pod of the node", l.A1, l.B1.Pair, 300},
		{"from another node", l.B2, l.A1.Pair, 300},
		{"to another node", l.A2, l.B2.Pair, 200},
		{"from outside", l.Outside, l.A2.Pair, 100},
		{"to outside", l.B1, l.Outside.Pair, 100},
	} {
		held = append(held, running{w, w.from.BeginUntil(t, "hold", fmt.Sprint("--connections=", w.held), "--interval=500ms", "--timeout=20s", lab.At(w.to.V4, heldPort).String())})
		begun = append(begun, running{w, w.from.BeginUntil(t, "load", "--protocol=http", "--connections=4", fmt.Sprint("--rate=", rate), "--new-connection-ratio=1",
			lab.At(w.to.V4, app.HTTPPort).String())})
	}
	// All that are held have begun: those between a1 and b1 are at both.
	for pod, want := range map[*lab.Host]int{l.A1: 600, l.A2: 300, l.B1: 400} {
		lab.Eventually(t, "the connections of "+pod.Name, func() error {
			open, err := bpf.EstablishedFlows(pod.Path, pod.V4)
			if err == nil && len(open) < want {
				err = fmt.Errorf("%d of %d", len(open), want)
			}
			return err
		})
	}
	for _, rule := range []struct {
		name   string
		tenant func(model.Identity) model.Tenant
	}{
		{"Node for one namespace", func(id model.Identity) model.Tenant {
			if id.Namespace == "team-b" {
				return model.Tenant{Scope: model.ScopeNode}
			}
			return model.NamespaceTenant(id.Namespace)
		}},
		{"Node", func(model.Identity) model.Tenant { return model.Tenant{Scope: model.ScopeNode} }},
		{"ServiceAccount", func(id model.Identity) model.Tenant {
			return model.Tenant{Scope: model.ScopeServiceAccount, Namespace: id.Namespace, Name: id.ServiceAccount}
		}},
		{"Namespace", func(id model.Identity) model.Tenant { return model.NamespaceTenant(id.Namespace) }},
	} {
		want := map[string]int{}
		for _, p := range n.Pods {
			p.Tenant = rule.tenant(p.Identity)
			want[p.Tenant.String()]++
		}
		if rule.name == "Node" {
			// The proxy is there, and hears of these pods later than their agent.
			n.WritePlan()
			lab.Eventually(t, "the plan", func() error {
				if leaving := n.Tenant("team-a"); !strings.Contains(leaving.Reason, "wait there for the proxy") {
					return errors.New(leaving.Reason)
				}
				return nil
			})
			for _, f := range flows(l) {
				f.check(t, 4)
			}
			if shared := n.Tenant("_node"); len(shared.Pods) != 1 {
				t.Errorf("a proxy that doesn't serve them has got the pods %+v", shared.Pods)
			}
		}
		l.Publish()
		n.WritePlan()
		lab.Eventually(t, "tenants of "+rule.name, func() error {
			i, err := n.Inspect()
			if err != nil {
				return err
			}
			ready := 0
			for _, tenant := range i.Tenants {
				if tenant.Ready && len(tenant.Pods) == want[tenant.Name] {
					ready += len(tenant.Pods)
				}
			}
			if ready != len(n.Pods) {
				return fmt.Errorf("%d pods are where they should be: %+v", ready, i.Tenants)
			}
			return nil
		})
		if rule.name == "ServiceAccount" {
			lab.Eventually(t, "what a tenant without pods waits for", func() error {
				if leaving := n.Tenant("team-a"); !strings.Contains(leaving.Reason, "connections that began there") {
					return errors.New(leaving.Reason)
				}
				return nil
			})
		}
		for _, f := range flows(l) {
			f.check(t, 4)
			f.check(t, 6)
			// Two namespaces may share a proxy: each keeps its own identity. Each tunnel to
			// the former proxy may bring one more to that.
			if f.mesh && rule.name != "Node for one namespace" {
				lab.Eventually(t, f.name+" in the log of its server's proxy", func() error {
					f.check(t, 4)
					return f.identities(4)
				})
			}
		}
	}
	for _, r := range held {
		var result app.RunResult
		if r.stop(&result); result.Failures.Total > 0 || result.Held != r.held {
			t.Errorf("%s: %d of %d connections held, %d failures, first %+v", r.what, result.Held, r.held, result.Failures.Total, result.Failures.First)
		}
	}
	for _, r := range begun {
		var result app.RunResult
		r.stop(&result)
		if least := rate * int(result.Ended.Sub(result.Started).Seconds()) / 4; !result.OK || result.Connections < max(least, 1) {
			t.Errorf("%s: %d of %d new connections failed, first %+v, last %+v", r.what, result.Failures.Total, result.Connections, result.Failures.First, result.Failures.Last)
		}
		t.Logf("%s: %d new connections, p99 %.0f ms, longest %.0f", r.what, result.Connections, result.Latency.P99, result.Latency.Max)
	}
	lab.Eventually(t, "the end of the former tenants", func() error {
		i, err := n.Inspect()
		if err == nil && len(i.Tenants) != 2 {
			err = fmt.Errorf("there are %d", len(i.Tenants))
		}
		return err
	})
}
