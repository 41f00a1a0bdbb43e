package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Counters returns the counters of all tenants; what belongs to no tenant is
// under 0.
func (d *Datapath) Counters() (map[uint16]steer.Counters, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := map[uint16]steer.Counters{}
	var index uint32
	var perCPU []datapathTenantCounters
	entries := d.maps[datapathMapCounters].Iterate()
	for entries.Next(&index, &perCPU) {
		var sum steer.Counters
		for i := range perCPU {
			addTenant(&sum, &perCPU[i])
		}
		sum.Cut = d.cut[uint16(index)]
		all[uint16(index)] = sum
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	return all, nil
}

func addTenant(c *steer.Counters, o *datapathTenantCounters) {
	for i, n := range o.Steered {
		c.Steered[i] += n
	}
	addListeners(&c.PerListener, o.Listener)
	c.Refused += o.Refused
	c.Excluded += o.Excluded
	c.Bypassed += o.Bypassed
	c.EventsLost += o.EventsLost
	addDrops(&c.Dropped, &o.Dropped)
}

func addListeners(p *steer.PerListener, counted [listenerCount]uint64) {
	for l, n := range counted {
		p.Add(listeners[l], n)
	}
}

func addDrops(d *steer.Drops, o *datapathDrops) {
	d.Spoofed += o.Spoofed
	d.Fragment += o.Fragment
	d.Malformed += o.Malformed
	d.NoTenant += o.NoTenant
	d.NotThePod += o.NotThePod
	d.Deliver += o.Deliver
	d.Foreign += o.Foreign
	d.Protocol += o.Protocol
	d.Unsteered += o.Unsteered
	d.Midstream += o.Midstream
	d.FlowsFull += o.FlowsFull
	d.PlainText += o.PlainText
	d.TooMany += o.TooMany
	d.TooFast += o.TooFast
	d.DirectTooFast += o.DirectTooFast
	d.PortsTaken += o.PortsTaken
}

// PodCounters returns the counters of all pods, by UID.
func (d *Datapath) PodCounters() (map[string]steer.PodCounters, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := map[string]steer.PodCounters{}
	for uid, has := range d.pods {
		for ifindex := range has.veths {
			var perCPU []datapathPodCounters
			switch err := d.maps[datapathMapPerPod].Lookup(ifindex, &perCPU); {
			case errors.Is(err, ebpf.ErrKeyNotExist):
				continue
			case err != nil:
				return nil, fmt.Errorf("read counters of pod %s: %w", uid, err)
			}
			sum := all[uid]
			for i := range perCPU {
				addPod(&sum, &perCPU[i])
			}
			all[uid] = sum
		}
	}
	return all, nil
}

func addPod(c *steer.PodCounters, o *datapathPodCounters) {
	addListeners(&c.PerListener, o.Listener)
	c.Direct += o.Direct
	c.Accepted += o.Accepted
	c.BytesSent += o.BytesSent
	c.BytesReceived += o.BytesReceived
	addDrops(&c.Dropped, &o.Dropped)
}

// addCounters makes a tenant's counters unless they are there.
func (d *Datapath) addCounters(index uint16) error {
	if err := addZero[datapathTenantCounters](d.maps[datapathMapCounters], uint32(index)); err != nil {
		return fmt.Errorf("make counters of tenant %d: %w", index, err)
	}
	return nil
}

// addVethCounters makes the counters of a veth unless they are there.
func (d *Datapath) addVethCounters(ifindex int) error {
	if err := addZero[datapathPodCounters](d.maps[datapathMapPerPod], uint32(ifindex)); err != nil {
		return fmt.Errorf("make counters of veth %d: %w", ifindex, err)
	}
	return nil
}

func addZero[T any](m *ebpf.Map, key any) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count CPUs: %w", err)
	}
	err = m.Update(key, make([]T, cpus), ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fullError(m, "of counters", err)
	}
	return nil
}
