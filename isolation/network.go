package isolation

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses that every tenant's namespace has. Decision 9 says why they are the
// same everywhere.
const (
	deliverIPv4 = "169.254.96.1"
	deliverIPv6 = "fd69:8::1"
	// The gateways answer nothing: they only give the routes a next hop, whose
	// hardware address is the node's end of the veth.
	gatewayIPv4 = "169.254.1.1"
	gatewayIPv6 = "fe80::1"

	tenantLink = "eth0"
)

// link is one tenant's veth.
type link struct {
	hostIfindex, tenantIfindex int
	hostMAC, tenantMAC         net.HardwareAddr
}

// hardwareAddrs are fixed for an index: a hardware address that was set is one
// that nobody's link policy replaces afterwards.
func hardwareAddrs(index uint16) (host, tenant net.HardwareAddr) {
	mac := func(end byte) net.HardwareAddr {
		return net.HardwareAddr{0x0a, 'b', 'h', end, byte(index >> 8), byte(index)}
	}
	return mac(0), mac(1)
}

// ensureNetwork brings the tenant's network to what it should be, from nothing
// or from any step of a run before. mtu 0 leaves the kernel's.
func ensureNetwork(netns, name string, index uint16, mtu int) (link, error) {
	l, err := ensureVeth(netns, name, index, mtu)
	if err != nil {
		return link{}, err
	}
	err = inNetns(netns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink in %s: %w", netns, err)
		}
		defer h.Close()
		return configureTenant(h, l, mtu)
	})
	if err != nil {
		return link{}, fmt.Errorf("set up network of %s: %w", filepath.Base(netns), err)
	}
	return l, nil
}

// ensureVeth creates the pair, or takes the one that connects exactly these two
// namespaces. Any other link of that name is a tenant's of the past.
func ensureVeth(netns, name string, index uint16, mtu int) (link, error) {
	hostMAC, tenantMAC := hardwareAddrs(index)
	l := link{hostMAC: hostMAC, tenantMAC: tenantMAC}
	tenantIfindex, peer, err := linkIn(netns)
	if err != nil {
		return l, err
	}
	host, err := netlink.LinkByName(name)
	if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
		return l, fmt.Errorf("look up link %s: %w", name, err)
	}
	if err == nil && (tenantIfindex == 0 || host.Attrs().Index != peer || host.Attrs().ParentIndex != tenantIfindex) {
		if err := removeLink(host); err != nil {
			return l, err
		}
		host = nil
	}
	if host == nil {
		if tenantIfindex != 0 {
			return l, fmt.Errorf("create veth %s: %s in %s belongs to another link; delete the tenant", name, tenantLink, netns)
		}
		if host, err = createVeth(netns, name, hostMAC, tenantMAC, mtu); err != nil {
			return l, err
		}
		if tenantIfindex, _, err = linkIn(netns); err != nil {
			return l, err
		}
	}
	l.hostIfindex, l.tenantIfindex = host.Attrs().Index, tenantIfindex
	if mtu != 0 && host.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(host, mtu); err != nil {
			return l, fmt.Errorf("set MTU %d of %s: %w", mtu, name, err)
		}
	}
	// No address of its own on the node's end: nothing there is meant to be
	// reached, and multicast of the node has no business in a tenant.
	const addrGenNone = 1
	if err := netlink.LinkSetIP6AddrGenMode(host, addrGenNone); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EAFNOSUPPORT) {
		return l, fmt.Errorf("leave %s without address: %w", name, err)
	}
	if err := netlink.LinkSetUp(host); err != nil {
		return l, fmt.Errorf("set %s up: %w", name, err)
	}
	return l, nil
}

func createVeth(netns, name string, hostMAC, tenantMAC net.HardwareAddr, mtu int) (netlink.Link, error) {
	ns, err := os.Open(netns)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.MTU = name, hostMAC, mtu
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: tenantLink, PeerHardwareAddr: tenantMAC,
		PeerNamespace: netlink.NsFd(ns.Fd()),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("create veth %s: %w", name, err)
	}
	host, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("look up link %s: %w", name, err)
	}
	return host, nil
}

// linkIn returns the indexes of the tenant's end and, as the tenant sees it, of
// the node's end; zeros if there is none.
func linkIn(netns string) (ifindex, peer int, err error) {
	err = inNetns(netns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink in %s: %w", netns, err)
		}
		defer h.Close()
		l, err := h.LinkByName(tenantLink)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look up %s in %s: %w", tenantLink, netns, err)
		}
		ifindex, peer = l.Attrs().Index, l.Attrs().ParentIndex
		return nil
	})
	return ifindex, peer, err
}

// ensureNoLink removes the node's end by name; its other end goes with it.
func ensureNoLink(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look up link %s: %w", name, err)
	}
	return removeLink(l)
}

