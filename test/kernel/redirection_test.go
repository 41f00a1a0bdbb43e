package kernel

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A node that redirects in another way from now on leaves nothing of the former one,
// and its connections go on.
func TestRedirectionChanges(t *testing.T) {
	l := lab.New(t)
	const connections = 100
	stop := l.A1.BeginUntil(t, "hold", fmt.Sprint("--connections=", connections), "--interval=200ms", "--timeout=20s", lab.At(l.B2.V4, app.GreetPort).String())
	waitConnections(t, l.Node1, "team-a", connections)
	for _, r := range []v1alpha1.Redirection{v1alpha1.RedirectionNetfilter, v1alpha1.RedirectionEBPF, v1alpha1.RedirectionNetfilter} {
		l.Node1.Redirection = r
		if r == v1alpha1.RedirectionNetfilter {
			l.Node1.WritePlan()
		} else {
			// Also by an agent that wasn't there when it was decided.
			l.Node1.Kill()
			l.Node1.Start()
		}
		lab.Eventually(t, "the redirection by "+string(r), func() error {
			i, err := l.Node1.Inspect()
			if err != nil {
				return err
			}
			if i.Redirection != string(r) {
				return fmt.Errorf("it is by %s: %s", i.Redirection, i.Problem)
			}
			return onlyRedirection(t, l.Node1)
		})
		l.Node1.WaitReady()
		for _, f := range flows(l) {
			f.check(t, 4)
			f.check(t, 6)
		}
	}
	var r app.RunResult
	stop(&r)
	if !r.OK || r.Held != connections {
		t.Errorf("%d of %d connections held, failures %+v", r.Held, connections, r.Failures)
	}
}

// Tenants that end with the redirection that led to them are removed all the same.
func TestRedirectionAndTenantsChange(t *testing.T) {
	l := lab.NewWith(t, lab.Options{Redirection: v1alpha1.RedirectionNetfilter})
	n := l.Node1
	for _, r := range []v1alpha1.Redirection{v1alpha1.RedirectionEBPF, v1alpha1.RedirectionNetfilter} {
		want := 2
		for _, p := range l.Pods {
			p.Tenant = model.NamespaceTenant(p.Identity.Namespace)
			if r == v1alpha1.RedirectionEBPF {
				p.Tenant, want = model.Tenant{Scope: model.ScopeNode}, 1
			}
		}
		n.Redirection = r
		l.Publish()
		n.WritePlan()
		l.Node2.WritePlan()
		lab.Eventually(t, "the tenants by "+string(r), func() error {
			i, err := n.Inspect()
			if err != nil || i.Redirection != string(r) || len(i.Tenants) != want {
				return fmt.Errorf("%d tenants by %s: %s, %v", len(i.Tenants), i.Redirection, i.Problem, err)
			}
			return nil
		})
		n.WaitReady()
		flow{from: l.B1, to: l.B2}.check(t, 4)
	}
}

// onlyRedirection fails while there is anything of the other way.
func onlyRedirection(t *testing.T, n *lab.Node) (err error) {
	if n.Redirection == v1alpha1.RedirectionNetfilter {
		if _, err := os.Stat(n.PinDir()); err == nil {
			return fmt.Errorf("%s is left", n.PinDir())
		}
		return nil
	}
	in := []*lab.Namespace{n.Namespace, n.Proxy("team-a"), n.Proxy("team-b")}
	for _, ns := range in {
		ns.Do(t, func() {
			tables, listErr := (&nftables.Conn{}).ListTables()
			if listErr != nil || len(tables) > 0 {
				err = fmt.Errorf("%d nftables are left, %v", len(tables), listErr)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// A firewall that is loaded anew removes all tables of nftables, and the agent makes
// its own again at once.
func TestRulesetFlushed(t *testing.T) {
	l := lab.NewWith(t, lab.Options{Redirection: v1alpha1.RedirectionNetfilter})
	var took []time.Duration
	for range 3 {
		l.Node1.Do(t, func() {
			c := &nftables.Conn{}
			c.FlushRuleset()
			lab.Check(t, c.Flush())
		})
		begun := time.Now()
		lab.Eventually(t, "the pods' return into the mesh", func() error {
			pods, tenants, err := steered(t, l.Node1)
			if err == nil && (pods != len(l.Node1.Planned) || tenants != 2) {
				err = fmt.Errorf("%d pods and %d tenants are steered", pods, tenants)
			}
			return err
		})
		took = append(took, time.Since(begun))
	}
	atOnce(t, "the pods' return", took)
	l.Node1.WaitReady()
	for _, f := range flows(l) {
		f.check(t, 4)
		f.check(t, 6)
	}
}
