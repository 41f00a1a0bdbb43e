package bpf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// namespace is a network namespace without a name, so that it ends with the test.
type namespace struct {
	file *os.File
}

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	done := make(chan *os.File)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		defer close(done)
		if unix.Unshare(unix.CLONE_NEWNET) == nil {
			f, _ := os.Open("/proc/thread-self/ns/net")
			done <- f
		}
	}()
	f := <-done
	if f == nil {
		t.Fatal("can't make a network namespace")
	}
	n := &namespace{f}
	t.Cleanup(func() { f.Close() })
	n.do(t, func() { up(t, "lo") })
	return n
}

func (n *namespace) path() string { return fmt.Sprintf("/proc/self/fd/%d", n.file.Fd()) }

// do runs f in the namespace; f may call t.Fatal.
func (n *namespace) do(t *testing.T, f func()) {
	t.Helper()
	finished := false
	check(t, n.run(func() { f(); finished = true }))
	if !finished {
		t.FailNow()
	}
}

// run runs f in the namespace, on a thread that ends with it.
func (n *namespace) run(f func()) error {
	done := make(chan error, 1)
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		f()
	}()
	return <-done
}

// onOneCPU keeps the thread, which ends with what it does in a namespace, on the first
// CPU that it may use.
func onOneCPU(t *testing.T) {
	t.Helper()
	var allowed, first unix.CPUSet
	check(t, unix.SchedGetaffinity(0, &allowed))
	for cpu := 0; first.Count() == 0; cpu++ {
		if allowed.IsSet(cpu) {
			first.Set(cpu)
		}
	}
	check(t, unix.SchedSetaffinity(0, &first))
}

// Every node, pod and tenant of a topology has addresses of both families.
type pair struct{ v4, v6 netip.Addr }

func addresses(v4, v6 string) pair { return pair{netip.MustParseAddr(v4), netip.MustParseAddr(v6)} }

func (p pair) both() []netip.Addr { return []netip.Addr{p.v4, p.v6} }

func (p pair) of(family int) netip.Addr {
	if family == 4 {
		return p.v4
	}
	return p.v6
}

var (
	nodeAddresses   = addresses("192.0.2.1", "2001:db8::1")
	remoteAddresses = addresses("192.0.2.2", "2001:db8::2")
	gateway         = addresses("169.254.1.1", "fe80::1")
	bridgeAddresses = addresses("10.77.1.1", "fd77:1::1")
	deliver         = pair{steer.DeliverIPv4, steer.DeliverIPv6}
)

// topology is the node (the process's own namespace), a machine beside it, and
// what pod and tenant add.
type topology struct {
	t      *testing.T
	pinDir string
	remote *namespace
	bridge netlink.Link
}

type testPod struct {
	*namespace
	pair
	veth string
	steer.Pod
}

type testTenant struct {
	*namespace
	veth string
	steer.Tenant
}

func newTopology(t *testing.T) *topology {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	if err := Probe(); err != nil {
		t.Fatal(err)
	}
	parent := os.Getenv(pinParent)
	check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	check(t, Mount(parent))
	top := &topology{t: t, pinDir: filepath.Join(parent, "bulkhead"), remote: newNamespace(t)}
	t.Cleanup(func() {
		check(t, Uninstall(top.pinDir))
		check(t, unix.Unmount(parent, 0))
	})
	up(t, "lo")
	// Strict, as on many nodes: each packet must come from where its source is.
	sysctl(t, "net/ipv4/ip_forward=1", "net/ipv6/conf/all/forwarding=1", "net/ipv4/conf/all/rp_filter=1")
	veth(t, "bhtremote", top.remote)
	address(t, "bhtremote", nodeAddresses, 24, 64)
	top.remote.do(t, func() {
		address(t, "eth0", remoteAddresses, 24, 64)
		route(t, "eth0", "10.77.0.0/16", nodeAddresses.v4)
		route(t, "eth0", "fd77::/16", nodeAddresses.v6)
	})
	return top
}

// pod makes a pod as a point-to-point CNI plugin does, or on a bridge.
func (top *topology) pod(uid string, tenant uint16, ip pair, bridged bool) *testPod {
	t := top.t
	t.Helper()
	p := &testPod{namespace: newNamespace(t), pair: ip, veth: "bhtpod" + uid}
	mac, ifindex := veth(t, p.veth, p.namespace)
	p.Pod = steer.Pod{UID: uid, Tenant: tenant, Ifindex: ifindex, IPs: ip.both(), MAC: mac}
	if bridged {
		top.joinBridge(p.veth)
		p.do(t, func() {
			address(t, "eth0", ip, 24, 64)
			route(t, "eth0", "0.0.0.0/0", bridgeAddresses.v4)
			route(t, "eth0", "::/0", bridgeAddresses.v6)
		})
		return p
	}
	address(t, p.veth, gateway, 32, 64)
	p.do(t, func() {
		address(t, "eth0", ip, 32, 128)
		route(t, "eth0", "169.254.1.1/32", netip.Addr{})
		route(t, "eth0", "0.0.0.0/0", gateway.v4)
		route(t, "eth0", "::/0", gateway.v6)
	})
	route(t, p.veth, ip.v4.String()+"/32", netip.Addr{})
	route(t, p.veth, ip.v6.String()+"/128", netip.Addr{})
	return p
}

