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
	c.Dropped.Spoofed += o.Dropped.Spoofed
	c.Dropped.Fragment += o.Dropped.Fragment
	c.Dropped.Malformed += o.Dropped.Malformed
	c.Dropped.NoTenant += o.Dropped.NoTenant
	c.Dropped.NotThePod += o.Dropped.NotThePod
	c.Dropped.Deliver += o.Dropped.Deliver
	c.Dropped.Foreign += o.Dropped.Foreign
	c.Dropped.Protocol += o.Dropped.Protocol
	c.Dropped.Unsteered += o.Dropped.Unsteered
}

// addCounters makes a tenant's counters unless they are there.
func (d *Datapath) addCounters(index uint16) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count CPUs: %w", err)
	}
	zero := make([]datapathTenantCounters, cpus)
	err = d.maps[datapathMapCounters].Update(uint32(index), zero, ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("make counters of tenant %d: %w", index, err)
	}
	return nil
}
