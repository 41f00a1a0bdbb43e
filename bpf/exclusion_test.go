package bpf

import (
	"errors"
	"net/netip"
	"testing"
	"time"
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
		all, own []Exclusion
		// Which connections of pod a, and of pod c, pass in the clear: out to
		// ports 80 and 81 of the remote, in from there to its own.
		want map[string]string
	}{
		{"nothing", nil, nil, map[string]string{"a": "", "c": ""}},
		{"outbound port of all", []Exclusion{{Port: 81}}, nil, map[string]string{"a": "out81", "c": "out81"}},
		{"inbound port of all", []Exclusion{{Port: 81, Inbound: true}}, nil, map[string]string{"a": "in81", "c": "in81"}},
		{"outbound port of one", nil, []Exclusion{{Port: 80}}, map[string]string{"a": "out80", "c": ""}},
		{"inbound port of one", nil, []Exclusion{{Port: 80, Inbound: true}}, map[string]string{"a": "in80", "c": ""}},
		{"outbound networks of all", []Exclusion{{Peer: prefix("192.0.2.0/24")}, {Peer: prefix("2001:db8::/64")}}, nil, map[string]string{"a": "out80 out81", "c": "out80 out81"}},
		{"other networks", []Exclusion{{Peer: prefix("192.0.3.0/24")}, {Peer: prefix("2001:db8:1::/64")}, {Peer: prefix("192.0.2.3/32")}, {Peer: prefix("2001:db8::3/128")}}, nil, map[string]string{"a": "", "c": ""}},
		{"port and network", []Exclusion{{Peer: prefix("192.0.2.2/32"), Port: 80}, {Peer: prefix("2001:db8::2/128"), Port: 80}}, nil, map[string]string{"a": "out80", "c": "out80"}},
		{"inbound networks of one", nil, []Exclusion{{Inbound: true, Peer: prefix("192.0.0.0/8")}, {Inbound: true, Peer: prefix("2000::/3")}}, map[string]string{"a": "in80 in81", "c": ""}},
		{"all and one", []Exclusion{{Port: 80}}, []Exclusion{{Port: 81}}, map[string]string{"a": "out80 out81", "c": "out80"}},
		{"a whole pod", nil, []Exclusion{{}, {Inbound: true}}, map[string]string{"a": "out80 out81 in80 in81", "c": ""}},
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

	t.Run("held", func(t *testing.T) {
		var held []heldFlow
		m.hold(&held, "before", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "proxy1")
		check(t, m.d.SetExclusions([]Exclusion{{Port: 80}}))
		m.hold(&held, "excluded", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "app 10.77.0.2")
		goOn(t, "excluded", held)
		check(t, m.d.SetExclusions(nil))
		goOn(t, "not excluded any more", held)
		m.greets("not excluded any more", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
	})
	// A peer that comes from an excluded port must not come in thereby.
	t.Run("source port", func(t *testing.T) {
		check(t, m.d.SetExclusions([]Exclusion{{Port: 82}}))
		_, greeting, err := dial(t, m.remote, at(remoteAddresses.v4, 82), at(m.a.v4, 80))
		if greeting != "proxy1" {
			t.Errorf("%q, %v", greeting, err)
		}
	})
	t.Run("limit of a pod", func(t *testing.T) {
		check(t, m.d.SetExclusions([]Exclusion{{Port: 80}}))
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
	t.Run("deleted", func(t *testing.T) {
		m.a.Exclusions = []Exclusion{{Port: 1}}
		check(t, m.d.SetExclusions(nil))
		check(t, m.d.UpdatePod(m.a.Pod))
		if n := size(t, m.d.maps[datapathMapExclusions]); n != 1 {
			t.Errorf("%d exclusions, want 1", n)
		}
		check(t, m.d.DeletePod("a"))
		if n := size(t, m.d.maps[datapathMapExclusions]); n != 0 {
			t.Errorf("%d exclusions are left", n)
		}
	})
	for _, e := range []Exclusion{{Peer: netip.PrefixFrom(netip.MustParseAddr("10.0.0.1"), 8)}, {Peer: prefix("::ffff:10.0.0.0/104")}, {Peer: netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), 40)}} {
		if err := m.d.SetExclusions([]Exclusion{e}); err == nil {
			t.Errorf("%v is accepted", e)
		}
	}
}

func TestBypass(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8080)
	held := m.holdAllOutbound(m.a, "proxy1")
	if err := m.d.SetBypass(9, true); !errors.Is(err, ErrUnknownTenant) {
		t.Errorf("bypass of an unknown tenant: %v", err)
	}
	check(t, m.d.SetBypass(1, true))
	check(t, m.d.SetBypass(1, true))
	if on, err := m.d.Bypassed(); err != nil || len(on) != 1 || on[0] != 1 {
		t.Errorf("bypassed %v, %v", on, err)
	}
	check(t, m.d.UpdateTenant(m.one.Tenant))
	m.greets("another tenant", m.b.namespace, at(remoteAddresses.v4, 80), "proxy2")
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
	check(t, m.d.SetBypass(1, false))
	check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
	goOn(t, "off", append(direct, held...))
	m.greets("off", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
	if n := m.counters(1).Bypassed - before; n != 4 {
		t.Errorf("%d connections counted after it was switched off, want 4", n)
	}
	if on, err := m.d.Bypassed(); err != nil || len(on) != 0 {
		t.Errorf("bypassed %v, %v", on, err)
	}
	// Without its tenant a pod is closed, bypass or not.
	check(t, m.d.SetBypass(1, true))
	check(t, m.d.DeleteTenant(1))
	dropped := m.counters(0).Dropped.NoTenant
	syn(t, m.a.namespace, m.a.v4, at(remoteAddresses.v4, 80), func() bool { return m.counters(0).Dropped.NoTenant > dropped })
}

func (m *mesh) holdAllOutbound(p *testPod, proxy string) (held []heldFlow) {
	m.t.Helper()
	for _, family := range []int{4, 6} {
		m.hold(&held, "outbound", p.namespace, netip.AddrPort{}, at(remoteAddresses.of(family), 80), proxy)
	}
	return held
}
