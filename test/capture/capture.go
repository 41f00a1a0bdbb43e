// Package capture looks at the TCP packets that pass a node's network interface
// for a bounded time and tells which flows carried payload, and which of them a
// marker string. The demo and the e2e tests use it to prove what is, and what is
// not, readable between nodes.
package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sort"
	"time"

	"golang.org/x/sys/unix"
)

// Options of a capture.
type Options struct {
	// Address picks the interface: the one that has it.
	Address netip.Addr
	// Marker that an application sends in the clear.
	Marker string
	// MaxPackets ends the capture early, default 200,000. Nothing is written to
	// disk and no payload is kept; a flow costs about 150 bytes.
	MaxPackets int
}

// Flow is one direction between two TCP endpoints.
type Flow struct {
	From     netip.Addr `json:"from"`
	To       netip.Addr `json:"to"`
	FromPort uint16     `json:"fromPort"`
	ToPort   uint16     `json:"toPort"`
}

// Count is what a Flow carried.
type Count struct {
	Flow
	Packets int `json:"packets"`
	Bytes   int `json:"bytes"`
	// Marked packets held the marker.
	Marked int `json:"marked"`
}

// Report of a capture, flows in a stable order.
type Report struct {
	Interface string `json:"interface"`
	Packets   int    `json:"packets"`
	// Dropped packets that the kernel couldn't hand over: above 0 the report isn't
	// complete.
	Dropped int     `json:"dropped"`
	Full    bool    `json:"full"` // MaxPackets was reached
	Flows   []Count `json:"flows"`
}

// Run captures until ctx ends. It needs CAP_NET_RAW in the network namespace of
// the interface. ready is called once nothing is missed any more.
func Run(ctx context.Context, o Options, ready func()) (Report, error) {
	if o.MaxPackets == 0 {
		o.MaxPackets = 200_000
	}
	link, err := interfaceOf(o.Address)
	if err != nil {
		return Report{}, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		return Report{}, fmt.Errorf("open packet socket: %w", err)
	}
	socket := os.NewFile(uintptr(fd), "packet")
	defer socket.Close()
	// Without privilege for the larger buffer the default one is kept; drops are told.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Index}); err != nil {
		return Report{}, fmt.Errorf("bind packet socket to %s: %w", link.Name, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = socket.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	ready()
	r := Report{Interface: link.Name}
	flows := map[Flow]*Count{}
	buf := make([]byte, 128<<10)
	for {
		n, err := socket.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return Report{}, fmt.Errorf("read packets of %s: %w", link.Name, err)
		}
		flow, payload, ok := parse(buf[:n])
		if !ok {
			continue
		}
		r.Packets++
		if len(payload) > 0 {
			c := flows[flow]
			if c == nil {
				c = &Count{Flow: flow}
				flows[flow] = c
			}
			c.Packets++
			c.Bytes += len(payload)
			if o.Marker != "" && bytes.Contains(payload, []byte(o.Marker)) {
				c.Marked++
			}
		}
		if r.Packets >= o.MaxPackets {
			r.Full = true
			break
		}
	}
	if stats, err := unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
		r.Dropped = int(stats.Drops)
	}
	for _, c := range flows {
		r.Flows = append(r.Flows, *c)
	}
	sort.Slice(r.Flows, func(i, j int) bool { return less(r.Flows[i].Flow, r.Flows[j].Flow) })
	return r, nil
}

func less(a, b Flow) bool {
	if c := a.From.Compare(b.From); c != 0 {
		return c < 0
	}
	if c := a.To.Compare(b.To); c != 0 {
		return c < 0
	}
	if a.FromPort != b.FromPort {
		return a.FromPort < b.FromPort
	}
	return a.ToPort < b.ToPort
}

func interfaceOf(a netip.Addr) (*net.Interface, error) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		addrs, _ := l.Addrs() // an interface that went away has none
		for _, x := range addrs {
			if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().Unmap() == a.Unmap() {
				return &l, nil
			}
		}
	}
	return nil, fmt.Errorf("no interface has the address %s: give an address of this node", a)
}

// parse reads an IP packet that carries TCP.
func parse(b []byte) (Flow, []byte, bool) {
	var f Flow
	if len(b) < 1 {
		return f, nil, false
	}
	var proto byte
	switch {
	case b[0]>>4 == 4 && len(b) >= 20:
		header, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
		if header < 20 || len(b) < header || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return f, nil, false
		}
		proto, f.From, f.To = b[9], netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		if total >= header && total <= len(b) { // 0 where the packet is too large for the field
			b = b[:total]
		}
		b = b[header:]
	case b[0]>>4 == 6 && len(b) >= 40:
		proto, f.From, f.To = b[6], netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		if length := int(binary.BigEndian.Uint16(b[4:])); length > 0 && 40+length <= len(b) {
			b = b[:40+length]
		}
		b = b[40:]
	default:
		return f, nil, false
	}
	if proto != unix.IPPROTO_TCP || len(b) < 20 {
		return f, nil, false
	}
	f.FromPort, f.ToPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	offset := int(b[12]>>4) * 4
	if offset < 20 || offset > len(b) {
		return f, nil, false
	}
	return f, b[offset:], true
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }
