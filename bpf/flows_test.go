package bpf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// reader reads the flows of a pod in the namespace where it was.
func (m *mesh) reader(p *testPod) model.FlowReader {
	return func(from uint16) ([]model.Flow, error) {
		path := map[uint16]string{0: p.path(), 1: m.one.path(), 2: m.two.path()}[from]
		return EstablishedFlows(path, p.both()...)
	}
}

// flow is a held connection.
type heldFlow struct {
	name string
	net.Conn
}

func (m *mesh) hold(held *[]heldFlow, name string, n *namespace, from, to netip.AddrPort, want string) {
	m.t.Helper()
	c, greeting, err := dial(m.t, n, from, to)
	if err != nil || greeting != want {
		m.t.Fatalf("%s: %q, %v, want %q", name, greeting, err, want)
	}
	*held = append(*held, heldFlow{name, c})
}

func goOn(t *testing.T, when string, held []heldFlow) {
	t.Helper()
	for _, c := range held {
		if err := echo(c, 10_000); err != nil {
			t.Errorf("%s: %s: %v", when, c.name, err)
		}
	}
}

func (m *mesh) greets(when string, from *namespace, to netip.AddrPort, want string) {
	m.t.Helper()
	if _, greeting, err := dial(m.t, from, netip.AddrPort{}, to); greeting != want {
		m.t.Errorf("%s: new connection to %s: %q, %v, want %q", when, to, greeting, err, want)
	}
}

// holdAll holds a connection of each kind that a pod has through its tenant.
func (m *mesh) holdAll(p *testPod, n *testTenant, proxy string) (held []heldFlow) {
	m.t.Helper()
	for _, family := range []int{4, 6} {
		pod, remote := p.of(family), remoteAddresses.of(family)
		name := func(s string) string { return fmt.Sprintf("%s, IPv%d", s, family) }
		m.hold(&held, name("outbound"), p.namespace, netip.AddrPort{}, at(remote, 80), proxy)
		m.hold(&held, name("inbound"), m.remote, netip.AddrPort{}, at(pod, 8080), proxy)
		m.hold(&held, name("upstream"), n.namespace, at(pod, 0), at(remote, 80), "app "+pod.String())
		m.hold(&held, name("delivered"), n.namespace, at(remote, 0), at(pod, 8081), "app "+remote.String())
		m.hold(&held, name("delivered to itself"), n.namespace, at(pod, 0), at(pod, 8081),
			"app "+addresses("169.254.96.2", "fd69:8::2").of(family).String())
		// Its answers come from the pod's own address.
		m.hold(&held, name("to a pod of the tenant"), p.namespace, netip.AddrPort{}, at(m.c.of(family), 80), proxy)
	}
	return held
}

func TestFlowsStayOnJoin(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	d := m.pod("d", 1, addresses("10.77.0.40", "fd77::40"), false)
	serve(t, d.namespace, 8080)
	var held []heldFlow
	for _, family := range []int{4, 6} {
		pod, remote := d.of(family), remoteAddresses.of(family)
		m.hold(&held, fmt.Sprintf("outbound, IPv%d", family), d.namespace, netip.AddrPort{}, at(remote, 80), "app "+pod.String())
		m.hold(&held, fmt.Sprintf("inbound, IPv%d", family), m.remote, netip.AddrPort{}, at(pod, 8080), "app "+remote.String())
	}

	// Killed halfway: nothing is cut, nothing has moved.
	calls, broken := 0, errors.New("broken")
	err := m.d.MovePod(d.Pod, func(from uint16) ([]model.Flow, error) {
		if calls++; calls == 2 {
			return nil, broken
		}
		return m.reader(d)(from)
	})
	if !errors.Is(err, broken) {
		t.Fatalf("%v, want %v", err, broken)
	}
	goOn(t, "halfway", held)
	m.greets("halfway", d.namespace, at(remoteAddresses.v4, 80), "app 10.77.0.40")
	m.hold(&held, "opened halfway", d.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "app 10.77.0.40")

	check(t, m.d.MovePod(d.Pod, func(from uint16) ([]model.Flow, error) {
		flows, err := m.reader(d)(from)
		m.hold(&held, "opened while they are read", d.namespace, netip.AddrPort{}, at(remoteAddresses.v6, 80), "app fd77::40")
		return flows, err
	}))
	check(t, m.d.MovePod(d.Pod, m.reader(d)))
	goOn(t, "joined", held)
	for _, family := range []int{4, 6} {
		m.greets("joined", d.namespace, at(remoteAddresses.of(family), 80), "proxy1")
		m.greets("joined", m.remote, at(d.of(family), 8080), "proxy1")
	}
	// Its path's MTU is between the pod and its peer, too.
	setMTU(t, "bhtremote", 1400)
	for _, c := range held {
		if err := echo(c, 200_000); err != nil {
			t.Errorf("smaller MTU: %s: %v", c.name, err)
		}
	}
	flows, err := m.d.HeldFlows()
	if err != nil || flows["d"][0] < len(held) {
		t.Errorf("held %v, %v, want %d of pod d in the clear", flows, err, len(held))
	}
	m.endFlows(held, "d")
	m.greets("ended", d.namespace, at(remoteAddresses.v4, 80), "proxy1")
}

// A tenant that shows more sockets than anybody needs neither takes the room of others
// nor keeps its pods.
func TestTooManyToKeep(t *testing.T) {
	m := newMesh(t)
	m.a.Tenant = 2
	check(t, m.d.MovePod(m.a.Pod, func(uint16) ([]model.Flow, error) {
		var shown []model.Flow
		for i := range model.MaxKept + 1000 {
			shown = append(shown, model.Flow{Pod: at(m.a.v4, uint16(1+i%60000)), Peer: at(remoteAddresses.v4, uint16(1+i/60000)), Side: model.WireSide})
		}
		return shown, nil
	}))
	if n := size(t, m.d.maps[datapathMapFlows]); n != model.MaxKept {
		t.Errorf("%d connections are written down, want %d", n, model.MaxKept)
	}
	wantPlacement(t, m.d, "a", 2, 1)
	// Of another pod of that tenant none is left room for, until some have ended.
	check(t, m.d.SweepFlows(time.Hour))
	more := func(uint16) ([]model.Flow, error) {
		return []model.Flow{{Pod: at(m.c.v4, 40000), Peer: at(remoteAddresses.v4, 80), Side: model.WireSide}}, nil
	}
	_, err := m.d.keepFlows(m.c.Pod, 1, more)
	check(t, err)
	if n := size(t, m.d.maps[datapathMapFlows]); n != model.MaxKept {
		t.Errorf("%d connections are written down of two pods, want %d", n, model.MaxKept)
	}
	check(t, m.d.SweepFlows(0))
	_, err = m.d.keepFlows(m.c.Pod, 1, more)
	check(t, err)
	if n := size(t, m.d.maps[datapathMapFlows]); n != 1 {
		t.Errorf("%d connections are written down, want 1", n)
	}
}

// What opens between the list and the programs' start isn't in either.
func TestFlowsOpenedWhileJoining(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	d := m.pod("d", 1, addresses("10.77.0.40", "fd77::40"), false)
	var held []heldFlow
	calls := 0
	check(t, m.d.MovePod(d.Pod, func(from uint16) ([]model.Flow, error) {
		flows, err := m.reader(d)(from)
		calls++
		m.hold(&held, fmt.Sprint("opened after list ", calls), d.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "app 10.77.0.40")
		return flows, err
	}))
	goOn(t, "joined", held)
	m.greets("joined", d.namespace, at(remoteAddresses.v4, 80), "proxy1")
}

