package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"syscall"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// eventBytes bounds what the kernel keeps of each socket that tells of connections,
// some 700 of them, until it is read. What finds no room is lost and counted.
const eventBytes = 256 << 10

// eventSocket is a netlink socket that tells of connections. Who opens it closes it.
type eventSocket struct {
	conn *netlink.Conn
	raw  syscall.RawConn

	mu sync.Mutex
	// dropped is how many messages the kernel had dropped when lost was asked.
	dropped uint32
}

// openEvents opens a socket in a network namespace, 0 for the thread's own.
func openEvents(family, netns int, prepare func(*netlink.Conn) error) (*eventSocket, error) {
	c, err := netlink.Dial(family, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	s := &eventSocket{conn: c}
	if err = errors.Join(c.SetReadBuffer(eventBytes), prepare(c)); err == nil {
		s.raw, err = c.SyscallConn()
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return s, nil
}

// openLog tells of what the rules log.
func openLog(netns int) (*eventSocket, error) {
	return openEvents(unix.NETLINK_NETFILTER, netns, bindLog)
}

// Of enum sknetlink_groups.
const (
	groupTCP4Destroyed = 1
	groupTCP6Destroyed = 3
)

// openEnded tells of sockets of TCP when the kernel lets them go.
func openEnded(netns int) (*eventSocket, error) {
	return openEvents(unix.NETLINK_SOCK_DIAG, netns, func(c *netlink.Conn) error {
		if err := errors.Join(c.JoinGroup(groupTCP4Destroyed), c.JoinGroup(groupTCP6Destroyed)); err != nil {
			return fmt.Errorf("ask for sockets that end: %w", err)
		}
		return nil
	})
}

func probeEnded() error {
	s, err := openEnded(0)
	if err != nil {
		return err
	}
	return s.conn.Close()
}

// wait returns when there is something to read, or an error, as when it is closed.
func (s *eventSocket) wait() error {
	return s.raw.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), nil, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN)
	})
}

// receive reads what is there, nothing if there is nothing.
func (s *eventSocket) receive(buffer []byte) (messages []syscall.NetlinkMessage, err error) {
	n := 0
	// Not Read: that one waits for who waits.
	controlErr := s.raw.Control(func(fd uintptr) {
		for {
			n, _, err = unix.Recvfrom(int(fd), buffer, unix.MSG_DONTWAIT)
			// Others follow what was lost; lost counts it.
			if !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	switch {
	case controlErr != nil:
		return nil, controlErr
	case errors.Is(err, unix.EAGAIN):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return syscall.ParseNetlinkMessage(buffer[:n])
}

// lost is how many messages found no room since the last call.
func (s *eventSocket) lost() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var info [unix.SK_MEMINFO_VARS]uint32
	size, errno := uint32(unsafe.Sizeof(info)), unix.Errno(0)
	err := s.raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err != nil || errno != 0 {
		return 0
	}
	n := info[unix.SK_MEMINFO_DROPS] - s.dropped
	s.dropped = info[unix.SK_MEMINFO_DROPS]
	return uint64(n)
}

// endedSocket is a connection that a socket had.
type endedSocket struct {
	local, remote netip.AddrPort
	// What TCP carried, with its flags.
	sent, received uint64
}

// Of linux/inet_diag.h: the message, and where the ports and addresses are.
const (
	diagBytes                              = 72
	diagPorts, diagSource, diagDestination = 4, 8, 24
	diagInfo                               = 2
)

// parseEnded reads a message; ok is false if it isn't of a connection that began.
func parseEnded(m syscall.NetlinkMessage) (e endedSocket, ok bool) {
	if m.Header.Type != unix.SOCK_DIAG_BY_FAMILY || len(m.Data) < diagBytes {
		return e, false
	}
	length := 4
	if m.Data[0] == unix.AF_INET6 {
		length = 16
	}
	end := func(address, port int) netip.AddrPort {
		a, _ := netip.AddrFromSlice(m.Data[address : address+length])
		return netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(m.Data[port:]))
	}
	e.local, e.remote = end(diagSource, diagPorts), end(diagDestination, diagPorts+2)
	attrs, err := netlink.NewAttributeDecoder(m.Data[diagBytes:])
	if err != nil {
		return e, false
	}
	var info unix.TCPInfo
	for attrs.Next() {
		if attrs.Type() == diagInfo {
			copy(unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info)), attrs.Bytes())
		}
	}
	e.sent, e.received = info.Bytes_acked, info.Bytes_received
	// Either end's SYN counts: without, nobody answered.
	return e, attrs.Err() == nil && info.Delivered > 0
}
