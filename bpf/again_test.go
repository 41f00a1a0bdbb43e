package bpf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// vanish has the peer's end of a connection go without a packet, after what it is given to do
// with the sequence numbers that are next.
func vanish(t *testing.T, c net.Conn, before func(sequence, acknowledged uint32)) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	check(t, err)
	var next [2]uint32
	var failed error
	check(t, raw.Control(func(fd uintptr) {
		if failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); failed != nil {
			return
		}
		for i, queue := range []int{2, 1} { // TCP_SEND_QUEUE, TCP_RECV_QUEUE
			if failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queue); failed != nil {
				return
			}
			var n int
			if n, failed = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ); failed != nil {
				return
			}
			next[i] = uint32(n)
		}
	}))
	check(t, failed)
	before(next[0], next[1])
	check(t, c.Close())
}

// sendValid sends a segment that its receiver takes.
func sendValid(t *testing.T, n *namespace, from, to netip.AddrPort, flags byte, sequence, acknowledged uint32, payload ...byte) {
	t.Helper()
	n.do(t, func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
		check(t, err)
		defer unix.Close(fd)
		check(t, unix.Sendto(fd, validSegment(from, to, flags, sequence, acknowledged, payload...), 0, &unix.SockaddrInet4{Addr: to.Addr().As4()}))
	})
}

// acceptingAt serves a port of a pod and hands over what it accepts.
func acceptingAt(t *testing.T, n *namespace, port uint16) <-chan net.Conn {
	t.Helper()
	accepted := make(chan net.Conn, 1)
	n.do(t, func() {
		l, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		check(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintln(c, "app")
				accepted <- c
			}
		}()
	})
	return accepted
}

// The peer of a connection in the clear can have it end so that nothing tells of it but the
// pod's kernel. The next one with its ports doesn't pass in the clear.
func TestBeginsAgain(t *testing.T) {
	m := newMesh(t)
	for i, c := range []struct {
		name   string
		family int
		end    func(atPod, atPeer net.Conn)
	}{
		{"a reset behind a hole", 4, func(atPod, atPeer net.Conn) {
			from, to := addrPortOf(atPeer.LocalAddr()), addrPortOf(atPeer.RemoteAddr())
			vanish(t, atPeer, func(sequence, acknowledged uint32) {
				// Linux takes a reset at the end of what it has.
				sendValid(t, m.remote, from, to, tcpACK, sequence+100, acknowledged, 'x', 'x')
				sendValid(t, m.remote, from, to, tcpRST, sequence+102, 0)
				if _, err := atPod.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Fatalf("the pod reads %v, want a reset", err)
				}
			})
		}},
		{"no packet", 4, func(atPod, atPeer net.Conn) {
			vanish(t, atPod, func(uint32, uint32) {})
			vanish(t, atPeer, func(uint32, uint32) {})
		}},
		{"no packet, IPv6", 6, func(atPod, atPeer net.Conn) {
			vanish(t, atPod, func(uint32, uint32) {})
			vanish(t, atPeer, func(uint32, uint32) {})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			port, served := 42000+uint16(i), 8080+uint16(i)
			accepted := acceptingAt(t, m.a.namespace, served)
			from, to := at(remoteAddresses.of(c.family), port), at(m.a.of(c.family), served)
			check(t, m.d.SetExclusions([]steer.Exclusion{{Port: served, Inbound: true}}))
			atPeer, greeting, err := dial(t, m.remote, from, to)
			if greeting != "app" {
				t.Fatalf("%q, %v, want a connection in the clear", greeting, err)
			}
			check(t, m.d.SetExclusions(nil))
			c.end(<-accepted, atPeer)
			if s := m.flowOf(port); s.Seen == 0 || s.Ended != 0 {
				t.Fatalf("its end was seen: %+v", s)
			}
			if _, greeting, err := dial(t, m.remote, from, to); greeting != "proxy1" {
				t.Errorf("the next with its ports: %q, %v, want proxy1", greeting, err)
			}
		})
	}
}