// endFlows closes connections and waits until none is held any more: without the
// sweep, of the agent's own, but for those that nobody saw the end of.
func (m *mesh) endFlows(held []heldFlow, uid string) {
	m.t.Helper()
	for _, c := range held {
		check(m.t, c.Conn.(*net.TCPConn).CloseWrite())
		c.Read(make([]byte, 1))
		c.Close()
	}
	deadline := time.Now().Add(patience)
	for {
		flows, err := m.d.HeldFlows()
		check(m.t, err)
		open := 0
		check(m.t, m.d.eachFlow(func(key datapathFlow, s datapathFlowState) {
			for _, c := range held {
				if l := addrPortOf(c.LocalAddr()); s.Ended == 0 && (l.Port() == key.PodPort || l.Port() == key.PeerPort) {
					open++
				}
			}
		}))
		if open == 0 {
			return
		}
		if time.Now().After(deadline) {
			m.t.Errorf("connections of pod %s are still held: %v", uid, flows)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestFlowsStayOnChange(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8081)
	held := m.holdAll(m.a, m.one, "proxy1")
	m.a.Tenant = 2
	check(t, m.d.MovePod(m.a.Pod, func(from uint16) ([]model.Flow, error) {
		flows, err := m.reader(m.a)(from)
		m.hold(&held, "outbound, opened while they are read", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "proxy1")
		m.hold(&held, "upstream, opened while they are read", m.one.namespace, at(m.a.v6, 0), at(remoteAddresses.v6, 80), "app fd77::2")
		return flows, err
	}))
	check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
	goOn(t, "moved", held)
	more := m.holdAll(m.a, m.two, "proxy2")

	// The former tenant opens what they need, and what an address of its pod needs
	// only, until none is left or the time is over.
	m.hold(&held, "upstream of the former tenant", m.one.namespace, at(m.a.v4, 0), at(remoteAddresses.v4, 80), "app "+m.a.v4.String())
	m.hold(&held, "delivered by the former tenant", m.one.namespace, at(remoteAddresses.v4, 0), at(m.a.v4, 8081), "app "+remoteAddresses.v4.String())
	check(t, m.d.SweepFlows(time.Hour))
	m.hold(&held, "upstream of the former tenant, swept", m.one.namespace, at(m.a.v6, 0), at(remoteAddresses.v6, 80), "app "+m.a.v6.String())
	wantPlacement(t, m.d, "a", 2, 1)
	check(t, m.d.deleteFormers(func(datapathFormer, uint64) bool { return true }))
	wantPlacement(t, m.d, "a", 2)
	before := m.counters(1).Dropped.Foreign
	syn(t, m.one.namespace, m.a.v4, at(remoteAddresses.v4, 80), func() bool { return m.counters(1).Dropped.Foreign > before })
	// Nor can one end those of another: a reset from tenant 2, to the pod and as the pod.
	m.forge(m.two, addrPortOf(held[0].RemoteAddr()), addrPortOf(held[0].LocalAddr()))
	m.forge(m.two, addrPortOf(held[2].LocalAddr()), addrPortOf(held[2].RemoteAddr()))
	goOn(t, "forged", held)

	// Adopted by another process.
	check(t, m.d.Close())
	m.d = m.open()
	check(t, m.d.UpdatePod(m.a.Pod))
	goOn(t, "adopted", held)
	// And back: those of both are where they were.
	m.a.Tenant = 1
	check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
	goOn(t, "back", append(held, more...))
	m.greets("back", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")

	// A tenant that is gone has none; its index may be given to another.
	check(t, m.d.DeleteTenant(2))
	flows, err := m.d.HeldFlows()
	if err != nil || flows["a"][2] != 0 || flows["a"][1] == 0 {
		t.Errorf("held %v, %v", flows, err)
	}
	goOn(t, "the other is gone", held)
	m.endFlows(held, "a")
}

// forge sends packets with FIN and RST, as a tenant that binds another's address could.
func (m *mesh) forge(n *testTenant, from, to netip.AddrPort) {
	t := m.t
	t.Helper()
	before := m.counters(n.Index).Dropped.Foreign
	for _, flags := range []byte{1, 4} {
		forgePacket(t, n.namespace, from, to, flags)
	}
	if after := m.counters(n.Index).Dropped.Foreign; after != before+2 {
		t.Errorf("%d packets of a flow of another's dropped, want 2", after-before)
	}
	for _, port := range []uint16{from.Port(), to.Port()} {
		if s := m.flowAt(port); s.Ended != 0 {
			t.Errorf("a tenant ended another's connection: %+v", s)
		}
	}
}

func addrPortOf(a net.Addr) netip.AddrPort { return unmapped(a.(*net.TCPAddr).AddrPort()) }

// forgePacket sends a packet of IPv4 with the sequence number 0, which no end takes.
func forgePacket(t *testing.T, n *namespace, from, to netip.AddrPort, flags byte) {
	t.Helper()
	sendSegment(t, n, from, to, flags, 0, 0)
}

// forgeValidPacket sends one with a checksum that fits, and any sequence number.
func forgeValidPacket(t *testing.T, n *namespace, from, to netip.AddrPort, flags byte, sequence uint16) {
	t.Helper()
	const length = 20
	sum := uint32(unix.IPPROTO_TCP + length + acknowledged + 5<<12 + int(flags) + int(sequence) + int(from.Port()) + int(to.Port()))
	for _, a := range []netip.Addr{from.Addr(), to.Addr()} {
		b := a.As4()
		sum += uint32(b[0])<<8 + uint32(b[1]) + uint32(b[2])<<8 + uint32(b[3])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	sendSegment(t, n, from, to, flags, sequence, ^uint16(sum))
}

// acknowledged is what forged segments acknowledge; a reset that answers one begins there.
const acknowledged = 1

func sendSegment(t *testing.T, n *namespace, from, to netip.AddrPort, flags byte, sequence, checksum uint16) {
	t.Helper()
	n.do(t, func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
		check(t, err)
		defer unix.Close(fd)
		check(t, unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1))
		check(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: from.Addr().As4()}))
		packet := make([]byte, 20)
		packet[0], packet[1] = byte(from.Port()>>8), byte(from.Port())
		packet[2], packet[3] = byte(to.Port()>>8), byte(to.Port())
		packet[6], packet[7] = byte(sequence>>8), byte(sequence)
		packet[11] = acknowledged
		packet[12], packet[13] = 5<<4, flags
		packet[16], packet[17] = byte(checksum>>8), byte(checksum)
		check(t, unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: to.Addr().As4()}))
	})
}

