package netfilter

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// UpdateTenant makes the rules of a tenant, or corrects them where its namespace
// or veth is another one now. Its weight and listeners stay. It is idempotent and
// can be repeated after an error.
func (d *Datapath) UpdateTenant(t steer.Tenant) error {
	if err := t.Validate(); err != nil {
		return fmt.Errorf("update tenant %d: %w", t.Index, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.updateTenant(t); err != nil {
		return fmt.Errorf("update tenant %d: %w", t.Index, err)
	}
	return nil
}

func (d *Datapath) updateTenant(t steer.Tenant) error {
	link, err := netlink.LinkByIndex(t.HostIfindex)
	if err != nil {
		return fmt.Errorf("find interface %d: %w", t.HostIfindex, err)
	}
	if err := admit(link); err != nil {
		return err
	}
	state := d.tenants[t.Index]
	if state == nil || state.netns != t.Netns || state.ifindex != t.TenantIfindex {
		state = &tenantState{netns: t.Netns, ifindex: t.TenantIfindex}
	}
	// First in there: nothing is sent into a namespace that doesn't know what to do
	// with it.
	if err := d.writeTenant(t.Index, state, func(s *innerState) {
		s.pace, s.concurrent, s.own = t.Connections.NewPerSecond, t.Connections.Concurrent, 0
		if t.BoundEgress {
			s.own = d.priority
		}
	}); err != nil {
		return err
	}
	d.tenants[t.Index] = state
	d.readTenantEvents(t.Index, t.Netns)
	ch, err := d.change()
	if err != nil {
		return err
	}
	veth, tenant := uint32(t.HostIfindex), native(uint32(t.Index))
	ch.forgetTenant(t.Index)
	ch.put(setTenantOf, native(veth), tenant, "")
	ch.put(setTenants, tenant, native(veth), "")
	ch.put(setTenantMACs, tenant, t.TenantMAC, "")
	chains := whose(t.Index, tenantChain(veth))
	ch.hook(chains[0].name, nftables.ChainHookIngress, link.Attrs().Name, chains[0].rules...)
	ch.makeAccount(tenantAccount(t.Index))
	for _, of := range chains[1:] {
		ch.branch(of)
	}
	ch.pace(t.Index, t.Connections.DirectPerSecond)
	return ch.commit()
}

// ConnectionLimits are those that the rules hold for a tenant.
func (d *Datapath) ConnectionLimits(index uint16) (steer.ConnectionLimits, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.tenants[index]
	if t == nil {
		return steer.ConnectionLimits{}, fmt.Errorf("limits of tenant %d: %w", index, steer.ErrUnknownTenant)
	}
	s, err := d.snapshotNow()
	if err != nil {
		return steer.ConnectionLimits{}, fmt.Errorf("limits of tenant %d: %w", index, err)
	}
	return steer.ConnectionLimits{Concurrent: t.have.concurrent, NewPerSecond: t.have.pace, DirectPerSecond: s.paceOf(index)}, nil
}

func tenantChain(veth uint32) string { return "tenant_" + strconv.Itoa(int(veth)) }

func (c *change) forgetTenant(index uint16) {
	tenant := native(uint32(index))
	for k, e := range c.snap.sets[setTenantOf] {
		if string(e.value) == string(tenant) {
			c.delete(setTenantOf, []byte(k))
			c.unhook(tenantChain(binaryutil.NativeEndian.Uint32([]byte(k))))
		}
	}
	for _, of := range whose(index, "")[1:] {
		c.unhook(of.name)
	}
	c.delete(setTenants, tenant)
	c.delete(setTenantMACs, tenant)
}

// vethAddress is on the node's end of every tenant's veth: rp_filter is never loose
// for an interface without an address.
var vethAddress = &net.IPNet{IP: net.IPv4(169, 254, 96, 3).To4(), Mask: net.CIDRMask(32, 32)}

// admit lets the node take packets with pods' addresses from a tenant's veth, of
// which from_tenant has checked each: "loose" is for this interface alone, whatever
// is stricter for all.
func admit(link netlink.Link) error {
	// Nobody else's packets get it as their source: its scope is the host.
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: vethAddress, Scope: unix.RT_SCOPE_HOST}); err != nil {
		return fmt.Errorf("give %s an address: %w", link.Attrs().Name, err)
	}
	name := link.Attrs().Name
	for _, s := range []struct{ key, value string }{{"rp_filter", "2"}, {"forwarding", "1"}} {
		file := filepath.Join("/proc/sys/net/ipv4/conf", name, s.key)
		// /proc/sys is that of the thread that opens it.
		if have, err := os.ReadFile(file); err == nil && string(have) == s.value+"\n" {
			continue
		}
		if err := os.WriteFile(file, []byte(s.value), 0o644); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
	}
	return nil
}

