package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Names in a tenant's pin folder.
const (
	fromTenantLink = "from_tenant"
	steerLink      = "steer_link"
	observeLink    = "observe_link"
	// noTransparentLink is of former versions; processes that they started need
	// it as long as they run.
	noTransparentLink = "no_transparent"
)

// tenantLinks are in the order in which they go: what comes out of the namespace
// is checked to the last.
var tenantLinks = []string{observeLink, noTransparentLink, steerLink, fromTenantLink}

// UpdateTenant attaches the programs of a tenant, or corrects them where its
// namespace, veth or cgroup is another one now. Its weight and listeners stay.
// It is idempotent and can be repeated after an error.
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
	former, err := d.tenant(t.Index)
	if err != nil && !errors.Is(err, steer.ErrUnknownTenant) {
		return err
	}
	if err := d.addCounters(t.Index); err != nil {
		return err
	}
	if err := d.addLoad(t.Index); err != nil {
		return err
	}
	veth := datapathVeth{Kind: datapathVethKindVETH_TENANT, Tenant: uint32(t.Index)}
	var counted datapathVeth
	if d.maps[datapathMapVeths].Lookup(former.Ifindex, &counted) == nil && counted.Kind == veth.Kind && counted.Tenant == veth.Tenant {
		veth.Learned = counted.Learned
	}
	if t.Watch {
		if err := d.watch(t.Index); err != nil {
			return err
		}
		veth.Watched = 1
	} else if err := d.unwatch(t.Index); err != nil {
		return err
	}
	if err := d.maps[datapathMapVeths].Put(uint32(t.HostIfindex), veth); err != nil {
		return fmt.Errorf("write veth %d: %w", t.HostIfindex, fullError(d.maps[datapathMapVeths], datapathMapVeths, err))
	}
	if err := d.addVethCounters(t.HostIfindex); err != nil {
		return err
	}
	// The entry comes last: nothing is sent into the namespace before what
	// comes out of it is checked.
	if err := d.attachTenant(t); err != nil {
		return err
	}
	entry := former
	entry.Ifindex = uint32(t.HostIfindex)
	copy(entry.Mac[:], t.TenantMAC)
	entry.MaxConnections, entry.NewPerSecond = t.Connections.Concurrent, t.Connections.NewPerSecond
	entry.DirectPerSecond = t.Connections.DirectPerSecond
	if err := d.maps[datapathMapTenants].Put(uint32(t.Index), entry); err != nil {
		return fmt.Errorf("write tenant: %w", fullError(d.maps[datapathMapTenants], datapathMapTenants, err))
	}
	return d.deleteVeths(func(ifindex uint32, v datapathVeth) bool {
		return v.Kind == datapathVethKindVETH_TENANT && v.Tenant == uint32(t.Index) && ifindex != uint32(t.HostIfindex)
	})
}

func (d *Datapath) attachTenant(t steer.Tenant) error {
	dir := d.tenantDir(t.Index)
	if err := makeDir(dir); err != nil {
		return err
	}
	if err := d.attachTCX(filepath.Join(dir, fromTenantLink), datapathProgFromTenant, t.HostIfindex, ebpf.AttachTCXIngress); err != nil {
		return err
	}
	steer, listeners, err := d.loadSteer(t.Index)
	if err != nil {
		return err
	}
	defer steer.Close()
	defer listeners.Close()
	netns, err := os.Open(t.Netns)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer netns.Close()
	inode, err := inodeOf(netns)
	if err != nil {
		return err
	}
	err = ensureLink(filepath.Join(dir, steerLink), steer,
		func(i *link.Info) bool { n := i.NetNs(); return n != nil && uint64(n.NetnsInode) == inode },
		func() (link.Link, error) {
			l, err := link.AttachNetNs(int(netns.Fd()), steer)
			if err != nil {
				return nil, fmt.Errorf("attach steer to network namespace %s: %w", t.Netns, err)
			}
			return l, nil
		})
	if err != nil {
		return err
	}
	observe, err := d.loadObserve(t.Index)
	if err != nil {
		return err
	}
	defer observe.Close()
	return attachObserve(filepath.Join(dir, observeLink), t.CgroupV2, observe)
}

