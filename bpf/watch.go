package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// watch has what becomes of a tenant's connections counted by generation, before its
// programs are told to; from anew, unless they do already.
func (d *Datapath) watch(index uint16) error {
	for g := range steer.Generations {
		key := datapathGeneration{Tenant: uint32(index), Generation: uint32(g)}
		if err := addZero[datapathGenerationCounters](d.maps[datapathMapPerGeneration], key); err != nil {
			return fmt.Errorf("make counters of generations: %w", err)
		}
	}
	return nil
}

// unwatch forgets it all, when the programs have been told.
func (d *Datapath) unwatch(index uint16) error {
	for g := range steer.Generations {
		key := datapathGeneration{Tenant: uint32(index), Generation: uint32(g)}
		if err := deleteKey(d.maps[datapathMapPerGeneration], key); err != nil {
			return fmt.Errorf("delete counters of generations: %w", err)
		}
	}
	var stale []datapathFlow
	var flow datapathFlow
	var state datapathWatchedFlow
	entries := d.maps[datapathMapWatched].Iterate()
	for entries.Next(&flow, &state) {
		if state.Tenant == uint32(index) {
			stale = append(stale, flow)
		}
	}
	// Others come and go meanwhile; what is missed makes room when it is needed, and
	// without counters nothing is counted.
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read watched connections: %w", err)
	}
	for _, f := range stale {
		if err := deleteKey(d.maps[datapathMapWatched], f); err != nil {
			return fmt.Errorf("delete watched connection: %w", err)
		}
	}
	return nil
}

// GenerationCounters returns how the connections of a tenant's generations fare; ok
// is false if the tenant isn't watched.
func (d *Datapath) GenerationCounters(index uint16) (all [steer.Generations]steer.GenerationCounters, ok bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for g := range all {
		var perCPU []datapathGenerationCounters
		key := datapathGeneration{Tenant: uint32(index), Generation: uint32(g)}
		switch err := d.maps[datapathMapPerGeneration].Lookup(key, &perCPU); {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return all, false, nil
		case err != nil:
			return all, false, fmt.Errorf("read counters of generation %d of tenant %d: %w", g, index, err)
		}
		for i := range perCPU {
			c, o := &all[g], &perCPU[i]
			c.Connections += o.Connections
			c.Unanswered += o.Unanswered
			c.Resets += o.Resets
			for k, n := range o.FirstByte {
				c.FirstByte[k] += n
			}
		}
	}
	return all, true, nil
}
