package load

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// FlowPort of ServeFlow.
const FlowPort = 9109

// ServeFlow sends to each connection as much as it takes, without end. It returns
// when it can't listen.
func ServeFlow(ready func()) error {
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", FlowPort))
	if err != nil {
		return err
	}
	defer l.Close()
	ready()
	flow := make([]byte, 64<<10)
	for {
		c, err := l.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			defer c.Close()
			for {
				if _, err := c.Write(flow); err != nil {
					return
				}
			}
		}()
	}
}

// HoldUnread opens connections to a ServeFlow, a hundred a second, and reads nothing
// of them, so that all buffers on the way fill. It returns after the duration.
func HoldUnread(to netip.AddrPort, connections int, duration time.Duration) {
	end := time.Now().Add(duration)
	var held []net.Conn
	for time.Now().Before(end) {
		if len(held) < connections {
			if c, err := net.DialTimeout("tcp", to.String(), time.Second); err == nil {
				held = append(held, c)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, c := range held {
		c.Close()
	}
}

// SendHuge makes requests with as large headers as Envoy takes and a mebibyte of body,
// of which it doesn't wait for an answer, on so many connections at a time, a new one
// each. It returns after the duration.
func SendHuge(to netip.AddrPort, connections int, duration time.Duration) {
	var request bytes.Buffer
	fmt.Fprintf(&request, "POST / HTTP/1.1\r\nHost: huge\r\nContent-Length: %d\r\n", 1<<20)
	for i := range 50 {
		fmt.Fprintf(&request, "x-huge-%d: %s\r\n", i, bytes.Repeat([]byte("h"), 1<<10))
	}
	request.WriteString("\r\n")
	request.Write(bytes.Repeat([]byte("b"), 1<<20))
	end := time.Now().Add(duration)
	var all sync.WaitGroup
	for range connections {
		all.Go(func() {
			for time.Now().Before(end) {
				c, err := net.DialTimeout("tcp", to.String(), time.Second)
				if err != nil {
					continue
				}
				c.SetDeadline(time.Now().Add(patience))
				c.Write(request.Bytes())
				c.Close()
			}
		})
	}
	all.Wait()
}

// Scan sends SYNs to a port from all ports of a pod's address, IPv4, as fast as it can,
// or, to port 0, UDP to all ports: connections that a listener and conntrack have to
// keep, and that nobody goes on with. It takes CAP_NET_RAW, as pods have it. It returns after the
// duration.
func Scan(from netip.Addr, to netip.AddrPort, duration time.Duration) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return fmt.Errorf("make a raw socket: %w", err)
	}
	defer unix.Close(fd)
	address := &unix.SockaddrInet4{Addr: to.Addr().As4()}
	end := time.Now().Add(duration)
	for i := uint32(0); i&0xff != 0 || time.Now().Before(end); i++ {
		source, port := uint16(1024+i%60000), to.Port()
		if port == 0 {
			port = uint16(1024 + i*7919%59999) // other pairs the next time round
		}
		packet := probe(from.As4(), address.Addr, source, port, to.Port() == 0)
		if err := unix.Sendto(fd, packet, 0, address); err != nil && err != unix.ENOBUFS && err != unix.EPERM && err != unix.EAGAIN {
			return fmt.Errorf("send a packet: %w", err)
		}
	}
	return nil
}

// probe is an empty UDP packet, or a SYN. The kernel writes the checksum of IP.
func probe(from, to [4]byte, source, port uint16, udp bool) []byte {
	const header = 20
	transport := make([]byte, 20)
	protocol := byte(unix.IPPROTO_TCP)
	if udp {
		protocol, transport = unix.IPPROTO_UDP, transport[:8]
		transport[5] = 8
	}
	binary.BigEndian.PutUint16(transport, source)
	binary.BigEndian.PutUint16(transport[2:], port)
	if !udp { // which may go without a checksum
		transport[12], transport[13] = 5<<4, 0x02
		binary.BigEndian.PutUint16(transport[14:], 65535)
		pseudo := append(append(append([]byte{}, from[:]...), to[:]...), 0, protocol, 0, byte(len(transport)))
		sum := uint32(0)
		for _, b := range [][]byte{pseudo, transport} {
			for k := 0; k < len(b); k += 2 {
				sum += uint32(binary.BigEndian.Uint16(b[k:]))
			}
		}
		for sum > 0xffff {
			sum = sum&0xffff + sum>>16
		}
		binary.BigEndian.PutUint16(transport[16:], ^uint16(sum))
	}
	ip := make([]byte, header, header+len(transport))
	ip[0], ip[8], ip[9] = 0x45, 64, protocol
	copy(ip[12:], from[:])
	copy(ip[16:], to[:])
	return append(ip, transport...)
}
