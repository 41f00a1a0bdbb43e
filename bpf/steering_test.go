package bpf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// patience is how long a test waits for what should happen at once, on a machine that
// may be busy with other things.
var patience = 40 * time.Second

// dialer connects from a namespace and reads the line that the other end begins
// with. from may be any address, if the namespace lets it be bound.
func dial(t *testing.T, n *namespace, from, to netip.AddrPort) (c net.Conn, greeting string, err error) {
	t.Helper()
	connect := func() {
		d := net.Dialer{Timeout: patience}
		if from.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(from)
			d.Control = func(_, _ string, c syscall.RawConn) error {
				return c.Control(func(fd uintptr) {
					unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
					unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
				})
			}
		}
		if c, err = d.DialContext(context.Background(), "tcp", to.String()); err != nil {
			return
		}
		c.SetDeadline(time.Now().Add(patience))
		greeting, err = line(c)
	}
	if n == nil {
		connect()
	} else {
		n.do(t, connect)
	}
	if c != nil {
		t.Cleanup(func() { c.Close() })
	}
	return c, greeting, err
}

// line reads byte by byte, so that what follows stays.
func line(r io.Reader) (string, error) {
	var b [1]byte
	var s []byte
	for {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return string(s), err
		}
		if b[0] == '\n' {
			return string(s), nil
		}
		s = append(s, b[0])
	}
}