// flowAt is what is written down of the connection with a port at the pod's end.
func (m *mesh) flowAt(port uint16) (found datapathFlowState) {
	m.t.Helper()
	check(m.t, m.d.eachFlow(func(key datapathFlow, s datapathFlowState) {
		if key.PodPort == port {
			found = s
		}
	}))
	return found
}

// A connection's end is its last packet; then its ports can be used again, and
// the next one goes where new ones go. What only looks like an end isn't one.
func TestFlowEnds(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	from, to := at(m.a.v4, 40000), at(remoteAddresses.v4, 80)
	hold := func(want string) *net.TCPConn {
		var held []heldFlow
		m.hold(&held, "held", m.a.namespace, from, to, want)
		return held[0].Conn.(*net.TCPConn)
	}
	excluded := []steer.Exclusion{{Port: 80}}
	check(t, m.d.SetExclusions(excluded))
	c := hold("app 10.77.0.2")
	check(t, c.SetLinger(0))
	check(t, c.Close())
	check(t, m.d.SetExclusions(nil))
	c = hold("proxy1")
	if s := m.flowAt(40000); s.Seen != 0 {
		t.Errorf("the former connection is still written down: %+v", s)
	}
	check(t, c.SetLinger(0))
	check(t, c.Close())

	check(t, m.d.SetExclusions(excluded))
	c = hold("app 10.77.0.2")
	check(t, c.CloseWrite())
	c.Read(make([]byte, 1))
	for deadline := time.Now().Add(patience); m.flowAt(40000).Seen != 0; {
		if time.Now().After(deadline) {
			t.Fatalf("both ends have closed: %+v", m.flowAt(40000))
		}
		time.Sleep(time.Millisecond)
	}
	var v datapathVeth
	check(t, m.d.maps[datapathMapVeths].Lookup(uint32(m.a.Ifindex), &v))
	if v.Learned != 0 {
		t.Errorf("%d connections of the pod are counted, want 0", v.Learned)
	}

	// Of an address that another pod gets, nothing stays.
	check(t, c.Close())
	from = at(m.a.v4, 40001)
	hold("app 10.77.0.2")
	m.c.IPs = append(m.c.IPs, m.a.v4)
	check(t, m.d.UpdatePod(m.c.Pod))
	if s := m.flowAt(40001); s.Seen != 0 {
		t.Errorf("another pod's connection stays: %+v", s)
	}
}

