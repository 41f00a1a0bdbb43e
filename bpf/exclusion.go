package bpf

import (
	"fmt"
	"net/netip"
)

// Exclusion leaves connections out of the mesh: they pass in the clear, between
// the pod and its peer. It concerns new ones; one that has begun stays where it
// is. Of two exclusions it is enough that one fits. Tunnels to the pod (port
// 15008) are never excluded: they end at its tenant.
type Exclusion struct {
	// Inbound is for connections that are made to the pod, otherwise it is for
	// those that it makes.
	Inbound bool
	// Port is that of the destination; 0 is every port.
	Port uint16
	// Peer is the pod's peer; the zero Prefix is everyone.
	Peer netip.Prefix
}

// String is such as "outbound 10.0.0.0/8:443", "inbound *:8080" or "outbound *".
func (e Exclusion) String() string {
	direction, peer, port := "outbound", "*", ""
	if e.Inbound {
		direction = "inbound"
	}
	if e.Peer.IsValid() {
		peer = e.Peer.String()
	}
	if e.Port != 0 {
		port = fmt.Sprintf(":%d", e.Port)
	}
	return direction + " " + peer + port
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
	has := d.exclusions[uint32(ifindex)]
	wanted := map[datapathExclusion]bool{}
	for _, e := range all {
		key, err := e.key(ifindex)
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
