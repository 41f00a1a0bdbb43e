package lab

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

// Namespace is a network namespace with a thread in it, which lives as long as
// the test, and so does what it starts.
type Namespace struct {
	// Path is a file that is the namespace.
	Path string
	jobs chan func()
	// dead is closed when a job has failed the test: t.Fatal ends the thread.
	dead chan struct{}
}

// newNamespace makes one at a path.
func newNamespace(t testing.TB, path string) *Namespace {
	t.Helper()
	Check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	Check(t, os.WriteFile(path, nil, 0o600))
	n := inThread(t, path, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	t.Cleanup(func() { Check(t, unix.Unmount(path, unix.MNT_DETACH)) })
	n.Do(t, func() { up(t, "lo") })
	return n
}

// Enter is the namespace at a path, which somebody else made.
func Enter(t testing.TB, path string) *Namespace {
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

func inThread(t testing.TB, path string, enter func() error) *Namespace {
	t.Helper()
	n := &Namespace{Path: path, jobs: make(chan func()), dead: make(chan struct{})}
	entered := make(chan error)
	go func() {
		defer close(n.dead)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		entered <- enter()
		for job := range n.jobs {
			job()
		}
	}()
	Check(t, <-entered)
	t.Cleanup(func() { close(n.jobs) })
	return n
}

// Do runs f on the namespace's thread; f may call t.Fatal.
func (n *Namespace) Do(t testing.TB, f func()) {
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

// Go begins f on the namespace's thread.
func (n *Namespace) Go(f func()) { n.jobs <- f }

// Pair is an address of each family.
type Pair struct{ V4, V6 netip.Addr }

// Addresses is a pair as text.
func Addresses(v4, v6 string) Pair { return Pair{netip.MustParseAddr(v4), netip.MustParseAddr(v6)} }

// Of is the address of a family, 4 or 6.
func (p Pair) Of(family int) netip.Addr {
	if family == 4 {
		return p.V4
	}
	return p.V6
}

// Has says whether a is one of them.
func (p Pair) Has(a netip.Addr) bool { return a == p.V4 || a == p.V6 }

// Both are both.
func (p Pair) Both() []netip.Addr { return []netip.Addr{p.V4, p.V6} }

// At is a port of an address.
func At(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// veth connects two namespaces.
func veth(t testing.TB, from *Namespace, name string, to *Namespace, peer string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	fd, err := os.Open(to.Path)
	Check(t, err)
	defer fd.Close()
	from.Do(t, func() {
		Check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(int(fd.Fd()))}))
		up(t, name)
	})
	to.Do(t, func() { up(t, peer) })
}

func up(t testing.TB, name string) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	Check(t, err)
	Check(t, netlink.LinkSetUp(l))
}

func address(t testing.TB, name string, ip Pair, bits4, bits6 int) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	Check(t, err)
	for _, n := range []*net.IPNet{
		{IP: ip.V4.AsSlice(), Mask: net.CIDRMask(bits4, 32)},
		{IP: ip.V6.AsSlice(), Mask: net.CIDRMask(bits6, 128)},
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

func route(t testing.TB, name, to string, via netip.Addr) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	Check(t, err)
	_, dst, err := net.ParseCIDR(to)
	Check(t, err)
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}
	if via.IsValid() {
		r.Gw, r.Scope = via.AsSlice(), netlink.SCOPE_UNIVERSE
	}
	if err := netlink.RouteReplace(r); err != nil {
		t.Fatalf("route %s via %s dev %s: %v", to, via, name, err)
	}
}

func setMTU(t testing.TB, name string, mtu int) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	Check(t, err)
	Check(t, netlink.LinkSetMTU(l, mtu))
}

// Sysctl sets what is below /proc/sys/net in the thread's namespace, as PATH=VALUE.
func Sysctl(t testing.TB, settings ...string) {
	t.Helper()
	for _, s := range settings {
		path, value, _ := strings.Cut(s, "=")
		Check(t, os.WriteFile(filepath.Join("/proc/sys/net", path), []byte(value), 0o644))
	}
}

func forward(t testing.TB) {
	t.Helper()
	// Strict, as on many nodes: each packet must come from where its source is.
	Sysctl(t, "ipv4/ip_forward=1", "ipv6/conf/all/forwarding=1", "ipv4/conf/all/rp_filter=1")
}

// Counter reads one of the kernel's counters of a namespace, such as "TcpExt
// SyncookiesRecv" or "Icmp6InPktTooBigs".
func (n *Namespace) Counter(t testing.TB, name string) (value uint64) {
	t.Helper()
	n.Do(t, func() {
		table, field, ok := strings.Cut(name, " ")
		if !ok {
			b, err := os.ReadFile("/proc/thread-self/net/snmp6")
			Check(t, err)
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
			Check(t, err)
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
