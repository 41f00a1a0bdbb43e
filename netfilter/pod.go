package netfilter

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/vishvananda/netlink"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// UpdatePod steers a pod through its tenant, or changes where: its TCP goes to
// another tenant at once, whereupon connections through the former one end (see
// MovePod), but for those that an earlier MovePod kept. An address that another
// pod had is this pod's from now on. It is idempotent and can be repeated after
// an error.
func (d *Datapath) UpdatePod(p steer.Pod) error {
	if err := p.Validate(); err != nil {
		return fmt.Errorf("update pod %q: %w", p.UID, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.updatePod(p, false); err != nil {
		return fmt.Errorf("update pod %s: %w", p.UID, err)
	}
	return nil
}

// updatePod writes a pod's elements and chains in one step; with learn, the rules
// write down each connection that opens. The tenant's namespace knows of it first.
func (d *Datapath) updatePod(p steer.Pod, learn bool) error {
	link, err := netlink.LinkByIndex(p.Ifindex)
	if err != nil {
		return fmt.Errorf("find interface %d: %w", p.Ifindex, err)
	}
	ch, err := d.change()
	if err != nil {
		return err
	}
	veth := uint32(p.Ifindex)
	wanted := map[netip.Addr]bool{}
	for _, a := range p.IPs {
		wanted[a.Unmap()] = true
	}
	var lost []netip.Addr
	var moved []uint32
	for _, former := range ch.snap.podVeths(p.UID) {
		if former != veth || ch.snap.tenantOf(former) != p.Tenant {
			moved = append(moved, former)
		}
		for _, a := range ch.snap.podAddresses([]uint32{former}) {
			ch.forgetAddress(former, a)
			if !wanted[a] {
				lost = append(lost, a)
			}
		}
		if former != veth {
			ch.forgetVeth(former)
		}
	}
	for a := range wanted {
		if e, ok := ch.snap.sets[setAddresses+familyOf(a).version][string(addressKey(a))]; ok {
			owner := binaryutil.NativeEndian.Uint32(e.value)
			if other, ok := ch.snap.sets[setPods][string(native(owner))]; !ok || other.comment != p.UID {
				// The connections of an address that it takes over were the other pod's.
				lost = append(lost, a)
				ch.forgetAddress(owner, a)
			}
		}
	}
	if err := errors.Join(d.deleteFlowsOf(lost), d.keepUntold(ch.snap, moved)); err != nil {
		return err
	}
	for a := range wanted {
		ch.putAddress(veth, a, p.Tenant, learn)
		ch.put(setMACs+familyOf(a).version, addressKey(a), p.MAC, "")
	}
	if ch.delete(setStrict, native(veth)); p.Strict {
		ch.put(setStrict, native(veth), nil, "")
	}
	ch.exclude(veth, p.Exclusions, p.Bypass)
	ch.put(setPods, native(veth), native(uint32(p.Tenant)), p.UID)
	in, out := podChains(veth)
	ch.hook(in, nftables.ChainHookIngress, link.Attrs().Name)
	ch.hook(out, nftables.ChainHookEgress, link.Attrs().Name)
	ch.leadPod(veth, p.Tenant, ch.snap.paceOf(p.Tenant))
	if t := d.tenants[p.Tenant]; t != nil {
		if err := d.syncTenant(p.Tenant, t, p); err != nil {
			return err
		}
	}
	if err := ch.commit(); err != nil {
		return err
	}
	return d.syncTenants()
}

func podChains(veth uint32) (in, out string) {
	n := strconv.Itoa(int(veth))
	return "in_" + n, "out_" + n
}

// eachOf calls f for every key that a pod's address has.
func eachOf(veth uint32, a netip.Addr, f func(set string, key []byte)) {
	v := familyOf(a).version
	address := addressKey(a)
	f(setSent+v, key(native(veth), address))
	f(setReceived+v, key(native(veth), address))
	f(setAddresses+v, address)
	f(setMACs+v, address)
	f(setOwners+v, address)
	f(setLearn+v, address)
	f(setSelf+v, key(address, address))
	f(setMarked+v, address)
}

func (c *change) forgetAddress(veth uint32, a netip.Addr) { eachOf(veth, a, c.delete) }

func (c *change) putAddress(veth uint32, a netip.Addr, tenant uint16, learn bool) {
	v := familyOf(a).version
	eachOf(veth, a, func(set string, k []byte) {
		switch set {
		case setAddresses + v:
			c.put(set, k, native(veth), "")
		case setMACs + v:
			if e, ok := c.snap.sets[set][string(k)]; ok {
				c.put(set, k, e.value, "") // the caller's to replace
			}
		case setOwners + v:
			c.put(set, k, native(uint32(tenant)), "")
		case setLearn + v:
			if learn {
				c.put(set, k, nil, "")
			}
		default:
			c.put(set, k, nil, "")
		}
	})
}

func (c *change) forgetVeth(veth uint32) {
	c.delete(setPods, native(veth))
	c.delete(setStrict, native(veth))
	c.exclude(veth, nil, false)
	in, out := podChains(veth)
	c.unhook(in)
	c.unhook(out)
}

// DeletePod forgets a pod; its veth may be gone. If it still runs, its plain
// connections pass from then on, those through the tenant end. Nothing to delete
// is no error.
func (d *Datapath) DeletePod(uid string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.deletePod(uid); err != nil {
		return fmt.Errorf("delete pod %s: %w", uid, err)
	}
	return nil
}

func (d *Datapath) deletePod(uid string) error {
	ch, err := d.change()
	if err != nil {
		return err
	}
	veths := ch.snap.podVeths(uid)
	addresses := ch.snap.podAddresses(veths)
	for _, veth := range veths {
		for _, a := range ch.snap.podAddresses([]uint32{veth}) {
			ch.forgetAddress(veth, a)
		}
		ch.forgetVeth(veth)
	}
	if err := d.deleteFlowsOf(addresses); err != nil {
		return err
	}
	for _, a := range addresses {
		delete(d.joining, a)
	}
	if err := d.forgetCounted(veths, setDrops, setDirect); err != nil {
		return err
	}
	if err := d.keepUntold(ch.snap, veths); err != nil {
		return err
	}
	if err := ch.commit(); err != nil {
		return err
	}
	return d.syncTenants()
}

// Pods returns the UIDs of the pods that are steered, in order. One whose chains
// somebody removed isn't among them.
func (d *Datapath) Pods() ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.snapshotNow()
	if err != nil {
		return nil, err
	}
	var uids []string
	for _, e := range s.sets[setPods] {
		uids = append(uids, e.comment)
	}
	slices.Sort(uids)
	return slices.Compact(uids), nil
}