func TestFlowsStayOnLeave(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8081)
	serve(t, m.a.namespace, 8080)
	held := m.holdAll(m.a, m.one, "proxy1")
	check(t, m.d.ReleasePod("a", m.reader(m.a)))
	check(t, m.d.ReleasePod("a", m.reader(m.a)))
	goOn(t, "released", held)
	var direct []heldFlow
	for _, family := range []int{4, 6} {
		pod, remote := m.a.of(family), remoteAddresses.of(family)
		m.hold(&direct, "outbound in the clear", m.a.namespace, netip.AddrPort{}, at(remote, 80), "app "+pod.String())
		m.hold(&direct, "inbound in the clear", m.remote, netip.AddrPort{}, at(pod, 8080), "app "+remote.String())
	}
	goOn(t, "released", slices.Concat(held, direct))
	check(t, m.d.Close())
	m.d = m.open()
	goOn(t, "adopted", slices.Concat(held, direct))
	m.endFlows(held, "a")
	check(t, m.d.DeletePod("a"))
	goOn(t, "deleted", direct)
	if flows, err := m.d.HeldFlows(); err != nil || len(flows) != 0 {
		t.Errorf("held %v, %v after all is deleted", flows, err)
	}
	check(t, m.d.ReleasePod("a", nil))
}

// What isn't known never passes in the clear: both ends would say that they don't
// know it, by a reset, if they saw it.
func TestMidstream(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	eachFamily(t, func(t *testing.T, family int) {
		m.t = t
		check(t, m.d.UpdatePod(m.a.Pod))
		var held []heldFlow
		m.hold(&held, "outbound", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.of(family), 80), "proxy1")
		m.hold(&held, "inbound", m.remote, netip.AddrPort{}, at(m.a.of(family), 8080), "proxy1")
		check(t, m.d.ReleasePod("a", nil))
		for _, c := range held {
			before := m.pod1("a").Dropped.Midstream
			c.SetDeadline(time.Now().Add(300 * time.Millisecond))
			c.Write([]byte("secret"))
			_, err := c.Read(make([]byte, 1))
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %v, want silence", c.name, err)
			}
			if after := m.pod1("a").Dropped.Midstream; after == before {
				t.Errorf("%s: not counted", c.name)
			}
		}
	})
}

func (m *mesh) pod1(uid string) steer.PodCounters {
	m.t.Helper()
	all, err := m.d.PodCounters()
	check(m.t, err)
	return all[uid]
}

func TestOver(t *testing.T) {
	const idle = time.Hour
	for _, c := range []struct {
		state datapathFlowState
		quiet time.Duration
		want  bool
	}{
		{datapathFlowState{}, idle - 1, false},
		{datapathFlowState{}, idle, true},
		{datapathFlowState{Ended: endedPod}, idle - 1, false},
		{datapathFlowState{Ended: endedPod | endedPeer}, endedLinger - 1, false},
		{datapathFlowState{Ended: endedPod | endedPeer}, endedLinger, true},
		{datapathFlowState{Ended: endedReset}, endedLinger, true},
		{datapathFlowState{Learned: 1, BytesSent: 1}, openedLinger - 1, false},
		{datapathFlowState{Learned: 1, BytesSent: 1}, openedLinger, true},
		{datapathFlowState{Learned: 1, BytesSent: 1, BytesReceived: 1}, openedLinger, false},
	} {
		if got := over(c.state, c.quiet, idle); got != c.want {
			t.Errorf("%+v after %v: %v, want %v", c.state, c.quiet, got, c.want)
		}
	}
}

