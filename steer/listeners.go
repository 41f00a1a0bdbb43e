package steer

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Generations is how many processes of a tenant can run side by side: 0 and 1.
const Generations = 2

// GenerationStep is between the ports of one generation and those of the next.
const GenerationStep = 100

// ErrNotListening says that a process doesn't listen on all ports; it may yet.
var ErrNotListening = errors.New("not listening")

// Listener is one of Envoy's, for the connections that fit.
type Listener int

const (
	// Outbound takes what the tenant's pods connect to.
	Outbound Listener = iota
	// Inbound takes tunnels to them, Plain other connections to them, and NodePlain
	// those that come from the node's own addresses.
	Inbound
	Plain
	NodePlain
	// Listeners is how many there are.
	Listeners
)

var ports = [Listeners]uint16{15001, 15008, 15006, 15007}

// Port is where generation 0 has it.
func (l Listener) Port() uint16 { return ports[l] }

// PortOf is where a generation has it.
func (l Listener) PortOf(generation int) uint16 {
	return ports[l] + uint16(GenerationStep*generation)
}

// Socket is one that a process listens with.
type Socket struct {
	FD       int
	Listener Listener
	Port     uint16
}

// CheckGeneration says whether there can be such a generation.
func CheckGeneration(generation int) error {
	if generation < 0 || generation >= Generations {
		return fmt.Errorf("generation %d is not between 0 and %d", generation, Generations-1)
	}
	return nil
}

// ListeningSockets duplicates the sockets with which a process listens on the ports of
// a generation, or of generation 0: on [::] for both families. A port may have
// several, one for each worker, in the order in which the process made them; Envoy has
// some of them twice while it changes a listener, which count once. Multipath TCP is
// left out: it can't be put into a socket map, and nothing configures it. The caller
// closes them with Close, also after an error.
func ListeningSockets(pid, generation int) (sockets []Socket, err error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process: %w", err)
	}
	defer unix.Close(pidfd)
	list, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	if err != nil {
		return nil, fmt.Errorf("list its files: %w", err)
	}
	seen := map[uint64]bool{}
	for _, e := range list {
		number, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, number, 0)
		if errors.Is(err, unix.EBADF) {
			continue // closed in the meantime
		}
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w; the agent needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3", err)
		}
		if err != nil {
			return sockets, fmt.Errorf("duplicate its file %d: %w", number, err)
		}
		s, ok := listens(fd, generation)
		cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		if !ok || err != nil || seen[cookie] {
			unix.Close(fd)
			continue
		}
		seen[cookie] = true
		sockets = append(sockets, s)
	}
	return sockets, nil
}

// Close closes the duplicates.
func Close(sockets []Socket) {
	for _, s := range sockets {
		unix.Close(s.FD)
	}
}

func listens(fd, generation int) (Socket, bool) {
	if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || v != 1 {
		return Socket{}, false
	}
	if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || v != unix.IPPROTO_TCP {
		return Socket{}, false
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return Socket{}, false
	}
	// A socket of IPv4 alone can't be given connections of IPv6.
	six, ok := name.(*unix.SockaddrInet6)
	if !ok || !netip.AddrFrom16(six.Addr).IsUnspecified() {
		return Socket{}, false
	}
	if only, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY); err != nil || only != 0 {
		return Socket{}, false
	}
	for l := range Listeners {
		if port := uint16(six.Port); port == l.Port() || port == l.PortOf(generation) {
			return Socket{fd, l, port}, true
		}
	}
	return Socket{}, false
}

// ProbeListeningSockets returns an error if the kernel lacks what ListeningSockets
// needs.
func ProbeListeningSockets() error {
	pidfd, err := unix.PidfdOpen(unix.Getpid(), 0)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	if _, err := unix.PidfdGetfd(pidfd, -1, 0); !errors.Is(err, unix.EBADF) {
		return err
	}
	return nil
}
