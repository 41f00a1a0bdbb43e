package bpf

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Whoever knows the ports of a connection that stays where it began can send in its
// peer's name, and have neither its end nor that it is swept.
func TestForgedEnds(t *testing.T) {
	const fin, syn, rst, ack = 1, 2, 4, 16
	m := newMesh(t)
	serve(t, m.remote, 80)
	d := m.pod("d", 1, addresses("10.77.0.40", "fd77::40"), false)
	serve(t, d.namespace, 8080)
	remote := remoteAddresses.v4
	type kept struct {
		heldFlow
		pod, peer netip.AddrPort
		side      datapathSide
	}
	var all []kept
	keep := func(name string, from *namespace, by, to netip.AddrPort, outbound bool, side datapathSide, want string) {
		t.Helper()
		var held []heldFlow
		m.hold(&held, name, from, by, to, want)
		k := kept{held[0], by, to, side}
		if !outbound {
			k.pod, k.peer = to, by
		}
		all = append(all, k)
	}
	keep("in the clear, outbound", d.namespace, at(d.v4, 41000), at(remote, 80), true, datapathSideSIDE_WIRE, "app "+d.v4.String())
	keep("in the clear, inbound", m.remote, at(remote, 41001), at(d.v4, 8080), false, datapathSideSIDE_WIRE, "app "+remote.String())
	keep("former tenant, outbound", m.a.namespace, at(m.a.v4, 41002), at(remote, 80), true, datapathSideSIDE_POD, "proxy1")
	keep("former tenant, inbound", m.remote, at(remote, 41003), at(m.a.v4, 8080), false, datapathSideSIDE_WIRE, "proxy1")
	check(t, m.d.MovePod(d.Pod, m.reader(d)))
	m.a.Tenant = 2
	check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
	flow := func(k kept) datapathFlowState {
		t.Helper()
		var s datapathFlowState
		pod, err := addrKey(k.pod.Addr())
		check(t, err)
		peer, err := addrKey(k.peer.Addr())
		check(t, err)
		check(t, m.d.maps[datapathMapFlows].Lookup(datapathFlow{Pod: pod, Peer: peer, PodPort: k.pod.Port(), PeerPort: k.peer.Port(), Side: k.side}, &s))
		return s
	}
	for _, k := range all {
		for _, flags := range []byte{rst, fin} {
			goOn(t, "before", []heldFlow{k.heldFlow})
			forgePacket(t, m.remote, k.peer, k.pod, flags)
			if s := flow(k); s.Ended&endedReset != 0 {
				t.Errorf("%s: ended by a forged reset: %+v", k.name, s)
			}
			forgePacket(t, m.remote, k.peer, k.pod, syn)
			goOn(t, fmt.Sprint("forged ", flags), []heldFlow{k.heldFlow})
		}
	}

	// Its end is seen, and who opens another with the same ports finds the mesh.
	for _, k := range all {
		want := map[netip.Addr]string{d.v4: "proxy1", m.a.v4: "proxy2"}[k.pod.Addr()]
		from := m.remote
		if k.LocalAddr().String() == k.pod.String() {
			from = map[netip.Addr]*namespace{d.v4: d.namespace, m.a.v4: m.a.namespace}[k.pod.Addr()]
		}
		// With something that isn't acknowledged yet.
		_, err := k.Write([]byte("x"))
		check(t, err)
		check(t, k.Conn.(*net.TCPConn).SetLinger(0))
		check(t, k.Close())
		// A peer can't take it back, by what the pod's kernel drops for its checksum.
		forgePacket(t, m.remote, k.peer, k.pod, ack)
		if _, got, err := dial(t, from, addrPortOf(k.LocalAddr()), addrPortOf(k.RemoteAddr())); got != want {
			t.Errorf("%s: the next with its ports: %q, %v, want %q", k.name, got, err, want)
		}
	}
}

