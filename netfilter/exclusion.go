package netfilter

import (
	"net/netip"
	"slices"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// passedExcluded and passedBypassed are why a new connection passed in the clear: the
// second part of the key in setPassed.
const (
	passedExcluded = iota + 1
	passedBypassed
)

// exclusionKeys are a pod's exclusions as the sets have them, by set: the first key of
// each range to its last.
type exclusionKeys map[string]map[string]string

// keysOf returns a pod's exclusions without those that a wider one with the same port
// contains: the kernel takes no ranges that overlap, and one that fits is enough.
func keysOf(veth uint32, exclusions []steer.Exclusion) exclusionKeys {
	keys := exclusionKeys{}
	type group struct {
		set  string
		port uint16
	}
	networks := map[group][]netip.Prefix{}
	for _, e := range exclusions {
		for _, f := range families {
			g := group{setExcludedOut + f.version, e.Port}
			if e.Inbound {
				g.set = setExcludedIn + f.version
			}
			switch everyone := netip.PrefixFrom(netip.IPv6Unspecified(), 0); {
			case e.Peer.IsValid() && familyOf(e.Peer.Addr()).version == f.version:
				networks[g] = append(networks[g], e.Peer)
			case !e.Peer.IsValid():
				if f.version == "4" {
					everyone = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
				}
				networks[g] = append(networks[g], everyone)
			}
		}
	}
	for g, list := range networks {
		slices.SortFunc(list, func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
		var widest []netip.Prefix
		for _, p := range list {
			if slices.ContainsFunc(widest, p.Overlaps) {
				continue
			}
			widest = append(widest, p)
			if keys[g.set] == nil {
				keys[g.set] = map[string]string{}
			}
			start := key(native(veth), portKey(g.port))
			keys[g.set][string(key(start, addressKey(p.Addr())))] = string(key(start, lastOf(p)))
		}
	}
	return keys
}

// lastOf is a network's last address.
func lastOf(p netip.Prefix) []byte {
	last := p.Masked().Addr().AsSlice()
	for i := range last {
		for bit := range 8 {
			if i*8+bit >= p.Bits() {
				last[i] |= 0x80 >> bit
			}
		}
	}
	return last
}

// exclude makes a veth's exclusions and its bypass what they should be.
func (c *change) exclude(veth uint32, exclusions []steer.Exclusion, bypass bool) {
	k := native(veth)
	c.delete(setExempt, k)
	c.delete(setBypassed, k)
	if bypass {
		c.put(setBypassed, k, nil, "")
	}
	if bypass || len(exclusions) > 0 {
		c.put(setExempt, k, nil, "")
	}
	wanted := keysOf(veth, exclusions)
	for _, f := range families {
		for _, set := range []string{setExcludedIn + f.version, setExcludedOut + f.version} {
			for have := range c.snap.sets[set] {
				if have[:len(k)] == string(k) {
					c.delete(set, []byte(have))
				}
			}
			for first, last := range wanted[set] {
				c.set(set, []byte(first), &element{end: []byte(last)})
			}
		}
	}
}

// exempt are the rules by which a new connection of a pod passes in the clear: the
// bypass, or an exclusion that fits. out says that the pod makes it.
func (f family) exempt(way string, device func(uint32) rule, out bool) []rule {
	v := f.version
	set, peer := setExcludedIn+v, f.source
	if out {
		set, peer = setExcludedOut+v, f.destination
	}
	rules := []rule{join(device(regKey), isNotIn(setExempt, regKey), goTo(way+"_steered"+v))}
	if !out {
		// A tunnel ends at the tenant: the pod doesn't speak it.
		rules = append(rules, join(transport(2, 2, regTemp), equal(regTemp, big16(portInbound)...), goTo(way+"_steered"+v)))
	}
	for _, port := range []rule{transport(2, 2, regKey+1), immediate(regKey+1, portKey(0)...)} {
		rules = append(rules, join(device(regKey), port, network(peer, f.length, regKey+2), isIn(set, regKey), goTo(way+"_excluded"+v)))
	}
	return append(rules,
		join(device(regKey), isIn(setBypassed, regKey), goTo(way+"_bypassed"+v)),
		goTo(way+"_steered"+v))
}

// passes counts a connection that passes in the clear, for the tenant of the mark.
func passes(why uint32, then rule) []rule {
	return []rule{join(theMark(regKey), immediate(regKey+1, native(why)...), put(setPassed, regKey, 0, 0, counter())), then}
}
