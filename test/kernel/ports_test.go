package kernel

import (
	"errors"
	"fmt"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// Pods and proxies choose their ports without each other. Where they have few to choose from,
// what begins after pods have moved meets the connections that stayed all the time: none
// of both fails, and none waits for a proxy to give up (decision 31).
func TestPortsMeet(t *testing.T) {
	// What Netfilter does about a pod's own ports isn't the same.
	testPortsMeet(t, lab.NewWith(t, lab.Options{Redirection: v1alpha1.RedirectionEBPF}))
}

func testPortsMeet(t *testing.T, l *lab.Lab) {
	const (
		port = 8092
		// One in 20 of those that a proxy tries: Linux takes only the even ones while it can,
		// and steps over some. Four attempts all fail once in 100,000.
		delivered, outbound = "20000 20999", "30000 30999"
		held, meanwhile     = 25, 75
		// More than all connections that begin at a time can lose, SYN by SYN, before the first
		// of them has failed: 12, with three SYNs each until Envoy gives up.
		enough = 60
	)
	n := l.Node1
	narrow := func(ns *lab.Namespace, ports string) {
		ns.Do(t, func() { lab.Sysctl(t, "ipv4/ip_local_port_range="+ports, "ipv4/tcp_tw_reuse=1") })
	}
	for _, h := range []*lab.Host{l.A1, l.A2, l.Outside} {
		l.ServeGreeting(h, port)
	}
	type way struct {
		what  string
		from  *lab.Host
		to    lab.Pair
		ports string
		// The pod and its tenant have them from the same ports, on either side of the proxy.
		own bool
	}
	type running struct {
		way
		stop func(any)
	}
	ways := []way{
		{"from another node", l.B2, l.A1.Pair, delivered, false},
		{"from outside", l.Outside, l.A2.Pair, delivered, false},
	}
	if n.Redirection == v1alpha1.RedirectionEBPF {
		ways = append(ways, way{"to outside", l.A1, l.Outside.Pair, outbound, true})
	}
	former := n.Proxy("team-a")
	var stay, begin []running
	for _, w := range ways {
		narrow(former, w.ports)
		if w.own {
			narrow(w.from.Namespace, w.ports)
		}
		to := lab.At(w.to.V4, port).String()
		// Others between them, so that those that stay aren't in a row.
		others := w.from.BeginUntil(t, "hold", fmt.Sprint("--connections=", meanwhile), "--interval=1s", to)
		stay = append(stay, running{w, w.from.BeginUntil(t, "hold", fmt.Sprint("--connections=", held), "--interval=500ms", "--timeout=20s", to)})
		pod := l.A1
		if w.to == l.A2.Pair {
			pod = l.A2
		}
		open := func(want func(int) bool) func() error {
			return func() error {
				flows, err := bpf.EstablishedFlows(pod.Path, pod.V4)
				count := 0
				for _, f := range flows {
					if f.Pod.Port() == port || f.Peer.Port() == port {
						count++
					}
				}
				if err == nil && !want(count) {
					err = fmt.Errorf("there are %d", count)
				}
				return err
			}
		}
		before := 0
		for _, s := range stay[:len(stay)-1] {
			if w.own && s.to == pod.Pair {
				before += held
			}
		}
		lab.Eventually(t, "connections "+w.what, open(func(n int) bool { return n == before+held+meanwhile }))
		var result app.RunResult
		others(&result)
		lab.Eventually(t, "the end of some "+w.what, open(func(n int) bool { return n == before+held }))
	}
	// What it opens from now on isn't what this is about.
	narrow(former, "1024 65535")

	want := 0
	for _, p := range n.Pods {
		if p.Identity.Namespace == "team-a" {
			p.Tenant = model.Tenant{Scope: model.ScopeNode}
			want++
		}
	}
	n.WritePlan()
	lab.Eventually(t, "the other tenant's proxy", func() error {
		i, err := n.Inspect()
		for _, tenant := range i.Tenants {
			if tenant.Name == "_node" && lab.First(tenant).PID != 0 {
				return nil
			}
		}
		return errors.Join(err, errors.New("there is none"))
	})
	other := n.Proxy("_node")
	for _, w := range ways {
		// Less than Envoy waits for a connection.
		begin = append(begin, running{w, w.from.BeginUntil(t, "load", "--protocol=tcp", "--connections=4", "--rate=15", "--new-connection-ratio=1", "--timeout=4900ms", lab.At(w.to.V4, port).String())})
	}
	l.Publish()
	n.WritePlan()
	lab.Eventually(t, "the other tenant", func() error {
		narrow(other, delivered)
		if has := n.Tenant("_node"); !has.Ready || len(has.Pods) != want {
			return fmt.Errorf("%s, pods %+v", has.Reason, has.Pods)
		}
		return nil
	})
	lab.Eventually(t, "ports that meet", func() error {
		narrow(other, delivered) // the agent sets them back
		if drops := n.Tenant("_node").Drops; drops["portsTaken"] < enough {
			return fmt.Errorf("%v, want %d", drops, enough)
		}
		return nil
	})
	// It would have waited for those.
	if drops := n.Tenant("_node").Drops; drops["foreign"] > 0 {
		t.Errorf("dropped %v", drops)
	}
	for _, r := range begin {
		var result app.RunResult
		if r.stop(&result); !result.OK {
			t.Errorf("%s: %d of %d new connections failed, first %+v, last %+v", r.what, result.Failures.Total, result.Connections, result.Failures.First, result.Failures.Last)
		}
		t.Logf("%s: %d new connections", r.what, result.Connections)
	}
	for _, r := range stay {
		var result app.RunResult
		if r.stop(&result); result.Failures.Total > 0 || result.Held != held {
			t.Errorf("%s: %d of %d connections held, %d failures, first %+v", r.what, result.Held, held, result.Failures.Total, result.Failures.First)
		}
	}
	t.Logf("dropped %v", n.Tenant("_node").Drops)
}
