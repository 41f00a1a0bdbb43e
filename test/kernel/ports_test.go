package kernel

import (
	"errors"
	"fmt"
	"os"
	"strings"
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
		// Linux takes only the even ones while it can, each up to 16 after the last.
		delivered, outbound, ports = 20000, 30000, 1000
		// One in 20 of those that a proxy tries. It has four attempts, and those that stay
		// are further from each other than two of them: were they in a row, one connection
		// in some thousand would meet four.
		held, apart = 25, 24
		// More than all connections that begin at a time can lose, SYN by SYN, before the first
		// of them has failed: 12, with three SYNs each until Envoy gives up.
		enough = 60
	)
	n := l.Node1
	narrow := func(ns *lab.Namespace, first, last int) {
		ns.Do(t, func() {
			lab.Sysctl(t, fmt.Sprintf("ipv4/ip_local_port_range=%d %d", first, last), "ipv4/tcp_tw_reuse=1")
		})
	}
	// reserve leaves a port in apart from first on, until restore.
	reserve := func(ns *lab.Namespace, first int) (restore func()) {
		const reserved = "ipv4/ip_local_reserved_ports"
		var others []string
		for p := first; p < first+ports; p += apart {
			others = append(others, fmt.Sprintf("%d-%d", p+1, p+apart-1))
		}
		var before []byte
		ns.Do(t, func() {
			var err error
			before, err = os.ReadFile("/proc/sys/net/" + reserved)
			lab.Check(t, err)
			lab.Sysctl(t, reserved+"="+strings.Join(others, ","))
		})
		return func() { ns.Do(t, func() { lab.Sysctl(t, reserved+"="+string(before)) }) }
	}
	for _, h := range []*lab.Host{l.A1, l.A2, l.Outside} {
		l.ServeGreeting(h, port)
	}
	type way struct {
		what  string
		from  *lab.Host
		to    lab.Pair
		first int // of the ports that it has
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
		chooses := []*lab.Namespace{former}
		if w.own {
			chooses = append(chooses, w.from.Namespace)
		}
		var restore []func()
		for _, ns := range chooses {
			narrow(ns, w.first, w.first+ports-1)
			restore = append(restore, reserve(ns, w.first))
		}
		to := lab.At(w.to.V4, port).String()
		stay = append(stay, running{w, w.from.BeginUntil(t, "hold", fmt.Sprint("--connections=", held), "--interval=500ms", "--timeout=20s", to)})
		pod := l.A1
		if w.to == l.A2.Pair {
			pod = l.A2
		}
		want := held
		for _, s := range stay[:len(stay)-1] {
			if w.own && s.to == pod.Pair {
				want += held
			}
		}
		lab.Eventually(t, "connections "+w.what, func() error {
			flows, err := bpf.EstablishedFlows(pod.Path, pod.V4)
			count := 0
			for _, f := range flows {
				if f.Pod.Port() == port || f.Peer.Port() == port {
					count++
				}
			}
			if err == nil && count != want {
				err = fmt.Errorf("there are %d, want %d", count, want)
			}
			return err
		})
		for _, f := range restore {
			f()
		}
	}
	// What it opens from now on isn't what this is about.
	narrow(former, 1024, 65535)

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
		narrow(other, delivered, delivered+ports-1)
		if has := n.Tenant("_node"); !has.Ready || len(has.Pods) != want {
			return fmt.Errorf("%s, pods %+v", has.Reason, has.Pods)
		}
		return nil
	})
	// One or two in a second do, on a machine that opens as many connections as it is asked to.
	lab.EventuallyWithin(t, 3*lab.Patience, "ports that meet", func() error {
		narrow(other, delivered, delivered+ports-1) // the agent sets them back
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
