package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// What becomes of connections is counted for the generation that had them, as the
// client sees it; and nothing of tenants that aren't watched.
func TestWatch(t *testing.T) {
	m := newMesh(t)
	canary := startProxy(t, m.one.namespace, "canary")
	check(t, m.d.SetListeners(1, 1, canary.pid))
	check(t, m.d.SetWeight(1, 50))
	const each = 24
	// open has a pod, and a machine outside of the mesh, open connections.
	open := func(port uint16, use func(c net.Conn)) {
		t.Helper()
		for i := range each {
			from, to := m.a.namespace, remoteAddresses.both()[i%2]
			if i%4 >= 2 {
				from, to = m.remote, m.a.both()[i%2]
			}
			var c net.Conn
			var err error
			from.do(t, func() { c, err = net.DialTimeout("tcp", netip.AddrPortFrom(to, port).String(), patience) })
			if port == resetPort && errors.Is(err, unix.ECONNRESET) {
				continue // the reset came before the connection was looked at
			}
			check(t, err)
			c.SetDeadline(time.Now().Add(patience))
			use(c)
			c.Close()
		}
	}
	toEnd := func(c net.Conn) { io.Copy(io.Discard, c) }
	greeted := func(c net.Conn) {
		_, err := line(c)
		check(t, err)
	}
	open(80, greeted)
	if _, watched, err := m.d.GenerationCounters(1); watched || err != nil {
		t.Errorf("watched before anybody asked for it: %v", err)
	}
	m.one.Watch = true
	check(t, m.d.UpdateTenant(m.one.Tenant))
	accepted := func() (n [steer.Generations]uint64) {
		for {
			select {
			case <-m.proxy1.accepted:
				n[0]++
			case <-canary.accepted:
				n[1]++
			default:
				return n
			}
		}
	}
	m.waitAccepted(each, accepted)

	for _, c := range []struct {
		what string
		port uint16
		use  func(net.Conn)
		want func(n uint64) steer.GenerationCounters
		// firstByte is how many were answered, and slow whether late.
		answered, slow bool
	}{
		{what: "the client closes", port: 80, use: greeted, want: func(n uint64) steer.GenerationCounters { return steer.GenerationCounters{Connections: n} }, answered: true},
		{what: "closed before a byte", port: closedPort, use: toEnd, want: func(n uint64) steer.GenerationCounters {
			return steer.GenerationCounters{Connections: n, Unanswered: n}
		}},
		{what: "reset before a byte", port: resetPort, use: toEnd, want: func(n uint64) steer.GenerationCounters {
			return steer.GenerationCounters{Connections: n, Unanswered: n}
		}},
		{what: "reset later", port: brokenPort, use: func(c net.Conn) { greeted(c); fmt.Fprintln(c, "on"); toEnd(c) }, want: func(n uint64) steer.GenerationCounters {
			return steer.GenerationCounters{Connections: n, Resets: n}
		}, answered: true},
		{what: "slow", port: slowPort, use: greeted, want: func(n uint64) steer.GenerationCounters { return steer.GenerationCounters{Connections: n} }, answered: true, slow: true},
		{what: "the client gives up", port: silentPort, use: func(net.Conn) {}, want: func(n uint64) steer.GenerationCounters { return steer.GenerationCounters{Connections: n} }},
	} {
		before, _, err := m.d.GenerationCounters(1)
		check(t, err)
		open(c.port, c.use)
		n := m.waitAccepted(each, accepted)
		if n[0] == 0 || n[1] == 0 {
			t.Errorf("%s: accepted %d: one generation got none", c.what, n)
		}
		after, watched, err := m.d.GenerationCounters(1)
		check(t, err)
		if !watched {
			t.Fatal("not watched")
		}
		for g := range after {
			got, early, late := after[g], uint64(0), uint64(0)
			got.Connections -= before[g].Connections
			got.Unanswered -= before[g].Unanswered
			got.Resets -= before[g].Resets
			for i := range got.FirstByte {
				// From the bound that is next below slowAnswer on.
				if k := got.FirstByte[i] - before[g].FirstByte[i]; time.Duration(1<<17)<<i > slowAnswer {
					late += k
				} else {
					early += k
				}
			}
			got.FirstByte = [steer.FirstByteBuckets]uint64{}
			if want := c.want(n[g]); got != want {
				t.Errorf("%s: generation %d counts %+v, want %+v", c.what, g, got, want)
			}
			if c.answered != (early+late == n[g]) || !c.answered && early+late > 0 || c.slow && early > 0 {
				t.Errorf("%s: of %d of generation %d the first byte was counted %d times early and %d late", c.what, n[g], g, early, late)
			}
		}
	}

	m.one.Watch = false
	check(t, m.d.UpdateTenant(m.one.Tenant))
	if _, watched, err := m.d.GenerationCounters(1); watched || err != nil {
		t.Errorf("watched still: %v", err)
	}
	for _, name := range []string{datapathMapWatched, datapathMapPerGeneration} {
		if n := size(t, m.d.maps[name]); n != 0 {
			t.Errorf("%d entries are left in %s", n, name)
		}
	}
}

