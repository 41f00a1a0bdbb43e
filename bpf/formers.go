package bpf

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// formerLeast is for how long a former tenant may open connections for a pod even
// if it has none: one may be between two processors.
const formerLeast = 5 * time.Second

// addFormer lets a tenant that a pod is about to leave go on to open connections
// for it.
func (d *Datapath) addFormer(uid string, tenant uint16) error {
	has := d.pods[uid]
	if tenant == 0 || has == nil {
		return nil
	}
	now, err := monotonic()
	if err != nil {
		return err
	}
	m := d.maps[datapathMapFormers]
	for address := range has.addresses {
		if err := m.Put(datapathFormer{Pod: address, Tenant: uint32(tenant)}, now+uint64(model.FormerLimit)); err != nil {
			return fmt.Errorf("write former tenant: %w", fullError(m, datapathMapFormers, err))
		}
	}
	return nil
}

// Placements returns where each pod is, by UID.
func (d *Datapath) Placements() (map[string]model.Placement, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	places, owner := map[string]model.Placement{}, map[datapathAddr]string{}
	for uid, has := range d.pods {
		for address := range has.addresses {
			owner[address] = uid
		}
		if err := d.changePodEntries(uid, func(e *datapathPod) { places[uid] = model.Placement{Tenant: uint16(e.Tenant)} }); err != nil {
			return nil, err
		}
	}
	return places, d.eachFormer(func(f datapathFormer, _ uint64) {
		uid, ok := owner[f.Pod]
		p := places[uid]
		if tenant := uint16(f.Tenant); ok && tenant != p.Tenant && !slices.Contains(p.Formers, tenant) {
			p.Formers = append(p.Formers, tenant)
			places[uid] = p
		}
	})
}

// sweepFormers ends what is over, or isn't needed any more: used are those that
// have connections.
func (d *Datapath) sweepFormers(used map[datapathFormer]bool, now uint64) error {
	return d.deleteFormers(func(f datapathFormer, until uint64) bool {
		return until <= now || !used[f] && now+uint64(model.FormerLimit-formerLeast) > until
	})
}

func (d *Datapath) eachFormer(f func(datapathFormer, uint64)) error {
	var key datapathFormer
	var until uint64
	all := d.maps[datapathMapFormers].Iterate()
	for all.Next(&key, &until) {
		f(key, until)
	}
	if err := all.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read former tenants: %w", err)
	}
	return nil
}

func (d *Datapath) deleteFormers(which func(f datapathFormer, until uint64) bool) error {
	stale := map[datapathFormer]bool{}
	if err := d.eachFormer(func(f datapathFormer, until uint64) { stale[f] = which(f, until) }); err != nil {
		return err
	}
	maps.DeleteFunc(stale, func(_ datapathFormer, is bool) bool { return !is })
	for f := range stale {
		if err := deleteKey(d.maps[datapathMapFormers], f); err != nil {
			return fmt.Errorf("delete former tenant: %w", err)
		}
	}
	return nil
}
