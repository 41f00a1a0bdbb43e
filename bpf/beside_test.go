package bpf

import (
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Of a connection in the clear, what one end sends may pass like the node's own: it lasts as
// long as others, and its end is seen.
func TestClearToAndFromTheNode(t *testing.T) {
	m := newMesh(t)
	serve(t, m.a.namespace, 8081)
	serve(t, nil, 8082)
	// A process of the node answers for a service, as where kube-proxy leads to a hostNetwork
	// pod: the address isn't the node's.
	service := addresses("198.51.100.9", "2001:db8:9::9")
	veth(t, "bhtservice", newNamespace(t))
	address(t, "bhtservice", service, 32, 128)
	// Masqueraded traffic of a NodePort has the node's address, and isn't the node's.
	check(t, m.d.SetNodeAddresses(append(nodeOwn(), remoteAddresses.both()...)))
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 8082}, {Inbound: true, Port: 8081}}))
	eachFamily(t, func(t *testing.T, family int) {
		m.t = t
		pod, remote := m.a.of(family), remoteAddresses.of(family)
		var held []heldFlow
		m.hold(&held, "answered by the node", m.a.namespace, at(pod, 42000), at(service.of(family), 8082), "app "+pod.String())
		m.hold(&held, "masqueraded", m.remote, at(remote, 42001), at(pod, 8081), "app "+remote.String())
		goOn(t, "open", held)
		ports := map[string]uint16{"answered by the node": 42000, "masqueraded": 8081}
		for name, port := range ports {
			s := m.flowAt(port)
			if s.Seen == 0 {
				t.Fatalf("%s: it isn't written down", name)
			}
			if over(s, openedLinger, time.Hour) {
				t.Errorf("%s: it counts as never answered: %+v", name, s)
			}
		}
		for _, c := range held {
			check(t, c.Close())
		}
		for name, port := range ports {
			for deadline := time.Now().Add(patience); m.flowAt(port).Seen != 0; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%s: both ends have closed: %+v", name, m.flowAt(port))
				}
			}
		}
	})
}