func removeLink(l netlink.Link) error {
	if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove link %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// sysctls of a tenant's namespace, below /proc/sys/net.
var sysctls = []struct{ key, value string }{
	{"ipv4/conf/all/rp_filter", "0"},
	{"ipv4/conf/default/rp_filter", "0"},
	{"ipv4/conf/" + tenantLink + "/rp_filter", "0"},
	{"ipv4/tcp_mtu_probing", "1"},
	{"ipv4/tcp_tw_reuse", "1"},
	{"ipv4/tcp_migrate_req", "1"},
	{"ipv4/ip_local_port_range", "1024 65535"},
	// Envoy's own ports, of both generations: steering takes a connection from 15008
	// for the end of a tunnel.
	{"ipv4/ip_local_reserved_ports", "15001,15006-15008,15101,15106-15108"},
	// Without it IPv6 sources of pods can't be bound, whatever the routes say.
	{"ipv6/ip_nonlocal_bind", "1"},
	{"ipv6/conf/all/accept_dad", "0"},
	{"ipv6/conf/" + tenantLink + "/accept_dad", "0"},
	{"ipv6/conf/" + tenantLink + "/accept_ra", "0"},
	{"ipv6/conf/" + tenantLink + "/router_solicitations", "0"},
}

// configureTenant runs in the tenant's namespace. The order matters: addresses
// before routes, neighbours before anything is sent, and the rule that the
// kernel begins with goes last.
func configureTenant(h *netlink.Handle, l link, mtu int) error {
	// The thread's own view: net sysctls are those of the thread that opens them.
	for _, s := range sysctls {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", s.key), []byte(s.value), 0o644); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("look up lo: %w", err)
	}
	eth, err := h.LinkByIndex(l.tenantIfindex)
	if err != nil {
		return fmt.Errorf("look up %s: %w", tenantLink, err)
	}
	if mtu != 0 && eth.Attrs().MTU != mtu {
		if err := h.LinkSetMTU(eth, mtu); err != nil {
			return fmt.Errorf("set MTU %d: %w", mtu, err)
		}
	}
	for _, up := range []netlink.Link{lo, eth} {
		if err := h.LinkSetUp(up); err != nil {
			return fmt.Errorf("set %s up: %w", up.Attrs().Name, err)
		}
	}
	for _, a := range []*netlink.Addr{
		{IPNet: host(deliverIPv4)},
		{IPNet: host(deliverIPv6), Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE},
	} {
		if err := h.AddrReplace(eth, a); err != nil {
			return fmt.Errorf("add address %s: %w", a.IPNet, err)
		}
	}
	for _, ip := range []string{gatewayIPv4, gatewayIPv6} {
		n := &netlink.Neigh{LinkIndex: l.tenantIfindex, State: netlink.NUD_PERMANENT, IP: net.ParseIP(ip), HardwareAddr: l.hostMAC}
		if err := h.NeighSet(n); err != nil {
			return fmt.Errorf("set neighbour %s: %w", ip, err)
		}
	}
	any4, any6 := cidr("0.0.0.0/0"), cidr("::/0")
	for _, r := range []*netlink.Route{
		{LinkIndex: l.tenantIfindex, Dst: host(gatewayIPv4), Scope: netlink.SCOPE_LINK},
		{LinkIndex: l.tenantIfindex, Dst: any4, Gw: net.ParseIP(gatewayIPv4)},
		{LinkIndex: l.tenantIfindex, Dst: any6, Gw: net.ParseIP(gatewayIPv6)},
		// Every address is local for what comes in: Envoy accepts and binds any.
		{LinkIndex: lo.Attrs().Index, Dst: any4, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST},
		{LinkIndex: lo.Attrs().Index, Dst: any6, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL},
	} {
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("add route %s: %w", r.Dst, err)
		}
	}
	return errors.Join(
		ensureRules(h, unix.AF_INET, "127.0.0.0/8"),
		ensureRules(h, unix.AF_INET6, "fe80::/10"))
}

// ensureRules makes what comes in local, and what goes out not: it takes table
// main first. Rule 0, which takes table local for both, is removed at the end.
func ensureRules(h *netlink.Handle, family int, own string) error {
	rule := func(priority, table int) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table = family, priority, table
		return r
	}
	toOwn := rule(1, unix.RT_TABLE_LOCAL)
	toOwn.Dst = cidr(own)
	incoming := rule(2, unix.RT_TABLE_LOCAL)
	incoming.IifName = tenantLink
	wanted := []*netlink.Rule{toOwn, incoming, rule(3, unix.RT_TABLE_MAIN), rule(4, unix.RT_TABLE_LOCAL)}

	have, err := h.RuleList(family)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	has := func(priority int) bool {
		for _, r := range have {
			if r.Priority == priority {
				return true
			}
		}
		return false
	}
	for _, r := range wanted {
		if has(r.Priority) {
			continue
		}
		if err := h.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add rule %d: %w", r.Priority, err)
		}
	}
	for i := range have {
		if r := have[i]; r.Table == unix.RT_TABLE_LOCAL && (r.Priority == 0 || r.Priority == -1) && r.Dst == nil && r.IifName == "" {
			r.Family, r.Priority = family, 0
			if err := h.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("remove rule 0: %w", err)
			}
		}
	}
	return nil
}

func host(ip string) *net.IPNet {
	addr := net.ParseIP(ip)
	if v4 := addr.To4(); v4 != nil {
		return &net.IPNet{IP: v4, Mask: net.CIDRMask(32, 32)}
	}
	return &net.IPNet{IP: addr, Mask: net.CIDRMask(128, 128)}
}

func cidr(s string) *net.IPNet {
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err) // a constant of this file
	}
	return n
}
