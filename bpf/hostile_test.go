package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// neighbour is a pod on the bridge that isn't in the mesh: what it sends to others on the
// bridge passes no stack of the node's.
func (m *mesh) neighbour() *testPod {
	m.t.Helper()
	p := m.pod("x", 1, addresses("10.77.1.9", "fd77:1::9"), true)
	// Where the node's firewall looks at what a bridge forwards, it mends what this sends.
	for _, family := range []string{"ip", "ip6"} {
		err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+family+"tables", []byte("0"), 0o644)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			m.t.Fatal(err)
		}
	}
	return p
}

// sendFrame sends what is behind the addresses of a frame.
func (p *testPod) sendFrame(t *testing.T, to []byte, kind uint16, payload []byte) {
	t.Helper()
	p.do(t, func() {
		eth0, err := netlink.LinkByName("eth0")
		check(t, err)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		defer unix.Close(fd)
		frame := slices.Concat(to, p.MAC, binary.BigEndian.AppendUint16(nil, kind), payload)
		check(t, unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: eth0.Attrs().Index}))
	})
}

// framesWith counts the frames that come to a namespace and hold something.
func framesWith(t *testing.T, n *namespace, what string) *atomic.Int64 {
	t.Helper()
	const all = 0x0300 // ETH_P_ALL, as the network has it
	var fd int
	n.do(t, func() {
		var err error
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
		check(t, err)
		check(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}))
	})
	count, done, ended := &atomic.Int64{}, make(chan struct{}), make(chan struct{})
	t.Cleanup(func() {
		close(done)
		<-ended
		unix.Close(fd)
	})
	go func() {
		defer close(ended)
		for b := make([]byte, 512); ; {
			select {
			case <-done:
				return
			default:
			}
			if size, _, err := unix.Recvfrom(fd, b, 0); err == nil && bytes.Contains(b[:size], []byte(what)) {
				count.Add(1)
			}
		}
	}()
	return count
}

// A frame may be longer than the packet in it. What is behind that is no data: a SYN without
// any asks the pod whether its connection has ended.
func TestPaddedFrames(t *testing.T) {
	const shortest = 60
	m := newMesh(t)
	x := m.neighbour()
	accepted := acceptingAt(t, m.c.namespace, 8080)
	from, to := at(x.v4, 42040), at(m.c.v4, 8080)
	m.c.Exclusions = []steer.Exclusion{{Port: 8080, Inbound: true}}
	check(t, m.d.UpdatePod(m.c.Pod))
	atPeer, greeting, err := dial(t, x.namespace, from, to)
	if greeting != "app" {
		t.Fatalf("%q, %v, want a connection in the clear", greeting, err)
	}
	m.c.Exclusions = nil
	check(t, m.d.UpdatePod(m.c.Pod))
	frame := func(segment []byte) {
		t.Helper()
		packet := ipv4(unix.IPPROTO_TCP, x.v4, m.c.v4, segment)
		x.sendFrame(t, m.c.MAC, unix.ETH_P_IP, append(packet, make([]byte, shortest-14-len(packet))...))
	}
	vanish(t, atPeer, func(sequence, acknowledged uint32) {
		before := m.flowOf(42040)
		frame(validSegment(from, to, tcpACK, sequence, acknowledged))
		m.awaitFlow(42040, "an acknowledgement", func(s datapathFlowState) bool { return s.BytesReceived > before.BytesReceived })
		if s := m.flowOf(42040); s.Expected != sequence {
			t.Errorf("behind %d bytes of a frame after an acknowledgement the pod waits for %d, want %d", shortest, s.Expected, sequence)
		}
	})
	vanish(t, <-accepted, func(uint32, uint32) {})
	frame(validSegment(from, to, tcpSYN, 12345, 0))
	m.awaitFlow(42040, "a reset of the pod", func(s datapathFlowState) bool { return s.Ended&endedReset != 0 })
}

