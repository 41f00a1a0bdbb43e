package bpf

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

func wantPlacement(t *testing.T, d *Datapath, uid string, tenant uint16, formers ...uint16) {
	t.Helper()
	places, err := d.Placements()
	if p := places[uid]; err != nil || p.Tenant != tenant || !slices.Equal(p.Formers, formers) {
		t.Errorf("pod %s is %+v, %v, want tenant %d and formers %v", uid, p, err, tenant, formers)
	}
}

// led has it that a SYN led a flow that is written down to where it is.
func (m *mesh) led(f model.Flow) {
	m.t.Helper()
	pod, err := addrKey(f.Pod.Addr())
	check(m.t, err)
	peer, err := addrKey(f.Peer.Addr())
	check(m.t, err)
	key := datapathFlow{Pod: pod, Peer: peer, PodPort: f.Pod.Port(), PeerPort: f.Peer.Port(), Side: sides[f.Side]}
	var s datapathFlowState
	check(m.t, m.d.maps[datapathMapFlows].Lookup(key, &s))
	s.Led = 1
	check(m.t, m.d.maps[datapathMapFlows].Put(key, s))
}

// What a tenant has opened as a pod, or to it, before the pod left it or since, gets it
// none of the pod's new connections.
func TestFormerTakesPorts(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.remote, 81)
	serve(t, m.a.namespace, 8081)
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 81}}))
	var held []heldFlow
	take := func(family int) {
		pod, remote := m.a.of(family), remoteAddresses.of(family)
		port := uint16(40000 + len(held))
		m.hold(&held, "as the pod", m.one.namespace, at(pod, port), at(remote, 80), "app "+pod.String())
	}
	take(4)
	take(6)
	m.a.Tenant = 2
	check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
	take(4)
	take(6)
	for i, c := range held {
		check(t, echo(c, 1000))
		family := []int{4, 6}[i%2]
		pod, remote := m.a.of(family), remoteAddresses.of(family)
		if _, got, err := dial(t, m.a.namespace, at(pod, uint16(40000+i)), at(remote, 80)); got != "proxy2" {
			t.Errorf("IPv%d, port %d: %q, %v, want proxy2", family, 40000+i, got, err)
		}
	}
	goOn(t, "the pod and its new tenant have the ports, too", held)
	for _, family := range []int{4, 6} {
		pod, remote := m.a.of(family), remoteAddresses.of(family)
		var to []heldFlow
		m.hold(&to, "to the pod", m.one.namespace, at(remote, 41000), at(pod, 8081), "app "+remote.String())
		if _, got, err := dial(t, m.remote, at(remote, 41000), at(pod, 8081)); got != "proxy2" {
			t.Errorf("IPv%d, to the pod: %q, %v, want proxy2", family, got, err)
		}
		goOn(t, "the pod's peer has the ports, too", to)
	}
	// The same, where the tenant's connection is the other way round, or where the pod's goes
	// past its tenants. Nobody answers the tenant's SYN.
	pod, remote := m.a.v4, remoteAddresses.v4
	for _, c := range []struct {
		name           string
		sent, received netip.AddrPort
		from           *namespace
		dials, dialled netip.AddrPort
		want           string
	}{
		{"from the pod", at(remote, 80), at(pod, 42000), m.a.namespace, at(pod, 42000), at(remote, 80), "proxy2"},
		{"to the pod", at(pod, 8080), at(remote, 42001), m.remote, at(remote, 42001), at(pod, 8080), "proxy2"},
		{"in the clear", at(pod, 42002), at(remote, 81), m.a.namespace, at(pod, 42002), at(remote, 81), "app " + pod.String()},
	} {
		forgePacket(t, m.one.namespace, c.sent, c.received, tcpSYN)
		written := 0
		check(t, m.d.eachFlow(func(key datapathFlow, s datapathFlowState) {
			if s.Tenant == 1 && s.Led == 0 && (key.PeerPort == c.dials.Port() || key.PodPort == c.dials.Port()) {
				written++
			}
		}))
		if written != 1 {
			t.Fatalf("%s: %d connections of tenant 1 are written down, want 1", c.name, written)
		}
		if _, got, err := dial(t, c.from, c.dials, c.dialled); got != c.want {
			t.Errorf("%s: %q, %v, want %q", c.name, got, err, c.want)
		}
	}
}

// serveBothWays has remote and pod a listen at a port through the tenant each, 80 and 8081,
// and at one in the clear, 81 and 8082.
func (m *mesh) serveBothWays() {
	m.t.Helper()
	serve(m.t, m.remote, 80)
	serve(m.t, m.remote, 81)
	serve(m.t, m.a.namespace, 8081)
	serve(m.t, m.a.namespace, 8082)
	check(m.t, m.d.SetExclusions([]steer.Exclusion{{Port: 81}, {Inbound: true, Port: 8082}}))
}

