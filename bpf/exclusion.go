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

// allIPv4 is the network of IPv6 where addresses of IPv4 are looked up.
var allIPv4 = netip.PrefixFrom(netip.AddrFrom16([16]byte{10: 0xff, 0xff}), 96)

// exclusionEntries are the keys of exclusions, with what the programs find there: 1, and 0 for
// IPv4 where it is in a network of IPv6 that is excluded, and nobody excludes it.
func exclusionEntries(all []steer.Exclusion, ifindex int) (map[datapathExclusion]uint8, error) {
	entries, everyone := map[datapathExclusion]uint8{}, map[datapathExclusion]bool{}
	for _, e := range all {
		key, err := exclusionKey(e, ifindex)
		if err != nil {
			return nil, err
		}
		entries[key] = 1
		if e.Peer == (netip.Prefix{}) {
			everyone[key] = true
		}
	}
	for _, e := range all {
		if !e.Peer.Contains(allIPv4.Addr()) {
			continue
		}
		e.Peer = netip.Prefix{}
		key, err := exclusionKey(e, ifindex)
		if err != nil {
			return nil, err
		}
		if everyone[key] {
			continue
		}
		key.Prefixlen += uint32(allIPv4.Bits())
		key.Peer.Bytes = allIPv4.Addr().As16()
		if entries[key] == 0 {
			entries[key] = 0
		}
	}
	return entries, nil
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
	wanted, err := exclusionEntries(all, ifindex)
	if err != nil {
		return err
	}
	if has == nil {
		has = map[datapathExclusion]uint8{}
		d.exclusions[uint32(ifindex)] = has
	}
	put := func(value uint8) error {
		for key, v := range wanted {
			if former, ok := has[key]; v != value || ok && former == v {
				continue
			}
			if err := m.Put(key, v); err != nil {
				return fmt.Errorf("write exclusion: %w", fullError(m, datapathMapExclusions, err))
			}
			has[key] = v
		}
		return nil
	}
	remove := func(value uint8) error {
		for key, v := range has {
			if _, ok := wanted[key]; ok || v != value {
				continue
			}
			if err := deleteKey(m, key); err != nil {
				return fmt.Errorf("delete exclusion: %w", err)
			}
			delete(has, key)
		}
		return nil
	}
	// Less passes in the clear if this fails halfway.
	for _, step := range []struct {
		do    func(value uint8) error
		value uint8
	}{{put, 0}, {remove, 1}, {remove, 0}, {put, 1}} {
		if err := step.do(step.value); err != nil {
			return err
		}
	}
	if len(has) == 0 {
		delete(d.exclusions, uint32(ifindex))
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
			d.exclusions[key.Ifindex] = map[datapathExclusion]uint8{}
		}
		d.exclusions[key.Ifindex][key] = value
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read exclusions: %w", err)
	}
	return nil
}
