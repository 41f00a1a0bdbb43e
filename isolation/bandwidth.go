package isolation

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Bandwidth bounds a tenant, in bytes per second; 0 is no limit. Packets of the
// priority DirectPriority pass either bound.
type Bandwidth struct {
	// Egress is what the tenant sends.
	Egress int64
	// Ingress is what is sent into the node's end of its veth.
	Ingress int64
}

// DirectPriority of a packet, or of the socket that sends it (SO_PRIORITY), has it
// pass unbounded. It is the handle of the queueing discipline: htb's own word for that.
const DirectPriority = uint32(1 << 16)

const (
	htbRoot  = 1 << 16
	htbClass = htbRoot | 1
	htbQueue = 2 << 16
	// minRate is below what TLS handshakes get done in time.
	minRate = 128 << 10
	// minBurst is more than the largest packet that the kernel makes of several.
	minBurst = 128 << 10
	// directQueue is in packets: what isn't bounded mustn't be dropped either.
	directQueue = 1 << 16
)

func (b Bandwidth) validate() error {
	for _, rate := range []int64{b.Egress, b.Ingress} {
		if rate < 0 || rate > 0 && rate < minRate {
			return fmt.Errorf("bandwidth of %d bytes per second: at least %d", rate, minRate)
		}
	}
	return nil
}

// burst is what may pass at once: 20 ms' worth.
func burst(rate int64) uint32 { return uint32(min(max(rate/50, minBurst), 1<<30)) }

// waiting is what may wait for its turn, in bytes: 100 ms' worth. What is beyond is
// dropped, and its sender slows down.
func waiting(rate int64) uint32 { return uint32(min(max(rate/10, 4*minBurst), 1<<30)) }

// shape bounds a tenant's bandwidth, in place, and returns what the kernel has then.
func shape(netns string, l link, want Bandwidth) (have Bandwidth, err error) {
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return have, fmt.Errorf("open netlink: %w", err)
	}
	defer host.Close()
	var errs []error
	have.Ingress, err = shapeIngress(host, l.hostIfindex, want.Ingress)
	errs = append(errs, err)
	errs = append(errs, inNetns(netns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink in %s: %w", netns, err)
		}
		defer h.Close()
		have.Egress, err = shapeEgress(h, l.tenantIfindex, want.Egress)
		return err
	}))
	return have, errors.Join(errs...)
}

// root is the queueing discipline of an interface, nil for the kernel's own.
func root(h *netlink.Handle, ifindex int) (netlink.Qdisc, error) {
	list, err := h.QdiscList(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: ifindex}})
	if err != nil {
		return nil, fmt.Errorf("list queueing disciplines: %w", err)
	}
	for _, q := range list {
		if q.Attrs().Parent == netlink.HANDLE_ROOT && q.Attrs().Handle != 0 {
			return q, nil
		}
	}
	return nil, nil
}

// unshape takes a queueing discipline of ours away.
func unshape(h *netlink.Handle, q netlink.Qdisc) error {
	if q == nil {
		return nil
	}
	if err := h.QdiscDel(q); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove queueing discipline: %w", err)
	}
	return nil
}

// shapeIngress has what comes wait at the node's end of the veth, in a queue of the
// node's memory: htb's own is bounded in packets, which may have 64 KiB. It must run
// in the node's network namespace.
func shapeIngress(h *netlink.Handle, ifindex int, rate int64) (have int64, err error) {
	if have, err = shapeEnd(h, ifindex, rate); err != nil {
		return have, fmt.Errorf("bound ingress: %w", err)
	}
	if rate == 0 {
		return have, nil
	}
	// The library doesn't know bfifo, which is in every kernel that has htb.
	r := nl.NewNetlinkRequest(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK)
	r.AddData(&nl.TcMsg{Family: nl.FAMILY_ALL, Ifindex: int32(ifindex), Handle: htbQueue, Parent: htbClass})
	r.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bfifo")))
	r.AddData(nl.NewRtAttr(nl.TCA_OPTIONS, nl.Uint32Attr(waiting(rate))))
	if _, err := r.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return have, fmt.Errorf("bound what waits of ingress: %w", err)
	}
	return have, nil
}

// shapeEgress has what goes wait in the tenant's namespace, where its sockets feel
// it and send no more: the queue needs no bound of its own.
func shapeEgress(h *netlink.Handle, ifindex int, rate int64) (have int64, err error) {
	if have, err = shapeEnd(h, ifindex, rate); err != nil {
		err = fmt.Errorf("bound egress: %w", err)
	}
	return have, err
}

// shapeEnd bounds what is sent at one end of a veth, and returns what it is bounded
// to then.
func shapeEnd(h *netlink.Handle, ifindex int, rate int64) (have int64, err error) {
	q, err := root(h, ifindex)
	if err != nil {
		return 0, err
	}
	_, there := q.(*netlink.Htb)
	if there {
		classes, err := h.ClassList(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}, netlink.HANDLE_NONE)
		if err != nil {
			return 0, fmt.Errorf("list classes: %w", err)
		}
		for _, c := range classes {
			if c, ok := c.(*netlink.HtbClass); ok && c.Handle == htbClass {
				have = int64(c.Rate)
			}
		}
	}
	if have == rate && (rate != 0 || q == nil) {
		return have, nil
	}
	if rate == 0 {
		return 0, unshape(h, q)
	}
	if !there {
		htb := netlink.NewHtb(netlink.QdiscAttrs{LinkIndex: ifindex, Handle: htbRoot, Parent: netlink.HANDLE_ROOT})
		length := uint32(directQueue)
		htb.Defcls, htb.DirectQlen = htbClass&0xffff, &length
		if err := h.QdiscReplace(htb); err != nil {
			return 0, fmt.Errorf("make the queueing discipline: %w", err)
		}
	}
	class := netlink.NewHtbClass(netlink.ClassAttrs{LinkIndex: ifindex, Parent: htbRoot, Handle: htbClass},
		netlink.HtbClassAttrs{Rate: uint64(rate) * 8, Buffer: burst(rate), Cbuffer: burst(rate)})
	class.Quantum = minBurst
	if err := h.ClassReplace(class); err != nil {
		return have, fmt.Errorf("bound its class to %d bytes per second: %w", rate, err)
	}
	return rate, nil
}

// setBandwidth bounds the tenant's bandwidth. That the kernel hasn't what it takes
// is no error: State tells. The caller holds op.
func (t *tenant) setBandwidth(want Bandwidth) error {
	t.mu.Lock()
	l, last := t.link, t.bandwidth
	t.mu.Unlock()
	if last != nil && *last == want && want == (Bandwidth{}) {
		return nil
	}
	have, err := shape(t.netns(), l, want)
	lacking := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)
	t.mu.Lock()
	t.bandwidth, t.unshaped = &have, ""
	if lacking {
		t.unshaped = fmt.Sprintf("bandwidth: the kernel has no htb (CONFIG_NET_SCH_HTB): %v", err)
	}
	t.mu.Unlock()
	if err != nil && !lacking {
		return fmt.Errorf("bound bandwidth of %s: %w", t.name, err)
	}
	return nil
}
