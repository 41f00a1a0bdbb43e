package bpf

import (
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Connections that are excluded are paced before they are written down: what follows a
// dropped SYN doesn't pass in the clear, and nobody is told that it was opened.
func TestExcludedPace(t *testing.T) {
	const rate, flood = 30, 300
	m := newMesh(t)
	m.one.Connections = steer.ConnectionLimits{DirectPerSecond: rate}
	check(t, m.d.UpdateTenant(m.one.Tenant))
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 5304}}))
	eachFamily(t, func(t *testing.T, family int) {
		before, counted, written, begun := m.counters(1), m.pod1("a").Direct, size(t, m.d.maps[datapathMapFlows]), time.Now()
		sent, passed, dropped := 0, 0, 0
		for ; sent < flood || passed == 0 && time.Since(begun) < patience; sent++ {
			raw(t, m.a.namespace, syscall.IPPROTO_TCP, remoteAddresses.of(family), segment(uint16(20000+sent), 5304, tcpSYN))
			now := m.counters(1)
			passed, dropped = int(now.Excluded-before.Excluded), int(now.Dropped.DirectTooFast-before.Dropped.DirectTooFast)
		}
		if most := int(rate*(1+time.Since(begun).Seconds())) + 1; passed+dropped != sent || passed == 0 || passed > most {
			t.Errorf("of %d connections %d passed, at most %d at %d a second, and %d were dropped", sent, passed, most, rate, dropped)
		}
		if n := int(m.pod1("a").Direct - counted); n != passed {
			t.Errorf("%d are counted as opened, %d passed", n, passed)
		}
		if n := size(t, m.d.maps[datapathMapFlows]) - written; n != passed {
			t.Errorf("%d are written down, %d passed", n, passed)
		}
	})

	// The emergency bypass is for everything that a proxy would have.
	m.a.Bypass = true
	check(t, m.d.UpdatePod(m.a.Pod))
	before := m.counters(1)
	for i := range flood {
		raw(t, m.a.namespace, syscall.IPPROTO_TCP, remoteAddresses.v4, segment(uint16(20000+i), 5306, tcpSYN))
	}
	now := m.counters(1)
	if passed, dropped := now.Bypassed-before.Bypassed, now.Dropped.DirectTooFast-before.Dropped.DirectTooFast; passed != flood || dropped != 0 {
		t.Errorf("of %d connections %d pass by the proxy, and %d were dropped", flood, passed, dropped)
	}
}

// receiving counts the datagrams on a UDP port of a namespace, and answers them or not.
func receiving(t *testing.T, n *namespace, port int, answers bool) *atomic.Int64 {
	t.Helper()
	var c *net.UDPConn
	n.do(t, func() {
		var err error
		c, err = net.ListenUDP("udp", &net.UDPAddr{Port: port})
		check(t, err)
	})
	t.Cleanup(func() { c.Close() })
	count := &atomic.Int64{}
	go func() {
		for b := make([]byte, 64); ; {
			size, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			count.Add(1)
			if answers {
				c.WriteToUDPAddrPort(b[:size], from)
			}
		}
	}()
	return count
}

