package netfilter

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

// generationStep is between the ports of one generation and those of the next.
const generationStep = 100

// listener is one of Envoy's, for the connections that fit.
type listener struct {
	name string
	port uint16
}

var listeners = []listener{{"outbound", 15001}, {"inbound", portInbound}, {"plain", 15006}, {"nodeplain", 15007}}

// ErrNotListening says that a process doesn't listen on all ports; it may yet.
var ErrNotListening = errors.New("not listening")

// SetListeners gives new connections of a tenant to the listening sockets of a
// process: ports 15001, 15008, 15006 and 15007 on [::], for IPv4 too, those of
// generation 1 plus 100. It makes the sockets transparent, which the process may
// not: without that, TPROXY takes none of them. It returns an ErrNotListening that
// names the port if one is missing, and ErrUnknownTenant before UpdateTenant. A
// socket that is closed gets nothing.
func (d *Datapath) SetListeners(index uint16, generation, pid int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := checkGeneration(generation)
	if err == nil {
		err = makeTransparent(pid, generation)
	}
	if err == nil {
		err = d.setState(index, func(s *innerState) { s.active[generation] = true })
	}
	if err != nil {
		return fmt.Errorf("set listeners of tenant %d, generation %d, to process %d: %w", index, generation, pid, err)
	}
	return nil
}

// ClearListeners gives a generation no new connections; those that it has stay.
// The other generation gets all. Without both, connections are refused.
func (d *Datapath) ClearListeners(index uint16, generation int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := checkGeneration(generation)
	if err == nil {
		err = d.setState(index, func(s *innerState) { s.active[generation] = false })
	}
	if err != nil {
		return fmt.Errorf("clear listeners of tenant %d, generation %d: %w", index, generation, err)
	}
	return nil
}

// SetWeight says how many percent of a tenant's new connections generation 1
// gets, 0 to 100; generation 0 gets the others. Which of them a connection gets
// depends on its source's address and port. Where one has no listeners the other
// gets all. Default 0.
func (d *Datapath) SetWeight(index uint16, canaryPercent int) error {
	if canaryPercent < 0 || canaryPercent > 100 {
		return fmt.Errorf("set weight of tenant %d: %d is not between 0 and 100", index, canaryPercent)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.setState(index, func(s *innerState) { s.weight = canaryPercent }); err != nil {
		return fmt.Errorf("set weight of tenant %d: %w", index, err)
	}
	return nil
}

func checkGeneration(generation int) error {
	if generation < 0 || generation >= Generations {
		return fmt.Errorf("generation %d is not between 0 and %d", generation, Generations-1)
	}
	return nil
}

// makeTransparent sets IP_TRANSPARENT on the sockets that a process listens with.
func makeTransparent(pid, generation int) error {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("open process: %w", err)
	}
	defer unix.Close(pidfd)
	list, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	if err != nil {
		return fmt.Errorf("list its files: %w", err)
	}
	found := map[int]bool{}
	for _, e := range list {
		number, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, number, 0)
		if errors.Is(err, unix.EBADF) {
			continue // closed in the meantime
		}
		if err != nil {
			return fmt.Errorf("duplicate its file %d: %w", number, err)
		}
		port, ok := listensOn(fd)
		if ok {
			// Also for connections of IPv4, which the socket takes.
			err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
		}
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("make the socket of port %d transparent: %w", port, err)
		}
		found[port] = ok
	}
	for _, l := range listeners {
		if port := int(l.port) + generationStep*generation; !found[port] {
			return fmt.Errorf("port %d on [::]: %w", port, ErrNotListening)
		}
	}
	return nil
}

// listensOn tells on which port a file takes connections of both families, if it
// does.
func listensOn(fd int) (port int, ok bool) {
	if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || v != 1 {
		return 0, false
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return 0, false
	}
	six, ok := name.(*unix.SockaddrInet6)
	if !ok || !netip.AddrFrom16(six.Addr).IsUnspecified() {
		return 0, false
	}
	only, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
	return six.Port, err == nil && only == 0
}
