package bpf

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Usage returns how full each map is that can be filled, by name.
func (d *Datapath) Usage() ([]steer.Usage, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []steer.Usage
	for name, m := range d.maps {
		if !countable(m) {
			continue
		}
		n, err := countEntries(m)
		if err != nil {
			return nil, fmt.Errorf("count entries of map %s: %w", name, err)
		}
		all = append(all, steer.Usage{Map: "BPF map " + name, Entries: n, Max: int(m.MaxEntries())})
	}
	slices.SortFunc(all, func(a, b steer.Usage) int { return strings.Compare(a.Map, b.Map) })
	return all, nil
}

func countable(m *ebpf.Map) bool {
	switch m.Type() {
	case ebpf.Hash, ebpf.PerCPUHash, ebpf.LPMTrie:
		return true
	}
	return false
}

// countEntries reads keys only. Entries that go meanwhile can make it start
// again, so that it gives up at twice the size.
func countEntries(m *ebpf.Map) (int, error) {
	var last any
	for n := range 2 * int(m.MaxEntries()) {
		key := make([]byte, m.KeySize())
		err := m.NextKey(last, key)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return min(n, int(m.MaxEntries())), nil
		}
		if err != nil {
			return 0, err
		}
		last = key
	}
	return int(m.MaxEntries()), nil
}

// fullError names the map, if that is what an error of writing to it means.
func fullError(m *ebpf.Map, name string, err error) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("BPF map %s is full with %d entries; move pods to other nodes: %w", name, m.MaxEntries(), err)
	}
	return err
}