// flow is a UDP socket, with a source port of its own.
func flow(t *testing.T, n *namespace, to netip.AddrPort) (c net.Conn) {
	t.Helper()
	n.do(t, func() {
		var err error
		c, err = net.Dial("udp", to.String())
		check(t, err)
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// answered reports whether a datagram is answered.
func answered(t *testing.T, c net.Conn, within time.Duration) bool {
	t.Helper()
	check(t, c.SetDeadline(time.Now().Add(within)))
	_, err := c.Write([]byte("x"))
	check(t, err)
	_, err = c.Read(make([]byte, 1))
	return err == nil
}

// Pods begin flows beside their proxy at their tenant's pace and no faster; what has
// begun and what they answer goes on, and others don't notice.
func TestDirectPace(t *testing.T) {
	const rate, flood = 30, 300
	m := newMesh(t)
	direct := func(perSecond uint32) {
		t.Helper()
		m.one.Connections = steer.ConnectionLimits{DirectPerSecond: perSecond}
		check(t, m.d.UpdateTenant(m.one.Tenant))
		if have, err := m.d.ConnectionLimits(1); err != nil || have != m.one.Connections {
			t.Fatalf("limits %+v, %v", have, err)
		}
	}
	dropped := func() int64 { return int64(m.counters(1).Dropped.DirectTooFast) }
	// One has a clock of its own.
	m.two.Connections = steer.ConnectionLimits{DirectPerSecond: 4 * rate}
	check(t, m.d.UpdateTenant(m.two.Tenant))
	count := receiving(t, m.remote, 5300, true)
	receiving(t, m.a.namespace, 5301, true)
	unanswered := receiving(t, m.remote, 5303, false)
	node := nodeAddresses
	serve(t, nil, 5302)
	serve(t, m.a.namespace, 5305)
	eachFamily(t, func(t *testing.T, family int) {
		to := at(remoteAddresses.of(family), 5300)
		direct(0)
		first := flow(t, m.a.namespace, to)
		if !answered(t, first, patience) {
			t.Fatal("nothing passes")
		}
		direct(rate)
		// When its turn has come: what was begun before the bound counts, too.
		for deadline := time.Now().Add(patience); !answered(t, first, 50*time.Millisecond); {
			if time.Now().After(deadline) {
				t.Fatal("a flow beside the proxy doesn't pass")
			}
		}
		was, got := dropped(), count.Load()
		// As fast as it can.
		begun := time.Now()
		for range flood {
			_, err := flow(t, m.a.namespace, to).Write([]byte("x"))
			check(t, err)
		}
		passed := int64(0)
		for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			if passed = count.Load() - got; passed+dropped()-was == flood {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("of %d flows %d passed and %d were dropped", flood, passed, dropped()-was)
			}
		}
		if most := int64(rate*(1+time.Since(begun).Seconds())) + 1; passed > most {
			t.Errorf("%d flows passed, at most %d at %d a second", passed, most, rate)
		}

		for i := range 2 * rate {
			if !answered(t, flow(t, m.b.namespace, to), patience) {
				t.Fatalf("flow %d of another tenant doesn't pass", i+1)
			}
		}

		// What has begun, and what others begin.
		for i := range 3 * rate {
			if !answered(t, first, patience) {
				t.Fatalf("packet %d of a flow that had begun doesn't pass", i+1)
			}
		}
		silent := flow(t, m.a.namespace, at(remoteAddresses.of(family), 5303))
		for sent, got, deadline := int64(0), unanswered.Load(), time.Now().Add(patience); sent < 3*rate || unanswered.Load()-got < 3*rate; sent++ {
			_, err := silent.Write([]byte("x"))
			check(t, err)
			if time.Now().After(deadline) {
				t.Fatalf("%d of %d packets of a flow that nobody answers pass", unanswered.Load()-got, sent)
			}
		}
		was = dropped()
		for range 3 * rate {
			_, err := silent.Write([]byte("x"))
			check(t, err)
		}
		for i := range 3 * rate {
			if !answered(t, flow(t, m.remote, at(m.a.of(family), 5301)), patience) {
				t.Fatalf("the pod doesn't answer flow %d that another one began", i+1)
			}
		}
		if n := dropped() - was; n != 0 {
			t.Errorf("%d packets of flows that had begun were dropped", n)
		}

		// Connections with the node: what has begun, and what the node begins.
		held, _, err := dial(t, m.a.namespace, netip.AddrPort{}, at(node.of(family), 5302))
		check(t, err)
		was = dropped()
		for range 3 * rate {
			check(t, echo(held, 1))
			c, _, err := dial(t, nil, netip.AddrPort{}, at(m.a.of(family), 5305))
			check(t, err)
			check(t, echo(c, 1))
			check(t, c.Close())
		}
		if n := dropped() - was; n != 0 {
			t.Errorf("of connections with the node %d packets were dropped", n)
		}

		// Connections to the node itself, echo requests, and protocols without ports.
		for name, send := range map[string]func(i int){
			"SYNs to the node": func(int) { synTo(t, m.a.namespace, at(node.of(family), 5302)) },
			"echo requests":    func(i int) { echoRequest(t, m.a.namespace, to.Addr(), uint16(i)) },
			"codes of an echo request": func(i int) {
				raw(t, m.a.namespace, icmp(to.Addr()), to.Addr(), []byte{echoType(to.Addr()), byte(i), 0, 0, 1, 1, 0, 0})
			},
			"calls of GRE": func(i int) {
				raw(t, m.a.namespace, syscall.IPPROTO_GRE, to.Addr(), []byte{0x20, 1, 0x88, 0x0b, 0, 0, 1, byte(i)})
			},
			"SYNs from one port": func(int) {
				raw(t, m.a.namespace, syscall.IPPROTO_TCP, node.of(family), segment(30000, 5302, tcpSYN))
			},
			"packets to the node without a SYN": func(i int) {
				raw(t, m.a.namespace, syscall.IPPROTO_TCP, node.of(family), segment(uint16(20000+i), 5302, tcpACK))
			},
			"another protocol": func(i int) { raw(t, m.a.namespace, 253, destination(to.Addr(), i), []byte("0123456789")) },
		} {
			// Once one has begun, the others count by themselves.
			was := dropped() - 1
			for deadline := time.Now().Add(patience); dropped() > was && time.Now().Before(deadline); {
				was = dropped()
				send(4 * rate)
			}
			// A busy machine isn't fast at first.
			sent := 0
			for deadline := time.Now().Add(patience); dropped()-was < rate && time.Now().Before(deadline); {
				for i := range 4 * rate {
					send(i)
					sent++
				}
			}
			if dropped()-was < rate {
				t.Errorf("of %d %s %d were dropped", sent, name, dropped()-was)
			}
		}
		direct(0)
		was = dropped()
		for range flood {
			_, err := flow(t, m.a.namespace, to).Write([]byte("x"))
			check(t, err)
		}
		if n := dropped() - was; n != 0 {
			t.Errorf("without a bound %d were dropped", n)
		}
	})
}

// synTo begins a connection, and leaves it.
func synTo(t *testing.T, n *namespace, to netip.AddrPort) {
	t.Helper()
	n.do(t, func() {
		d := net.Dialer{Timeout: time.Millisecond}
		if c, err := d.Dial("tcp", to.String()); err == nil {
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	})
}

const (
	tcpSYN = 2
	tcpACK = 16
)

// segment is a TCP header, whose checksum is wrong: nobody answers.
func segment(from, to uint16, flags byte) []byte {
	return []byte{byte(from >> 8), byte(from), byte(to >> 8), byte(to), 0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, flags, 255, 255, 0, 0, 0, 0}
}

// destination is another address of the same /24 or /64 for each i.
func destination(a netip.Addr, i int) netip.Addr {
	b := a.AsSlice()
	b[len(b)-1] = byte(i + 3)
	other, _ := netip.AddrFromSlice(b)
	return other
}

func echoRequest(t *testing.T, n *namespace, to netip.Addr, id uint16) {
	t.Helper()
	raw(t, n, icmp(to), to, []byte{echoType(to), 0, 0, 0, byte(id >> 8), byte(id), 0, 0})
}

func icmp(a netip.Addr) (protocol int) {
	if a.Is6() {
		return syscall.IPPROTO_ICMPV6
	}
	return syscall.IPPROTO_ICMP
}

func echoType(a netip.Addr) byte {
	if a.Is6() {
		return 128
	}
	return 8
}

// raw sends a packet behind an IP header of the kernel's.
func raw(t *testing.T, n *namespace, protocol int, to netip.Addr, payload []byte) {
	t.Helper()
	rawEach(t, n, protocol, to, 1, func(int) []byte { return payload })
}

// rawEach sends so many packets, as fast as it can.
func rawEach(t *testing.T, n *namespace, protocol int, to netip.Addr, packets int, payload func(i int) []byte) {
	t.Helper()
	n.do(t, func() {
		family, address := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{})
		if to.Is4() {
			address.(*unix.SockaddrInet4).Addr = to.As4()
		} else {
			family, address = unix.AF_INET6, &unix.SockaddrInet6{Addr: to.As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		check(t, err)
		defer unix.Close(fd)
		for i := range packets {
			check(t, unix.Sendto(fd, payload(i), 0, address))
		}
	})
}