// Who is beside a pod, or sends from anywhere to a node that doesn't look at where its
// sources are, may say that it is another pod of the pod's tenant. That pod's proxy would
// dial in its name.
func TestPeerSaysItIsAPod(t *testing.T) {
	m := newMesh(t)
	x := m.neighbour()
	forge := func(from netip.AddrPort, flags byte, sequence, acknowledged uint32) {
		t.Helper()
		to := at(m.c.v4, 8080)
		x.sendFrame(t, m.c.MAC, unix.ETH_P_IP, ipv4(unix.IPPROTO_TCP, from.Addr(), to.Addr(), validSegment(from, to, flags, sequence, acknowledged)))
	}
	await := func(what string, is func() bool) {
		t.Helper()
		for deadline := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %+v", what, m.counters(1))
			}
		}
	}
	// Not by a guess: the pod that it is said to be tells the number.
	deaf(t, m.a.namespace, 42050)
	var answers net.PacketConn
	m.a.do(t, func() {
		var err error
		answers, err = net.ListenPacket("ip4:tcp", m.a.v4.String())
		check(t, err)
	})
	defer answers.Close()
	check(t, answers.SetDeadline(time.Now().Add(patience)))
	forge(at(m.a.v4, 42050), tcpSYN, 1, 0)
	answer := make([]byte, 128)
	for answer[13] != tcpSYN|tcpACK {
		_, _, err := answers.ReadFrom(answer)
		check(t, err)
	}
	forge(at(m.a.v4, 42050), tcpACK, 2, binary.BigEndian.Uint32(answer[4:])+1)
	if port, from, to := m.proxy1.next(t); port != "15006" || unmapped(from) != at(m.a.v4, 42050) {
		t.Errorf("the proxy has a connection from %s to %s at port %s, want one in plain text, at 15006", from, to, port)
	}
	m.c.Strict = true
	check(t, m.d.UpdatePod(m.c.Pod))
	before := m.counters(1)
	forge(at(m.a.v4, 42051), tcpSYN, 1, 0)
	await("a SYN in a pod's name to one that takes no plain text", func() bool {
		return m.counters(1).Dropped.PlainText > before.Dropped.PlainText
	})
	// Its own are known by the veth that they come from.
	for _, family := range []int{4, 6} {
		m.greets("from the pod itself", m.a.namespace, at(m.c.of(family), 8080), "proxy1")
	}
	// What is excluded passes in the clear, and comes to the other pod as others' does.
	before = m.counters(1)
	m.a.Exclusions = []steer.Exclusion{{Port: 8080}}
	check(t, m.d.UpdatePod(m.a.Pod))
	if _, greeting, err := dial(t, m.a.namespace, netip.AddrPort{}, at(m.c.v4, 8080)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("in the clear to one that takes no plain text: %q, %v, want it refused", greeting, err)
	}
	m.c.Strict = false
	check(t, m.d.UpdatePod(m.c.Pod))
	m.greets("in the clear", m.a.namespace, at(m.c.v4, 8080), "proxy1")
	if now := m.counters(1); now.Plain == before.Plain || now.Outbound != before.Outbound {
		t.Errorf("in the clear: %+v, before %+v", now, before)
	}
}

