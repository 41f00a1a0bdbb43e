package netfilter

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// storedFlow is one that is written down.
type storedFlow struct {
	model.Flow
	tenant uint16
	// expires is when it ends if no packet comes.
	expires time.Duration
}

// mostWritten is how many flows there may be with those that a move writes down. Rules
// write into the set, too, and a write that finds it full may take it beyond its size,
// which rules aren't held to from then on (see correction): so none is tried then.
const mostWritten = maxFlows - maxFlows/16

// canWrite returns an error if there are too many flows to write more.
func canWrite(more, have int) error {
	if more > 0 && have+more > mostWritten {
		return fmt.Errorf("with %d others they are %d, and there is room for %d", have, have+more, mostWritten)
	}
	return nil
}

func flowKey(f model.Flow) []byte {
	return key(addressKey(f.Pod.Addr()), portKey(f.Pod.Port()), addressKey(f.Peer.Addr()), portKey(f.Peer.Port()))
}

func (f family) parseFlow(k []byte) model.Flow {
	n := int(f.length)
	port := func(b []byte) uint16 { return uint16(b[0])<<8 | uint16(b[1]) }
	pod, _ := netip.AddrFromSlice(k[:n])
	peer, _ := netip.AddrFromSlice(k[n+4 : 2*n+4])
	return model.Flow{Pod: netip.AddrPortFrom(pod, port(k[n:])), Peer: netip.AddrPortFrom(peer, port(k[2*n+4:]))}
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
	from, known, err := d.pod(p.UID)
	if err != nil {
		return err
	}
	if known && from == p.Tenant {
		return d.updatePod(p, false)
	}
	if known {
		if err := errors.Join(d.learn(p.UID, from), d.addFormer(p.UID, from)); err != nil {
			return err
		}
	}
	if from == 0 {
		for _, a := range p.IPs {
			d.joining[a.Unmap()] = p.Tenant
		}
	}
	of := cmp.Or(from, p.Tenant)
	lost, err := d.keepFlows(from, of, established)
	if err != nil {
		return err
	}
	if !known {
		// What opens from here on is written down by the rules.
		direct := p
		direct.Tenant = 0
		if err := d.updatePod(direct, true); err != nil {
			return err
		}
		if lost, err = d.keepFlows(from, of, established); err != nil {
			return err
		}
	}
	if err := d.updatePod(p, false); err != nil {
		return err
	}
	for _, a := range p.IPs {
		delete(d.joining, a.Unmap())
	}
	d.cut.Add(d.log, p.UID, of, lost)
	return nil
}

// ReleasePod takes a pod out of the mesh without cutting connections: new ones
// pass in the clear, those through its tenant stay there until they end. Its
// chains stay; call DeletePod when HeldFlows has none of it. Packets of
// connections that are neither held nor opened since are dropped. A pod that
// isn't known is no error.
func (d *Datapath) ReleasePod(uid string, established model.FlowReader) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.releasePod(uid, established); err != nil {
		return fmt.Errorf("release pod %s: %w", uid, err)
	}
	return nil
}

func (d *Datapath) releasePod(uid string, established model.FlowReader) error {
	from, known, err := d.pod(uid)
	if err != nil || !known || from == 0 {
		return err
	}
	if err := errors.Join(d.learn(uid, from), d.addFormer(uid, from)); err != nil {
		return err
	}
	lost, err := d.keepFlows(from, from, established)
	if err != nil {
		return err
	}
	if err := d.learn(uid, 0); err != nil {
		return err
	}
	d.cut.Add(d.log, uid, from, lost)
	return nil
}

// pod says where a pod's new connections go.
func (d *Datapath) pod(uid string) (tenant uint16, known bool, err error) {
	s, err := d.snapshotNow()
	if err != nil {
		return 0, false, err
	}
	for _, veth := range s.podVeths(uid) {
		return s.tenantOf(veth), true, nil
	}
	return 0, false, nil
}