func (top *topology) joinBridge(port string) {
	t := top.t
	if top.bridge == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "bhtbridge"
		check(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
		top.bridge = up(t, "bhtbridge")
		t.Cleanup(func() { netlink.LinkDel(top.bridge) })
		address(t, "bhtbridge", bridgeAddresses, 24, 64)
	}
	check(t, netlink.LinkSetMaster(up(t, port), top.bridge))
}

// tenant makes a tenant's namespace: all addresses are local for what comes in,
// and everything goes out of its veth.
func (top *topology) tenant(index uint16) *testTenant {
	t := top.t
	t.Helper()
	n := &testTenant{namespace: newNamespace(t), veth: fmt.Sprintf("bhtten%d", index)}
	mac, ifindex := veth(t, n.veth, n.namespace)
	host := up(t, n.veth)
	address(t, n.veth, gateway, 32, 64)
	n.Tenant = steer.Tenant{Index: index, Netns: n.path(), HostIfindex: ifindex, TenantMAC: mac}
	n.do(t, func() {
		sysctl(t, "net/ipv4/conf/all/rp_filter=0", "net/ipv4/conf/eth0/rp_filter=0", "net/ipv6/ip_nonlocal_bind=1", "net/ipv4/ip_nonlocal_bind=1")
		address(t, "eth0", deliver, 32, 128)
		route(t, "eth0", "169.254.1.1/32", netip.Addr{})
		route(t, "eth0", "0.0.0.0/0", gateway.v4)
		route(t, "eth0", "::/0", gateway.v6)
		eth0 := up(t, "eth0")
		n.TenantIfindex = eth0.Attrs().Index
		for _, ip := range gateway.both() {
			neighbour(t, "eth0", ip, host.Attrs().HardwareAddr)
		}
		localRouting(t, netlink.FAMILY_V4, "0.0.0.0/0", "127.0.0.0/8")
		localRouting(t, netlink.FAMILY_V6, "::/0", "fe80::/10")
	})
	return n
}

func localRouting(t *testing.T, family int, all, loopback string) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	check(t, err)
	check(t, netlink.RouteReplace(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: network(all), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: unix.RT_SCOPE_HOST}))
	for i, r := range []netlink.Rule{
		{Dst: network(loopback), Table: unix.RT_TABLE_LOCAL},
		{IifName: "eth0", Table: unix.RT_TABLE_LOCAL},
		{Table: unix.RT_TABLE_MAIN},
		{Table: unix.RT_TABLE_LOCAL},
	} {
		rule := netlink.NewRule()
		rule.Family, rule.Priority = family, i+1
		rule.Dst, rule.IifName, rule.Table = r.Dst, r.IifName, r.Table
		check(t, netlink.RuleAdd(rule))
	}
	first := netlink.NewRule()
	first.Family, first.Priority, first.Table = family, 0, unix.RT_TABLE_LOCAL
	check(t, netlink.RuleDel(first))
}

// veth makes a veth to eth0 in a namespace, whose MAC it returns with the index
// of this end.
func veth(t *testing.T, name string, to *namespace) (net.HardwareAddr, int) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(to.file.Fd()))}))
	link := up(t, name)
	t.Cleanup(func() { netlink.LinkDel(link) })
	var mac net.HardwareAddr
	to.do(t, func() { mac = up(t, "eth0").Attrs().HardwareAddr })
	return mac, link.Attrs().Index
}

func up(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	check(t, err)
	check(t, netlink.LinkSetUp(l))
	return l
}

func address(t *testing.T, name string, ip pair, bits4, bits6 int) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	check(t, err)
	for _, n := range []*net.IPNet{
		{IP: ip.v4.AsSlice(), Mask: net.CIDRMask(bits4, 32)},
		{IP: ip.v6.AsSlice(), Mask: net.CIDRMask(bits6, 128)},
	} {
		a := &netlink.Addr{IPNet: n}
		if n.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, a); err != nil && !errors.Is(err, unix.EEXIST) {
			t.Fatal(err)
		}
	}
}

func route(t *testing.T, name, to string, via netip.Addr) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	check(t, err)
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: network(to)}
	if via.IsValid() {
		r.Gw = via.AsSlice()
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := netlink.RouteReplace(r); err != nil {
		t.Fatalf("route %s via %s dev %s: %v", to, via, name, err)
	}
}

func neighbour(t *testing.T, name string, ip netip.Addr, mac net.HardwareAddr) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	check(t, err)
	check(t, netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: ip.AsSlice(), HardwareAddr: mac, State: unix.NUD_PERMANENT}))
}

func network(cidr string) *net.IPNet {
	_, n, err := net.ParseCIDR(cidr)
	if err != nil {
		panic(err)
	}
	return n
}

func sysctl(t *testing.T, settings ...string) {
	t.Helper()
	for _, s := range settings {
		path, value, _ := strings.Cut(s, "=")
		check(t, os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0o644))
	}
}

func removeLink(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkDel(l)
}

func setMTU(t *testing.T, name string, mtu int) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	check(t, err)
	check(t, netlink.LinkSetMTU(l, mtu))
}
