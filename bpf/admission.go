package bpf

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// ConnectionLimits are those that the programs hold for a tenant.
func (d *Datapath) ConnectionLimits(index uint16) (steer.ConnectionLimits, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t, err := d.tenant(index)
	return steer.ConnectionLimits{Concurrent: t.MaxConnections, NewPerSecond: t.NewPerSecond, DirectPerSecond: t.DirectPerSecond}, err
}

// Connections is how many connections a tenant's processes have accepted and not
// closed, 0 without Tenant.CgroupV2.
func (d *Datapath) Connections(index uint16) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t, err := d.tenant(index)
	if err != nil {
		return 0, err
	}
	n, err := d.counted(index)
	return max(0, n+int64(t.ConnectionsCorrection)), err
}

func (d *Datapath) counted(index uint16) (int64, error) {
	var l datapathTenantLoad
	if err := d.maps[datapathMapLoads].Lookup(uint32(index), &l); err != nil {
		return 0, fmt.Errorf("read connections of tenant %d: %w", index, err)
	}
	return l.Connections, nil
}

// checkPeriod is how often counts of connections are compared with the kernel's
// sockets.
const checkPeriod = 10 * time.Second

// CheckConnections compares the count of a tenant's connections with the sockets in
// its network namespace, and corrects what is wrong: more connections than sockets,
// at two checks one after the other, or less than none. The kernel tells of each
// connection's end, so that nothing should be; but a count that is wrong for ever
// would close a tenant for ever. It returns when to call it again.
func (d *Datapath) CheckConnections(index uint16, path string) (again time.Duration, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return checkPeriod, d.checkConnections(index, path)
}

func (d *Datapath) checkConnections(index uint16, path string) error {
	t, err := d.tenant(index)
	if err != nil || t.MaxConnections == 0 {
		delete(d.suspected, index)
		return err
	}
	before, err := d.counted(index)
	if err != nil {
		return err
	}
	sockets, err := connectedSockets(path)
	if err != nil {
		return fmt.Errorf("check connections of tenant %d: %w", index, err)
	}
	after, err := d.counted(index)
	if err != nil {
		return err
	}
	have := min(before, after) + int64(t.ConnectionsCorrection)
	excess := max(0, have-int64(sockets))
	last := d.suspected[index]
	if d.suspected == nil {
		d.suspected = map[uint16]int64{}
	}
	d.suspected[index] = excess
	change := -min(last, excess)
	if have < 0 {
		change = -have
	}
	if change == 0 {
		return nil
	}
	d.suspected[index] = 0
	d.log.Warn("A tenant's count of connections was wrong", "tenant", index, "counted", have, "sockets", sockets)
	return d.changeTenant(index, func(t *datapathTenant) { t.ConnectionsCorrection += int32(change) })
}

// connectedSockets counts the TCP sockets in a network namespace that have a peer.
func connectedSockets(path string) (n int, err error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return 0, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer ns.Close()
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_INET_DIAG)
	if err != nil {
		return 0, fmt.Errorf("ask for the sockets of network namespace %s: %w", path, err)
	}
	defer handle.Close()
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		list, err := sockets(handle, family)
		if err != nil {
			return 0, fmt.Errorf("list the sockets of network namespace %s: %w", path, err)
		}
		for _, s := range list {
			switch s.State {
			case netlink.TCP_LISTEN, netlink.TCP_CLOSE, netlink.TCP_TIME_WAIT:
			default:
				n++
			}
		}
	}
	return n, nil
}

// addLoad makes the entry that a tenant's connections are counted in.
func (d *Datapath) addLoad(index uint16) error {
	m := d.maps[datapathMapLoads]
	if err := m.Update(uint32(index), datapathTenantLoad{}, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("count connections of tenant %d: %w", index, fullError(m, datapathMapLoads, err))
	}
	return nil
}

// addLoads makes them for the tenants of a version that didn't count: the programs
// begin to as soon as they are replaced.
func (d *Datapath) addLoads() error {
	var indexes []uint16
	var index uint32
	var entry datapathTenant
	tenants := d.maps[datapathMapTenants].Iterate()
	for tenants.Next(&index, &entry) {
		indexes = append(indexes, uint16(index))
	}
	if err := tenants.Err(); err != nil {
		return fmt.Errorf("read tenants: %w", err)
	}
	for _, index := range indexes {
		if err := d.addLoad(index); err != nil {
			return err
		}
	}
	return nil
}
