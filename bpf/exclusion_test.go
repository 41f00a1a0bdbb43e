package bpf

import (
	"errors"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestExclusions(t *testing.T) {
	m := newMesh(t)
	for _, port := range []int{80, 81} {
		serve(t, m.remote, port)
		serve(t, m.a.namespace, port)
		serve(t, m.c.namespace, port)
	}
	for _, c := range []struct {
		name     string
		all, own []steer.Exclusion
		// Which connections of pod a, and of pod c, pass in the clear: out to
		// ports 80 and 81 of the remote, in from there to its own.
		want map[string]string
	}{
		{"nothing", nil, nil, map[string]string{"a": "", "c": ""}},
		{"outbound port of all", []steer.Exclusion{{Port: 81}}, nil, map[string]string{"a": "out81", "c": "out81"}},
		{"inbound port of all", []steer.Exclusion{{Port: 81, Inbound: true}}, nil, map[string]string{"a": "in81", "c": "in81"}},
		{"outbound port of one", nil, []steer.Exclusion{{Port: 80}}, map[string]string{"a": "out80", "c": ""}},
		{"inbound port of one", nil, []steer.Exclusion{{Port: 80, Inbound: true}}, map[string]string{"a": "in80", "c": ""}},
		{"outbound networks of all", []steer.Exclusion{{Peer: prefix("192.0.2.0/24")}, {Peer: prefix("2001:db8::/64")}}, nil, map[string]string{"a": "out80 out81", "c": "out80 out81"}},
		{"other networks", []steer.Exclusion{{Peer: prefix("192.0.3.0/24")}, {Peer: prefix("2001:db8:1::/64")}, {Peer: prefix("192.0.2.3/32")}, {Peer: prefix("2001:db8::3/128")}}, nil, map[string]string{"a": "", "c": ""}},
		{"port and network", []steer.Exclusion{{Peer: prefix("192.0.2.2/32"), Port: 80}, {Peer: prefix("2001:db8::2/128"), Port: 80}}, nil, map[string]string{"a": "out80", "c": "out80"}},
		{"inbound networks of one", nil, []steer.Exclusion{{Inbound: true, Peer: prefix("192.0.0.0/8")}, {Inbound: true, Peer: prefix("2000::/3")}}, map[string]string{"a": "in80 in81", "c": ""}},
		{"all and one", []steer.Exclusion{{Port: 80}}, []steer.Exclusion{{Port: 81}}, map[string]string{"a": "out80 out81", "c": "out80"}},
		{"a whole pod", nil, []steer.Exclusion{{}, {Inbound: true}}, map[string]string{"a": "out80 out81 in80 in81", "c": ""}},
		{"nothing again", nil, nil, map[string]string{"a": "", "c": ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			check(t, m.d.SetExclusions(c.all))
			m.a.Exclusions = c.own
			check(t, m.d.UpdatePod(m.a.Pod))
			eachFamily(t, func(t *testing.T, family int) {
				for _, p := range []*testPod{m.a, m.c} {
					got := ""
					for _, try := range []struct {
						name string
						from *namespace
						to   netip.AddrPort
					}{
						{"out80", p.namespace, at(remoteAddresses.of(family), 80)}, {"out81", p.namespace, at(remoteAddresses.of(family), 81)},
						{"in80", m.remote, at(p.of(family), 80)}, {"in81", m.remote, at(p.of(family), 81)},
					} {
						conn, greeting, err := dial(t, try.from, netip.AddrPort{}, try.to)
						check(t, err)
						check(t, echo(conn, 5000))
						if greeting != "proxy1" {
							if got != "" {
								got += " "
							}
							got += try.name
						}
					}
					if got != c.want[p.UID] {
						t.Errorf("pod %s: in the clear %q, want %q", p.UID, got, c.want[p.UID])
					}
				}
			})
		})
	}
	if n := m.counters(1).Excluded; n != 2*(2+2+1+1+4+2+2+3+4) {
		t.Errorf("%d connections counted as excluded", n)
	}
	if c := m.pod1("a"); c.Direct == 0 || c.Outbound == 0 || c.Plain == 0 {
		t.Errorf("counters of pod a: %+v", c)
	}

	// An address of IPv4 is in none of IPv6.
	t.Run("all of one family", func(t *testing.T) {
		v6 := prefix("::/0")
		for _, c := range []struct {
			name string
			all  []steer.Exclusion
			want map[int]string
		}{
			{"IPv6", []steer.Exclusion{{Peer: v6}}, map[int]string{4: "proxy1", 6: "app fd77::2"}},
			{"IPv6 of one port", []steer.Exclusion{{Peer: v6, Port: 80}}, map[int]string{4: "proxy1", 6: "app fd77::2"}},
			{"IPv6, and a network of IPv4", []steer.Exclusion{{Peer: v6}, {Peer: prefix("192.0.2.0/24")}}, map[int]string{4: "app 10.77.0.2", 6: "app fd77::2"}},
			{"both", []steer.Exclusion{{Peer: v6}, {Peer: prefix("0.0.0.0/0")}}, map[int]string{4: "app 10.77.0.2", 6: "app fd77::2"}},
			{"IPv6, and all", []steer.Exclusion{{Peer: v6}, {}}, map[int]string{4: "app 10.77.0.2", 6: "app fd77::2"}},
			{"all, and a large network of IPv6", []steer.Exclusion{{}, {Peer: prefix("::/16")}}, map[int]string{4: "app 10.77.0.2", 6: "app fd77::2"}},
			{"a large network of IPv6", []steer.Exclusion{{Peer: prefix("::/16")}}, map[int]string{4: "proxy1", 6: "proxy1"}},
			{"IPv4", []steer.Exclusion{{Peer: prefix("0.0.0.0/0")}}, map[int]string{4: "app 10.77.0.2", 6: "proxy1"}},
			{"neither", nil, map[int]string{4: "proxy1", 6: "proxy1"}},
		} {
			check(t, m.d.SetExclusions(c.all))
			for family, want := range c.want {
				m.greets(c.name, m.a.namespace, at(remoteAddresses.of(family), 80), want)
			}
		}
	})
	t.Run("held", func(t *testing.T) {
		var held []heldFlow
		m.hold(&held, "before", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "proxy1")
		check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 80}}))
		m.hold(&held, "excluded", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "app 10.77.0.2")
		goOn(t, "excluded", held)
		check(t, m.d.SetExclusions(nil))
		goOn(t, "not excluded any more", held)
		m.greets("not excluded any more", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
	})
	t.Run("tunnel", func(t *testing.T) {
		check(t, m.d.SetExclusions([]steer.Exclusion{{Inbound: true}}))
		m.greets("a plain connection", m.remote, at(m.a.v4, 80), "app 192.0.2.2")
		m.greets("a tunnel", m.remote, at(m.a.v4, 15008), "proxy1")
	})
	// A peer that comes from an excluded port must not come in thereby.
	t.Run("source port", func(t *testing.T) {
		check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 82}}))
		_, greeting, err := dial(t, m.remote, at(remoteAddresses.v4, 82), at(m.a.v4, 80))
		if greeting != "proxy1" {
			t.Errorf("%q, %v", greeting, err)
		}
	})
	t.Run("limit of a pod", func(t *testing.T) {
		check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 80}}))
		var v datapathVeth
		veths := m.d.maps[datapathMapVeths]
		check(t, veths.Lookup(uint32(m.a.Ifindex), &v))
		v.Learned = 8192
		check(t, veths.Put(uint32(m.a.Ifindex), v))
		syn(t, m.a.namespace, m.a.v4, at(remoteAddresses.v4, 80), func() bool { return m.pod1("a").Dropped.FlowsFull > 0 })
		m.greets("another pod", m.c.namespace, at(remoteAddresses.v4, 80), "app 10.77.1.4")
		m.greets("what isn't excluded", m.a.namespace, at(remoteAddresses.v4, 81), "proxy1")
		check(t, m.d.SweepFlows(time.Hour))
		m.greets("swept", m.a.namespace, at(remoteAddresses.v4, 80), "app 10.77.0.2")
	})
	t.Run("limit of a tenant", func(t *testing.T) {
		check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 80}}))
		check(t, m.d.SweepFlows(0))
		learned := func() uint32 {
			var v datapathVeth
			check(t, m.d.maps[datapathMapVeths].Lookup(uint32(m.one.HostIfindex), &v))
			return v.Learned
		}
		set := func(n uint32) {
			var v datapathVeth
			check(t, m.d.maps[datapathMapVeths].Lookup(uint32(m.one.HostIfindex), &v))
			v.Learned = n
			check(t, m.d.maps[datapathMapVeths].Put(uint32(m.one.HostIfindex), v))
		}
		if n := learned(); n != 0 {
			t.Errorf("%d connections of a tenant without any are counted", n)
		}
		var held []heldFlow
		m.hold(&held, "of a pod", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "app 10.77.0.2")
		m.hold(&held, "of another", m.c.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "app 10.77.1.4")
		if n := learned(); n != 2 {
			t.Errorf("%d connections of a tenant with 2 are counted", n)
		}
		m.endFlows(held, "a")
		if n := learned(); n != 0 {
			t.Errorf("%d connections of a tenant with 2 that have ended are counted", n)
		}
		set(16384)
		check(t, m.d.UpdateTenant(m.one.Tenant))
		before := m.pod1("a").Dropped.FlowsFull
		syn(t, m.a.namespace, m.a.v4, at(remoteAddresses.v4, 80), func() bool { return m.pod1("a").Dropped.FlowsFull > before })
		m.greets("another tenant", m.b.namespace, at(remoteAddresses.v4, 80), "app "+m.b.v4.String())
		m.greets("what isn't excluded", m.a.namespace, at(remoteAddresses.v4, 81), "proxy1")
		check(t, m.d.SweepFlows(time.Hour))
		m.greets("swept", m.a.namespace, at(remoteAddresses.v4, 80), "app 10.77.0.2")
		set(math.MaxUint32) // two CPUs at once, from 1
		m.greets("counted down too far", m.a.namespace, at(remoteAddresses.v4, 80), "app 10.77.0.2")
	})
	t.Run("deleted", func(t *testing.T) {
		m.a.Exclusions = []steer.Exclusion{{Port: 1}}
		check(t, m.d.SetExclusions(nil))
		check(t, m.d.UpdatePod(m.a.Pod))
		if n := size(t, m.d.maps[datapathMapExclusions]); n != 1 {
			t.Errorf("%d exclusions, want 1", n)
		}
		// Another process knows them, too.
		check(t, m.d.Close())
		m.d = m.open()
		check(t, m.d.DeletePod("a"))
		if n := size(t, m.d.maps[datapathMapExclusions]); n != 0 {
			t.Errorf("%d exclusions are left", n)
		}
	})
	for _, e := range []steer.Exclusion{{Peer: netip.PrefixFrom(netip.MustParseAddr("10.0.0.1"), 8)}, {Peer: prefix("::ffff:10.0.0.0/104")}, {Peer: netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), 40)}} {
		if err := m.d.SetExclusions([]steer.Exclusion{e}); err == nil {
			t.Errorf("%v is accepted", e)
		}
	}
}