func attachObserve(path, cgroup string, program *ebpf.Program) error {
	if cgroup == "" {
		return detach(path)
	}
	f, err := os.Open(cgroup)
	if err != nil {
		return fmt.Errorf("open cgroup: %w", err)
	}
	defer f.Close()
	inode, err := inodeOf(f)
	if err != nil {
		return err
	}
	return ensureLink(path, program,
		func(i *link.Info) bool { c := i.Cgroup(); return c != nil && c.CgroupId == inode },
		func() (link.Link, error) {
			l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupSockOps, Program: program})
			if err != nil {
				return nil, fmt.Errorf("attach %s to cgroup %s (is it version 2?): %w", filepath.Base(path), cgroup, err)
			}
			return l, nil
		})
}

// attachTCX attaches one of the shared programs before those of others.
func (d *Datapath) attachTCX(path, name string, ifindex int, at ebpf.AttachType) error {
	program := d.programs[name]
	return ensureLink(path, program,
		func(i *link.Info) bool { t := i.TCX(); return t != nil && int(t.Ifindex) == ifindex },
		func() (link.Link, error) {
			l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: program, Attach: at, Anchor: link.Head()})
			if err != nil {
				return nil, fmt.Errorf("attach %s to interface %d: %w", name, ifindex, err)
			}
			return l, nil
		})
}

// loadSteer returns a tenant's copy of steer and its map of listeners; the
// caller closes both.
func (d *Datapath) loadSteer(index uint16) (*ebpf.Program, *ebpf.Map, error) {
	dir := d.tenantDir(index)
	listeners, err := d.listeners(index)
	if err != nil {
		return nil, nil, err
	}
	maps := map[string]*ebpf.Map{datapathMapListeners: listeners}
	for name, m := range d.maps {
		maps[name] = m
	}
	program, err := d.adoptProgram(filepath.Join(dir, datapathProgSteer), datapathProgSteer, maps,
		func(spec *ebpf.CollectionSpec) error {
			return spec.Variables[datapathVarTenantIndex].Set(uint32(index))
		})
	if err != nil {
		listeners.Close()
		return nil, nil, err
	}
	return program, listeners, nil
}

// loadObserve returns a tenant's copy of observe; the caller closes it.
func (d *Datapath) loadObserve(index uint16) (*ebpf.Program, error) {
	return d.adoptProgram(filepath.Join(d.tenantDir(index), datapathProgObserve), datapathProgObserve, d.maps,
		func(spec *ebpf.CollectionSpec) error {
			return spec.Variables[datapathVarTenantIndex].Set(uint32(index))
		})
}

// DeleteTenant detaches and removes what belongs to a tenant; its pods are
// closed from then on. Call it when the tenant's processes have ended: from_tenant
// is what keeps them from using the addresses of others. Nothing to delete is no error.
func (d *Datapath) DeleteTenant(index uint16) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.deleteTenant(index); err != nil {
		return fmt.Errorf("delete tenant %d: %w", index, err)
	}
	return nil
}

func (d *Datapath) deleteTenant(index uint16) error {
	if err := deleteKey(d.maps[datapathMapTenants], uint32(index)); err != nil {
		return fmt.Errorf("delete entry: %w", err)
	}
	if err := removeDir(d.tenantDir(index), tenantLinks...); err != nil {
		return err
	}
	err := d.deleteVeths(func(_ uint32, v datapathVeth) bool {
		return v.Kind == datapathVethKindVETH_TENANT && v.Tenant == uint32(index)
	})
	if err != nil || index == 0 {
		return err
	}
	// Another tenant may get the index.
	if err := d.deleteFormers(func(f datapathFormer, _ uint64) bool { return f.Tenant == uint32(index) }); err != nil {
		return err
	}
	if err := d.deleteFlows(func(_ datapathFlow, s datapathFlowState) bool { return s.Tenant == uint32(index) }); err != nil {
		return err
	}
	if d.kept != nil {
		delete(d.kept.through, index)
	}
	delete(d.cut, index)
	for _, name := range []string{datapathMapCounters, datapathMapLoads} {
		if err := deleteKey(d.maps[name], uint32(index)); err != nil {
			return fmt.Errorf("delete counters: %w", err)
		}
	}
	return d.unwatch(index)
}

