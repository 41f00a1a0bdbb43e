package kernel

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
)

// selfAddresses are who a pod seems to be to itself, through a service.
var selfAddresses = addresses("169.254.96.2", "fd69:8::2")

// flow is one kind of connection.
type flow struct {
	name     string
	from, to *host
	// dial is another address than to's.
	dial pair
	// sees is another client than from's address; anyone if it is the zero Addr.
	sees *pair
	// mesh says that it is tunnelled, with both identities proven.
	mesh bool
}

func (l *lab) flows() []flow {
	return []flow{
		{name: "same node, same tenant", from: l.a1, to: l.a2, mesh: true},
		{name: "same node, other tenant", from: l.a1, to: l.b1, mesh: true},
		{name: "other node, same tenant", from: l.a1, to: l.a3, mesh: true},
		{name: "other node, other tenant", from: l.a1, to: l.b2, mesh: true},
		{name: "other node, back", from: l.b2, to: l.a2, mesh: true},
		{name: "service", from: l.a1, to: l.b2, dial: l.b2.vip, mesh: true},
		{name: "service of the same node", from: l.b1, to: l.a1, dial: l.a1.vip, mesh: true},
		{name: "to outside", from: l.a1, to: l.outside},
		{name: "other node, to outside", from: l.b2, to: l.outside},
		{name: "from outside", from: l.outside, to: l.a1},
		{name: "from outside to the other node", from: l.outside, to: l.b2},
		{name: "node to its pod", from: l.node1.host, to: l.a1, sees: &pair{}}, // any of the node's addresses
		{name: "node to another's pod", from: l.node1.host, to: l.a3},
		{name: "pod to its node", from: l.a1, to: l.node1.host},
		{name: "pod to another node", from: l.a1, to: l.node2.host},
		{name: "self", from: l.a1, to: l.a1},
		{name: "self by a service", from: l.a1, to: l.a1, dial: l.a1.vip, sees: &selfAddresses, mesh: true},
	}
}

func (f flow) address(family int, port uint16) netip.AddrPort {
	if f.dial != (pair{}) {
		return at(f.dial.of(family), port)
	}
	return at(f.to.of(family), port)
}

// check makes the connection and looks at both ends of it.
func (f flow) check(t *testing.T, family int) {
	t.Helper()
	to := f.address(family, app.GreetPort)
	r := f.from.call(t, "tcp", to.String())
	if !r.OK {
		t.Fatalf("%+v", r.Failure)
	}
	if r.Remote != to.String() {
		t.Errorf("the client is connected to %s, dialled %s", r.Remote, to)
	}
	sees := f.from.pair
	if f.sees != nil {
		sees = *f.sees
	}
	if want := sees.of(family); want.IsValid() && r.Answer.ClientIP() != want.String() {
		t.Errorf("the server sees client %s, want %s", r.Answer.Client, want)
	}
	if want := at(f.to.of(family), app.GreetPort).String(); r.Answer.Local != want || r.Answer.Pod != f.to.name {
		t.Errorf("%s answered on %s, want %s on %s", r.Answer.Pod, r.Answer.Local, f.to.name, want)
	}
}

func eachFamily(t *testing.T, f func(t *testing.T, family int)) {
	for _, family := range []int{4, 6} {
		t.Run(fmt.Sprintf("IPv%d", family), func(t *testing.T) { f(t, family) })
	}
}

func TestFlows(t *testing.T) {
	l := newLab(t)
	eachFamily(t, func(t *testing.T, family int) {
		for _, f := range l.flows() {
			t.Run(f.name, func(t *testing.T) { f.check(t, family) })
		}
	})
	t.Run("identities", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, family int) {
			for _, f := range l.flows() {
				if f.mesh {
					l.wantIdentities(t, f, family)
				}
			}
		})
	})
}

// An agent with nothing to do does nothing.
func TestIdleAgent(t *testing.T) {
	l := newLab(t)
	const wait, most = 3 * time.Second, 300 * time.Millisecond
	for _, n := range []*node{l.node1, l.node2} {
		before := n.agentTime(t)
		time.Sleep(wait)
		if spent := n.agentTime(t) - before; spent > most {
			t.Errorf("the agent of %s used %s of CPU in %s", n.name, spent, wait)
		}
	}
}

// wantIdentities waits for the server's proxy to tell of the flow: the peer's
// certificate, its own, and the addresses.
func (l *lab) wantIdentities(t *testing.T, f flow, family int) {
	t.Helper()
	server := f.to.of(family)
	want := map[string]string{
		"bulkhead": "inbound", "code": "200", "peer": f.from.identity.String(), "own": f.to.identity.String(),
		"source": f.from.of(family).String(), "destination": at(server, 15008).String(), "authority": at(server, app.GreetPort).String(),
	}
	eventually(t, f.name+" in the log of its server's proxy", func() error {
		lines := f.to.node.accessLog(f.to.tenant.String())
		for _, line := range lines {
			matches := true
			for k, v := range want {
				matches = matches && line[k] == v
			}
			if matches {
				return nil
			}
		}
		return fmt.Errorf("none of %d lines is %v", len(lines), want)
	})
}
