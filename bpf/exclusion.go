package bpf

import (
	"fmt"
	"net/netip"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// peerBits are those of the key before the address.
const peerBits = 64

// key says what the programs look up; ifindex 0 is for all pods.
func exclusionKey(e steer.Exclusion, ifindex int) (datapathExclusion, error) {
	k := datapathExclusion{Prefixlen: peerBits, Ifindex: uint32(ifindex), Port: e.Port<<8 | e.Port>>8}
	if !e.Inbound {
		k.Outbound = 1
	}
	if err := e.Validate(); err != nil || e.Peer == (netip.Prefix{}) {
		return k, err
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
func (d *Datapath) SetExclusions(all []steer.Exclusion) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.setExclusions(0, all); err != nil {
		return fmt.Errorf("set exclusions: %w", err)
	}
	return nil
}

func (d *Datapath) setExclusions(ifindex int, all []steer.Exclusion) error {
	m := d.maps[datapathMapExclusions]
	has := d.exclusions[uint32(ifindex)]
	wanted := map[datapathExclusion]bool{}
	for _, e := range all {
		key, err := exclusionKey(e, ifindex)
		if err != nil {
			return err
		}
		wanted[key] = true
	}
	// First what goes: less passes in the clear if this fails halfway.
	for key := range has {
		if wanted[key] {
			continue
		}
		if err := deleteKey(m, key); err != nil {
			return fmt.Errorf("delete exclusion: %w", err)
		}
		delete(has, key)
	}
	if len(wanted) == 0 {
		delete(d.exclusions, uint32(ifindex))
		return nil
	}
	if has == nil {
		has = map[datapathExclusion]bool{}
		d.exclusions[uint32(ifindex)] = has
	}
	for key := range wanted {
		if has[key] {
			continue
		}
		if err := m.Put(key, uint8(1)); err != nil {
			return fmt.Errorf("write exclusion: %w", fullError(m, datapathMapExclusions, err))
		}
		has[key] = true
	}
	return nil
}

// readExclusions reads what a former process left in the map.
func (d *Datapath) readExclusions() error {
	var key datapathExclusion
	var value uint8
	entries := d.maps[datapathMapExclusions].Iterate()
	for entries.Next(&key, &value) {
		if d.exclusions[key.Ifindex] == nil {
			d.exclusions[key.Ifindex] = map[datapathExclusion]bool{}
		}
		d.exclusions[key.Ifindex][key] = true
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read exclusions: %w", err)
	}
	return nil
}
