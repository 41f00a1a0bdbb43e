package netfilter

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A node with a tunnel of its CNI's unwraps what a pod wraps, whatever source it has: a
// pod of the mesh could send TCP past its proxy.
func TestWrapped(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		p, do := wire(t, "a", 1)
		check(t, errors.Join(d.SetNodeAddresses([]netip.Addr{wireNode}), d.UpdateTenant(tenant(t, 1)), d.UpdatePod(p)))
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "vxlan"
		vxlan := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: 7, Port: 8472}
		err = netlink.LinkAdd(vxlan)
		if errors.Is(err, unix.EOPNOTSUPP) {
			t.Skip("the kernel has no VXLAN")
		}
		check(t, errors.Join(err, netlink.LinkSetUp(vxlan)))
		link, err := netlink.LinkByName(attrs.Name)
		check(t, err)
		// Another node's pods are behind it.
		forged := netip.MustParseAddr("198.51.100.7")
		check(t, netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: net.IPv4(198, 51, 100, 0), Mask: net.CIDRMask(24, 32)}}))
		seen := segmentsOf(t, forged)

		segment := slices.Concat(datagram(40000, 80)[:4], []byte{7: 0}, []byte{5 << 4, 2, 7: 0})
		inner := slices.Concat([]byte{0x45, 3: byte(20 + len(segment)), 8: 64, 9: unix.IPPROTO_TCP, 11: 0}, forged.AsSlice(), wireNode.AsSlice())
		sum := uint32(0)
		for i := 0; i < len(inner); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(inner[i:]))
		}
		binary.BigEndian.PutUint16(inner[10:], ^uint16(sum>>16+sum&0xffff))
		inner = append(inner, segment...)
		mac := link.Attrs().HardwareAddr
		frame := slices.Concat([]byte{8, 6: 7, 7: 0}, mac, []byte{2, 5: 1}, []byte{8, 0}, inner)
		udp := func(to uint16) []byte {
			b := datagram(40000, to)[:8]
			binary.BigEndian.PutUint16(b[4:], uint16(8+len(frame)))
			return append(b, frame...)
		}
		send := func(protocol int, payload []byte) {
			t.Helper()
			var err error
			do(func() {
				err = unix.Sendto(rawSocket(t, protocol), payload, 0, &unix.SockaddrInet4{Addr: wireNode.As4()})
			})
			check(t, err)
		}
		dropped := func() uint64 {
			t.Helper()
			all, err := d.PodCounters()
			check(t, err)
			return all["a"].Dropped.Protocol
		}
		check(t, d.ReleasePod("a", nil))
		send(unix.IPPROTO_UDP, udp(8472))
		eventually(t, "segment of a pod that has left the mesh", func() bool { return seen.Load() == 1 })
		if n := dropped(); n != 0 {
			t.Errorf("%d packets of a pod that has left the mesh are dropped", n)
		}
		check(t, d.UpdatePod(p))
		send(unix.IPPROTO_UDP, udp(8472))
		eventually(t, "drop", func() bool { return dropped() == 1 })
		if n := seen.Load(); n != 1 {
			t.Errorf("%d segments get past the proxy", n-1)
		}

		for _, c := range []struct {
			name     string
			protocol int
			payload  []byte
			drops    uint64
		}{
			{"IPv4 in it", unix.IPPROTO_IPIP, inner, 1},
			{"IPv6 in it", unix.IPPROTO_IPV6, make([]byte, 40), 1},
			{"GRE", unix.IPPROTO_GRE, []byte{0, 0, 8, 0}, 1},
			{"GRE with a key", unix.IPPROTO_GRE, []byte{0x20, 0, 0x65, 0x58, 0, 0, 0, 1}, 1},
			{"PPTP", unix.IPPROTO_GRE, []byte{0x20, 1, 0x88, 0x0b, 0, 0, 1, 1}, 0},
			{"VXLAN", unix.IPPROTO_UDP, udp(4789), 1},
			{"Geneve", unix.IPPROTO_UDP, udp(6081), 1},
			{"a datagram", unix.IPPROTO_UDP, udp(53), 0},
			{"another protocol", 253, inner, 0},
		} {
			before := dropped()
			send(c.protocol, c.payload)
			// What is behind it on the wire is counted after it.
			send(unix.IPPROTO_IPIP, inner)
			eventually(t, "drop after "+c.name, func() bool { return dropped() > before+c.drops })
			if n := dropped() - before - 1; n != c.drops {
				t.Errorf("%s: %d packets dropped, want %d", c.name, n, c.drops)
			}
		}
	})
}

// segmentsOf counts the TCP segments of an address that get to the namespace.
func segmentsOf(t *testing.T, from netip.Addr) *atomic.Int64 {
	t.Helper()
	c, err := net.ListenPacket("ip4:tcp", "0.0.0.0")
	check(t, err)
	t.Cleanup(func() { c.Close() })
	count := &atomic.Int64{}
	go func() {
		for b := make([]byte, 64); ; {
			_, a, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if a.String() == from.String() {
				count.Add(1)
			}
		}
	}()
	return count
}
