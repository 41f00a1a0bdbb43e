package netfilter

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// formerLeast is for how long a former tenant may open connections for a pod even
	// if it has none: one may be on its way.
	formerLeast = 5 * time.Second
	// leftFor is for how long a SYN may be on its way to a former tenant.
	leftFor = 5 * time.Second
)

// former is a tenant that a pod with this address has left.
type former struct {
	tenant uint16
	pod    netip.Addr
}

func (f former) key() []byte { return key(native(uint32(f.tenant)), addressKey(f.pod)) }

// addFormer lets a tenant that a pod is about to leave go on to take and to open
// connections for it.
func (d *Datapath) addFormer(uid string, tenant uint16) error {
	if tenant == 0 {
		return nil
	}
	s, err := d.snapshotNow()
	if err != nil {
		return err
	}
	c, err := open(0)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	for _, a := range s.podAddresses(s.podVeths(uid)) {
		f := former{tenant, a}
		d.left[f] = time.Now()
		set := d.sets[setFormers+familyOf(a).version]
		// An element that is there keeps its time.
		there, err := formersIn(c, set)
		if err != nil {
			return err
		}
		if _, ok := there[f]; ok {
			if err := c.SetDeleteElements(set, []nftables.SetElement{{Key: f.key()}}); err != nil {
				return fmt.Errorf("write former tenant: %w", err)
			}
		}
		if err := c.SetAddElements(set, []nftables.SetElement{{Key: f.key(), Timeout: model.FormerLimit}}); err != nil {
			return fmt.Errorf("write former tenant: %w", err)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("write former tenant: %w", err)
	}
	return nil
}

// formersIn reads a set: how much time is left.
func formersIn(c *nftables.Conn, set *nftables.Set) (map[former]time.Duration, error) {
	elements, err := c.GetSetElements(set)
	if err != nil {
		return nil, fmt.Errorf("read former tenants: %w", err)
	}
	all := map[former]time.Duration{}
	for _, e := range elements {
		if len(e.Key) > 4 {
			a, _ := netip.AddrFromSlice(e.Key[4:])
			all[former{uint16(binaryutil.NativeEndian.Uint32(e.Key[:4])), a}] = e.Expires
		}
	}
	return all, nil
}

// Placements returns where each pod is, by UID.
func (d *Datapath) Placements() (map[string]model.Placement, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.snapshotNow()
	if err != nil {
		return nil, err
	}
	places := map[string]model.Placement{}
	for _, e := range s.sets[setPods] {
		places[e.comment] = model.Placement{Tenant: uint16(binaryutil.NativeEndian.Uint32(e.value))}
	}
	c, err := open(0)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	for _, fam := range families {
		all, err := formersIn(c, d.sets[setFormers+fam.version])
		if err != nil {
			return nil, err
		}
		for f := range all {
			veth, ok := s.sets[setAddresses+fam.version][string(addressKey(f.pod))]
			uid := s.sets[setPods][string(veth.value)].comment
			if p := places[uid]; ok && f.tenant != p.Tenant && !slices.Contains(p.Formers, f.tenant) {
				p.Formers = append(p.Formers, f.tenant)
				places[uid] = p
			}
		}
	}
	return places, nil
}

// sweepFormers ends what isn't needed any more.
func (d *Datapath) sweepFormers() error {
	over := false
	for f, since := range d.left {
		if time.Since(since) > leftFor {
			delete(d.left, f)
			over = true
		}
	}
	if over {
		if err := d.syncTenants(); err != nil {
			return err
		}
	}
	used := map[former]bool(nil)
	return d.deleteFormers(func(f former, expires time.Duration) bool {
		if expires > model.FormerLimit-formerLeast {
			return false
		}
		if used == nil {
			used = map[former]bool{}
			flows, err := d.flows(false)
			if err != nil {
				d.log.Warn("Former tenants can't be told from those with connections", "error", err)
				used = nil
				return false
			}
			for _, flow := range flows {
				used[former{flow.tenant, flow.Pod.Addr()}] = true
			}
		}
		return !used[f]
	})
}

func (d *Datapath) deleteFormers(which func(f former, expires time.Duration) bool) error {
	var err error
	for range 5 { // their time ends meanwhile, and what isn't there can't be deleted
		if err = d.tryDeleteFormers(which); !errors.Is(err, unix.ENOENT) {
			break
		}
	}
	return err
}

func (d *Datapath) tryDeleteFormers(which func(f former, expires time.Duration) bool) error {
	c, err := open(0)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	deleted := false
	for _, fam := range families {
		set := d.sets[setFormers+fam.version]
		all, err := formersIn(c, set)
		if err != nil {
			return err
		}
		for f, expires := range all {
			if !which(f, expires) {
				continue
			}
			delete(d.left, f)
			deleted = true
			if err := c.SetDeleteElements(set, []nftables.SetElement{{Key: f.key()}}); err != nil {
				return fmt.Errorf("delete former tenant: %w", err)
			}
		}
	}
	if !deleted {
		return nil
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("delete former tenant: %w", err)
	}
	return nil
}