// What resets a connection counts once, however often the tenant's kernel says it.
func TestResetsCountOnce(t *testing.T) {
	const port = 40000
	m := newMesh(t)
	m.one.Watch = true
	check(t, m.d.UpdateTenant(m.one.Tenant))
	from, to := at(m.a.v4, port), at(remoteAddresses.v4, brokenPort)
	c, _, err := dial(t, m.a.namespace, from, to)
	check(t, err)
	fmt.Fprintln(c, "on")
	io.Copy(io.Discard, c)
	c.Close()
	resets(t, m.a.namespace, from, to)
	all, _, err := m.d.GenerationCounters(1)
	check(t, err)
	if all[0].Connections != 1 || all[0].Resets != 1 || all[0].Unanswered != 0 {
		t.Errorf("counted %+v, want one connection that was reset", all[0])
	}
}

const (
	tcpRST = 4
	tcpPSH = 8
)

// provoke sends a segment, and waits until it is answered by one with these flags.
func provoke(t *testing.T, n *namespace, from, to netip.AddrPort, flags byte, sequence uint16, answer byte) {
	t.Helper()
	n.do(t, func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
		check(t, err)
		defer unix.Close(fd)
		check(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience / time.Second)}))
		forgeValidPacket(t, n, from, to, flags, sequence)
		for packet := make([]byte, 128); ; {
			size, _, err := unix.Recvfrom(fd, packet, 0)
			if err != nil {
				t.Fatalf("%s to %s: waiting for an answer to %#x: %v", from, to, flags, err)
			}
			tcp := packet[min(int(packet[0]&15)*4, size):size]
			if len(tcp) >= 20 && tcp[13] == answer && binary.BigEndian.Uint16(tcp) == to.Port() && binary.BigEndian.Uint16(tcp[2:]) == from.Port() {
				return
			}
		}
	})
}

// resets sends segments of a connection that nobody has, and waits until each is
// answered by a reset.
func resets(t *testing.T, n *namespace, from, to netip.AddrPort) {
	t.Helper()
	for _, flags := range []byte{tcpACK, tcpPSH | tcpACK, tcpPSH | tcpACK} {
		provoke(t, n, from, to, flags, 0, tcpRST)
	}
}

// deaf takes a port, so that the kernel answers nothing that comes to it.
func deaf(t *testing.T, n *namespace, port uint16) {
	t.Helper()
	n.do(t, func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		check(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		none := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
		check(t, unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &none[0]}))
		check(t, unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)}))
		check(t, unix.Listen(fd, 1))
	})
}