// Tenants returns the tenants that anything is left of, in order.
func (d *Datapath) Tenants() ([]uint16, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	indexes, err := d.tenantDirs()
	if err != nil {
		return nil, err
	}
	var index uint32
	var entry datapathTenant
	entries := d.maps[datapathMapTenants].Iterate()
	for entries.Next(&index, &entry) {
		indexes = append(indexes, uint16(index))
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read tenants: %w", err)
	}
	slices.Sort(indexes)
	return slices.Compact(indexes), nil
}

// SetWeight says how many percent of a tenant's new connections generation 1
// gets, 0 to 100; generation 0 gets the others. Which of them a connection gets
// depends on its addresses and ports. Where one has no listeners the other gets
// all. Default 0.
func (d *Datapath) SetWeight(index uint16, canaryPercent int) error {
	if canaryPercent < 0 || canaryPercent > 100 {
		return fmt.Errorf("set weight of tenant %d: %d is not between 0 and 100", index, canaryPercent)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changeTenant(index, func(t *datapathTenant) { t.Canary = uint8(canaryPercent) })
}

// changeTenant changes an entry that exists.
func (d *Datapath) changeTenant(index uint16, change func(*datapathTenant)) error {
	entry, err := d.tenant(index)
	if err != nil {
		return err
	}
	change(&entry)
	if err := d.maps[datapathMapTenants].Update(uint32(index), entry, ebpf.UpdateExist); err != nil {
		return fmt.Errorf("write tenant %d: %w", index, err)
	}
	return nil
}

func (d *Datapath) tenant(index uint16) (datapathTenant, error) {
	var entry datapathTenant
	switch err := d.maps[datapathMapTenants].Lookup(uint32(index), &entry); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return entry, fmt.Errorf("tenant %d: %w", index, steer.ErrUnknownTenant)
	case err != nil:
		return entry, fmt.Errorf("read tenant %d: %w", index, err)
	}
	return entry, nil
}

func (d *Datapath) tenantDir(index uint16) string {
	return filepath.Join(d.dir, "tenants", strconv.Itoa(int(index)))
}

func (d *Datapath) tenantDirs() ([]uint16, error) {
	names, err := entries(filepath.Join(d.dir, "tenants"))
	if err != nil {
		return nil, err
	}
	var indexes []uint16
	for _, name := range names {
		if n, err := strconv.ParseUint(name, 10, 16); err == nil {
			indexes = append(indexes, uint16(n))
		}
	}
	return indexes, nil
}

func (d *Datapath) deleteVeths(which func(ifindex uint32, v datapathVeth) bool) error {
	return d.eachVeth(func(ifindex uint32, v datapathVeth) error {
		if !which(ifindex, v) {
			return nil
		}
		return d.deleteVeth(ifindex)
	})
}

// deleteVeth deletes what is kept of a veth.
func (d *Datapath) deleteVeth(ifindex uint32) error {
	for _, name := range []string{datapathMapVeths, datapathMapPerPod} {
		if err := deleteKey(d.maps[name], ifindex); err != nil {
			return fmt.Errorf("delete veth %d: %w", ifindex, err)
		}
	}
	return nil
}

// eachVeth calls f for each entry that is there at the start.
func (d *Datapath) eachVeth(f func(ifindex uint32, v datapathVeth) error) error {
	all := map[uint32]datapathVeth{}
	var ifindex uint32
	var v datapathVeth
	entries := d.maps[datapathMapVeths].Iterate()
	for entries.Next(&ifindex, &v) {
		all[ifindex] = v
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read veths: %w", err)
	}
	for ifindex, v := range all {
		if err := f(ifindex, v); err != nil {
			return err
		}
	}
	return nil
}

func inodeOf(f *os.File) (uint64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("examine %s: no inode", f.Name())
	}
	return s.Ino, nil
}
