package kernel

import (
	"fmt"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// The pods of a node get other tenants while they talk: what has begun goes on in
// the former proxies to its end, and what begins finds a proxy. The switch doesn't
// wait until the new proxy knows the pod, so a connection that begins right then may
// be closed, and the next isn't. With Netfilter that lasts for a second or two.
func TestTenantsChange(t *testing.T) {
	l := lab.New(t)
	const connections = 300
	n := l.Node1
	type result struct {
		what string
		wait func(any)
	}
	var held []result
	hold := func(what string, from *lab.Host, to lab.Pair) {
		held = append(held, result{what, from.Begin(t, "hold", "--connections", fmt.Sprint(connections), "--interval", "500ms", "--duration", "15s", lab.At(to.V4, app.GreetPort).String())})
	}
	hold("to a pod of the node", l.A1, l.B1.Pair)
	hold("from another node", l.B2, l.A1.Pair)
	hold("from outside", l.Outside, l.A2.Pair)
	// All of them have begun: those of a1 are both ways.
	for pod, want := range map[*lab.Host]int{l.A1: 2 * connections, l.A2: connections} {
		lab.Eventually(t, "the connections of "+pod.Name, func() error {
			open, err := bpf.EstablishedFlows(pod.Path, pod.V4)
			if err == nil && len(open) < want {
				err = fmt.Errorf("%d of %d", len(open), want)
			}
			return err
		})
	}
	shared := model.Tenant{Scope: model.ScopeNode}
	for _, p := range n.Pods {
		p.Tenant = shared
	}
	l.Publish()
	n.WritePlan()
	deadline := time.Now().Add(20 * time.Second)
	closed := 0
	for attempts, done := 0, false; !done; attempts++ {
		r := l.A1.Call(t, "tcp", "--timeout", "3s", lab.At(l.B1.V4, app.GreetPort).String())
		if closed++; r.OK {
			closed = 0
		} else if closed > 1 {
			t.Errorf("attempt %d of a new connection, after one that was closed: %+v", attempts, r.Failure)
		}
		i, err := n.Inspect()
		lab.Check(t, err)
		for _, tenant := range i.Tenants {
			done = done || tenant.Name == "_node" && tenant.Ready && len(tenant.Pods) == len(n.Pods)
		}
		if time.Now().After(deadline) {
			t.Fatalf("the pods don't move: %+v", i.Tenants)
		}
	}
	eachFamily(t, func(t *testing.T, family int) {
		for _, f := range flows(l) {
			t.Run(f.name, func(t *testing.T) { f.check(t, family) })
			// Two namespaces share a proxy: each keeps its own identity.
			if f.mesh {
				wantIdentities(t, f, family)
			}
		}
	})
	for _, h := range held {
		var r app.RunResult
		if h.wait(&r); r.Failures.Total > 0 || r.Held != connections {
			t.Errorf("%s: %d of %d connections held, %d failures, first %+v", h.what, r.Held, connections, r.Failures.Total, r.Failures.First)
		}
	}
	// One that was closed at the switch is written down for 130 s.
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		i, err := n.Inspect()
		lab.Check(t, err)
		if len(i.Tenants) == 1 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the former tenants don't end: %+v", i.Tenants)
		}
	}
}