// Who sends SYNs counts as so many connections, and brings nothing about by what it sends
// afterwards: neither does a repeated SYN, which finds the handshake of the first, make
// something new of a later segment, nor do resets that it provokes count as the tenant's.
func TestHandshakesThatFail(t *testing.T) {
	const port = 40000
	m := newMesh(t)
	m.one.Watch = true
	check(t, m.d.UpdateTenant(m.one.Tenant))
	for _, c := range []struct {
		name     string
		from     *namespace
		fromAddr netip.Addr
		to       netip.AddrPort
	}{
		{"outbound", m.a.namespace, m.a.v4, at(remoteAddresses.v4, 80)},
		{"inbound", m.remote, remoteAddresses.v4, at(m.a.v4, 8080)},
	} {
		t.Run(c.name, func(t *testing.T) {
			deaf(t, c.from, port)
			counted := func(when string, want steer.GenerationCounters) {
				t.Helper()
				all, _, err := m.d.GenerationCounters(1)
				check(t, err)
				if all[0] != want {
					t.Errorf("%s: counted %+v, want %+v", when, all[0], want)
				}
			}
			segment := func(flags byte, sequence uint16, answer byte) {
				t.Helper()
				provoke(t, c.from, at(c.fromAddr, port), c.to, flags, sequence, answer)
			}
			all, _, err := m.d.GenerationCounters(1)
			check(t, err)
			want, steered := all[0], m.counters(1).Steered[0]+1
			want.Connections++
			for range 2 {
				segment(tcpSYN, 0, tcpSYN|tcpACK)
			}
			counted("a repeated SYN", want)
			segment(tcpACK, 0, tcpRST)
			counted("a handshake that ends with a wrong number", want)
			segment(tcpSYN, 1, tcpRST|tcpACK)
			counted("another SYN in its window", want)
			// As if that had been a while ago.
			syns := m.d.maps[datapathMapSyns]
			found := notLed(t, syns)
			if len(found) != 1 {
				t.Fatalf("%d SYNs are written down and weren't led, want that which found a handshake", len(found))
			}
			for key, came := range found {
				check(t, syns.Put(&key, came-uint64(time.Second)))
			}
			segment(tcpACK, 0, tcpRST)
			counted("a late segment", want)
			if n := m.counters(1).Steered[0]; n != steered {
				t.Errorf("%d connections are led to a listener, want %d", n, steered)
			}
			if n := len(notLed(t, syns)); n != 0 {
				t.Errorf("%d SYNs are still to be led", n)
			}
		})
	}
}

// notLed are the SYNs that steer hasn't led to a listener, and when they came.
func notLed(t *testing.T, syns *ebpf.Map) map[datapathSyn]uint64 {
	t.Helper()
	found := map[datapathSyn]uint64{}
	var key datapathSyn
	var came uint64
	all := syns.Iterate()
	for all.Next(&key, &came) {
		if came%2 == 0 {
			found[key] = came
		}
	}
	check(t, all.Err())
	return found
}

// A connection begins with a SYN. Who sends segments of none, of which each is led to a
// listener, has nothing counted, nor has an ACK that answers a SYN cookie.
func TestOnlySYNsCount(t *testing.T) {
	m := newMesh(t)
	m.one.Watch = true
	check(t, m.d.UpdateTenant(m.one.Tenant))
	type counted struct {
		steered, refused, watched, unanswered uint64
		listeners, ofPod                      steer.PerListener
	}
	counts := func() counted {
		t.Helper()
		c := m.counters(1)
		all, _, err := m.d.GenerationCounters(1)
		check(t, err)
		return counted{c.Steered[0], c.Refused, all[0].Connections, all[0].Unanswered, c.PerListener, m.pod1("a").PerListener}
	}
	segments := func(when string) {
		t.Helper()
		before := counts()
		resets(t, m.a.namespace, at(m.a.v4, 40000), at(remoteAddresses.v4, 80))
		resets(t, m.remote, at(remoteAddresses.v4, 40000), at(m.a.v4, 8080))
		resets(t, m.remote, at(remoteAddresses.v4, 40000), at(m.a.v4, steer.Inbound.Port()))
		if after := counts(); after != before {
			t.Errorf("%s: segments of no connection are counted: %+v, before %+v", when, after, before)
		}
	}
	segments("with listeners")
	check(t, m.d.ClearListeners(1, 0))
	segments("without listeners")
	check(t, m.d.SetListeners(1, 0, m.proxy1.pid))

	const each = 5
	open := func() {
		t.Helper()
		for range each {
			for _, c := range []struct {
				from     *namespace
				fromAddr netip.AddrPort
				to       netip.AddrPort
			}{
				{m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80)},
				{m.remote, netip.AddrPort{}, at(m.a.v4, 8080)},
				{m.remote, netip.AddrPort{}, at(m.a.v4, steer.Inbound.Port())},
				// A tunnel between two pods of the tenant.
				{m.one.namespace, at(m.c.v4, 0), at(m.a.v4, steer.Inbound.Port())},
			} {
				_, _, err := dial(t, c.from, c.fromAddr, c.to)
				check(t, err)
			}
		}
	}
	for _, cookies := range []string{"1", "2"} {
		m.one.do(t, func() { sysctl(t, "net/ipv4/tcp_syncookies="+cookies) })
		for rounds := 1; ; rounds++ {
			want, repeated := counts(), repeatedSYNs(t, m.a.namespace, m.remote, m.one.namespace)
			open()
			after := counts()
			// A machine that stalls for a second has SYNs repeated, which nothing remembers
			// with cookies: each counts.
			if n := repeatedSYNs(t, m.a.namespace, m.remote, m.one.namespace) - repeated; n > 0 && rounds < 5 {
				t.Logf("tcp_syncookies=%s: %d SYNs were repeated", cookies, n)
				continue
			}
			want.steered += 4 * each
			want.watched += 2 * each
			want.listeners.Outbound += each
			want.listeners.Plain += each
			want.listeners.Inbound += 2 * each
			want.ofPod.Outbound += each
			want.ofPod.Plain += each
			want.ofPod.Inbound += 2 * each
			if after != want {
				t.Errorf("tcp_syncookies=%s: counted %+v, want %+v", cookies, after, want)
			}
			break
		}
	}
}

