package bpf

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// podLinks are named after their programs.
var podLinks = []string{datapathProgFromPod, datapathProgToPod}

// podEntries are a pod's keys in the maps.
type podEntries struct {
	addresses map[datapathAddr]bool
	veths     map[uint32]bool
}

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

// updatePod writes a pod's entries and attaches its programs; with learn, they
// write down each connection that opens.
func (d *Datapath) updatePod(p steer.Pod, learn bool) error {
	entry := datapathPod{Tenant: uint32(p.Tenant), Ifindex: uint32(p.Ifindex), Uid: uidBytes(p.UID)}
	copy(entry.Mac[:], p.MAC)
	for _, flag := range []struct {
		field *uint8
		on    bool
	}{{&entry.Learn, learn}, {&entry.Plain, !p.Strict}, {&entry.Bypass, p.Bypass}} {
		if flag.on {
			*flag.field = 1
		}
	}
	gateway, err := gatewayMAC(p.Ifindex)
	if err != nil {
		return err
	}
	copy(entry.GatewayMac[:], gateway)
	wanted := map[datapathAddr]bool{}
	for _, ip := range p.IPs {
		key, err := addrKey(ip)
		if err != nil {
			return err
		}
		wanted[key] = true
	}

	has := d.entriesOf(p.UID)
	veth := datapathVeth{Kind: datapathVethKindVETH_POD, Tenant: uint32(p.Tenant), Uid: entry.Uid}
	var former datapathVeth
	if d.maps[datapathMapVeths].Lookup(uint32(p.Ifindex), &former) == nil && former.Uid == veth.Uid {
		veth.Learned = former.Learned
	} else if err := deleteKey(d.maps[datapathMapPerPod], uint32(p.Ifindex)); err != nil {
		return fmt.Errorf("delete counters of veth %d: %w", p.Ifindex, err)
	}
	if err := d.addVethCounters(p.Ifindex); err != nil {
		return err
	}
	if err := d.maps[datapathMapVeths].Put(uint32(p.Ifindex), veth); err != nil {
		return fmt.Errorf("write veth %d: %w", p.Ifindex, fullError(d.maps[datapathMapVeths], datapathMapVeths, err))
	}
	if p.Tenant != 0 {
		delete(d.joining, uint32(p.Ifindex))
	}
	if err := d.setExclusions(p.Ifindex, p.Exclusions); err != nil {
		return err
	}
	d.claim(p.UID, func(e *podEntries) { delete(e.veths, uint32(p.Ifindex)) })
	has.veths[uint32(p.Ifindex)] = true
	// The connections of an address that it takes over were the other pod's.
	if err := d.deleteFlowsOf(d.othersOf(p.UID, wanted)); err != nil {
		return err
	}
	for key := range wanted {
		if err := d.maps[datapathMapPods].Put(key, entry); err != nil {
			return fmt.Errorf("write address %s: %w", netip.AddrFrom16(key.Bytes).Unmap(), fullError(d.maps[datapathMapPods], datapathMapPods, err))
		}
		d.claim(p.UID, func(e *podEntries) { delete(e.addresses, key) })
		has.addresses[key] = true
	}
	if err := d.deletePodEntries(has, func(a datapathAddr) bool { return !wanted[a] }, func(i uint32) bool { return i != uint32(p.Ifindex) }); err != nil {
		return err
	}

	dir := d.podDir(p.UID)
	if err := makeDir(dir); err != nil {
		return err
	}
	if err := d.attachTCX(filepath.Join(dir, datapathProgFromPod), datapathProgFromPod, p.Ifindex, ebpf.AttachTCXIngress); err != nil {
		return err
	}
	return d.attachTCX(filepath.Join(dir, datapathProgToPod), datapathProgToPod, p.Ifindex, ebpf.AttachTCXEgress)
}

