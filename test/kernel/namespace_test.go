package kernel

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
)

// namespace is a network namespace with a thread in it, which lives as long as
// the test, and so does what it starts.
type namespace struct {
	path string
	jobs chan func()
	// dead is closed when a job has failed the test: t.Fatal ends the thread.
	dead chan struct{}
}

// newNamespace makes one at a path.
func newNamespace(t *testing.T, path string) *namespace {
	t.Helper()
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, nil, 0o600))
	n := inThread(t, path, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	t.Cleanup(func() { check(t, unix.Unmount(path, unix.MNT_DETACH)) })
	n.do(t, func() { up(t, "lo") })
	return n
}

// enter is the namespace at a path, which somebody else made.
func enter(t *testing.T, path string) *namespace {
	t.Helper()
	return inThread(t, path, func() error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
	})
}

func inThread(t *testing.T, path string, enter func() error) *namespace {
	t.Helper()
	n := &namespace{path: path, jobs: make(chan func()), dead: make(chan struct{})}
	entered := make(chan error)
	go func() {
		defer close(n.dead)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		entered <- enter()
		for job := range n.jobs {
			job()
		}
	}()
	check(t, <-entered)
	t.Cleanup(func() { close(n.jobs) })
	return n
}

// do runs f on the namespace's thread; f may call t.Fatal.
func (n *namespace) do(t *testing.T, f func()) {
	t.Helper()
	finished, done := false, make(chan struct{})
	select {
	case n.jobs <- func() {
		defer close(done)
		f()
		finished = true
	}:
		<-done
	case <-n.dead:
	}
	if !finished {
		t.FailNow()
	}
}

// pair is an address of each family.
type pair struct{ v4, v6 netip.Addr }

func addresses(v4, v6 string) pair { return pair{netip.MustParseAddr(v4), netip.MustParseAddr(v6)} }

func (p pair) of(family int) netip.Addr {
	if family == 4 {
		return p.v4
	}
	return p.v6
}

func (p pair) has(a netip.Addr) bool { return a == p.v4 || a == p.v6 }

func (p pair) both() []netip.Addr { return []netip.Addr{p.v4, p.v6} }

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// veth connects two namespaces.
func veth(t *testing.T, from *namespace, name string, to *namespace, peer string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	fd, err := os.Open(to.path)
	check(t, err)
	defer fd.Close()
	from.do(t, func() {
		check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(int(fd.Fd()))}))
		up(t, name)
	})
	to.do(t, func() { up(t, peer) })
}

func up(t *testing.T, name string) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	check(t, err)
	check(t, netlink.LinkSetUp(l))
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
	_, dst, err := net.ParseCIDR(to)
	check(t, err)
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}
	if via.IsValid() {
		r.Gw, r.Scope = via.AsSlice(), netlink.SCOPE_UNIVERSE
	}
	if err := netlink.RouteReplace(r); err != nil {
		t.Fatalf("route %s via %s dev %s: %v", to, via, name, err)
	}
}

func setMTU(t *testing.T, name string, mtu int) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	check(t, err)
	check(t, netlink.LinkSetMTU(l, mtu))
}

func sysctl(t *testing.T, settings ...string) {
	t.Helper()
	for _, s := range settings {
		path, value, _ := strings.Cut(s, "=")
		check(t, os.WriteFile(filepath.Join("/proc/sys/net", path), []byte(value), 0o644))
	}
}

func forward(t *testing.T) {
	t.Helper()
	// Strict, as on many nodes: each packet must come from where its source is.
	sysctl(t, "ipv4/ip_forward=1", "ipv6/conf/all/forwarding=1", "ipv4/conf/all/rp_filter=1")
}

// counter reads one of the kernel's counters of a namespace, such as "TcpExt
// SyncookiesRecv" or "Icmp6InPktTooBigs".
func (n *namespace) counter(t *testing.T, name string) (value uint64) {
	t.Helper()
	n.do(t, func() {
		table, field, ok := strings.Cut(name, " ")
		if !ok {
			b, err := os.ReadFile("/proc/thread-self/net/snmp6")
			check(t, err)
			for line := range strings.Lines(string(b)) {
				if f := strings.Fields(line); len(f) == 2 && f[0] == name {
					fmt.Sscan(f[1], &value)
					return
				}
			}
			t.Fatalf("no counter %s", name)
		}
		for _, file := range []string{"snmp", "netstat"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + file)
			check(t, err)
			var names []string
			for line := range strings.Lines(string(b)) {
				f := strings.Fields(line)
				if f[0] != table+":" {
					continue
				}
				if names == nil {
					names = f
					continue
				}
				for i := range names {
					if names[i] == field {
						fmt.Sscan(f[i], &value)
						return
					}
				}
			}
		}
		t.Fatalf("no counter %s", name)
	})
	return value
}
