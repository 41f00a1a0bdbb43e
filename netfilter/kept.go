package netfilter

import (
	"maps"
	"net/netip"

	"github.com/google/nftables/binaryutil"
)

// keptOf is how many of the flows that are written down a tenant is charged with: those
// through it, and those in the clear of its pods, also of such as are about to join it, or
// have left it for none and aren't done with it.
func (d *Datapath) keptOf(tenant uint16, stored []storedFlow) (int, error) {
	s, err := d.snapshotNow()
	if err != nil {
		return 0, err
	}
	c, err := open(0)
	if err != nil {
		return 0, err
	}
	left := map[former]bool{}
	for _, fam := range families {
		all, err := formersIn(c, d.sets[setFormers+fam.version])
		if err != nil {
			return 0, err
		}
		for f := range all {
			left[f] = true
		}
	}
	n := 0
	for _, f := range stored {
		if f.tenant == tenant || f.tenant == 0 && d.isCharged(s, tenant, f.Pod.Addr(), left) {
			n++
		}
	}
	return n, nil
}

// isCharged tells whether a tenant is charged with what a pod with this address has in the
// clear.
func (d *Datapath) isCharged(s *snapshot, tenant uint16, pod netip.Addr, left map[former]bool) bool {
	owner := s.sets[setOwners+familyOf(pod).version][string(addressKey(pod))]
	if len(owner.value) == 4 {
		if of := uint16(binaryutil.NativeEndian.Uint32(owner.value)); of != 0 {
			return of == tenant
		}
	}
	return d.joining[pod] == tenant || left[former{tenant, pod}]
}

// sweepJoining forgets pods that haven't come, and of which nothing is written down.
func (d *Datapath) sweepJoining() error {
	if len(d.joining) == 0 {
		return nil
	}
	stored, err := d.flows(false)
	if err != nil {
		return err
	}
	clear := map[netip.Addr]bool{}
	for _, f := range stored {
		if f.tenant == 0 {
			clear[f.Pod.Addr()] = true
		}
	}
	maps.DeleteFunc(d.joining, func(a netip.Addr, _ uint16) bool { return !clear[a] })
	return nil
}
