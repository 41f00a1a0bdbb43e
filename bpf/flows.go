package bpf

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// hbonePort is HBONE_PORT of maps.h.
const hbonePort = 15008

// How long an entry is kept after the last packet, if the connection has ended
// or nobody answered its SYN. The kernel gives up after 127 s.
const (
	endedLinger  = 10 * time.Second
	openedLinger = 130 * time.Second
)

const (
	endedPod = 1 << iota
	endedPeer
	endedReset
)

// EstablishedFlows returns the connections of pods that have a socket in a
// network namespace: at the pod's address, or connected to it, as a tenant's
// are. Those that only wait for late packets aren't among them. netns is the
// path of the namespace; one that is gone has none.
func EstablishedFlows(path string, pods ...netip.Addr) ([]model.Flow, error) {
	is := map[netip.Addr]bool{}
	for _, ip := range pods {
		is[ip.Unmap()] = true
	}
	var flows []model.Flow
	err := eachSocket(path, func(s *netlink.Socket) {
		switch s.State {
		case netlink.TCP_LISTEN, netlink.TCP_CLOSE, netlink.TCP_TIME_WAIT:
			return
		case netlink.TCP_FIN_WAIT2:
			// Of no process any more, of one that was killed for example: the peer has all of
			// it, and a minute to close, too.
			if s.INode == 0 {
				return
			}
		}
		local, remote := addrPort(s.ID.Source, s.ID.SourcePort), addrPort(s.ID.Destination, s.ID.DestinationPort)
		if is[local.Addr()] {
			flows = append(flows, model.Flow{Pod: local, Peer: remote, Side: model.WireSide})
		}
		if is[remote.Addr()] {
			flows = append(flows, model.Flow{Pod: remote, Peer: local, Side: model.PodSide})
		}
	})
	if err != nil {
		return nil, err
	}
	return withoutFarEnds(flows), nil
}

// eachSocket calls f for all TCP sockets of a network namespace, none if it is gone.
func eachSocket(path string, f func(*netlink.Socket)) error {
	ns, err := netns.GetFromPath(path)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer ns.Close()
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_INET_DIAG)
	if err != nil {
		return fmt.Errorf("ask for the sockets of network namespace %s: %w", path, err)
	}
	defer handle.Close()
	// A socket of IPv6 may have a connection of IPv4.
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := sockets(handle, family)
		if err != nil {
			return fmt.Errorf("list the sockets of network namespace %s: %w", path, err)
		}
		for _, s := range sockets {
			f(s)
		}
	}
	return nil
}

// Untaken counts the TCP sockets of a network namespace that have something for their
// process which it hasn't taken yet: bytes, or a connection. netns is the path of the
// namespace; one that is gone has none.
func Untaken(path string) (int, error) {
	count := 0
	err := eachSocket(path, func(s *netlink.Socket) {
		switch {
		case s.State == netlink.TCP_CLOSE, s.State == netlink.TCP_TIME_WAIT:
		case s.State == netlink.TCP_SYN_RECV, s.RQueue > 0: // a listening socket's are connections
			count++
		}
	})
	return count, err
}

// withoutFarEnds leaves out what is seen of a tunnel between two of the tenant's pods at the
// one's end and isn't between the tenant and the other: written down, nobody would see it end.
func withoutFarEnds(flows []model.Flow) []model.Flow {
	wire := map[model.Flow]bool{}
	for _, f := range flows {
		wire[f] = f.Side == model.WireSide && f.IsTunnel()
	}
	return slices.DeleteFunc(flows, func(f model.Flow) bool {
		return f.Side == model.PodSide && wire[model.Flow{Pod: f.Pod, Peer: f.Peer, Side: model.WireSide}]
	})
}