// A SYN with a living connection's ports ends nothing, also one that its kernel takes.
func TestForgedBeginnings(t *testing.T) {
	m := newMesh(t)
	serve(t, m.a.namespace, 8080)
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 8080, Inbound: true}}))
	from, to := at(remoteAddresses.v4, 42010), at(m.a.v4, 8080)
	var held []heldFlow
	m.hold(&held, "in the clear", m.remote, from, to, "app "+remoteAddresses.v4.String())
	check(t, m.d.SetExclusions(nil))
	dropped := func() uint64 { return m.pod1("a").Dropped.Midstream }
	for _, beyond := range []uint32{0, 1, 1000, 1 << 31, ^uint32(0)} {
		sequence := m.flowOf(42010).Expected + beyond // as of now: it goes on each time
		sendValid(t, m.remote, from, to, tcpSYN, sequence, 0)
		// What has data is dropped: as a segment it could be the connection's.
		before := dropped()
		sendValid(t, m.remote, from, to, tcpSYN, sequence, 0, 'x', 'x')
		for deadline := time.Now().Add(patience); dropped() == before && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		}
		if n := dropped() - before; n != 1 {
			t.Errorf("%d SYNs with data were dropped, want 1", n)
		}
		goOn(t, fmt.Sprintf("after a SYN at %d behind what is next", int32(beyond)), held)
	}
	if s := m.flowOf(42010); s.Ended != 0 {
		t.Errorf("a forged SYN ended it: %+v", s)
	}
}

// What nobody has answered yet goes on where it began, for as long as a kernel tries.
func TestSYNComesAgain(t *testing.T) {
	const fromItsSYN = "app"
	m := newMesh(t)
	accepted := acceptingAt(t, m.a.namespace, 8080)
	for i, c := range []struct {
		name   string
		change func(*datapathFlowState)
		want   string
	}{
		{"at once", func(*datapathFlowState) {}, fromItsSYN},
		{"too late", func(s *datapathFlowState) { s.Seen -= uint64(openedLinger) }, "proxy1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			port := 42020 + uint16(i)
			from, to := at(remoteAddresses.v4, port), at(m.a.v4, 8080)
			check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 8080, Inbound: true}}))
			forgePacket(t, m.remote, from, to, tcpSYN) // without a checksum: it gets lost
			m.awaitFlow(port, "a SYN", func(s datapathFlowState) bool { return s.Seen != 0 })
			check(t, m.d.SetExclusions(nil))
			check(t, m.d.eachFlow(func(key datapathFlow, s datapathFlowState) {
				if key.PeerPort == port {
					c.change(&s)
					check(t, m.d.maps[datapathMapFlows].Put(key, s))
				}
			}))
			if _, greeting, err := dial(t, m.remote, from, to); greeting != c.want {
				t.Errorf("%q, %v, want %s", greeting, err, c.want)
			}
			if c.want != fromItsSYN {
				return
			}
			<-accepted
			if s := m.flowOf(port); s.Led != 1 {
				t.Errorf("its SYN may come again: %+v", s)
			}
		})
	}
}

// The pod's kernel takes a question for a segment also where it looks at its checksum, which
// it doesn't of what another veth sends: it resets, and the next SYN is steered.
func TestQuestionHasItsChecksum(t *testing.T) {
	m := newMesh(t)
	accepted := acceptingAt(t, m.a.namespace, 8080)
	from, to := at(remoteAddresses.v4, 42030), at(m.a.v4, 8080)
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 8080, Inbound: true}}))
	atPeer, greeting, err := dial(t, m.remote, from, to)
	if greeting != "app" {
		t.Fatalf("%q, %v, want a connection in the clear", greeting, err)
	}
	check(t, m.d.SetExclusions(nil))
	vanish(t, <-accepted, func(uint32, uint32) {})
	vanish(t, atPeer, func(uint32, uint32) {})
	sendValid(t, m.remote, from, to, tcpSYN, 12345, 0)
	m.awaitFlow(42030, "a reset of the pod", func(s datapathFlowState) bool { return s.Ended&endedReset != 0 })
}

// awaitFlow waits for what is written down of the connection with a port at the peer's end.
func (m *mesh) awaitFlow(port uint16, what string, fits func(datapathFlowState) bool) {
	m.t.Helper()
	for deadline := time.Now().Add(patience); !fits(m.flowOf(port)); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("%s isn't there: %+v", what, m.flowOf(port))
		}
	}
}

// flowOf is what is written down of the connection with a port at the peer's end.
func (m *mesh) flowOf(port uint16) (found datapathFlowState) {
	m.t.Helper()
	check(m.t, m.d.eachFlow(func(key datapathFlow, s datapathFlowState) {
		if key.PeerPort == port {
			found = s
		}
	}))
	return found
}
