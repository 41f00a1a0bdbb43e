package netfilter

import (
	"fmt"
	"net/netip"
	"slices"

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
	case dropUnsteered:
		d.Unsteered += n
	case dropDirectTooFast:
		d.DirectTooFast += n
	case dropPortsTaken:
		d.PortsTaken += n
	}
}

const ethernetHeader = 14

// counted reads what a set has counted under keys of two numbers, or of one.
func (d *Datapath) counted(set string) (map[[2]uint32]uint64, error) {
	c, err := open(0)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	elements, err := c.GetSetElements(d.sets[set])
	if err != nil {
		return nil, fmt.Errorf("read set %s: %w", set, err)
	}
	all := map[[2]uint32]uint64{}
	for _, e := range elements {
		if e.Counter == nil || len(e.Key) < 4 {
			continue
		}
		k := [2]uint32{binaryutil.NativeEndian.Uint32(e.Key[:4])}
		if len(e.Key) == 8 {
			k[1] = binaryutil.NativeEndian.Uint32(e.Key[4:])
		}
		all[k] = e.Counter.Packets
	}
	return all, nil
}

// forgetCounted forgets what was counted of some interfaces, or of a tenant: what is
// first in the keys of sets.
func (d *Datapath) forgetCounted(of []uint32, sets ...string) error {
	if len(of) == 0 {
		return nil
	}
	c, err := open(0)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	for _, set := range sets {
		all, err := d.counted(set)
		if err != nil {
			return err
		}
		var gone []nftables.SetElement
		for k := range all {
			if !slices.Contains(of, k[0]) {
				continue
			}
			e := nftables.SetElement{Key: native(k[0])}
			if d.sets[set].Concatenation {
				e.Key = key(native(k[0]), native(k[1]))
			}
			gone = append(gone, e)
		}
		for part := range slices.Chunk(gone, chunk) {
			if err := c.SetDeleteElements(d.sets[set], part); err != nil {
				return fmt.Errorf("forget what set %s has counted: %w", set, err)
			}
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("forget what was counted: %w", err)
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
	all := map[uint16]steer.Counters{}
	dropped, err := d.counted(setTenantDrops)
	if err != nil {
		return nil, err
	}
	for k, n := range dropped {
		c := all[uint16(k[0])]
		addDrop(&c.Dropped, k[1], n)
		all[uint16(k[0])] = c
	}
	passed, err := d.counted(setPassed)
	if err != nil {
		return nil, err
	}
	for k, n := range passed {
		c := all[uint16(k[0])]
		switch k[1] {
		case passedExcluded:
			c.Excluded += n
		case passedBypassed:
			c.Bypassed += n
		}
		all[uint16(k[0])] = c
	}
	if err := d.addLost(all); err != nil {
		return nil, err
	}
	for index, n := range d.cut {
		c := all[index]
		c.Cut = n
		all[index] = c
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
			case !k.pod.IsUnspecified(): // it is in that of all as well
			case k.port == unsteeredPort:
				c.Dropped.Unsteered += k.n
			case k.port == plainTextPort:
				c.Dropped.PlainText += k.n
			case k.port == tooFastPort:
				c.Dropped.TooFast += k.n
			case k.port == tooManyPort:
				c.Dropped.TooMany += k.n
			case k.port == refusedPort:
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
						// On the way out a packet has its Ethernet header.
						p.BytesReceived += e.Counter.Bytes - ethernetHeader*e.Counter.Packets
					}
				})
			}
		}
	}
	dropped, err := d.counted(setDrops)
	if err != nil {
		return nil, err
	}
	for k, n := range dropped {
		of(native(k[0]), func(p *steer.PodCounters) { addDrop(&p.Dropped, k[1], n) })
	}
	direct, err := d.counted(setDirect)
	if err != nil {
		return nil, err
	}
	for k, n := range direct {
		of(native(k[0]), func(p *steer.PodCounters) { p.Direct += n })
	}
	for index, t := range d.tenants {
		list, err := t.connections()
		if err != nil {
			return nil, fmt.Errorf("tenant %d: %w", index, err)
		}
		for _, k := range list {
			e, ok := s.sets[setAddresses+familyOf(k.pod).version][string(addressKey(k.pod))]
			if !ok {
				continue
			}
			l, _, is := listenerOf(k.port)
			of(e.value, func(p *steer.PodCounters) {
				switch {
				case is:
					p.Add(l, k.n)
				case k.port == plainTextPort:
					p.Dropped.PlainText += k.n
				case k.port == tooFastPort:
					p.Dropped.TooFast += k.n
				case k.port == tooManyPort:
					p.Dropped.TooMany += k.n
				}
			})
		}
	}
	return all, nil
}