// sockets asks again if the list changed while it was read.
func sockets(h *netlink.Handle, family uint8) (list []*netlink.Socket, err error) {
	for range 5 {
		if list, err = h.SocketDiagTCP(family); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return list, err
}

func addrPort(ip []byte, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}

// MovePod is UpdatePod that cuts no connection: those that the pod has, in the
// clear or through another tenant, stay where they are until they end, and only
// new ones go to p.Tenant. A connection whose SYN was on its way is the former
// tenant's. That one may open others for the pod, as its clients and tunnels ask
// for, until none is left (SweepFlows sees to it) or model.FormerLimit has passed;
// otherwise it may send as the pod in those that it has only.
//
// It returns an error before anything is moved if the connections can't be read
// or there is no room for them; the pod then stays where it was, and the call
// can be repeated. Those beyond model.MaxKept of a tenant, which it leaves or else joins,
// are cut. Connections of a pod are read twice if it is new to the mesh.
func (d *Datapath) MovePod(p steer.Pod, established model.FlowReader) error {
	if err := p.Validate(); err != nil {
		return fmt.Errorf("move pod %q: %w", p.UID, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.movePod(p, established); err != nil {
		return fmt.Errorf("move pod %s: %w", p.UID, err)
	}
	return nil
}

func (d *Datapath) movePod(p steer.Pod, established model.FlowReader) error {
	from, known, err := d.learnFlows(p.UID)
	if err != nil {
		return err
	}
	if known && from == p.Tenant {
		return d.updatePod(p, false)
	}
	if err := d.addFormer(p.UID, from); err != nil {
		return err
	}
	if from == 0 {
		d.joining[uint32(p.Ifindex)] = p.Tenant
	}
	lost, err := d.keepFlows(p, from, established)
	if err != nil {
		return err
	}
	if !known {
		// What opens from here on is written down by the programs.
		direct := p
		direct.Tenant = 0
		if err := d.updatePod(direct, true); err != nil {
			return err
		}
		if lost, err = d.keepFlows(p, from, established); err != nil {
			return err
		}
	}
	if err := d.updatePod(p, false); err != nil {
		return err
	}
	d.cut.Add(d.log, p.UID, cmp.Or(from, p.Tenant), lost)
	return nil
}

// ReleasePod takes a pod out of the mesh without cutting connections: new ones
// pass in the clear, those through its tenant stay there until they end. Its
// programs stay attached; call SweepFlows from time to time, and DeletePod when
// HeldFlows has none of it. Packets of connections that are neither held nor
// opened since are dropped. A pod that isn't known is no error.
func (d *Datapath) ReleasePod(uid string, established model.FlowReader) error {
	if err := steer.ValidateUID(uid); err != nil {
		return fmt.Errorf("release pod %q: %w", uid, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.releasePod(uid, established); err != nil {
		return fmt.Errorf("release pod %s: %w", uid, err)
	}
	return nil
}

func (d *Datapath) releasePod(uid string, established model.FlowReader) error {
	from, known, err := d.learnFlows(uid)
	if err != nil || !known || from == 0 {
		return err
	}
	p := steer.Pod{UID: uid}
	err = d.changePodEntries(uid, func(e *datapathPod) { p.Ifindex = int(e.Ifindex) })
	if err != nil {
		return err
	}
	if err := d.addFormer(uid, from); err != nil {
		return err
	}
	lost, err := d.keepFlows(p, from, established)
	if err != nil {
		return err
	}
	if err := d.changePodEntries(uid, func(e *datapathPod) { e.Tenant, e.Learn = 0, 1 }); err != nil {
		return err
	}
	d.cut.Add(d.log, uid, from, lost)
	return nil
}

// learnFlows makes the programs write down each connection that a pod opens, and
// says where they go.
func (d *Datapath) learnFlows(uid string) (from uint16, known bool, err error) {
	err = d.changePodEntries(uid, func(e *datapathPod) {
		from, known = uint16(e.Tenant), true
		e.Learn = 1
	})
	return from, known, err
}

// changePodEntries changes what the map has of a pod, for each address.
func (d *Datapath) changePodEntries(uid string, change func(*datapathPod)) error {
	has := d.pods[uid]
	if has == nil {
		return nil
	}
	for key := range has.addresses {
		var entry datapathPod
		switch err := d.maps[datapathMapPods].Lookup(key, &entry); {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			continue
		case err != nil:
			return fmt.Errorf("read address: %w", err)
		}
		former := entry
		if change(&entry); entry == former {
			continue
		}
		if err := d.maps[datapathMapPods].Update(key, entry, ebpf.UpdateExist); err != nil {
			return fmt.Errorf("write address: %w", err)
		}
	}
	return nil
}

var sides = map[model.Side]datapathSide{model.PodSide: datapathSideSIDE_POD, model.WireSide: datapathSideSIDE_WIRE}

// keepFlows writes down where the connections of a pod go until they end, and returns of
// how many it doesn't: the tenant that they are at, or the pod joins, has too many.
func (d *Datapath) keepFlows(p steer.Pod, from uint16, established model.FlowReader) (lost int, err error) {
	if established == nil {
		return 0, nil
	}
	list, err := established(from)
	if err != nil {
		return 0, fmt.Errorf("read its connections: %w", err)
	}
	m := d.maps[datapathMapFlows]
	now, err := monotonic()
	if err != nil {
		return 0, err
	}
	kept, err := d.keptOf(cmp.Or(from, p.Tenant))
	if err != nil {
		return 0, err
	}
	state := datapathFlowState{Tenant: uint32(from), Ifindex: uint32(p.Ifindex), Seen: now}
	for _, f := range list {
		pod, err := addrKey(f.Pod.Addr())
		if err != nil {
			return 0, err
		}
		peer, err := addrKey(f.Peer.Addr())
		if err != nil {
			continue // not of this pod's: a socket without a peer
		}
		key := datapathFlow{Pod: pod, Peer: peer, PodPort: f.Pod.Port(), PeerPort: f.Peer.Port(), Side: sides[f.Side]}
		if from == 0 {
			key.Side = datapathSideSIDE_WIRE // in the clear
		}
		var former datapathFlowState
		there := m.Lookup(key, &former) == nil
		switch {
		case there && former.Ended == 0:
			continue // an earlier move's, which knows better
		case there:
			err = m.Put(key, state)
		case kept >= model.MaxKept:
			lost++
			continue
		default:
			if err = m.Update(key, state, ebpf.UpdateNoExist); err == nil {
				kept++
				d.kept.add(from, state.Ifindex)
			} else if errors.Is(err, ebpf.ErrKeyExist) {
				err = nil // the programs have just written it
			}
		}
		if err != nil {
			return 0, fmt.Errorf("write connection %s to %s: %w", f.Pod, f.Peer, fullError(m, datapathMapFlows, err))
		}
	}
	return lost, nil
}

// monotonic is the programs' clock.
func monotonic() (uint64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("read clock: %w", err)
	}
	return uint64(ts.Nano()), nil
}

// HeldFlows returns how many connections of each pod don't go where its new ones
// go, by UID and tenant; 0 is for those in the clear. Tunnels between proxies
// aren't counted: they are kept for reuse, and end with the proxy.
func (d *Datapath) HeldFlows() (map[string]map[uint16]int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	owner := map[datapathAddr]string{}
	for uid, e := range d.pods {
		for key := range e.addresses {
			owner[key] = uid
		}
	}
	held := map[string]map[uint16]int{}
	return held, d.eachFlow(func(key datapathFlow, s datapathFlowState) {
		if key.PodPort == hbonePort || key.PeerPort == hbonePort {
			return
		}
		uid := owner[key.Pod]
		if held[uid] == nil {
			held[uid] = map[uint16]int{}
		}
		held[uid][uint16(s.Tenant)]++
	})
}

// SweepFlows forgets connections that have ended, and those that had no packet
// for as long as idle: a packet that comes later is dropped, never sent in the
// clear. Former tenants that have none of a pod any more can open none from then
// on. Call it every few seconds.
func (d *Datapath) SweepFlows(idle time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := monotonic()
	if err != nil {
		return err
	}
	learned, used := map[uint32]uint32{}, map[datapathFormer]bool{}
	kept := &keptFlows{through: map[uint16]int{}, clear: map[uint32]int{}}
	err = d.deleteFlows(func(key datapathFlow, s datapathFlowState) bool {
		quiet := time.Duration(max(now, s.Seen) - s.Seen)
		if over(s, quiet, idle) {
			return true
		}
		if s.Learned != 0 {
			learned[s.Ifindex]++
		}
		used[datapathFormer{Pod: key.Pod, Tenant: s.Tenant}] = true
		kept.add(uint16(s.Tenant), s.Ifindex)
		return false
	})
	if err != nil {
		return fmt.Errorf("sweep connections: %w", err)
	}
	d.kept = kept
	maps.DeleteFunc(d.joining, func(ifindex uint32, _ uint16) bool { return kept.clear[ifindex] == 0 })
	if err := d.sweepFormers(used, now); err != nil {
		return err
	}
	// Of all pods of a tenant.
	account := map[uint32]uint32{}
	if err := d.eachVeth(func(ifindex uint32, v datapathVeth) error {
		if v.Kind == datapathVethKindVETH_POD {
			account[v.Tenant] += learned[ifindex]
		}
		return nil
	}); err != nil {
		return err
	}
	// The programs count, too; what they count meanwhile is made good next time.
	return d.eachVeth(func(ifindex uint32, v datapathVeth) error {
		counted := learned[ifindex]
		if v.Kind == datapathVethKindVETH_TENANT {
			counted = account[v.Tenant]
		}
		if v.Learned == counted {
			return nil
		}
		v.Learned = counted
		if err := d.maps[datapathMapVeths].Update(ifindex, v, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("write veth %d: %w", ifindex, err)
		}
		return nil
	})
}

// over says whether a connection has ended, by what was seen of it.
func over(s datapathFlowState, quiet, idle time.Duration) bool {
	both := s.Ended&endedPod != 0 && s.Ended&endedPeer != 0
	switch {
	case (both || s.Ended&endedReset != 0) && quiet >= endedLinger:
		return true
	case s.Learned != 0 && (s.BytesSent == 0 || s.BytesReceived == 0) && quiet >= openedLinger:
		return true
	}
	return quiet >= idle
}

func (d *Datapath) eachFlow(f func(datapathFlow, datapathFlowState)) error {
	var key datapathFlow
	var state datapathFlowState
	entries := d.maps[datapathMapFlows].Iterate()
	for entries.Next(&key, &state) {
		f(key, state)
	}
	// Connections end while they are read; what is missed is read next time.
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read connections: %w", err)
	}
	return nil
}

func (d *Datapath) deleteFlows(which func(datapathFlow, datapathFlowState) bool) error {
	var stale []datapathFlow
	err := d.eachFlow(func(key datapathFlow, s datapathFlowState) {
		if which(key, s) {
			stale = append(stale, key)
		}
	})
	if err != nil {
		return err
	}
	for _, key := range stale {
		if err := deleteKey(d.maps[datapathMapFlows], key); err != nil {
			return fmt.Errorf("delete connection: %w", err)
		}
	}
	return nil
}

// deleteFlowsOf forgets the connections of some addresses of pods.
func (d *Datapath) deleteFlowsOf(addresses map[datapathAddr]bool) error {
	if len(addresses) == 0 {
		return nil
	}
	if err := d.deleteFormers(func(f datapathFormer, _ uint64) bool { return addresses[f.Pod] }); err != nil {
		return err
	}
	return d.deleteFlows(func(f datapathFlow, _ datapathFlowState) bool { return addresses[f.Pod] })
}
