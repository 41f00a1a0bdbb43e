package bpf

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

const listenerCount = int(datapathListenerLISTENERS)

// What the programs keep for each generation.
var _ [steer.Generations]uint8 = datapathTenant{}.Workers

// listeners are Envoy's, by what the programs call them.
var listeners = [listenerCount]steer.Listener{
	datapathListenerLISTENER_OUTBOUND:   steer.Outbound,
	datapathListenerLISTENER_INBOUND:    steer.Inbound,
	datapathListenerLISTENER_PLAIN:      steer.Plain,
	datapathListenerLISTENER_NODE_PLAIN: steer.NodePlain,
}

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
	if err := steer.CheckGeneration(generation); err != nil {
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

func (d *Datapath) setListeners(index uint16, generation, pid int) error {
	if err := steer.CheckGeneration(generation); err != nil {
		return err
	}
	m, err := d.knownListeners(index)
	if err != nil {
		return err
	}
	defer m.Close()
	all, err := steer.ListeningSockets(pid, generation)
	defer func() { steer.Close(all) }()
	if err != nil {
		return err
	}
	var sockets [listenerCount][]int
	workers := workersPerPort(m)
	for listener, l := range listeners {
		for _, s := range all {
			if s.Listener == l {
				sockets[listener] = append(sockets[listener], s.FD)
			}
		}
		if len(sockets[listener]) == 0 {
			return fmt.Errorf("port %d on [::]: %w", l.PortOf(generation), steer.ErrNotListening)
		}
		workers = min(workers, len(sockets[listener]))
	}
	for listener := range listenerCount {
		for worker := range workers {
			if err := m.Put(slot(m, generation, listener, worker), uint64(sockets[listener][worker])); err != nil {
				return fmt.Errorf("hand over the socket of port %d: %w", listeners[listener].PortOf(generation), err)
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
	return int(m.MaxEntries()) / steer.Generations / listenerCount
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