// learn gives a pod, with all it has, to a tenant or to none, and makes the rules
// write down each connection that opens.
func (d *Datapath) learn(uid string, tenant uint16) error {
	ch, err := d.change()
	if err != nil {
		return err
	}
	for _, veth := range ch.snap.podVeths(uid) {
		ch.put(setPods, native(veth), native(uint32(tenant)), uid)
		ch.leadPod(veth, tenant, ch.snap.paceOf(tenant))
		for _, a := range ch.snap.podAddresses([]uint32{veth}) {
			ch.forgetAddress(veth, a)
			ch.putAddress(veth, a, tenant, true)
		}
	}
	if err := ch.commit(); err != nil {
		return err
	}
	return d.syncTenants()
}

// keepFlows writes down where the connections of a pod go until they end, and returns of
// how many it doesn't: of a tenant, which they are at or the pod joins, there are too many.
func (d *Datapath) keepFlows(from, of uint16, established model.FlowReader) (lost int, err error) {
	if established == nil {
		return 0, nil
	}
	list, err := established(from)
	if err != nil {
		return 0, fmt.Errorf("read its connections: %w", err)
	}
	if len(list) == 0 {
		return 0, nil
	}
	stored, err := d.flows(false)
	if err != nil {
		return 0, err
	}
	kept, err := d.keptOf(of, stored)
	if err != nil {
		return 0, err
	}
	known := map[model.Flow]bool{}
	written := map[string]int{}
	for _, f := range stored {
		written[familyOf(f.Pod.Addr()).version]++
		known[f.Flow] = true // an earlier move's, which knows better
	}
	var flows [2][]nftables.SetElement
	for _, f := range list {
		f = model.Flow{Pod: unmapped(f.Pod), Peer: unmapped(f.Peer)}
		if known[f] || f.Peer.Addr().IsUnspecified() || f.Pod.Addr().Is4() != f.Peer.Addr().Is4() {
			continue
		}
		known[f] = true
		if kept >= model.MaxKept {
			lost++
			continue
		}
		kept++
		i := slices.IndexFunc(families, func(fam family) bool { return fam.version == familyOf(f.Pod.Addr()).version })
		flows[i] = append(flows[i], nftables.SetElement{Key: flowKey(f), Val: native(uint32(from)), Timeout: flowIdle})
	}
	c, err := open(0)
	if err != nil {
		return 0, fmt.Errorf("open nftables: %w", err)
	}
	for i, f := range families {
		if err := canWrite(len(flows[i]), written[f.version]); err != nil {
			return 0, fmt.Errorf("write connections of IPv%s: %w", f.version, err)
		}
		for part := range slices.Chunk(flows[i], chunk) {
			if err := c.SetAddElements(d.sets[setFlows+f.version], part); err != nil {
				return 0, fmt.Errorf("write connections: %w", err)
			}
		}
	}
	if err := c.Flush(); err != nil {
		return 0, fmt.Errorf("write connections: %w", err)
	}
	return lost, nil
}

