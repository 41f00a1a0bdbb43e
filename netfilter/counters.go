package netfilter

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

func addDrop(d *steer.Drops, reason uint32, n uint64) {
	switch reason {
	case dropSpoofed:
		d.Spoofed += n
	case dropFragment:
		d.Fragment += n
	case dropMalformed:
		d.Malformed += n
	case dropNoTenant:
		d.NoTenant += n
	case dropNotThePod:
		d.NotThePod += n
	case dropDeliver:
		d.Deliver += n
	case dropForeign:
		d.Foreign += n
	case dropProtocol:
		d.Protocol += n
	case dropMidstream:
		d.Midstream += n
	case dropFlowsFull:
		d.FlowsFull += n
	}
}

// eachDrop calls f for everything that was counted at a veth.
func (d *Datapath) eachDrop(f func(veth, reason uint32, n uint64)) error {
	c, err := open(0)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	elements, err := c.GetSetElements(d.sets[setDrops])
	if err != nil {
		return fmt.Errorf("read what was dropped: %w", err)
	}
	for _, e := range elements {
		if e.Counter != nil && len(e.Key) == 8 {
			f(binaryutil.NativeEndian.Uint32(e.Key[:4]), binaryutil.NativeEndian.Uint32(e.Key[4:]), e.Counter.Packets)
		}
	}
	return nil
}

// deleteDrops forgets what was counted at veths.
func (d *Datapath) deleteDrops(veths []uint32) error {
	if len(veths) == 0 {
		return nil
	}
	c, err := open(0)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	var gone []nftables.SetElement
	err = d.eachDrop(func(veth, reason uint32, _ uint64) {
		for _, v := range veths {
			if v == veth {
				gone = append(gone, nftables.SetElement{Key: key(native(veth), native(reason))})
			}
		}
	})
	if err != nil || len(gone) == 0 {
		return err
	}
	if err := c.SetDeleteElements(d.sets[setDrops], gone); err != nil {
		return fmt.Errorf("forget what was dropped: %w", err)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("forget what was dropped: %w", err)
	}
	return nil
}

// connection is what a tenant's table counted of a pod and a listener's port.
type connection struct {
	pod  netip.Addr
	port uint16
	n    uint64
}

func (t *tenantState) connections() (list []connection, err error) {
	err = inTenant(t.netns, func(ns int) error {
		c, err := open(ns)
		if err != nil {
			return err
		}
		sets := innerSets()
		for _, f := range families {
			elements, err := c.GetSetElements(sets[setConnections+f.version])
			if err != nil {
				return fmt.Errorf("read counted connections: %w", err)
			}
			for _, e := range elements {
				pod, ok := netip.AddrFromSlice(e.Key[:f.length])
				if ok && e.Counter != nil {
					list = append(list, connection{pod, uint16(e.Key[f.length])<<8 | uint16(e.Key[f.length+1]), e.Counter.Packets})
				}
			}
		}
		return nil
	})
	return list, err
}

// listenerOf tells a port's listener and generation.
func listenerOf(port uint16) (l steer.Listener, generation int, ok bool) {
	for g := range steer.Generations {
		for l := range steer.Listeners {
			if l.PortOf(g) == port {
				return l, g, true
			}
		}
	}
	return 0, 0, false
}

// Counters returns the counters of all tenants; what belongs to no tenant is
// under 0.
func (d *Datapath) Counters() (map[uint16]steer.Counters, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.snapshotNow()
	if err != nil {
		return nil, err
	}
	all := map[uint16]steer.Counters{}
	err = d.eachDrop(func(veth, reason uint32, n uint64) {
		index := s.tenantOf(veth)
		if e, ok := s.sets[setTenantOf][string(native(veth))]; ok {
			index = uint16(binaryutil.NativeEndian.Uint32(e.value))
		}
		c := all[index]
		addDrop(&c.Dropped, reason, n)
		all[index] = c
	})
	if err != nil {
		return nil, err
	}
	for index, t := range d.tenants {
		list, err := t.connections()
		if err != nil {
			return nil, fmt.Errorf("tenant %d: %w", index, err)
		}
		c := all[index]
		for _, k := range list {
			l, generation, ok := listenerOf(k.port)
			switch {
			case k.port == 0 && k.pod.IsUnspecified():
				c.Dropped.Unsteered += k.n
			case k.port == plainTextPort:
				c.Dropped.PlainText += k.n
			case k.port == 0:
				c.Refused += k.n
			case ok:
				c.Steered[generation] += k.n
				c.Add(l, k.n)
			}
		}
		all[index] = c
	}
	return all, nil
}

// PodCounters returns the counters of all pods, by UID.
func (d *Datapath) PodCounters() (map[string]steer.PodCounters, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.snapshotNow()
	if err != nil {
		return nil, err
	}
	c, err := open(0)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	all := map[string]steer.PodCounters{}
	of := func(veth []byte, f func(*steer.PodCounters)) {
		if e, ok := s.sets[setPods][string(veth)]; ok {
			p := all[e.comment]
			f(&p)
			all[e.comment] = p
		}
	}
	for _, f := range families {
		for _, name := range []string{setSent, setReceived} {
			elements, err := c.GetSetElements(d.sets[name+f.version])
			if err != nil {
				return nil, fmt.Errorf("read counted bytes: %w", err)
			}
			for _, e := range elements {
				if e.Counter == nil {
					continue
				}
				of(e.Key[:4], func(p *steer.PodCounters) {
					if name == setSent {
						p.BytesSent += e.Counter.Bytes
					} else {
						p.BytesReceived += e.Counter.Bytes
					}
				})
			}
		}
	}
	err = d.eachDrop(func(veth, reason uint32, n uint64) {
		of(native(veth), func(p *steer.PodCounters) { addDrop(&p.Dropped, reason, n) })
	})
	if err != nil {
		return nil, err
	}
	for index, t := range d.tenants {
		list, err := t.connections()
		if err != nil {
			return nil, fmt.Errorf("tenant %d: %w", index, err)
		}
		for _, k := range list {
			e, ok := s.sets[setAddresses+familyOf(k.pod).version][string(addressKey(k.pod))]
			if l, _, is := listenerOf(k.port); ok && is {
				of(e.value, func(p *steer.PodCounters) { p.Add(l, k.n) })
			}
		}
	}
	return all, nil
}