// serve greets with "app <remote>" on a port of a namespace.
func serve(t *testing.T, n *namespace, port int) {
	t.Helper()
	var l net.Listener
	listen := func() {
		var err error
		l, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		check(t, err)
	}
	if n == nil {
		listen()
	} else {
		n.do(t, listen)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				remote := c.RemoteAddr().(*net.TCPAddr).AddrPort()
				fmt.Fprintf(c, "app %s\n", remote.Addr().Unmap())
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
}

// mesh is what most tests need: tenant 1 with the pods a (point to point) and c
// (on a bridge), tenant 2 with pod b, a proxy each.
type mesh struct {
	*topology
	d              *Datapath
	one, two       *testTenant
	a, b, c        *testPod
	proxy1, proxy2 *proxy
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	m := &mesh{topology: newTopology(t)}
	m.d = m.open()
	m.one, m.two = m.tenant(1), m.tenant(2)
	m.a = m.pod("a", 1, addresses("10.77.0.2", "fd77::2"), false)
	m.b = m.pod("b", 2, addresses("10.77.0.3", "fd77::3"), false)
	m.c = m.pod("c", 1, addresses("10.77.1.4", "fd77:1::4"), true)
	m.proxy1 = startProxy(t, m.one.namespace, "proxy1")
	m.proxy2 = startProxy(t, m.two.namespace, "proxy2")
	check(t, m.d.SetNodeAddresses(nodeOwn()))
	check(t, m.d.UpdateTenant(m.one.Tenant))
	check(t, m.d.UpdateTenant(m.two.Tenant))
	check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
	check(t, m.d.SetListeners(2, 0, m.proxy2.pid))
	for _, p := range []*testPod{m.a, m.b, m.c} {
		check(t, m.d.UpdatePod(p.Pod))
	}
	return m
}

func nodeOwn() []netip.Addr {
	return slices.Concat(nodeAddresses.both(), bridgeAddresses.both(), gateway.both())
}

// open opens the datapath until the test's end, or m.d is closed before.
func (top *topology) open() *Datapath {
	top.t.Helper()
	d, err := Open(Options{PinDir: top.pinDir})
	check(top.t, err)
	top.t.Cleanup(func() { d.Close() })
	return d
}

// openLogged does likewise, and returns what it says.
func (top *topology) openLogged() (*Datapath, string) {
	top.t.Helper()
	var log strings.Builder
	d, err := Open(Options{PinDir: top.pinDir, Log: slog.New(slog.NewTextHandler(&log, nil))})
	check(top.t, err)
	top.t.Cleanup(func() { d.Close() })
	return d, log.String()
}

func (m *mesh) counters(index uint16) steer.Counters {
	m.t.Helper()
	all, err := m.d.Counters()
	check(m.t, err)
	return all[index]
}

// accepted is what a proxy has accepted next: port, remote, local.
func (p *proxy) next(t *testing.T) (port string, remote, local netip.AddrPort) {
	t.Helper()
	select {
	case l := <-p.accepted:
		f := strings.Fields(l)
		return f[0], netip.MustParseAddrPort(f[1]), netip.MustParseAddrPort(f[2])
	case <-time.After(patience):
		t.Fatal("the proxy accepted nothing")
		return
	}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

func unmapped(a netip.AddrPort) netip.AddrPort { return at(a.Addr().Unmap(), a.Port()) }

func eachFamily(t *testing.T, f func(t *testing.T, family int)) {
	for _, family := range []int{4, 6} {
		t.Run(fmt.Sprintf("IPv%d", family), func(t *testing.T) { f(t, family) })
	}
}

func TestSteering(t *testing.T) {
	m := newMesh(t)
	ports := map[string]string{"outbound": "15001", "inbound": "15008", "plain": "15006", "nodeplain": "15007"}
	eachFamily(t, func(t *testing.T, family int) {
		remote, node := remoteAddresses.of(family), nodeAddresses.of(family)
		a, b, c := m.a.of(family), m.b.of(family), m.c.of(family)
		for _, flow := range []struct {
			name     string
			from     *namespace
			fromAddr netip.Addr
			to       netip.AddrPort
			proxy    *proxy
			listener string
		}{
			{"pod to remote", m.a.namespace, a, at(remote, 80), m.proxy1, "outbound"},
			{"bridged pod to remote", m.c.namespace, c, at(remote, 80), m.proxy1, "outbound"},
			{"pod to VIP", m.a.namespace, a, at(pair{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd96::10")}.of(family), 443), m.proxy1, "outbound"},
			{"pod to pod of another tenant", m.a.namespace, a, at(b, 80), m.proxy1, "outbound"},
			{"pod to pod of the same tenant", m.a.namespace, a, at(c, 80), m.proxy1, "outbound"},
			{"another tenant's pod to remote", m.b.namespace, b, at(remote, 80), m.proxy2, "outbound"},
			{"remote to pod", m.remote, remote, at(a, 8080), m.proxy1, "plain"},
			{"remote to pod, HBONE", m.remote, remote, at(a, 15008), m.proxy1, "inbound"},
			{"remote to bridged pod", m.remote, remote, at(c, 8080), m.proxy1, "plain"},
			{"remote to bridged pod, HBONE", m.remote, remote, at(c, 15008), m.proxy1, "inbound"},
			// As Envoy dials, bound to the pod's address.
			{"tunnel to pod of another tenant", m.one.namespace, a, at(b, 15008), m.proxy2, "inbound"},
			{"tunnel from bridged pod to another tenant's", m.one.namespace, c, at(b, 15008), m.proxy2, "inbound"},
			{"tunnel to bridged pod of another tenant", m.two.namespace, b, at(c, 15008), m.proxy1, "inbound"},
			{"tunnel to pod of the same tenant", m.one.namespace, a, at(c, 15008), m.proxy1, "inbound"},
		} {
			t.Run(flow.name, func(t *testing.T) {
				_, _, err := dial(t, flow.from, at(flow.fromAddr, 0), flow.to)
				check(t, err)
				port, gotRemote, gotLocal := flow.proxy.next(t)
				if port != ports[flow.listener] || gotRemote.Addr().Unmap() != flow.fromAddr || unmapped(gotLocal) != flow.to {
					t.Errorf("port %s accepted %s → %s; want %s (%s), %s → %s", port, gotRemote, gotLocal, ports[flow.listener], flow.listener, flow.fromAddr, flow.to)
				}
			})
		}

		serve(t, m.a.namespace, 8100+family)
		serve(t, m.c.namespace, 8100+family)
		serve(t, m.remote, 8100+family)
		serve(t, nil, 8100+family)
		port := uint16(8100 + family)
		for _, flow := range []struct {
			name     string
			from     *namespace
			fromAddr netip.Addr
			to       netip.Addr
		}{
			{"delivery with a remote's source", m.one.namespace, remote, a},
			{"delivery to a bridged pod", m.one.namespace, remote, c},
			{"delivery with another tenant's pod as source", m.one.namespace, b, a},
			{"delivery with an own pod as source", m.one.namespace, c, a},
			{"delivery with the pod's own source", m.one.namespace, a, a},
			{"delivery from the deliver address", m.one.namespace, deliver.of(family), a},
			{"tenant to remote as pod", m.one.namespace, a, remote},
			{"tenant to remote as bridged pod", m.one.namespace, c, remote},
			{"node to pod", nil, node, a},
			{"pod to node", m.a.namespace, a, node},
			{"bridged pod to node", m.c.namespace, c, bridgeAddresses.of(family)},
		} {
			t.Run(flow.name, func(t *testing.T) {
				from := netip.AddrPort{}
				if flow.from != nil {
					from = at(flow.fromAddr, 0)
				}
				_, greeting, err := dial(t, flow.from, from, at(flow.to, port))
				check(t, err)
				if flow.from == nil && family == 6 {
					return // the kernel may choose any of the node's addresses
				}
				want := "app " + flow.fromAddr.String()
				if flow.fromAddr == flow.to {
					// Its own address would be a martian to it.
					want = "app " + addresses("169.254.96.2", "fd69:8::2").of(family).String()
				}
				if flow.from != nil && greeting != want {
					t.Errorf("got %q, want %q", greeting, want)
				}
			})
		}
	})
	if c := m.counters(1); c.Outbound == 0 || c.Inbound == 0 || c.Plain == 0 || c.Steered[0] != c.Outbound+c.Inbound+c.Plain+c.NodePlain || c.Steered[1] != 0 {
		t.Errorf("counters %+v", c)
	}
	if c := m.counters(1); c.Dropped != (steer.Drops{Protocol: c.Dropped.Protocol}) || c.Refused != 0 {
		t.Errorf("something was dropped on the way: %+v", c)
	}
}

// A pod can set the mark that says "re-injected" on its packets; it must not help.
func TestForgedMark(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	eachFamily(t, func(t *testing.T, family int) {
		var c net.Conn
		var greeting string
		var err error
		m.a.do(t, func() {
			d := net.Dialer{Timeout: patience, Control: func(_, _ string, c syscall.RawConn) error {
				var err error
				return errors.Join(c.Control(func(fd uintptr) {
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, reinjected)
				}), err)
			}}
			if c, err = d.Dial("tcp", at(remoteAddresses.of(family), 80).String()); err == nil {
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				greeting, err = line(c)
			}
		})
		if greeting != "proxy1" {
			t.Errorf("%q, %v", greeting, err)
		}
	})
}

// reinjected is REINJECTED of maps.h.
const reinjected = 0xb01df00d

// A client behind the node's own address, as NodePorts with masquerade have,
// is told apart: that source can't be kept.
func TestNodeAddressAsClient(t *testing.T) {
	m := newMesh(t)
	check(t, m.d.SetNodeAddresses(append(nodeOwn(), remoteAddresses.both()...)))
	eachFamily(t, func(t *testing.T, family int) {
		_, _, err := dial(t, m.remote, netip.AddrPort{}, at(m.a.of(family), 8080))
		check(t, err)
		if port, _, _ := m.proxy1.next(t); port != "15007" {
			t.Errorf("accepted at %s, want 15007", port)
		}
	})
}

func TestSpoofing(t *testing.T) {
	m := newMesh(t)
	eachFamily(t, func(t *testing.T, family int) {
		remote, b := remoteAddresses.of(family), m.b.of(family)
		serve(t, m.remote, 8200+family)
		serve(t, m.a.namespace, 8200+family)
		serve(t, m.b.namespace, 8200+family)
		serve(t, nil, 8200+family)
		port := uint16(8200 + family)
		node := nodeAddresses.of(family)
		unknown := pair{netip.MustParseAddr("10.77.9.9"), netip.MustParseAddr("fd77:9::9")}.of(family)
		for _, c := range []struct {
			name     string
			from     *namespace
			fromAddr netip.Addr
			to       netip.Addr
			tenant   uint16
			counted  func(steer.Drops) uint64
		}{
			{"pod as another tenant's pod", m.a.namespace, b, remote, 1, func(d steer.Drops) uint64 { return d.Spoofed }},
			{"pod as a pod of its tenant", m.a.namespace, m.c.of(family), remote, 1, func(d steer.Drops) uint64 { return d.Spoofed }},
			{"pod as nobody", m.a.namespace, unknown, remote, 1, func(d steer.Drops) uint64 { return d.Spoofed }},
			{"pod as nobody to the node", m.a.namespace, unknown, node, 1, func(d steer.Drops) uint64 { return d.Spoofed }},
			{"tenant as another tenant's pod", m.one.namespace, b, remote, 1, func(d steer.Drops) uint64 { return d.Foreign }},
			{"tenant as nobody", m.one.namespace, unknown, remote, 1, func(d steer.Drops) uint64 { return d.Foreign }},
			{"tenant as nobody to another tenant's pod", m.one.namespace, unknown, b, 1, func(d steer.Drops) uint64 { return d.Foreign }},
			{"tenant as nobody to the node", m.one.namespace, unknown, node, 1, func(d steer.Drops) uint64 { return d.Foreign }},
			{"deliver address to another tenant's pod", m.one.namespace, deliver.of(family), b, 1, func(d steer.Drops) uint64 { return d.Deliver }},
			{"deliver address to a remote", m.one.namespace, deliver.of(family), remote, 1, func(d steer.Drops) uint64 { return d.Deliver }},
			{"deliver address to the node", m.one.namespace, deliver.of(family), node, 1, func(d steer.Drops) uint64 { return d.Deliver }},
			{"remote to nobody behind a pod's veth", m.remote, remote, unknown, 1, func(d steer.Drops) uint64 { return d.NotThePod }},
		} {
			t.Run(c.name, func(t *testing.T) {
				if c.to == unknown {
					bits := map[int]string{4: "/32", 6: "/128"}[family]
					route(t, m.a.veth, unknown.String()+bits, netip.Addr{})
					neighbour(t, m.a.veth, unknown, m.a.MAC)
				}
				before := c.counted(m.counters(c.tenant).Dropped)
				syn(t, c.from, c.fromAddr, at(c.to, port), func() bool { return c.counted(m.counters(c.tenant).Dropped) > before })
			})
		}
	})
	// What the drops were for: nobody saw any of it.
	for _, p := range []*proxy{m.proxy1, m.proxy2} {
		select {
		case l := <-p.accepted:
			t.Errorf("a proxy accepted %s", l)
		default:
		}
	}
}

// syn begins a connection, which must not come about, and waits for a condition.
func syn(t *testing.T, n *namespace, from netip.Addr, to netip.AddrPort, done func() bool) {
	t.Helper()
	synFrom(t, n, at(from, 0), to, done)
}

func synFrom(t *testing.T, n *namespace, from, to netip.AddrPort, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	connected := make(chan error, 1)
	attempt := func() {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) {
				unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
				unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
			})
		}}
		c, err := d.DialContext(ctx, "tcp", to.String())
		if err == nil {
			c.Close()
		}
		connected <- err
	}
	go func() {
		if err := n.run(attempt); err != nil {
			connected <- err
		}
	}()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for ctx.Err() == nil && !done() {
		select {
		case err := <-connected:
			if !done() {
				t.Errorf("connect ended with %v before anything was counted", err)
			}
			cancel()
			return
		case <-ticker.C:
		}
	}
	if ctx.Err() != nil {
		t.Error("nothing was counted")
	}
	cancel()
	if err := <-connected; err == nil {
		t.Error("connected")
	}
}

