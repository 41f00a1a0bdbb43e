package bpf

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Who sends SYNs first, and answers the cookies that come back all at once, has no more
// connections than its tenant may have either, and outsiders leave the last quarter to
// the pods. Those beyond are reset, and not counted: late segments look the same.
func TestCookiesLeaveTheBound(t *testing.T) {
	const most, tries, port = 8, 20, 21000
	for _, c := range []struct {
		name string
		has  int64
		of   func(m *mesh) (from *namespace, fromAddr netip.Addr, to netip.AddrPort)
	}{
		{"pods", most, func(m *mesh) (*namespace, netip.Addr, netip.AddrPort) {
			return m.a.namespace, m.a.v4, at(remoteAddresses.v4, 80)
		}},
		{"outsiders", most * 3 / 4, func(m *mesh) (*namespace, netip.Addr, netip.AddrPort) {
			return m.remote, remoteAddresses.v4, at(m.a.v4, steer.Inbound.Port())
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMesh(t)
			m.counting(steer.ConnectionLimits{Concurrent: most})
			m.one.do(t, func() { sysctl(t, "net/ipv4/tcp_syncookies=2") }) // as in a flood
			from, fromAddr, to := c.of(m)
			for i := range uint16(tries) {
				deaf(t, from, port+i)
			}
			from.do(t, func() {
				onOneCPU(t) // on two, one could overtake another
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
				check(t, err)
				defer unix.Close(fd)
				check(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience / time.Second)}))
				send := func(from uint16, flags byte, sequence, acknowledged uint32) {
					check(t, unix.Sendto(fd, validSegment(at(fromAddr, from), to, flags, sequence, acknowledged), 0, &unix.SockaddrInet4{Addr: to.Addr().As4()}))
				}
				// answers waits until n ports got a segment with these flags, and returns
				// its sequence number.
				answers := func(flags byte, n int) map[uint16]uint32 {
					t.Helper()
					sequences := map[uint16]uint32{}
					for b := make([]byte, 256); len(sequences) < n; {
						size, _, err := unix.Recvfrom(fd, b, 0)
						if err != nil {
							t.Fatalf("%d of %d were answered with %#x: %v", len(sequences), n, flags, err)
						}
						if tcp := b[min(int(b[0]&0xf)*4, size):size]; len(tcp) >= 20 && tcp[13] == flags && binary.BigEndian.Uint16(tcp) == to.Port() {
							sequences[binary.BigEndian.Uint16(tcp[2:])] = binary.BigEndian.Uint32(tcp[4:])
						}
					}
					return sequences
				}
				for i := range uint16(tries) {
					send(port+i, tcpSYN, 0, 0)
				}
				cookies := answers(tcpSYN|tcpACK, tries)
				for i := range uint16(tries) {
					send(port+i, tcpACK, 1, cookies[port+i]+1)
				}
				reset := answers(tcpRST, tries-int(c.has))
				m.waitConnections(1, c.has)
				if d := m.counters(1).Dropped; d.TooMany != 0 {
					t.Errorf("%d are counted as too many", d.TooMany)
				}
				// The room of one that ends is another's.
				var open, beyond uint16
				for p := range cookies {
					if _, was := reset[p]; was {
						beyond = p
					} else {
						open = p
					}
				}
				send(open, tcpRST, 1, 0)
				m.waitConnections(1, c.has-1)
				send(beyond, tcpACK, 1, cookies[beyond]+1)
				m.waitConnections(1, c.has)
			})
		})
	}
}

// A tunnel between two pods of a tenant, which is for connections that have room already,
// is opened whatever room there is; also while the kernel answers SYNs with cookies.
func TestCookiesLeaveOwnTunnels(t *testing.T) {
	const most = 8
	m := newMesh(t)
	m.counting(steer.ConnectionLimits{Concurrent: most})
	m.one.do(t, func() { sysctl(t, "net/ipv4/tcp_syncookies=2") })
	opens := func(when string) {
		t.Helper()
		c, greeting, err := dial(t, m.one.namespace, at(m.c.v4, 0), at(m.a.v4, steer.Inbound.Port()))
		if greeting != "proxy1" {
			t.Errorf("%s a tunnel ends with %q, %v", when, greeting, err)
		}
		if c != nil {
			c.Close()
		}
	}
	var held []heldFlow
	for range most * 3 / 4 {
		m.hold(&held, "from outside", m.remote, netip.AddrPort{}, at(m.a.v4, 8080), "proxy1")
	}
	m.waitConnections(1, most*3/4)
	opens("when outsiders have all that they may")
	m.waitConnections(1, most*3/4)
	for range most / 4 {
		m.hold(&held, "from a pod", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "proxy1")
	}
	m.waitConnections(1, most)
	opens("when there is no room")
}

// validSegment is one of IPv4, with an even number of bytes.
func validSegment(from, to netip.AddrPort, flags byte, sequence, acknowledged uint32, payload ...byte) []byte {
	b := append(segment(from.Port(), to.Port(), flags), payload...)
	binary.BigEndian.PutUint32(b[4:], sequence)
	binary.BigEndian.PutUint32(b[8:], acknowledged)
	sum := uint32(unix.IPPROTO_TCP + len(b))
	source, destination := from.Addr().As4(), to.Addr().As4()
	for _, part := range [][]byte{source[:], destination[:], b} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[16:], ^uint16(sum))
	return b
}
