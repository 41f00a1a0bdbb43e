package kernel

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// selfAddresses are who a pod seems to be to itself, through a service.
var selfAddresses = lab.Addresses("169.254.96.2", "fd69:8::2")

// flow is one kind of connection.
type flow struct {
	name     string
	from, to *lab.Host
	// dial is another address than to's.
	dial lab.Pair
	// sees is another client than from's address; anyone if it is the zero Addr.
	sees *lab.Pair
	// mesh says that it is tunnelled, with both identities proven.
	mesh bool
}

func flows(l *lab.Lab) []flow {
	return []flow{
		{name: "same node, same tenant", from: l.A1, to: l.A2, mesh: true},
		{name: "same node, other tenant", from: l.A1, to: l.B1, mesh: true},
		{name: "other node, same tenant", from: l.A1, to: l.A3, mesh: true},
		{name: "other node, other tenant", from: l.A1, to: l.B2, mesh: true},
		{name: "other node, back", from: l.B2, to: l.A2, mesh: true},
		{name: "service", from: l.A1, to: l.B2, dial: l.B2.VIP, mesh: true},
		{name: "service of the same node", from: l.B1, to: l.A1, dial: l.A1.VIP, mesh: true},
		{name: "to outside", from: l.A1, to: l.Outside},
		{name: "other node, to outside", from: l.B2, to: l.Outside},
		{name: "from outside", from: l.Outside, to: l.A1},
		{name: "from outside to the other node", from: l.Outside, to: l.B2},
		{name: "node to its pod", from: l.Node1.Host, to: l.A1, sees: &lab.Pair{}}, // any of the node's addresses
		{name: "node to another's pod", from: l.Node1.Host, to: l.A3},
		{name: "pod to its node", from: l.A1, to: l.Node1.Host},
		{name: "pod to another node", from: l.A1, to: l.Node2.Host},
		{name: "self", from: l.A1, to: l.A1},
		{name: "self by a service", from: l.A1, to: l.A1, dial: l.A1.VIP, sees: &selfAddresses, mesh: true},
	}
}

func (f flow) address(family int, port uint16) netip.AddrPort {
	if f.dial != (lab.Pair{}) {
		return lab.At(f.dial.Of(family), port)
	}
	return lab.At(f.to.Of(family), port)
}

// check makes the connection and looks at both ends of it.
func (f flow) check(t *testing.T, family int) {
	t.Helper()
	to := f.address(family, app.GreetPort)
	r := f.from.Call(t, "tcp", to.String())
	if !r.OK {
		t.Fatalf("%+v", r.Failure)
	}
	if r.Remote != to.String() {
		t.Errorf("the client is connected to %s, dialled %s", r.Remote, to)
	}
	sees := f.from.Pair
	if f.sees != nil {
		sees = *f.sees
	}
	if want := sees.Of(family); want.IsValid() && r.Answer.ClientIP() != want.String() {
		t.Errorf("the server sees client %s, want %s", r.Answer.Client, want)
	}
	if want := lab.At(f.to.Of(family), app.GreetPort).String(); r.Answer.Local != want || r.Answer.Pod != f.to.Name {
		t.Errorf("%s answered on %s, want %s on %s", r.Answer.Pod, r.Answer.Local, f.to.Name, want)
	}
}

func eachFamily(t *testing.T, f func(t *testing.T, family int)) {
	for _, family := range []int{4, 6} {
		t.Run(fmt.Sprintf("IPv%d", family), func(t *testing.T) { f(t, family) })
	}
}

func TestFlows(t *testing.T) { eachRedirection(t, testFlows) }

func testFlows(t *testing.T, l *lab.Lab) {
	eachFamily(t, func(t *testing.T, family int) {
		for _, f := range flows(l) {
			t.Run(f.name, func(t *testing.T) { f.check(t, family) })
		}
	})
	t.Run("identities", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, family int) {
			for _, f := range flows(l) {
				if f.mesh {
					wantIdentities(t, f, family)
				}
			}
		})
	})
	// A pod may have other ephemeral ports than the kernel's, the tunnels' own among them.
	t.Run("from the tunnels' port", func(t *testing.T) {
		l.A1.Namespace.Do(t, func() { lab.Sysctl(t, "ipv4/ip_local_port_range=15008 15008") })
		eachFamily(t, func(t *testing.T, family int) {
			for _, f := range flows(l) {
				if f.from == l.A1 && f.to != l.A1 {
					t.Run(f.name, func(t *testing.T) { f.check(t, family) })
				}
			}
		})
	})
}

// All of it is so with every Envoy that is delivered.
func TestFlowsWithOtherEnvoys(t *testing.T) {
	for _, version := range dist.Versions() {
		if version == dist.Default {
			continue // TestFlows
		}
		t.Run(version, func(t *testing.T) {
			l := lab.NewWith(t, lab.Options{Envoy: version})
			for _, name := range []string{"team-a", "team-b"} {
				if got := l.Node1.Running(name).Version; got != version {
					t.Errorf("%s has Envoy %s", name, got)
				}
			}
			testFlows(t, l)
		})
	}
}

// Source addresses are kept without a cgroup of version 2, in which a program could
// answer for Envoy's socket options.
func TestFlowsWithoutCgroupV2(t *testing.T) {
	const unified = "/sys/fs/cgroup/unified"
	var s unix.Statfs_t
	if err := unix.Statfs(unified, &s); err != nil || s.Type != unix.CGROUP2_SUPER_MAGIC {
		t.Skip("this machine has no hybrid cgroups, of which version 2 could be taken away")
	}
	// In the test's own mount namespace.
	lab.Check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	lab.Check(t, unix.Unmount(unified, unix.MNT_DETACH))
	t.Cleanup(func() { lab.Check(t, unix.Mount("cgroup2", unified, "cgroup2", 0, "")) })
	eachRedirection(t, func(t *testing.T, l *lab.Lab) {
		for _, f := range flows(l) {
			t.Run(f.name, func(t *testing.T) { f.check(t, 4) })
		}
	})
}

// An agent with nothing to do does nothing.
func TestIdleAgent(t *testing.T) { eachRedirection(t, testIdleAgent) }

func testIdleAgent(t *testing.T, l *lab.Lab) {
	const wait, most = 3 * time.Second, 300 * time.Millisecond
	for _, n := range []*lab.Node{l.Node1, l.Node2} {
		// On a busy machine it may still have something to do at first.
		lab.Eventually(t, "the agent of "+n.Name+" to be idle", func() error {
			for range 2 { // in a row: what it does every few seconds is no idling
				before := n.AgentTime(t)
				time.Sleep(wait)
				if spent := n.AgentTime(t) - before; spent > most {
					return fmt.Errorf("it used %s of CPU in %s", spent, wait)
				}
			}
			return nil
		})
	}
}

// wantIdentities waits for the server's proxy to tell of the flow: the peer's
// certificate, its own, and the addresses.
func wantIdentities(t *testing.T, f flow, family int) {
	t.Helper()
	lab.Eventually(t, f.name+" in the log of its server's proxy", func() error { return f.identities(family) })
}

// identities looks for the flow in the log of its server's proxy.
func (f flow) identities(family int) error {
	server := f.to.Of(family)
	want := map[string]string{
		"bulkhead": "inbound", "code": "200", "peer": f.from.Identity.String(), "own": f.to.Identity.String(),
		"source": f.from.Of(family).String(), "destination": lab.At(server, 15008).String(), "authority": lab.At(server, app.GreetPort).String(),
	}
	lines := f.to.Node.AccessLog(f.to.Tenant.String())
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
}
