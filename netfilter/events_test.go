package netfilter

import (
	"net"
	"testing"

	"github.com/vishvananda/netlink"
)

// The kernel tells of connections that end, and what they carried.
func TestEnded(t *testing.T) {
	inNode(t, func(t *testing.T) {
		lo, err := netlink.LinkByName("lo")
		check(t, err)
		check(t, netlink.LinkSetUp(lo))
		s, err := openEnded(0)
		check(t, err)
		defer s.conn.Close()
		for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
			l, err := net.Listen("tcp", address)
			check(t, err)
			c, err := net.Dial("tcp", l.Addr().String())
			check(t, err)
			in, err := l.Accept()
			check(t, err)
			_, err = c.Write(make([]byte, 1000))
			check(t, err)
			_, err = in.Read(make([]byte, 1000))
			check(t, err)
			c.Close()
			in.Close()
			l.Close()
			want := map[string]uint64{c.LocalAddr().String(): 1000, in.LocalAddr().String(): 0}
			buffer := make([]byte, messageBytes)
			for len(want) > 0 {
				check(t, s.wait())
				messages, err := s.receive(buffer)
				check(t, err)
				for _, m := range messages {
					e, ok := parseEnded(m)
					if sent, is := want[e.local.String()]; ok && is {
						if e.sent < sent || e.sent > sent+2 || e.sent-sent > 2 {
							t.Errorf("%+v, want %d bytes sent", e, sent)
						}
						delete(want, e.local.String())
					}
				}
			}
		}
	})
}
