package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// keptFlows are how many connections the map of flows has, as of the last sweep and moves
// since.
type keptFlows struct {
	// through are those through each tenant.
	through map[uint16]int
	// clear are those in the clear, by the pod's veth: its tenant may change.
	clear map[uint32]int
}

func (k *keptFlows) add(tenant uint16, ifindex uint32) {
	if tenant == 0 {
		k.clear[ifindex]++
	} else {
		k.through[tenant]++
	}
}

// keptOf is how many of them a tenant is charged with: those through it, and those in the
// clear of its pods, also of such as are about to join it, or have left it for none.
func (d *Datapath) keptOf(tenant uint16) (int, error) {
	if d.kept == nil {
		// What a former process has written down counts, too.
		kept := &keptFlows{through: map[uint16]int{}, clear: map[uint32]int{}}
		if err := d.eachFlow(func(_ datapathFlow, s datapathFlowState) { kept.add(uint16(s.Tenant), s.Ifindex) }); err != nil {
			return 0, err
		}
		d.kept = kept
	}
	n := d.kept.through[tenant]
	for ifindex, clear := range d.kept.clear {
		of, joins := d.joining[ifindex]
		var veth datapathVeth
		switch err := d.maps[datapathMapVeths].Lookup(ifindex, &veth); {
		case err == nil && !joins:
			of = uint16(veth.Tenant)
		case err != nil && !errors.Is(err, ebpf.ErrKeyNotExist):
			return 0, fmt.Errorf("read veth %d: %w", ifindex, err)
		}
		if of == tenant {
			n += clear
		}
	}
	return n, nil
}
