package bpf

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Exclusion leaves connections out of the mesh: they pass in the clear, between
// the pod and its peer. It concerns new ones; one that has begun stays where it
// is. Of two exclusions it is enough that one fits.
type Exclusion struct {
	// Inbound is for connections that are made to the pod, otherwise it is for
	// those that it makes.
	Inbound bool
	// Port is that of the destination; 0 is every port.
	Port uint16
	// Peer is the pod's peer; the zero Prefix is everyone.
	Peer netip.Prefix
}

// peerBits are those of the key before the address.
const peerBits = 64

// key says what the programs look up; ifindex 0 is for all pods.
func (e Exclusion) key(ifindex int) (datapathExclusion, error) {
	k := datapathExclusion{Prefixlen: peerBits, Ifindex: uint32(ifindex), Port: e.Port<<8 | e.Port>>8}
	if !e.Inbound {
		k.Outbound = 1
	}
	switch {
	case e.Peer == netip.Prefix{}:
		return k, nil
	case !e.Peer.IsValid() || e.Peer != e.Peer.Masked() || e.Peer.Addr().Is4In6():
		return k, fmt.Errorf("exclusion of peer %q: want an IPv4 or IPv6 network", e.Peer)
	}
	k.Peer.Bytes = e.Peer.Addr().As16()
	k.Prefixlen += uint32(e.Peer.Bits())
	if e.Peer.Addr().Is4() {
		k.Prefixlen += 96
	}
	return k, nil
}

// SetExclusions says what is left out of the mesh for all pods; Pod.Exclusions
// are beside these. Default: nothing.
func (d *Datapath) SetExclusions(all []Exclusion) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.setExclusions(0, all); err != nil {
		return fmt.Errorf("set exclusions: %w", err)
	}
	return nil
}

func (d *Datapath) setExclusions(ifindex int, all []Exclusion) error {
	m := d.maps[datapathMapExclusions]
	wanted := map[datapathExclusion]bool{}
	for _, e := range all {
		key, err := e.key(ifindex)
		if err != nil {
			return err
		}
		wanted[key] = true
	}
	// First what goes: less passes in the clear if this fails halfway.
	var stale []datapathExclusion
	var key datapathExclusion
	var value uint8
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		if key.Ifindex == uint32(ifindex) && !wanted[key] {
			stale = append(stale, key)
		}
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read exclusions: %w", err)
	}
	for _, key := range stale {
		if err := deleteKey(m, key); err != nil {
			return fmt.Errorf("delete exclusion: %w", err)
		}
	}
	for key := range wanted {
		if err := m.Put(key, uint8(1)); err != nil {
			return fmt.Errorf("write exclusion: %w", fullError(m, datapathMapExclusions, err))
		}
	}
	return nil
}

// SetBypass switches the emergency bypass of a tenant: while it is on, new
// connections of its pods pass in the clear, and are counted as
// Counters.Bypassed; those that have begun stay where they are, also when it is
// switched off. Every change is logged as a warning. Default off.
func (d *Datapath) SetBypass(index uint16, on bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	former, err := d.tenant(index)
	if err != nil {
		return fmt.Errorf("set bypass: %w", err)
	}
	var value uint8
	if on {
		value = 1
	}
	if former.Bypass == value {
		return nil
	}
	if err := d.changeTenant(index, func(t *datapathTenant) { t.Bypass = value }); err != nil {
		return fmt.Errorf("set bypass: %w", err)
	}
	d.log.Warn("Emergency bypass of the mesh", "tenant", index, "on", on)
	return nil
}

// Bypassed says which tenants have the emergency bypass on.
func (d *Datapath) Bypassed() ([]uint16, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var on []uint16
	var index uint32
	var entry datapathTenant
	entries := d.maps[datapathMapTenants].Iterate()
	for entries.Next(&index, &entry) {
		if entry.Bypass != 0 {
			on = append(on, uint16(index))
		}
	}
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, fmt.Errorf("read tenants: %w", err)
	}
	return on, nil
}
