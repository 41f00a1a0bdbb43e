package netfilter

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// SetListeners gives new connections of a tenant to the listening sockets of a
// process: ports 15001, 15008, 15006 and 15007 on [::], for IPv4 too, those of
// generation 1 plus 100; a port may have several sockets, one for each worker. It makes
// the sockets transparent, which the process may not: without that, TPROXY takes none of
// them. It returns an ErrNotListening that names the port if one is missing, and
// ErrUnknownTenant before UpdateTenant. A socket that is closed gets nothing.
func (d *Datapath) SetListeners(index uint16, generation, pid int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.setListeners(index, generation, pid); err != nil {
		return fmt.Errorf("set listeners of tenant %d, generation %d, to process %d: %w", index, generation, pid, err)
	}
	return nil
}

func (d *Datapath) setListeners(index uint16, generation, pid int) error {
	if err := steer.CheckGeneration(generation); err != nil {
		return err
	}
	t := d.tenants[index]
	if t == nil {
		return steer.ErrUnknownTenant
	}
	if err := prepareSockets(pid, generation, t.have.seed); err != nil {
		return err
	}
	return d.setState(index, func(s *innerState) { s.active[generation] = true })
}

// ClearListeners gives a generation no new connections; those that it has stay.
// The other generation gets all. Without both, connections are refused.
func (d *Datapath) ClearListeners(index uint16, generation int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := steer.CheckGeneration(generation)
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

// prepareSockets says how the kernel is to choose among the sockets that a process
// listens with, and lets TPROXY take them.
func prepareSockets(pid, generation int, seed uint32) error {
	sockets, err := steer.ListeningSockets(pid, generation)
	defer func() { steer.Close(sockets) }()
	if err != nil {
		return err
	}
	if err := shareWorkers(sockets, generation, seed); err != nil {
		return err
	}
	found := map[uint16]bool{}
	for _, s := range sockets {
		// Also for connections of IPv4, which the socket takes.
		if err := unix.SetsockoptInt(s.FD, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1); err != nil {
			return fmt.Errorf("make the socket of port %d transparent: %w", s.Port, err)
		}
		found[s.Port] = true
	}
	for l := range steer.Listeners {
		if port := l.PortOf(generation); !found[port] {
			return fmt.Errorf("port %d on [::]: %w", port, steer.ErrNotListening)
		}
	}
	return nil
}
