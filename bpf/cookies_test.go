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
// connections than its tenant may have either. Those beyond wait for room.
func TestCookiesLeaveTheBound(t *testing.T) {
	const most, tries, port = 6, 20, 21000
	m := newMesh(t)
	m.counting(steer.ConnectionLimits{Concurrent: most})
	m.one.do(t, func() { sysctl(t, "net/ipv4/tcp_syncookies=2") }) // as in a flood
	to := at(remoteAddresses.v4, silentPort)                       // whatever it said, the pod's kernel would reset
	cookies := map[uint16]uint32{}
	m.a.do(t, func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
		check(t, err)
		defer unix.Close(fd)
		check(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience / time.Second)}))
		send := func(from uint16, flags byte, sequence, acknowledged uint32) {
			check(t, unix.Sendto(fd, validSegment(at(m.a.v4, from), to, flags, sequence, acknowledged), 0, &unix.SockaddrInet4{Addr: to.Addr().As4()}))
		}
		for i := range uint16(tries) {
			send(port+i, tcpSYN, 0, 0)
		}
		for b := make([]byte, 256); len(cookies) < tries; {
			n, _, err := unix.Recvfrom(fd, b, 0)
			if err != nil {
				t.Fatalf("%d of %d SYNs are answered: %v", len(cookies), tries, err)
			}
			if tcp := b[min(int(b[0]&0xf)*4, n):n]; len(tcp) >= 20 && tcp[13]&0x12 == 0x12 && binary.BigEndian.Uint16(tcp) == to.Port() {
				cookies[binary.BigEndian.Uint16(tcp[2:])] = binary.BigEndian.Uint32(tcp[4:])
			}
		}
		for i := range uint16(tries) {
			send(port+i, 16, 1, cookies[port+i]+1)
		}
		m.waitConnections(1, most)
		if d := m.counters(1).Dropped; d.TooMany < tries-most {
			t.Errorf("%d are too many, of %d with room for %d", d.TooMany, tries, most)
		}
		// The first that got in ends, and one that didn't tries again, as TCP does.
		send(port, 4, 1, 0)
		m.waitConnections(1, most-1)
		send(port+tries-1, 16, 1, cookies[port+tries-1]+1)
		m.waitConnections(1, most)
	})
}

// validSegment is one of IPv4 without a payload.
func validSegment(from, to netip.AddrPort, flags byte, sequence, acknowledged uint32) []byte {
	b := segment(from.Port(), to.Port(), flags)
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