func TestSweep(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	check(t, m.d.ReleasePod("a", nil))
	var held []heldFlow
	m.hold(&held, "outbound", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "app 10.77.0.2")
	goOn(t, "open", held)
	check(t, m.d.SweepFlows(time.Hour))
	goOn(t, "swept", held)
	check(t, m.d.SweepFlows(0))
	if flows, err := m.d.HeldFlows(); err != nil || len(flows) != 0 {
		t.Errorf("held %v, %v after a sweep of all", flows, err)
	}
	held[0].SetDeadline(time.Now().Add(300 * time.Millisecond))
	before := m.pod1("a").Dropped.Midstream
	held[0].Write([]byte("x"))
	held[0].Read(make([]byte, 1))
	if m.pod1("a").Dropped.Midstream == before {
		t.Error("a packet after the sweep isn't dropped")
	}
}

// A socket that no process has is one of a connection until its peer has all that was sent.
func TestEstablishedFlowsWithoutProcess(t *testing.T) {
	n := newNamespace(t)
	n.do(t, func() {
		server, err := net.Listen("tcp", "127.0.0.1:0")
		check(t, err)
		defer server.Close()
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
		client, err := dialer.Dial("tcp", server.Addr().String())
		check(t, err)
		defer client.Close()
		accepted, err := server.Accept()
		check(t, err)
		defer accepted.Close()
		// Both ends are in the namespace.
		want := func(sockets int, when string) {
			t.Helper()
			deadline := time.Now().Add(patience)
			for {
				flows, err := EstablishedFlows(n.path(), netip.MustParseAddr("127.0.0.2"))
				check(t, err)
				if len(flows) == sockets {
					return
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s: %v, want %d", when, flows, sockets)
				}
				time.Sleep(time.Millisecond)
			}
		}
		want(2, "open")
		check(t, accepted.(*net.TCPConn).CloseWrite())
		want(2, "half-closed")
		check(t, accepted.Close())
		want(1, "closed by one end")
		check(t, client.Close())
		want(0, "closed by both")
	})
}

func TestFarEndsOfTunnels(t *testing.T) {
	pod, peer := netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("10.77.0.3")
	server, client := model.Flow{Pod: at(pod, 15008), Peer: at(peer, 40000)}, model.Flow{Pod: at(pod, 40001), Peer: at(peer, 15008)}
	plain, dialled := model.Flow{Pod: at(pod, 40002), Peer: at(peer, 80)}, model.Flow{Pod: at(pod, 15008), Peer: at(peer, 80)}
	side := func(f model.Flow, s model.Side) model.Flow { f.Side = s; return f }
	// Both ends of tunnels are in the namespace; what the pod dialled from their port is a connection of its own.
	want := []model.Flow{side(server, model.WireSide), side(client, model.WireSide), side(plain, model.WireSide), side(plain, model.PodSide), side(dialled, model.PodSide)}
	got := withoutFarEnds(append([]model.Flow{side(server, model.PodSide), side(client, model.PodSide)}, want...))
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// A connection that nobody answers is kept as if its pod had sent nothing after the SYN.
func TestOneEndKeepsNothing(t *testing.T) {
	m := newMesh(t)
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 80}}))
	from, to := at(m.a.v4, 41000), at(remoteAddresses.v4, 80)
	// Packets without a checksum, which nobody answers.
	forgePacket(t, m.a.namespace, from, to, 2)
	opened := m.flowAt(41000)
	if opened.Seen == 0 {
		t.Fatal("it isn't written down")
	}
	forgePacket(t, m.a.namespace, from, to, 16)
	if s := m.flowAt(41000); s.BytesSent == 0 || s.Seen != opened.Seen {
		t.Errorf("after another packet of the pod: %+v, before %+v", s, opened)
	}
	forgePacket(t, m.remote, to, from, 16)
	if s := m.flowAt(41000); s.BytesReceived == 0 || s.Seen <= opened.Seen {
		t.Errorf("after one of its peer: %+v, before %+v", s, opened)
	}
}