// repeatedSYNs is how many SYNs were sent again from these namespaces.
func repeatedSYNs(t *testing.T, from ...*namespace) (sum int) {
	t.Helper()
	for _, n := range from {
		n.do(t, func() {
			b, err := os.ReadFile("/proc/thread-self/net/netstat")
			check(t, err)
			names, rest, _ := strings.Cut(string(b), "\n")
			values, _, _ := strings.Cut(rest, "\n")
			i := slices.Index(strings.Fields(names), "TCPSynRetrans")
			if i < 0 {
				t.Fatalf("no TCPSynRetrans among %s", names)
			}
			repeated, err := strconv.Atoi(strings.Fields(values)[i])
			check(t, err)
			sum += repeated
		})
	}
	return sum
}

// waitAccepted waits until n connections more were accepted, by generation.
func (m *mesh) waitAccepted(n uint64, accepted func() [steer.Generations]uint64) (sum [steer.Generations]uint64) {
	m.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		more := accepted()
		if sum[0], sum[1] = sum[0]+more[0], sum[1]+more[1]; sum[0]+sum[1] >= n {
			return sum
		}
	}
	m.t.Fatalf("%d of %d connections were accepted", sum, n)
	return sum
}

// Resets that two CPUs see at the same time are one.
func TestResetsAtOnce(t *testing.T) {
	const rounds, port = 200, 40000
	m := newMesh(t)
	m.one.Watch = true
	check(t, m.d.UpdateTenant(m.one.Tenant))
	from, to := at(remoteAddresses.v4, 80), at(m.a.v4, port)
	peer, err := addrKey(from.Addr())
	check(t, err)
	pod, err := addrKey(to.Addr())
	check(t, err)
	flow := datapathFlow{Pod: pod, Peer: peer, PodPort: to.Port(), PeerPort: from.Port(), Side: datapathSideSIDE_POD}
	watched := m.watchedOf(1)

	packet := make([]byte, 14+20+20)
	packet[12], packet[13] = 8, 0 // IPv4
	ip, tcp := packet[14:34], packet[34:]
	ip[0], ip[3], ip[8], ip[9] = 4<<4|5, 40, 64, unix.IPPROTO_TCP
	copy(ip[12:], from.Addr().AsSlice())
	copy(ip[16:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	tcp[12], tcp[13] = 5<<4, tcpRST|tcpACK
	// Of struct __sk_buff, as far as the interface's index.
	context := make([]uint32, 11)
	context[10] = uint32(m.one.HostIfindex)

	run := func() error {
		_, err := m.d.programs[datapathProgFromTenant].Run(&ebpf.RunOptions{Data: packet, Context: context})
		return err
	}
	// The other CPU waits without sleeping: it has to be there at the same moment.
	var began, ended atomic.Uint64
	stop := func() { began.Store(math.MaxUint64) }
	t.Cleanup(stop)
	errs := make(chan error, 1)
	go func() {
		for n := uint64(1); ; n++ {
			for began.Load() < n {
			}
			if began.Load() == math.MaxUint64 {
				errs <- nil
				return
			}
			if err := run(); err != nil {
				errs <- err
				ended.Store(math.MaxUint64)
				return
			}
			ended.Store(n)
		}
	}()
	for n := range uint64(rounds) {
		check(t, watched.Put(flow, datapathWatchedFlow{Answered: 1}))
		began.Store(n + 1)
		// How much sooner than the other it would be isn't known.
		for range n % 256 {
			began.Load()
		}
		check(t, run())
		for ended.Load() < n+1 {
		}
	}
	stop()
	check(t, <-errs)
	all, _, err := m.d.GenerationCounters(1)
	check(t, err)
	if all[0].Resets != rounds {
		t.Errorf("%d resets of %d connections are counted", all[0].Resets, rounds)
	}
}
