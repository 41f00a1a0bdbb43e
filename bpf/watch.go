package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// watchedPerCPU is how many connections of a tenant are watched for each CPU at least.
// Kernels before 6.16 let each have 128 free entries of its own, so that in a small map of
// a machine with many CPUs none would be left for connections that stay.
const watchedPerCPU = 256

// watchedSpec is how a tenant's map of watched connections is made.
func watchedSpec(template *ebpf.MapSpec, cpus int) *ebpf.MapSpec {
	spec := template.Copy()
	spec.MaxEntries = max(spec.MaxEntries, uint32(watchedPerCPU*cpus))
	return spec
}

// watch has what becomes of a tenant's connections counted by generation, before its
// programs are told to; from anew, unless they do already.
func (d *Datapath) watch(index uint16) error {
	for g := range steer.Generations {
		key := datapathGeneration{Tenant: uint32(index), Generation: uint32(g)}
		if err := addZero[datapathGenerationCounters](d.maps[datapathMapPerGeneration], key); err != nil {
			return fmt.Errorf("make counters of generations: %w", err)
		}
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count CPUs: %w", err)
	}
	spec := watchedSpec(d.spec.Maps[datapathMapWatched].InnerMap, cpus)
	// What a former agent watched goes on.
	if fits, err := d.fitsWatched(index, spec); err != nil || fits {
		return err
	}
	flows, err := ebpf.NewMap(spec)
	if err != nil {
		return fmt.Errorf("create the map of watched connections: %w", err)
	}
	defer flows.Close() // the other keeps it
	if err := d.maps[datapathMapWatched].Put(uint32(index), flows); err != nil {
		return fmt.Errorf("add the map of watched connections: %w", err)
	}
	return nil
}

// hasWatched tells whether a tenant has a map of watched connections.
func (d *Datapath) hasWatched(index uint16) (bool, error) {
	var id uint32
	switch err := d.maps[datapathMapWatched].Lookup(uint32(index), &id); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look for the map of watched connections: %w", err)
	}
	return true, nil
}

// fitsWatched tells whether it has one that is as this build makes it.
func (d *Datapath) fitsWatched(index uint16, spec *ebpf.MapSpec) (bool, error) {
	var flows *ebpf.Map
	switch err := d.maps[datapathMapWatched].Lookup(uint32(index), &flows); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("open the map of watched connections: %w", err)
	}
	defer flows.Close()
	return spec.Compatible(flows) == nil && sameFields(flows, spec) == nil, nil
}

// unwatch forgets it all. Nothing to forget is no error.
func (d *Datapath) unwatch(index uint16) error {
	for g := range steer.Generations {
		key := datapathGeneration{Tenant: uint32(index), Generation: uint32(g)}
		if err := deleteKey(d.maps[datapathMapPerGeneration], key); err != nil {
			return fmt.Errorf("delete counters of generations: %w", err)
		}
	}
	// The kernel waits for its programs at a deletion, also at one that finds nothing.
	if there, err := d.hasWatched(index); err != nil || !there {
		return err
	}
	if err := deleteKey(d.maps[datapathMapWatched], uint32(index)); err != nil {
		return fmt.Errorf("delete the map of watched connections: %w", err)
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