// DeleteTenant removes what belongs to a tenant; its pods are closed from then on.
// Call it when the tenant's processes have ended: from_tenant is what keeps them
// from using the addresses of others. Nothing to delete is no error.
func (d *Datapath) DeleteTenant(index uint16) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.deleteTenant(index); err != nil {
		return fmt.Errorf("delete tenant %d: %w", index, err)
	}
	return nil
}

func (d *Datapath) deleteTenant(index uint16) error {
	ch, err := d.change()
	if err != nil {
		return err
	}
	d.endTenantEvents(index)
	delete(d.lost, index)
	delete(d.cut, index)
	var veths []uint32
	for k, e := range ch.snap.sets[setTenantOf] {
		if string(e.value) == string(native(uint32(index))) {
			veths = append(veths, binaryutil.NativeEndian.Uint32([]byte(k)))
		}
	}
	ch.forgetTenant(index)
	ch.pace(index, 0)
	if err := ch.commit(); err != nil {
		return err
	}
	// Another tenant may get the index.
	if err := d.deleteFormers(func(f former, _ time.Duration) bool { return f.tenant == index }); err != nil {
		return err
	}
	if err := d.deleteFlows(func(f storedFlow) bool { return f.tenant == index }); err != nil {
		return err
	}
	if err := d.forgetCounted(veths, setDrops, setUntold); err != nil {
		return err
	}
	if err := d.forgetCounted([]uint32{uint32(index)}, setTenantDrops, setPassed); err != nil {
		return err
	}
	if state := d.tenants[index]; state != nil {
		if err := inTenant(state.netns, func(ns int) error { return removeTables(ns, inner) }); err != nil {
			return err
		}
		delete(d.tenants, index)
	}
	return nil
}

// Tenants returns the tenants that anything is left of, in order.
func (d *Datapath) Tenants() ([]uint16, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.snapshotNow()
	if err != nil {
		return nil, err
	}
	var indexes []uint16
	for k := range s.sets[setTenants] {
		indexes = append(indexes, uint16(binaryutil.NativeEndian.Uint32([]byte(k))))
	}
	for _, e := range s.sets[setTenantOf] {
		indexes = append(indexes, uint16(binaryutil.NativeEndian.Uint32(e.value)))
	}
	slices.Sort(indexes)
	return slices.Compact(indexes), nil
}

// tenantState is a tenant's network namespace, and what is in its table.
type tenantState struct {
	netns   string
	ifindex int
	// generation of the namespace's nftables when have was read; 0: never.
	generation uint32
	have       innerState
}

// setState changes who gets a tenant's new connections.
func (d *Datapath) setState(index uint16, f func(*innerState)) error {
	t := d.tenants[index]
	if t == nil {
		return steer.ErrUnknownTenant
	}
	return d.writeTenant(index, t, f)
}

// syncTenants brings the tenants' namespaces up to date.
func (d *Datapath) syncTenants() error {
	var errs []error
	for index, t := range d.tenants {
		if err := d.syncTenant(index, t); err != nil {
			errs = append(errs, fmt.Errorf("tenant %d: %w", index, err))
		}
	}
	return errors.Join(errs...)
}

// syncTenant tells a tenant's namespace of its pods, those of the node's table and
// more that are about to be there, and of the node's addresses.
func (d *Datapath) syncTenant(index uint16, t *tenantState, more ...steer.Pod) error {
	return d.writeTenant(index, t, func(*innerState) {}, more...)
}

func (d *Datapath) writeTenant(index uint16, t *tenantState, f func(*innerState), more ...steer.Pod) error {
	s, err := d.snapshotNow()
	if err != nil {
		return err
	}
	pods, nodes, strict := map[netip.Addr]bool{}, map[netip.Addr]bool{}, map[netip.Addr]bool{}
	for _, family := range families {
		for k, e := range s.sets[setOwners+family.version] {
			a, _ := netip.AddrFromSlice([]byte(k))
			if _, left := d.left[former{index, a}]; left || string(e.value) == string(native(uint32(index))) {
				pods[a] = true
				veth := s.sets[setAddresses+family.version][k].value
				if _, ok := s.sets[setStrict][string(veth)]; ok {
					strict[a] = true
				}
			}
		}
		for k := range s.sets[setNode+family.version] {
			a, _ := netip.AddrFromSlice([]byte(k))
			nodes[a] = true
		}
	}
	for _, p := range more {
		for _, a := range p.IPs {
			pods[a.Unmap()], strict[a.Unmap()] = true, p.Strict
		}
	}
	maps.DeleteFunc(strict, func(_ netip.Addr, is bool) bool { return !is })
	err = inTenant(t.netns, func(ns int) error {
		c, err := open(ns)
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		if err := t.read(c); err != nil {
			return err
		}
		want := t.have
		want.pods, want.nodes, want.strict = pods, nodes, strict
		if f(&want); t.have.made && want.equal(t.have) {
			return nil
		}
		return t.write(c, want)
	})
	// The namespace has gone with its tenant.
	if errors.Is(err, unix.ENOENT) {
		t.generation = 0
	}
	return err
}