func TestRefused(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	eachFamily(t, func(t *testing.T, family int) {
		remote, a := remoteAddresses.of(family), m.a.of(family)
		check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
		_, _, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remote, 80))
		check(t, err)
		check(t, m.d.ClearListeners(1, 0))
		before := m.counters(1).Refused
		for name, try := range map[string]func() error{
			"outbound": func() error { _, _, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remote, 80)); return err },
			"inbound":  func() error { _, _, err := dial(t, m.remote, netip.AddrPort{}, at(a, 15008)); return err },
		} {
			if err := try(); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: %v, want connection refused", name, err)
			}
		}
		if after := m.counters(1).Refused; after != before+2 {
			t.Errorf("%d refusals counted, want 2", after-before)
		}
		_, greeting, err := dial(t, m.b.namespace, netip.AddrPort{}, at(remote, 80))
		if err != nil || greeting != "proxy2" {
			t.Errorf("the other tenant got %q, %v", greeting, err)
		}
	})

	t.Run("dead proxy", func(t *testing.T) {
		check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
		m.proxy1.stop()
		_, _, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80))
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%v, want connection refused", err)
		}
	})
	t.Run("deleted tenant", func(t *testing.T) {
		check(t, m.d.DeleteTenant(2))
		before := m.counters(2).Dropped.NoTenant
		syn(t, m.b.namespace, m.b.v4, at(remoteAddresses.v4, 80), func() bool { return m.counters(0).Dropped.NoTenant+m.counters(2).Dropped.NoTenant > before })
	})
}

func makeCgroup(t *testing.T) string {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var s unix.Statfs_t
		if unix.Statfs(root, &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC {
			dir, err := os.MkdirTemp(root, "bht-bpf-")
			check(t, err)
			t.Cleanup(func() { check(t, os.Remove(dir)) })
			return dir
		}
	}
	t.Fatal("no cgroup version 2 is mounted")
	return ""
}
