package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// Counters are what has happened to one tenant since UpdateTenant made it. Steering
// doesn't see TCP's flags: a late packet of a connection that has ended counts as
// a new connection, too.
type Counters struct {
	// Steered are new connections per generation.
	Steered [Generations]uint64
	// Outbound, Inbound, Plain and NodePlain are new connections per listener.
	Outbound, Inbound, Plain, NodePlain uint64
	// Refused are new connections that found no listener.
	Refused uint64
	// Excluded and Bypassed are new connections that passed in the clear, by an
	// Exclusion or by Pod.Bypass.
	Excluded, Bypassed uint64
	// EventsLost are connection events that found no room.
	EventsLost uint64
	// Dropped are packets.
	Dropped Drops
}

// Drops are dropped packets by reason.
type Drops struct {
	// Spoofed: a pod used a source that isn't its address.
	Spoofed uint64
	// Fragment: a fragment of a TCP packet.
	Fragment uint64
	// Malformed: headers that can't be read to their end.
	Malformed uint64
	// NoTenant: the pod's tenant isn't known or has no network namespace.
	NoTenant uint64
	// NotThePod: to a pod's veth, but not to its address.
	NotThePod uint64
	// Deliver: from the deliver address to others than the tenant's own pods.
	Deliver uint64
	// Foreign: the tenant sent what is neither from nor to its own pods.
	Foreign uint64
	// Protocol: the tenant sent other things than TCP.
	Protocol uint64
	// Unsteered: TCP of no pod of the tenant reached its namespace.
	Unsteered uint64
	// Midstream: in the middle of a connection that isn't known, of a pod whose
	// new ones pass in the clear.
	Midstream uint64
	// FlowsFull: a connection that would pass in the clear, of a pod that has
	// 8,192 such ones already, or where the map of connections is full.
	FlowsFull uint64
	// PlainText: a new connection from outside of the mesh to a pod that is Strict.
	PlainText uint64
	// TooMany: a new connection of a tenant that has as many as it may
	// (ConnectionLimits). One that is tried again counts again.
	TooMany uint64
	// TooFast: a new connection of a tenant that opens them faster than it may.
	TooFast uint64
}

// PodCounters are what has happened to one pod since UpdatePod made it known. Bytes
// are of TCP on its veth, from the IP header on; packets that the kernel
// handles in one piece count with one header.
type PodCounters struct {
	// Outbound, Inbound, Plain and NodePlain are new connections per listener of
	// its tenant, Direct are those in the clear that are written down: of
	// exclusions, the bypass, and while it leaves.
	Outbound, Inbound, Plain, NodePlain, Direct uint64
	// BytesSent are by the pod.
	BytesSent, BytesReceived uint64
	// Dropped are packets at its veth.
	Dropped Drops
}

// Counters returns the counters of all tenants; what belongs to no tenant is
// under 0.
func (d *Datapath) Counters() (map[uint16]Counters, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := map[uint16]Counters{}
	var index uint32
	var perCPU []datapathTenantCounters
	entries := d.maps[datapathMapCounters].Iterate()
	for entries.Next(&index, &perCPU) {
		var sum Counters
		for i := range perCPU {
			sum.add(&perCPU[i])
		}
		all[uint16(index)] = sum
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	return all, nil
}

func (c *Counters) add(o *datapathTenantCounters) {
	for i, n := range o.Steered {
		c.Steered[i] += n
	}
	c.Outbound += o.Listener[datapathListenerLISTENER_OUTBOUND]
	c.Inbound += o.Listener[datapathListenerLISTENER_INBOUND]
	c.Plain += o.Listener[datapathListenerLISTENER_PLAIN]
	c.NodePlain += o.Listener[datapathListenerLISTENER_NODE_PLAIN]
	c.Refused += o.Refused
	c.Excluded += o.Excluded
	c.Bypassed += o.Bypassed
	c.EventsLost += o.EventsLost
	c.Dropped.add(&o.Dropped)
}

func (d *Drops) add(o *datapathDrops) {
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
}

// PodCounters returns the counters of all pods, by UID.
func (d *Datapath) PodCounters() (map[string]PodCounters, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := map[string]PodCounters{}
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
				sum.add(&perCPU[i])
			}
			all[uid] = sum
		}
	}
	return all, nil
}

func (c *PodCounters) add(o *datapathPodCounters) {
	c.Outbound += o.Listener[datapathListenerLISTENER_OUTBOUND]
	c.Inbound += o.Listener[datapathListenerLISTENER_INBOUND]
	c.Plain += o.Listener[datapathListenerLISTENER_PLAIN]
	c.NodePlain += o.Listener[datapathListenerLISTENER_NODE_PLAIN]
	c.Direct += o.Direct
	c.BytesSent += o.BytesSent
	c.BytesReceived += o.BytesReceived
	c.Dropped.add(&o.Dropped)
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

func addZero[T any](m *ebpf.Map, key uint32) error {
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
