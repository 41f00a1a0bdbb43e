package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// bridgeName is the nodes' network in the control plane's network namespace. The
// bridge is there and not on this machine, whose firewall would see its packets.
const bridgeName = "nodes"

// freeSubnet returns a subnet that overlaps nothing that this machine knows a way
// to, beyond its default route.
func freeSubnet(c cluster) (int, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return 0, fmt.Errorf("list routes: %w", err)
	}
	for c.Subnet = 0; c.Subnet < 256; c.Subnet++ {
		wanted := []netip.Prefix{netip.PrefixFrom(c.addr4(0), 24), netip.PrefixFrom(c.addr6(0), 64)}
		if !anyOverlaps(routes, wanted) {
			return c.Subnet, nil
		}
	}
	return 0, errors.New("every 10.250.<n>.0/24 is in use on this machine: the cluster needs one; 'ip route' shows what uses them")
}

func anyOverlaps(routes []netlink.Route, wanted []netip.Prefix) bool {
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ip, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		if !ok || ones == 0 {
			continue
		}
		for _, w := range wanted {
			if netip.PrefixFrom(ip.Unmap(), ones).Overlaps(w) {
				return true
			}
		}
	}
	return false
}

// attachControlPlane makes the nodes' bridge in the control plane's namespace and
// links this machine to it.
func (c cluster) attachControlPlane(pid int) error {
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}); err != nil {
		return fmt.Errorf("make bridge: %w", err)
	}
	if err := c.plug(h, ns, c.hostLink(), "host", nil); err != nil {
		return err
	}
	link, err := netlink.LinkByName(c.hostLink())
	if err != nil {
		return err
	}
	for _, p := range []netip.Prefix{netip.PrefixFrom(c.addr4(hostLast), 24), netip.PrefixFrom(c.addr6(hostLast), 64)} {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if err := netlink.AddrReplace(link, a); err != nil && !errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("address %s on %s: %w", p, c.hostLink(), err)
		}
	}
	return netlink.LinkSetUp(link)
}

// attachNode links a node to the bridge of the control plane.
func (c cluster) attachNode(n, controlPlanePID int) func(pid int) error {
	return func(pid int) error {
		cp, err := netns.GetFromPid(controlPlanePID)
		if err != nil {
			return err
		}
		defer cp.Close()
		node, err := netns.GetFromPid(pid)
		if err != nil {
			return err
		}
		defer node.Close()
		h, err := netlink.NewHandleAt(cp)
		if err != nil {
			return err
		}
		defer h.Close()
		return c.plug(h, cp, "eth0", nodeName(n), &node)
	}
}

// plug makes a veth whose end called port is on the bridge, and whose other end,
// called name, is in ns, or in this machine's namespace if that is nil.
func (c cluster) plug(h *netlink.Handle, bridgeNS netns.NsHandle, name, port string, ns *netns.NsHandle) error {
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: port, PeerNamespace: netlink.NsFd(bridgeNS)}
	if ns != nil {
		veth.Namespace = netlink.NsFd(*ns)
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make link %s: %w", name, err)
	}
	bridge, err := h.LinkByName(bridgeName)
	if err != nil {
		return err
	}
	link, err := h.LinkByName(port)
	if err != nil {
		return err
	}
	if err := h.LinkSetMaster(link, bridge); err != nil {
		return fmt.Errorf("put %s on the bridge: %w", port, err)
	}
	return h.LinkSetUp(link)
}

// unplug removes this machine's end, should it still be there.
func (c cluster) unplug() error {
	link, err := netlink.LinkByName(c.hostLink())
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	return netlink.LinkDel(link)
}