// However a pod forms its packets, their TCP gets to its tenant or nowhere.
func TestFormsOfPackets(t *testing.T) {
	const hidden, plain = "hidden", "plain"
	m := newMesh(t)
	// Also where a source or a destination is no other's.
	route(t, "bhtremote", "::/0", remoteAddresses.v6)
	sysctl(t, "net/ipv4/conf/all/rp_filter=0", "net/ipv4/conf/"+m.a.veth+"/rp_filter=0", "net/ipv4/conf/all/accept_source_route=1")
	seen, passed := framesWith(t, m.remote, hidden), framesWith(t, m.remote, plain)
	veth, err := netlink.LinkByName(m.a.veth)
	check(t, err)
	gateway, a, remote := veth.Attrs().HardwareAddr, m.a.pair, remoteAddresses
	tcp := func(flags byte) []byte { return append(segment(42060, 80, flags), hidden...) }
	syn := tcp(tcpSYN)
	short := slices.Clone(syn)
	short[12] = 0 // shorter than a header
	changed := func(packet []byte, changes map[int]byte) []byte {
		for at, b := range changes {
			packet[at] = b
		}
		packet[10], packet[11] = 0, 0
		var sum uint32
		for i := 0; i < int(packet[0]&0xf)*4; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(packet[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(packet[10:], ^uint16(sum))
		return packet
	}
	v4 := func(payload []byte) []byte { return ipv4(unix.IPPROTO_TCP, a.v4, remote.v4, payload) }
	v6 := func(next byte, payload ...[]byte) []byte { return ipv6(next, a.v6, remote.v6, payload...) }
	options := func(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }
	fragment := func(next byte, field uint16) []byte {
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16([]byte{next, 0}, field), 7)
	}
	var seven [][]byte
	for range 6 {
		seven = append(seven, options(unix.IPPROTO_DSTOPTS))
	}
	seven = append(seven, options(unix.IPPROTO_TCP), syn)
	routed := slices.Concat([]byte{0x46}, v4(syn)[1:20], []byte{131, 3, 4, 1}, syn)
	binary.BigEndian.PutUint16(routed[2:], uint16(len(routed)))
	malformed := func(d steer.Drops) uint64 { return d.Malformed }
	inFragments := func(d steer.Drops) uint64 { return d.Fragment }
	spoofed := func(d steer.Drops) uint64 { return d.Spoofed }
	for _, c := range []struct {
		name    string
		kind    uint16
		payload []byte
		counted func(steer.Drops) uint64 // nil: it is its tenant's
	}{
		{"a SYN", unix.ETH_P_IP, v4(syn), nil},
		{"no flags", unix.ETH_P_IP, v4(tcp(0)), nil},
		{"a header of no length", unix.ETH_P_IP, v4(short), nil},
		{"SYN and FIN", unix.ETH_P_IP, v4(tcp(tcpSYN | 1)), malformed},
		{"a first fragment", unix.ETH_P_IP, changed(v4(syn), map[int]byte{6: 0x20}), inFragments},
		{"a later fragment", unix.ETH_P_IP, changed(v4(syn), map[int]byte{7: 3}), inFragments},
		{"IP's header too short", unix.ETH_P_IP, changed(v4(syn), map[int]byte{0: 0x44}), malformed},
		{"a source route", unix.ETH_P_IP, changed(routed, nil), nil},
		{"a tag", unix.ETH_P_8021Q, slices.Concat([]byte{0, 5, 8, 0}, v4(syn)), nil},
		{"a tag of priority alone", unix.ETH_P_8021Q, slices.Concat([]byte{0x60, 0, 8, 0}, v4(syn)), nil},
		{"two tags", unix.ETH_P_8021AD, slices.Concat([]byte{0, 5, 0x81, 0, 0, 0, 8, 0}, v4(syn)), malformed},
		{"the node as source", unix.ETH_P_IP, ipv4(unix.IPPROTO_TCP, nodeAddresses.v4, remote.v4, syn), spoofed},
		{"loopback as source", unix.ETH_P_IP, ipv4(unix.IPPROTO_TCP, netip.MustParseAddr("127.0.0.1"), remote.v4, syn), spoofed},
		{"what proxies deliver from", unix.ETH_P_IP, ipv4(unix.IPPROTO_TCP, deliver.v4, remote.v4, syn), spoofed},
		{"IPv6", unix.ETH_P_IPV6, v6(unix.IPPROTO_TCP, syn), nil},
		{"a link's own address", unix.ETH_P_IPV6, ipv6(unix.IPPROTO_TCP, netip.MustParseAddr("fe80::77"), remote.v6, syn), spoofed},
		{"options", unix.ETH_P_IPV6, v6(unix.IPPROTO_HOPOPTS, options(unix.IPPROTO_DSTOPTS), options(unix.IPPROTO_TCP), syn), nil},
		{"options without an end", unix.ETH_P_IPV6, v6(unix.IPPROTO_DSTOPTS, seven...), malformed},
		{"a packet in one fragment", unix.ETH_P_IPV6, v6(unix.IPPROTO_FRAGMENT, fragment(unix.IPPROTO_TCP, 0), syn), nil},
		{"IPv6's first fragment", unix.ETH_P_IPV6, v6(unix.IPPROTO_FRAGMENT, fragment(unix.IPPROTO_TCP, 1), syn), inFragments},
		{"IPv6's later fragment", unix.ETH_P_IPV6, v6(unix.IPPROTO_FRAGMENT, fragment(unix.IPPROTO_TCP, 24), syn), inFragments},
		{"options in a fragment", unix.ETH_P_IPV6, v6(unix.IPPROTO_FRAGMENT, fragment(unix.IPPROTO_DSTOPTS, 1), options(unix.IPPROTO_TCP), syn), malformed},
		{"options cut off", unix.ETH_P_IPV6, v6(unix.IPPROTO_DSTOPTS, []byte{unix.IPPROTO_TCP, 200}, []byte(hidden)), malformed},
		// Written as one of IPv6, an address of IPv4 is another one.
		{"the node's address of IPv4", unix.ETH_P_IPV6, ipv6(unix.IPPROTO_TCP, a.v6, netip.AddrFrom16(nodeAddresses.v4.As16()), syn), malformed},
		{"the pod's address of IPv4", unix.ETH_P_IPV6, ipv6(unix.IPPROTO_TCP, netip.AddrFrom16(a.v4.As16()), remote.v6, syn), malformed},
	} {
		before, got, marks := m.pod1("a").Dropped, seen.Load(), passed.Load()
		m.a.sendFrame(t, gateway, c.kind, c.payload)
		// What is behind it on the wire comes after it.
		m.a.sendFrame(t, gateway, unix.ETH_P_IP, ipv4(unix.IPPROTO_UDP, a.v4, remote.v4, udp(5300, []byte(plain))))
		for deadline := time.Now().Add(patience); passed.Load() == marks; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: nothing passes behind it", c.name)
			}
		}
		if n := seen.Load() - got; n != 0 {
			t.Errorf("%s: it gets past the proxy", c.name)
		}
		now := m.pod1("a").Dropped
		if c.counted == nil {
			if now != before {
				t.Errorf("%s: dropped %+v, before %+v", c.name, now, before)
			}
		} else if c.counted(now) != c.counted(before)+1 {
			t.Errorf("%s: dropped %+v, before %+v", c.name, now, before)
		}
	}
}

// ipv6 is a packet of IPv6.
func ipv6(next byte, from, to netip.Addr, payload ...[]byte) []byte {
	a, b, behind := from.As16(), to.As16(), slices.Concat(payload...)
	return slices.Concat([]byte{0x60, 5: byte(len(behind)), 6: next, 7: 64}, a[:], b[:], behind)
}