func unmapped(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// flows reads those that are written down; alive leaves out those that have ended.
func (d *Datapath) flows(alive bool) (list []storedFlow, err error) {
	c, err := openLong()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	for _, f := range families {
		elements, err := c.GetSetElements(d.sets[setFlows+f.version])
		if err != nil {
			return nil, fmt.Errorf("read connections: %w", err)
		}
		ended := map[string]bool{}
		if alive && len(elements) > 0 {
			for _, set := range []string{setEnded, setPeerEnded} {
				over, err := c.GetSetElements(d.sets[set+f.version])
				if err != nil {
					return nil, fmt.Errorf("read connections that have ended: %w", err)
				}
				for _, e := range over {
					ended[string(e.Key)] = true
				}
			}
		}
		for _, e := range elements {
			if len(e.Val) < 4 {
				continue
			}
			if !ended[string(e.Key)] {
				list = append(list, storedFlow{f.parseFlow(e.Key), uint16(binaryutil.NativeEndian.Uint32(e.Val)), e.Expires})
			}
		}
	}
	return list, nil
}

// HeldFlows returns how many connections of each pod don't go where its new ones
// go, by UID and tenant; 0 is for those in the clear. Tunnels between proxies
// aren't counted: they are kept for reuse, and end with the proxy. One of which
// an end was seen isn't, either.
func (d *Datapath) HeldFlows() (map[string]map[uint16]int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	flows, err := d.flows(true)
	if err != nil {
		return nil, err
	}
	s, err := d.snapshotNow()
	if err != nil {
		return nil, err
	}
	held := map[string]map[uint16]int{}
	for _, f := range flows {
		if f.IsTunnel() {
			continue
		}
		uid := ""
		if e, ok := s.sets[setAddresses+familyOf(f.Pod.Addr()).version][string(addressKey(f.Pod.Addr()))]; ok {
			uid = s.sets[setPods][string(e.value)].comment
		}
		if held[uid] == nil {
			held[uid] = map[uint16]int{}
		}
		held[uid][f.tenant]++
	}
	return held, nil
}

// SweepFlows ends the right of former tenants, which have none of a pod's
// connections any more, to open some. Connections that have ended the kernel forgets
// by itself, endedLinger after that at most, or after flowIdle without a packet. Call it
// every few seconds.
func (d *Datapath) SweepFlows(time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(d.sweepJoining(), d.sweepFormers())
}

// deleteFlowsOf forgets the connections of some addresses of pods.
func (d *Datapath) deleteFlowsOf(addresses []netip.Addr) error {
	if len(addresses) == 0 {
		return nil
	}
	if err := d.deleteFormers(func(f former, _ time.Duration) bool { return slices.Contains(addresses, f.pod) }); err != nil {
		return err
	}
	if err := d.deleteFlows(func(f storedFlow) bool { return slices.Contains(addresses, f.Pod.Addr()) }); err != nil {
		return err
	}
	return untilThere(func(ending time.Duration) error { return d.forgetCharges(addresses, ending) })
}

// untilThere deletes elements again that somebody else has deleted, or that have expired,
// since they were read: what isn't there can't be deleted. Each time it leaves more of
// those to themselves that are about to expire.
func untilThere(del func(ending time.Duration) error) (err error) {
	for ending := range 5 {
		if err = del(time.Duration(ending) * time.Second); !errors.Is(err, unix.ENOENT) {
			break
		}
	}
	return err
}

func (d *Datapath) deleteFlows(which func(storedFlow) bool) error {
	return untilThere(func(ending time.Duration) error {
		return d.tryDeleteFlows(func(f storedFlow) bool { return f.expires > ending && which(f) })
	})
}

func (d *Datapath) tryDeleteFlows(which func(storedFlow) bool) error {
	stored, err := d.flows(false)
	if err != nil {
		return err
	}
	gone := map[*nftables.Set][]nftables.SetElement{}
	for _, f := range stored {
		if which(f) {
			set := d.sets[setFlows+familyOf(f.Pod.Addr()).version]
			gone[set] = append(gone[set], nftables.SetElement{Key: flowKey(f.Flow)})
		}
	}
	if err := deleteElements(gone); err != nil {
		return fmt.Errorf("delete connections: %w", err)
	}
	return nil
}

// forgetCharges takes what pods with these addresses had out of all accounts: they may
// have had several, one after the other.
func (d *Datapath) forgetCharges(addresses []netip.Addr, ending time.Duration) error {
	s, err := d.snapshotNow()
	if err != nil {
		return err
	}
	c, err := openLong()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	gone := map[*nftables.Set][]nftables.SetElement{}
	for name := range s.flows {
		if _, ok := ofAccount(name); !ok {
			continue
		}
		set := accountSet(name, 0)
		elements, err := c.GetSetElements(set)
		if err != nil {
			return fmt.Errorf("read connections of an account: %w", err)
		}
		for _, e := range elements {
			if pod, ok := netip.AddrFromSlice(e.Key[:min(16, len(e.Key))]); ok && e.Expires > ending && slices.Contains(addresses, pod.Unmap()) {
				gone[set] = append(gone[set], nftables.SetElement{Key: e.Key})
			}
		}
	}
	if err := deleteElements(gone); err != nil {
		return fmt.Errorf("delete connections of an account: %w", err)
	}
	return nil
}

func deleteElements(gone map[*nftables.Set][]nftables.SetElement) error {
	if len(gone) == 0 {
		return nil
	}
	c, err := open(0)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	for set, elements := range gone {
		for part := range slices.Chunk(elements, chunk) {
			if err := c.SetDeleteElements(set, part); err != nil {
				return err
			}
		}
	}
	return c.Flush()
}
