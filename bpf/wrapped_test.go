package bpf

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// udp is a datagram behind its IP header, without a checksum.
func udp(to uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0x9c, 0x40}, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return slices.Concat(b, []byte{0, 0}, payload)
}

// ipv4 is a packet of IPv4.
func ipv4(protocol byte, from, to netip.Addr, payload []byte) []byte {
	b := slices.Concat([]byte{0x45, 3: byte(20 + len(payload)), 8: 64, 9: protocol, 11: 0}, from.AsSlice(), to.AsSlice())
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	return append(b, payload...)
}

// segmentsOf counts the TCP segments of an address that get to a namespace.
func segmentsOf(t *testing.T, n *namespace, from netip.Addr) *atomic.Int64 {
	t.Helper()
	var c net.PacketConn
	n.do(t, func() {
		var err error
		c, err = net.ListenPacket("ip4:tcp", "0.0.0.0")
		check(t, err)
	})
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

// A node with a tunnel of its CNI's unwraps what a pod wraps, and sends it on, whatever
// source it has: a pod of the mesh could send TCP past its proxy.
func TestWrapped(t *testing.T) {
	m := newMesh(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "bhtvxlan"
	vxlan := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: 7, Port: 8472}
	err := netlink.LinkAdd(vxlan)
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("the kernel has no VXLAN")
	}
	check(t, err)
	t.Cleanup(func() { netlink.LinkDel(vxlan) })
	mac := up(t, attrs.Name).Attrs().HardwareAddr
	// Another node's pods are behind it.
	forged := netip.MustParseAddr("198.51.100.7")
	route(t, attrs.Name, "198.51.100.0/24", netip.Addr{})
	frame := slices.Concat(mac, []byte{2, 5: 1}, []byte{8, 0}, ipv4(unix.IPPROTO_TCP, forged, remoteAddresses.v4, segment(40000, 80, tcpSYN)))
	wrapped := udp(8472, slices.Concat([]byte{8, 6: 7, 7: 0}, frame))
	seen := segmentsOf(t, m.remote, forged)
	dropped := func() uint64 { return m.pod1("a").Dropped.Protocol }
	send := func(protocol int, to netip.Addr, payload []byte) {
		t.Helper()
		raw(t, m.a.namespace, protocol, to, payload)
	}
	eventually := func(what string, is func() bool) {
		t.Helper()
		for deadline := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d segments get past the proxy, %d packets are dropped", what, seen.Load(), dropped())
			}
		}
	}
	check(t, m.d.ReleasePod("a", nil))
	send(unix.IPPROTO_UDP, nodeAddresses.v4, wrapped)
	eventually("a pod that has left the mesh", func() bool { return seen.Load() == 1 })
	if n := dropped(); n != 0 {
		t.Errorf("%d packets of a pod that has left the mesh are dropped", n)
	}
	check(t, m.d.UpdatePod(m.a.Pod))
	send(unix.IPPROTO_UDP, nodeAddresses.v4, wrapped)
	eventually("a pod of the mesh", func() bool { return dropped() == 1 })
	if n := seen.Load(); n != 1 {
		t.Errorf("%d segments get past the proxy", n-1)
	}

	// To other nodes, too: the source is its node's then, where pods are hidden.
	eachFamily(t, func(t *testing.T, family int) {
		to := remoteAddresses.of(family)
		for _, c := range []struct {
			name     string
			protocol int
			payload  []byte
			drops    uint64
		}{
			{"IPv4 in it", unix.IPPROTO_IPIP, frame[14:], 1},
			{"IPv6 in it", unix.IPPROTO_IPV6, make([]byte, 40), 1},
			{"GRE", unix.IPPROTO_GRE, []byte{0, 0, 8, 0}, 1},
			{"GRE with a key", unix.IPPROTO_GRE, []byte{0x20, 0, 0x65, 0x58, 0, 0, 0, 1}, 1},
			{"PPTP", unix.IPPROTO_GRE, []byte{0x20, 1, 0x88, 0x0b, 0, 0, 1, 1}, 0},
			{"VXLAN", unix.IPPROTO_UDP, udp(4789, frame), 1},
			{"VXLAN, Linux's port", unix.IPPROTO_UDP, udp(8472, frame), 1},
			{"Geneve", unix.IPPROTO_UDP, udp(6081, frame), 1},
			{"a datagram", unix.IPPROTO_UDP, udp(53, frame), 0},
			{"another protocol", 253, frame, 0},
		} {
			before := dropped()
			send(c.protocol, to, c.payload)
			// What is behind it on the wire is counted after it.
			send(unix.IPPROTO_IPIP, to, frame[14:])
			eventually(c.name, func() bool { return dropped() > before+c.drops })
			if n := dropped() - before - 1; n != c.drops {
				t.Errorf("%s: %d packets dropped, want %d", c.name, n, c.drops)
			}
		}
	})
}