// A connection for a pod with the ports of one that stayed elsewhere is refused, to who may
// open some for it. Others aren't answered.
func TestPortsTaken(t *testing.T) {
	m := newMesh(t)
	m.serveBothWays()
	eachFamily(t, func(t *testing.T, family int) {
		m.t = t
		m.a.Tenant = 1
		check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
		pod, remote, from := m.a.of(family), remoteAddresses.of(family), deliver.of(family)
		var held []heldFlow
		m.hold(&held, "as the pod", m.one.namespace, at(pod, 40000), at(remote, 80), "app "+pod.String())
		m.hold(&held, "to the pod", m.one.namespace, at(remote, 40001), at(pod, 8081), "app "+remote.String())
		m.hold(&held, "to the pod, for the node", m.one.namespace, at(from, 40002), at(pod, 8081), "app "+from.String())
		m.a.Tenant = 2
		check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
		m.hold(&held, "in the clear", m.a.namespace, at(pod, 40003), at(remote, 81), "app "+pod.String())
		m.hold(&held, "to the pod in the clear", m.remote, at(remote, 40004), at(pod, 8082), "app "+remote.String())
		for _, c := range []struct {
			name     string
			by       *testTenant
			from, to netip.AddrPort
		}{
			{"its tenant, as the pod", m.two, at(pod, 40000), at(remote, 80)},
			{"its tenant, to the pod", m.two, at(remote, 40001), at(pod, 8081)},
			{"its tenant, to the pod for the node", m.two, at(from, 40002), at(pod, 8081)},
			{"its tenant, what is in the clear", m.two, at(pod, 40003), at(remote, 81)},
			{"its tenant, what is in the clear to the pod", m.two, at(remote, 40004), at(pod, 8082)},
			{"its former tenant, what is in the clear", m.one, at(pod, 40003), at(remote, 81)},
		} {
			before := m.counters(c.by.Index).Dropped
			began := time.Now()
			if _, got, err := dial(t, c.by.namespace, c.from, c.to); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: %q, %v after %v, want it refused", c.name, got, err, time.Since(began))
			}
			if now := m.counters(c.by.Index).Dropped; now.PortsTaken != before.PortsTaken+1 || now.Foreign != before.Foreign {
				t.Errorf("%s: dropped %+v, before %+v", c.name, now, before)
			}
		}
		goOn(t, "after attempts at their ports", held)

		check(t, m.d.deleteFormers(func(datapathFormer, uint64) bool { return true }))
		before := m.counters(1).Dropped
		// One that is answered isn't sent again.
		synFrom(t, m.one.namespace, at(pod, 40003), at(remote, 81), func() bool { return m.counters(1).Dropped.Foreign >= before.Foreign+2 })
		if now := m.counters(1).Dropped; now.PortsTaken != before.PortsTaken {
			t.Errorf("one that may not: dropped %+v, before %+v", now, before)
		}
		goOn(t, "after an attempt of another", held)
	})
}

// What a former tenant begins with the ports of a connection that the pod has through its
// tenant ends neither, and takes nothing of it: nobody answers.
func TestFormerBeginsWithPortsInUse(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8081)
	m.a.Tenant = 2
	check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
	eachFamily(t, func(t *testing.T, family int) {
		m.t = t
		pod, remote := m.a.of(family), remoteAddresses.of(family)
		var held []heldFlow
		m.hold(&held, "as the pod", m.two.namespace, at(pod, 43000), at(remote, 80), "app "+pod.String())
		m.hold(&held, "to the pod", m.two.namespace, at(remote, 43001), at(pod, 8081), "app "+remote.String())
		m.hold(&held, "from the pod", m.a.namespace, at(pod, 43002), at(remote, 80), "proxy2")
		m.hold(&held, "from its peer", m.remote, at(remote, 43003), at(pod, 8080), "proxy2")
		for i, c := range []struct{ from, to netip.AddrPort }{
			{at(pod, 43000), at(remote, 80)},
			{at(remote, 43001), at(pod, 8081)},
			{at(remote, 80), at(pod, 43002)},
			{at(pod, 8080), at(remote, 43003)},
		} {
			if _, got, err := dialBriefly(t, m.one.namespace, c.from, c.to); err == nil {
				t.Errorf("the former tenant's, with the ports of one %s: %q", held[i].name, got)
			}
			goOn(t, "after the former tenant's attempt", held[i:i+1])
		}
		goOn(t, "after all attempts", held)
		// Of those with ports of their own, both.
		var own []heldFlow
		m.hold(&own, "as the pod", m.one.namespace, at(pod, 43010), at(remote, 80), "app "+pod.String())
		m.hold(&own, "to the pod", m.one.namespace, at(remote, 43011), at(pod, 8081), "app "+remote.String())
		goOn(t, "with ports of their own", own)
		if _, _, err := dial(t, m.one.namespace, at(pod, 43012), at(remote, 83)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("where nobody listens: %v, want it refused", err)
		}
	})
}