// What a pod had sent before it got its peer's reset doesn't take that back. What it says
// when its kernel didn't take one does.
func TestResetWhileThePodSends(t *testing.T) {
	const fin, rst, ack = 1, 4, 16
	m := newMesh(t)
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 80}}))
	to := at(remoteAddresses.v4, 80)
	// Segments without a checksum, which no kernel takes.
	open := func(port uint16) netip.AddrPort {
		t.Helper()
		from := at(m.a.v4, port)
		forgePacket(t, m.a.namespace, from, to, tcpSYN)
		forgePacket(t, m.a.namespace, from, to, ack)
		if s := m.flowAt(port); s.Expected != acknowledged {
			t.Fatalf("the pod waits for %d: %+v", acknowledged, s)
		}
		return from
	}
	reset := func(from netip.AddrPort, sequence uint16) {
		t.Helper()
		sendSegment(t, m.remote, to, from, rst, sequence, 0)
		if s := m.flowAt(from.Port()); s.Ended&endedReset == 0 {
			t.Fatalf("a reset isn't seen: %+v", s)
		}
	}
	from := open(41010)
	reset(from, acknowledged)
	forgePacket(t, m.a.namespace, from, to, ack)
	if s := m.flowAt(41010); s.Ended&endedReset == 0 {
		t.Errorf("what was on its way takes the reset back: %+v", s)
	}
	from = open(41011)
	sendSegment(t, m.remote, to, from, fin, acknowledged, 0) // which is lost behind the program
	reset(from, acknowledged+1)
	forgePacket(t, m.a.namespace, from, to, ack)
	if s := m.flowAt(41011); s.Ended&endedReset != 0 {
		t.Errorf("what the pod says doesn't take the reset back: %+v", s)
	}
}

// A pod's older acknowledgement, which came late, has a reset counted that its kernel doesn't
// take. What it says next takes that back, and until then its peer's next SYN is steered.
func TestOlderAcknowledgement(t *testing.T) {
	const rst = 4
	m := newMesh(t)
	serve(t, m.a.namespace, 8080)
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 8080, Inbound: true}}))
	from, to := at(remoteAddresses.v4, 42070), at(m.a.v4, 8080)
	var held []heldFlow
	m.hold(&held, "in the clear", m.remote, from, to, "app "+remoteAddresses.v4.String())
	check(t, m.d.SetExclusions(nil))
	m.a.Strict = true
	check(t, m.d.UpdatePod(m.a.Pod))
	reset := func() {
		t.Helper()
		older := m.flowOf(42070).Expected
		goOn(t, "in the clear", held)
		sendValid(t, m.a.namespace, to, from, tcpACK, 1, older)
		m.awaitFlow(42070, "an older acknowledgement", func(s datapathFlowState) bool { return s.Expected == older })
		sendValid(t, m.remote, from, to, rst, older, 0)
		m.awaitFlow(42070, "a reset", func(s datapathFlowState) bool { return s.Ended&endedReset != 0 })
	}
	reset()
	goOn(t, "after a reset at an older number", held)
	if s := m.flowOf(42070); s.Ended&endedReset != 0 {
		t.Errorf("what the pod says doesn't take the reset back: %+v", s)
	}
	reset()
	before := m.pod1("a").Dropped.PlainText
	sendValid(t, m.remote, from, to, tcpSYN, 12345, 0)
	for deadline := time.Now().Add(patience); m.pod1("a").Dropped.PlainText == before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("a SYN isn't refused as one in plain text: %+v", m.flowOf(42070))
		}
	}
}

// A pod that dials with the ports of a connection that stayed where it began has that one no
// more, also if nobody saw its end.
func TestDialsAgain(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	d := m.pod("d", 1, addresses("10.77.0.40", "fd77::40"), false)
	from, to := at(d.v4, 41020), at(remoteAddresses.v4, 80)
	var held []heldFlow
	m.hold(&held, "in the clear", d.namespace, from, to, "app "+d.v4.String())
	check(t, m.d.MovePod(d.Pod, m.reader(d)))
	goOn(t, "moved", held)
	// A socket that is repaired ends without a packet.
	raw, err := held[0].Conn.(*net.TCPConn).SyscallConn()
	check(t, err)
	var failed error
	check(t, raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1) }))
	check(t, failed)
	check(t, held[0].Close())
	if s := m.flowAt(41020); s.Seen == 0 || s.Ended != 0 {
		t.Fatalf("its end was seen: %+v", s)
	}
	// At once: the peer has it still, and what it answers would end it for the second one.
	forgePacket(t, d.namespace, from, to, tcpSYN)
	if s := m.flowAt(41020); s.Seen != 0 {
		t.Errorf("the first SYN with its ports went where it had been: %+v", s)
	}
	if _, got, err := dial(t, d.namespace, from, to); got != "proxy1" {
		t.Errorf("the next with its ports: %q, %v, want proxy1", got, err)
	}
}