func TestBypass(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8080)
	serve(t, m.c.namespace, 8080)
	held := m.holdAllOutbound(m.a, "proxy1")
	bypass := func(on bool) {
		t.Helper()
		m.a.Bypass = on
		check(t, m.d.UpdatePod(m.a.Pod))
	}
	bypass(true)
	check(t, m.d.UpdateTenant(m.one.Tenant))
	m.greets("another tenant", m.b.namespace, at(remoteAddresses.v4, 80), "proxy2")
	m.greets("another pod of the tenant", m.c.namespace, at(remoteAddresses.v4, 80), "proxy1")
	// A tunnel still ends at the tenant: the pod doesn't speak it.
	for _, family := range []int{4, 6} {
		m.greets("tunnel", m.remote, at(m.a.of(family), 15008), "proxy1")
	}
	// What it is for: the proxy doesn't answer.
	check(t, m.d.ClearListeners(1, 0))
	goOn(t, "on", held)
	before := m.counters(1).Bypassed
	var direct []heldFlow
	for _, family := range []int{4, 6} {
		m.hold(&direct, "outbound", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.of(family), 80), "app "+m.a.of(family).String())
		m.hold(&direct, "inbound", m.remote, netip.AddrPort{}, at(m.a.of(family), 8080), "app "+remoteAddresses.of(family).String())
	}
	if n := m.counters(1).Bypassed - before; n != 4 {
		t.Errorf("%d connections counted, want 4", n)
	}
	bypass(false)
	check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
	goOn(t, "off", append(direct, held...))
	m.greets("off", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
	if n := m.counters(1).Bypassed - before; n != 4 {
		t.Errorf("%d connections counted after it was switched off, want 4", n)
	}
	// While it is on, not even a tenant is needed; without both, the pod is closed.
	bypass(true)
	check(t, m.d.DeleteTenant(1))
	m.greets("bypassed without its tenant", m.a.namespace, at(remoteAddresses.v4, 80), "app 10.77.0.2")
	bypass(false)
	dropped := m.counters(0).Dropped.NoTenant
	syn(t, m.a.namespace, m.a.v4, at(remoteAddresses.v4, 80), func() bool { return m.counters(0).Dropped.NoTenant > dropped })
}