// A former tenant leaves room for what the pod opens in the clear.
func TestFormerLeavesRoom(t *testing.T) {
	const byTenants = 4096
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.remote, 81)
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 81}}))
	m.a.Tenant = 2
	check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
	veths := m.d.maps[datapathMapVeths]
	var veth datapathVeth
	check(t, veths.Lookup(uint32(m.a.Ifindex), &veth))
	veth.Learned = byTenants - 1
	check(t, veths.Put(uint32(m.a.Ifindex), veth))
	as, server := at(m.a.v4, 0), at(remoteAddresses.v4, 80)
	if _, got, err := dial(t, m.one.namespace, as, server); got != "app "+m.a.v4.String() {
		t.Errorf("with room: %q, %v", got, err)
	}
	check(t, veths.Lookup(uint32(m.a.Ifindex), &veth))
	veth.Learned = byTenants // also if that connection is over
	check(t, veths.Put(uint32(m.a.Ifindex), veth))
	before := m.counters(1).Dropped.Foreign
	syn(t, m.one.namespace, m.a.v4, server, func() bool { return m.counters(1).Dropped.Foreign > before })
	m.greets("excluded", m.a.namespace, at(remoteAddresses.v4, 81), "app "+m.a.v4.String())
}

// A SYN that was led to a tenant before its pod moved, and comes to its listeners
// after that, is that tenant's.
func TestSynOnItsWay(t *testing.T) {
	m := newMesh(t)
	m.a.Tenant = 2
	check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
	for i, former := range []bool{true, false} {
		if !former {
			check(t, m.d.deleteFormers(func(datapathFormer, uint64) bool { return true }))
		}
		for _, family := range []int{4, 6} {
			pod, remote := m.a.of(family), remoteAddresses.of(family)
			out := model.Flow{Pod: at(pod, uint16(40000+i)), Peer: at(remote, 80), Side: model.PodSide}
			in := model.Flow{Pod: at(pod, 8080), Peer: at(remote, uint16(40000+i)), Side: model.WireSide}
			_, err := m.d.keepFlows(m.a.Pod, 1, func(uint16) ([]model.Flow, error) { return []model.Flow{out, in}, nil })
			check(t, err)
			m.led(out)
			m.led(in)
			refused := m.counters(1).Dropped.Unsteered
			_, sent, errSent := dial(t, m.a.namespace, out.Pod, out.Peer)
			_, received, errReceived := dial(t, m.remote, in.Peer, in.Pod)
			if former && (sent != "proxy1" || received != "proxy1") {
				t.Errorf("IPv%d: %q, %v and %q, %v", family, sent, errSent, received, errReceived)
			}
			if !former && (errSent == nil || errReceived == nil || m.counters(1).Dropped.Unsteered < refused+2) {
				t.Errorf("IPv%d, after its time: %q, %v and %q, %v", family, sent, errSent, received, errReceived)
			}
		}
	}
}

// A former tenant's right ends when it has no connection of the pod any more, and at
// the latest when its time is over; with the tenant and with the pod it goes at once.
func TestFormersEnd(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	move := func(to uint16) {
		m.a.Tenant = to
		check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
	}
	set := func(left time.Duration) {
		now, err := monotonic()
		check(t, err)
		for _, a := range m.a.both() {
			key, err := addrKey(a)
			check(t, err)
			check(t, m.d.maps[datapathMapFormers].Put(datapathFormer{Pod: key, Tenant: 1}, now+uint64(left)))
		}
	}
	move(2)
	check(t, m.d.SweepFlows(time.Hour)) // one may be on its way
	wantPlacement(t, m.d, "a", 2, 1)
	set(model.FormerLimit - formerLeast - time.Second)
	check(t, m.d.SweepFlows(time.Hour))
	wantPlacement(t, m.d, "a", 2)

	move(1)
	var held []heldFlow
	m.hold(&held, "outbound", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "proxy1")
	move(2)
	set(time.Minute)
	check(t, m.d.SweepFlows(time.Hour))
	wantPlacement(t, m.d, "a", 2, 1)
	set(0)
	before := m.counters(1).Dropped.Foreign
	syn(t, m.one.namespace, m.a.v4, at(remoteAddresses.v4, 80), func() bool { return m.counters(1).Dropped.Foreign > before })
	goOn(t, "the time is over", held)
	check(t, m.d.SweepFlows(time.Hour))
	wantPlacement(t, m.d, "a", 2)

	set(time.Minute)
	check(t, m.d.DeleteTenant(1))
	wantPlacement(t, m.d, "a", 2)
	set(time.Minute)
	check(t, m.d.DeletePod("a"))
	if n := size(t, m.d.maps[datapathMapFormers]); n != 0 {
		t.Errorf("%d former tenants of a pod that is gone", n)
	}
}