// DeletePod detaches a pod's programs and forgets it; its veth may be gone. If
// it still runs, its plain connections pass from then on, those through the
// tenant end. Nothing to delete is no error.
func (d *Datapath) DeletePod(uid string) error {
	if err := steer.ValidateUID(uid); err != nil {
		return fmt.Errorf("delete pod %q: %w", uid, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	all := func(datapathAddr) bool { return true }
	// Entries first: a pod without any is closed until its programs are gone.
	if err := d.deletePodEntries(d.entriesOf(uid), all, func(uint32) bool { return true }); err != nil {
		return fmt.Errorf("delete pod %s: %w", uid, err)
	}
	if err := removeDir(d.podDir(uid), podLinks...); err != nil {
		return fmt.Errorf("delete pod %s: %w", uid, err)
	}
	delete(d.pods, uid)
	return nil
}

// Pods returns the UIDs of the pods that anything is left of, in order.
func (d *Datapath) Pods() ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	uids, err := entries(filepath.Join(d.dir, "pods"))
	if err != nil {
		return nil, err
	}
	for uid := range d.pods {
		uids = append(uids, uid)
	}
	slices.Sort(uids)
	return slices.Compact(uids), nil
}

func (d *Datapath) entriesOf(uid string) *podEntries {
	e := d.pods[uid]
	if e == nil {
		e = &podEntries{addresses: map[datapathAddr]bool{}, veths: map[uint32]bool{}}
		d.pods[uid] = e
	}
	return e
}

// claim lets go of a key that a pod has taken over from any other.
func (d *Datapath) claim(uid string, release func(*podEntries)) {
	for other, e := range d.pods {
		if other != uid {
			release(e)
		}
	}
}

// othersOf returns which of these addresses another pod has.
func (d *Datapath) othersOf(uid string, wanted map[datapathAddr]bool) map[datapathAddr]bool {
	others := map[datapathAddr]bool{}
	d.claim(uid, func(e *podEntries) {
		for key := range e.addresses {
			if wanted[key] {
				others[key] = true
			}
		}
	})
	return others
}

func (d *Datapath) deletePodEntries(e *podEntries, address func(datapathAddr) bool, veth func(uint32) bool) error {
	gone := map[datapathAddr]bool{}
	for key := range e.addresses {
		if !address(key) {
			continue
		}
		if err := deleteKey(d.maps[datapathMapPods], key); err != nil {
			return fmt.Errorf("delete address: %w", err)
		}
		delete(e.addresses, key)
		gone[key] = true
	}
	if err := d.deleteFlowsOf(gone); err != nil {
		return err
	}
	for ifindex := range e.veths {
		if !veth(ifindex) {
			continue
		}
		if err := d.setExclusions(int(ifindex), nil); err != nil {
			return err
		}
		if err := d.deleteVeth(ifindex); err != nil {
			return err
		}
		delete(e.veths, ifindex)
	}
	return nil
}

// readPods reads what a former process left in the maps.
func (d *Datapath) readPods() error {
	var key datapathAddr
	var pod datapathPod
	pods := d.maps[datapathMapPods].Iterate()
	for pods.Next(&key, &pod) {
		d.entriesOf(uidString(pod.Uid)).addresses[key] = true
	}
	if err := pods.Err(); err != nil {
		return fmt.Errorf("read pods: %w", err)
	}
	var ifindex uint32
	var veth datapathVeth
	veths := d.maps[datapathMapVeths].Iterate()
	for veths.Next(&ifindex, &veth) {
		if veth.Kind == datapathVethKindVETH_POD {
			d.entriesOf(uidString(veth.Uid)).veths[ifindex] = true
		}
	}
	if err := veths.Err(); err != nil {
		return fmt.Errorf("read veths: %w", err)
	}
	return nil
}

// gatewayMAC is what a pod sends to that isn't on its link: its veth, or the
// bridge that this is a port of.
func gatewayMAC(ifindex int) (net.HardwareAddr, error) {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil, fmt.Errorf("find interface %d: %w", ifindex, err)
	}
	if master := l.Attrs().MasterIndex; master != 0 {
		m, err := netlink.LinkByIndex(master)
		if err != nil {
			return nil, fmt.Errorf("find interface %d, which %s belongs to: %w", master, l.Attrs().Name, err)
		}
		if m.Type() == "bridge" {
			l = m
		}
	}
	if mac := l.Attrs().HardwareAddr; len(mac) == 6 {
		return mac, nil
	}
	return nil, fmt.Errorf("interface %s has no Ethernet address", l.Attrs().Name)
}

func (d *Datapath) podDir(uid string) string { return filepath.Join(d.dir, "pods", uid) }

func uidBytes(uid string) (b [steer.MaxUID]byte) {
	copy(b[:], uid)
	return b
}

func uidString(b [steer.MaxUID]byte) string { return string(bytes.TrimRight(b[:], "\x00")) }