// A strict pod refuses plain text before a connection begins, from wherever it
// comes, and nothing else; what has begun goes on.
func TestStrict(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8080)
	var held []heldFlow
	m.hold(&held, "plain", m.remote, netip.AddrPort{}, at(m.a.v4, 8080), "proxy1")
	m.hold(&held, "plain", m.remote, netip.AddrPort{}, at(m.a.v6, 8080), "proxy1")
	events, err := m.d.Events(1000)
	check(t, err)
	defer events.Close()
	m.a.Strict = true
	check(t, m.d.UpdatePod(m.a.Pod))
	eachFamily(t, func(t *testing.T, family int) {
		before, beforePod, plain := m.counters(1).Dropped.PlainText, m.pod1("a").Dropped.PlainText, m.counters(1).Plain
		repeated := repeatedSYNs(t, m.remote) // each counts once more
		_, greeting, err := dial(t, m.remote, netip.AddrPort{}, at(m.a.of(family), 8080))
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("plain text: %q, %v, want a refused connection", greeting, err)
		}
		most := uint64(1 + repeatedSYNs(t, m.remote) - repeated)
		if n := m.counters(1).Dropped.PlainText - before; n < 1 || n > most {
			t.Errorf("the tenant counts %d refusals, want 1 to %d", n, most)
		}
		if n := m.pod1("a").Dropped.PlainText - beforePod; n < 1 || n > most {
			t.Errorf("the pod counts %d refusals, want 1 to %d", n, most)
		}
		if n := m.counters(1).Plain - plain; n != 0 {
			t.Errorf("%d connections were steered", n)
		}
		// Not each one is told where they come fast.
		told := false
		for deadline := time.Now().Add(patience); !told && time.Now().Before(deadline); {
			dial(t, m.remote, netip.AddrPort{}, at(m.a.of(family), 8080))
			select {
			case e := <-events.C:
				told = e.Kind == steer.Denied && e.PodUID == "a" && e.Reason == "PlainText" && e.Way == steer.WayInbound &&
					e.Pod == at(m.a.of(family), 8080) && e.Peer.Addr() == remoteAddresses.of(family)
			case <-time.After(20 * time.Millisecond):
			}
		}
		if !told {
			t.Error("the refusal isn't told as an event")
		}
		m.greets("tunnel", m.remote, at(m.a.of(family), 15008), "proxy1")
		m.greets("what the pod makes", m.a.namespace, at(remoteAddresses.of(family), 80), "proxy1")
		m.greets("another pod of the tenant", m.remote, at(m.c.of(family), 8080), "proxy1")
		// A probe of the kubelet, or a process of the node.
		if _, greeting, err := dial(t, nil, netip.AddrPort{}, at(m.a.of(family), 8080)); err != nil || !strings.HasPrefix(greeting, "app ") {
			t.Errorf("from the node: %q, %v", greeting, err)
		}
	})
	// Masqueraded traffic of a NodePort has the node's address, and isn't the node's.
	check(t, m.d.SetNodeAddresses(append(nodeOwn(), remoteAddresses.both()...)))
	eachFamily(t, func(t *testing.T, family int) {
		before := m.counters(1)
		if _, greeting, err := dial(t, m.remote, netip.AddrPort{}, at(m.a.of(family), 8080)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("masqueraded: %q, %v", greeting, err)
		}
		if n := m.counters(1); n.Dropped.PlainText != before.Dropped.PlainText+1 || n.NodePlain != before.NodePlain {
			t.Errorf("masqueraded: %+v", n)
		}
	})
	check(t, m.d.SetNodeAddresses(nodeOwn()))
	goOn(t, "strict", held)
	// A process that takes over finds it so.
	check(t, m.d.Close())
	m.d = m.open()
	if _, greeting, err := dial(t, m.remote, netip.AddrPort{}, at(m.a.v4, 8080)); err == nil {
		t.Errorf("after another process took over: %q", greeting)
	}
	m.a.Strict = false
	check(t, m.d.UpdatePod(m.a.Pod))
	m.greets("permissive again", m.remote, at(m.a.v4, 8080), "proxy1")
}

func (m *mesh) holdAllOutbound(p *testPod, proxy string) (held []heldFlow) {
	m.t.Helper()
	for _, family := range []int{4, 6} {
		m.hold(&held, "outbound", p.namespace, netip.AddrPort{}, at(remoteAddresses.of(family), 80), proxy)
	}
	return held
}
