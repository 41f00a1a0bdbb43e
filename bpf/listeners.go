package bpf

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Generations is how many processes of a tenant can run side by side: 0 and 1.
const Generations = len(datapathTenant{}.Workers)

const listenerCount = int(datapathListenerLISTENERS)

// listenerPorts is where Envoy listens, by what the programs call it.
var listenerPorts = [listenerCount]int{
	datapathListenerLISTENER_OUTBOUND:   15001,
	datapathListenerLISTENER_INBOUND:    15008,
	datapathListenerLISTENER_PLAIN:      15006,
	datapathListenerLISTENER_NODE_PLAIN: 15007,
}

// generationStep is between the ports of one generation and those of the next.
const generationStep = 100

// ErrNotListening says that a process doesn't listen on all ports; it may yet.
var ErrNotListening = errors.New("not listening")

// SetListeners gives new connections of a tenant to the listening sockets of a
// process, which it duplicates: ports 15001, 15008, 15006 and 15007 on [::],
// those of generation 1 plus 100 (or not, as of former agents), for IPv4 too; a
// port may have several sockets, one for each worker. It changes
// nothing and returns an ErrNotListening that names the port if one is missing,
// and ErrUnknownTenant before UpdateTenant. A socket that is closed leaves by
// itself.
func (d *Datapath) SetListeners(index uint16, generation, pid int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.setListeners(index, generation, pid); err != nil {
		return fmt.Errorf("set listeners of tenant %d, generation %d, to process %d: %w", index, generation, pid, err)
	}
	return nil
}

// ClearListeners gives a generation no new connections; those that it has stay.
// The other generation gets all. Without both, connections are refused.
func (d *Datapath) ClearListeners(index uint16, generation int) error {
	if err := checkGeneration(generation); err != nil {
		return fmt.Errorf("clear listeners of tenant %d: %w", index, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.knownListeners(index)
	if err != nil {
		return fmt.Errorf("clear listeners: %w", err)
	}
	defer m.Close()
	for listener := range listenerCount {
		if err := clearSlots(m, generation, listener, 0); err != nil {
			return fmt.Errorf("clear listeners of tenant %d, generation %d: %w", index, generation, err)
		}
	}
	return nil
}

func checkGeneration(generation int) error {
	if generation < 0 || generation >= Generations {
		return fmt.Errorf("generation %d is not between 0 and %d", generation, Generations-1)
	}
	return nil
}

func (d *Datapath) setListeners(index uint16, generation, pid int) error {
	if err := checkGeneration(generation); err != nil {
		return err
	}
	m, err := d.knownListeners(index)
	if err != nil {
		return err
	}
	defer m.Close()
	sockets, err := listeningSockets(pid, generation)
	defer func() {
		for _, fds := range sockets {
			closeAll(fds)
		}
	}()
	if err != nil {
		return err
	}
	workers := workersPerPort(m)
	for listener, port := range listenerPorts {
		if len(sockets[listener]) == 0 {
			return fmt.Errorf("port %d on [::]: %w", port, ErrNotListening)
		}
		workers = min(workers, len(sockets[listener]))
	}
	for listener := range listenerCount {
		for worker := range workers {
			if err := m.Put(slot(m, generation, listener, worker), uint64(sockets[listener][worker])); err != nil {
				return fmt.Errorf("hand over the socket of port %d: %w", listenerPorts[listener], err)
			}
		}
		if err := clearSlots(m, generation, listener, workers); err != nil {
			return err
		}
	}
	return d.changeTenant(index, func(t *datapathTenant) { t.Workers[generation] = uint8(workers) })
}

// knownListeners returns the map of a tenant that UpdateTenant was called for.
func (d *Datapath) knownListeners(index uint16) (*ebpf.Map, error) {
	if _, err := d.tenant(index); err != nil {
		return nil, err
	}
	return d.listeners(index)
}

func (d *Datapath) listeners(index uint16) (*ebpf.Map, error) {
	return d.adoptMap(filepath.Join(d.tenantDir(index), datapathMapListeners), d.spec.Maps[datapathMapListeners])
}

func workersPerPort(m *ebpf.Map) int {
	return int(m.MaxEntries()) / Generations / listenerCount
}

func slot(m *ebpf.Map, generation, listener, worker int) uint32 {
	return uint32((generation*listenerCount+listener)*workersPerPort(m) + worker)
}

func clearSlots(m *ebpf.Map, generation, listener, from int) error {
	for worker := from; worker < workersPerPort(m); worker++ {
		err := m.Delete(slot(m, generation, listener, worker))
		// The kernel says EINVAL where there is no socket.
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("clear slot: %w", err)
		}
	}
	return nil
}

// listeningSockets duplicates a process's sockets that listen on the ports; the
// caller closes them, also after an error.
func listeningSockets(pid, generation int) (sockets [listenerCount][]int, err error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return sockets, fmt.Errorf("open process: %w", err)
	}
	defer unix.Close(pidfd)
	list, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	if err != nil {
		return sockets, fmt.Errorf("list its files: %w", err)
	}
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
			return sockets, fmt.Errorf("duplicate its file %d: %w", number, err)
		}
		listener, ok := listenerOf(fd, generation)
		if !ok {
			unix.Close(fd)
			continue
		}
		sockets[listener] = append(sockets[listener], fd)
	}
	return sockets, nil
}

// listenerOf tells which listener of a generation a file is, if any.
func listenerOf(fd, generation int) (int, bool) {
	if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || v != 1 {
		return 0, false
	}
	// Multipath TCP listens, too, but can't be put into a socket map.
	if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || v != unix.IPPROTO_TCP {
		return 0, false
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return 0, false
	}
	// A socket of IPv4 alone can't be given connections of IPv6.
	six, ok := name.(*unix.SockaddrInet6)
	if !ok || !netip.AddrFrom16(six.Addr).IsUnspecified() {
		return 0, false
	}
	if only, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY); err != nil || only != 0 {
		return 0, false
	}
	for listener, port := range listenerPorts {
		if six.Port == port || six.Port == port+generationStep*generation {
			return listener, true
		}
	}
	return 0, false
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
