package bpf

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// echo says something on a connection and hears it again.
func echo(c net.Conn, size int) error {
	c.SetDeadline(time.Now().Add(patience))
	sent := make([]byte, size)
	go c.Write(sent)
	_, err := io.ReadFull(c, make([]byte, size))
	return err
}

// programs are the IDs of what is attached to a pod's veth and a tenant's
// namespace and veth.
func (m *mesh) attached(p *testPod, n *testTenant) []ebpf.ProgramID {
	m.t.Helper()
	var ids []ebpf.ProgramID
	for _, q := range []link.QueryOptions{
		{Target: p.Ifindex, Attach: ebpf.AttachTCXIngress},
		{Target: p.Ifindex, Attach: ebpf.AttachTCXEgress},
		{Target: n.HostIfindex, Attach: ebpf.AttachTCXIngress},
		{Target: int(n.file.Fd()), Attach: ebpf.AttachSkLookup},
	} {
		r, err := link.QueryPrograms(q)
		check(m.t, err)
		for _, a := range r.Programs {
			ids = append(ids, a.ID)
		}
	}
	return ids
}

func TestAdopt(t *testing.T) {
	m := newMesh(t)
	held, greeting, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80))
	check(t, err)
	before := m.attached(m.a, m.one)
	if greeting != "proxy1" || len(before) != 4 {
		t.Fatalf("greeting %q, programs %v", greeting, before)
	}
	if _, err := Open(Options{PinDir: m.pinDir}); err == nil {
		t.Fatal("opened twice")
	}

	check(t, m.d.Close())
	check(t, echo(held, 1000))
	if _, greeting, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v6, 80)); greeting != "proxy1" {
		t.Fatalf("while closed: %q, %v", greeting, err)
	}

	m.d = m.open()
	if after := m.attached(m.a, m.one); !slices.Equal(before, after) {
		t.Errorf("unchanged programs were replaced: %v, before %v", after, before)
	}
	if pods, err := m.d.Pods(); err != nil || !slices.Equal(pods, []string{"a", "b", "c"}) {
		t.Errorf("pods %v, %v", pods, err)
	}
	if tenants, err := m.d.Tenants(); err != nil || !slices.Equal(tenants, []uint16{1, 2}) {
		t.Errorf("tenants %v, %v", tenants, err)
	}
	check(t, m.d.UpdateTenant(m.one.Tenant))
	check(t, m.d.UpdatePod(m.a.Pod))
	if after := m.attached(m.a, m.one); !slices.Equal(before, after) {
		t.Errorf("repeated updates replaced programs: %v, before %v", after, before)
	}
	check(t, echo(held, 1000))

	t.Run("other programs", func(t *testing.T) {
		// As if another version had made them: some that drop everything. Were
		// they to pass it, a late acknowledgement could reset the connection.
		other := constant(t, ebpf.SchedCLS, 2)
		otherSteer := constant(t, ebpf.SkLookup, 0)
		paths := map[string]*ebpf.Program{
			"programs/from_pod": other, "programs/to_pod": other, "programs/from_tenant": other,
			"pods/a/from_pod": other, "pods/a/to_pod": other, "tenants/1/from_tenant": other,
			"tenants/1/steer": otherSteer, "tenants/1/steer_link": otherSteer,
		}
		check(t, m.d.Close())
		for path, p := range paths {
			path = filepath.Join(m.pinDir, path)
			if l, err := link.LoadPinnedLink(path, nil); err == nil {
				check(t, l.Update(p))
				l.Close()
				continue
			}
			check(t, os.Remove(path))
			check(t, p.Pin(path))
		}
		m.d = m.open()
		after := m.attached(m.a, m.one)
		id := func(p *ebpf.Program) ebpf.ProgramID { i, _ := p.Info(); id, _ := i.ID(); return id }
		if len(after) != 4 || slices.Contains(after, id(other)) || slices.Contains(after, id(otherSteer)) {
			t.Errorf("programs %v after %v; they were not replaced", after, before)
		}
		check(t, echo(held, 1000))
		if _, greeting, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80)); greeting != "proxy1" {
			t.Errorf("%q, %v", greeting, err)
		}
	})

	// What a process that was killed in the middle may leave, and what nobody made.
	t.Run("half-finished", func(t *testing.T) {
		check(t, m.d.Close())
		for _, path := range []string{"programs/to_pod", "maps/counters", "pods/a/to_pod", "tenants/1/steer", "tenants/1/steer_link", "tenants/2/listeners"} {
			check(t, os.Remove(filepath.Join(m.pinDir, path)))
		}
		for _, path := range []string{"pods/d", "tenants/7", "tenants/x"} {
			check(t, os.Mkdir(filepath.Join(m.pinDir, path), 0o700))
		}
		wrong, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		check(t, err)
		defer wrong.Close()
		check(t, os.Remove(filepath.Join(m.pinDir, "maps/tenants")))
		check(t, wrong.Pin(filepath.Join(m.pinDir, "maps/tenants")))

		m.d = m.open()
		before := m.counters(0).Dropped.NoTenant
		syn(t, m.a.namespace, m.a.v4, at(remoteAddresses.v4, 80), func() bool { return m.counters(0).Dropped.NoTenant > before })
		if pods, err := m.d.Pods(); err != nil || !slices.Contains(pods, "d") {
			t.Errorf("pods %v, %v", pods, err)
		}
		if tenants, err := m.d.Tenants(); err != nil || !slices.Equal(tenants, []uint16{1, 2, 7}) {
			t.Errorf("tenants %v, %v", tenants, err)
		}
		check(t, m.d.DeletePod("d"))
		check(t, m.d.DeleteTenant(7))
		check(t, m.d.UpdateTenant(m.one.Tenant))
		check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
		check(t, m.d.UpdatePod(m.a.Pod))
		eachFamily(t, func(t *testing.T, family int) {
			for _, flow := range []struct {
				from *namespace
				to   netip.AddrPort
			}{{m.a.namespace, at(remoteAddresses.of(family), 80)}, {m.remote, at(m.a.of(family), 80)}} {
				if _, greeting, err := dial(t, flow.from, netip.AddrPort{}, flow.to); greeting != "proxy1" {
					t.Errorf("%q, %v", greeting, err)
				}
			}
		})
	})
}

// constant is a program with one answer.
func constant(t *testing.T, kind ebpf.ProgramType, verdict int32) *ebpf.Program {
	t.Helper()
	spec := &ebpf.ProgramSpec{Type: kind, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}}
	if kind == ebpf.SkLookup {
		spec.AttachType = ebpf.AttachSkLookup
	}
	p, err := ebpf.NewProgram(spec)
	check(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

func TestWeight(t *testing.T) {
	m := newMesh(t)
	canary := startProxy(t, m.one.namespace, "canary")
	check(t, m.d.SetListeners(1, 1, canary.pid))
	count := func(n int) (got map[string]int) {
		got = map[string]int{}
		for i := range n {
			c, greeting, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.of(4+i%2*2), 80))
			check(t, err)
			c.Close()
			got[greeting]++
		}
		return got
	}
	for _, step := range []struct {
		name             string
		weight, min, max int
		do               func() error
	}{
		{"0", 0, 0, 0, nil},
		{"30", 30, 21, 99, nil}, // six standard deviations
		{"100", 100, 200, 200, nil},
		{"without the canary", 100, 0, 0, func() error { return m.d.ClearListeners(1, 1) }},
		{"without the other", 0, 200, 200, func() error {
			return errors.Join(m.d.SetListeners(1, 1, canary.pid), m.d.ClearListeners(1, 0))
		}},
		{"after the canary's death", 100, 0, 0, func() error { canary.stop(); return m.d.SetListeners(1, 0, m.proxy1.pid) }},
	} {
		t.Run(step.name, func(t *testing.T) {
			if step.do != nil {
				check(t, step.do())
			}
			check(t, m.d.SetWeight(1, step.weight))
			before := m.counters(1).Steered
			got := count(200)
			if n := got["canary"]; n < step.min || n > step.max || n+got["proxy1"] != 200 {
				t.Errorf("%v of 200, want %d to %d for the canary", got, step.min, step.max)
			}
			after := m.counters(1).Steered
			for i, name := range []string{"proxy1", "canary"} {
				if int(after[i]-before[i]) != got[name] {
					t.Errorf("counted %v, before %v, accepted %v", after, before, got)
				}
			}
		})
	}
	if err := m.d.SetWeight(9, 10); !errors.Is(err, steer.ErrUnknownTenant) {
		t.Errorf("weight of an unknown tenant: %v", err)
	}
	if err := m.d.SetListeners(1, 0, os.Getpid()); !errors.Is(err, steer.ErrNotListening) {
		t.Errorf("a process that doesn't listen: %v", err)
	}
	if got := count(1); got["proxy1"] != 1 {
		t.Errorf("an error changed the listeners: %v", got)
	}
}

// What a pod has with one destination shares a worker, and with it a tunnel; another
// destination may be another worker's, and what comes to pods goes to all.
func TestWorkers(t *testing.T) {
	m := newMesh(t)
	canary := startProxy(t, m.one.namespace, "canary")
	check(t, m.d.SetListeners(1, 1, canary.pid))
	check(t, m.d.SetWeight(1, 100))
	eachFamily(t, func(t *testing.T, family int) {
		workers := func(from *namespace, to func(i int) netip.Addr) map[string]int {
			got := map[string]int{}
			for i := range 64 {
				c, greeting, err := dial(t, from, netip.AddrPort{}, at(to(i), uint16(80+i%3)))
				if err != nil || greeting != "canary" {
					t.Fatalf("%q, %v", greeting, err)
				}
				c.Close()
				got[strings.Fields(<-canary.accepted)[3]]++
			}
			return got
		}
		remote := remoteAddresses.of(family)
		if got := workers(m.a.namespace, func(int) netip.Addr { return remote }); len(got) != 1 {
			t.Errorf("one destination: %v", got)
		}
		// Nobody is there: the proxy takes the connection, whatever it is to.
		for name, got := range map[string]map[string]int{
			"many destinations": workers(m.a.namespace, func(i int) netip.Addr {
				b := remote.AsSlice()
				b[len(b)-2], b[len(b)-1] = 7, byte(i)
				to, _ := netip.AddrFromSlice(b)
				return to
			}),
			"to a pod": workers(m.remote, func(int) netip.Addr { return m.a.of(family) }),
		} {
			if got["0"] < 12 || got["1"] < 12 {
				t.Errorf("%s: %v", name, got)
			}
		}
	})
}

func TestMovePod(t *testing.T) {
	m := newMesh(t)
	port := uint16(80)
	held, greeting, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, port))
	if err != nil || greeting != "proxy1" {
		t.Fatalf("%q, %v", greeting, err)
	}
	m.a.Tenant = 2
	check(t, m.d.UpdatePod(m.a.Pod))
	if _, greeting, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, port)); greeting != "proxy2" {
		t.Errorf("%q, %v", greeting, err)
	}
	if _, greeting, err := dial(t, m.remote, netip.AddrPort{}, at(m.a.v6, port)); greeting != "proxy2" {
		t.Errorf("%q, %v", greeting, err)
	}
	if err := echo(held, 10); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a connection through the former tenant: %v, want a reset", err)
	}

	// A new sandbox, and its address given to another pod.
	next := m.pod("next", 1, addresses("10.77.0.20", "fd77::20"), false)
	next.IPs = append(next.IPs, m.a.v4)
	check(t, m.d.UpdatePod(next.Pod))
	check(t, m.d.DeletePod("a"))
	var entry datapathPod
	for ip, want := range map[netip.Addr]bool{m.a.v4: true, m.a.v6: false} {
		key, _ := addrKey(ip)
		err := m.d.maps[datapathMapPods].Lookup(key, &entry)
		if (err == nil) != want || want && uidString(entry.Uid) != "next" {
			t.Errorf("%s: %q, %v", ip, uidString(entry.Uid), err)
		}
	}
}

func TestRemove(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	check(t, m.d.DeletePod("a"))
	check(t, m.d.DeletePod("a"))
	if ids := m.attached(m.a, m.one); len(ids) != 2 {
		t.Errorf("programs %v, want those of the tenant only", ids)
	}
	if _, greeting, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80)); greeting != "app 10.77.0.2" {
		t.Errorf("a pod outside of the mesh: %q, %v", greeting, err)
	}
	// The veth is gone before the agent hears of it.
	check(t, removeLink(m.b.veth))
	check(t, m.d.DeletePod("b"))
	check(t, m.d.DeleteTenant(1))
	check(t, m.d.DeleteTenant(1))
	if ids := m.attached(m.a, m.one); len(ids) != 0 {
		t.Errorf("programs %v are left", ids)
	}
	for name, want := range map[string]int{datapathMapPods: 2, datapathMapVeths: 2, datapathMapTenants: 1, datapathMapCounters: 2} {
		if n := size(t, m.d.maps[name]); n != want {
			t.Errorf("%d entries in %s, want %d", n, name, want)
		}
	}
	if err := Uninstall(m.pinDir); err == nil {
		t.Error("uninstalled while in use")
	}
	check(t, m.d.Close())
	check(t, Uninstall(m.pinDir))
	check(t, Uninstall(m.pinDir))
	if ids := m.attached(m.c, m.two); len(ids) != 0 {
		t.Errorf("programs %v are left", ids)
	}
	if _, err := os.Stat(m.pinDir); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", m.pinDir, err)
	}
}

// Both ends of a path with a smaller MTU than the pod's: the error of the node
// between must reach the tenant, who sent the packets as the pod.
func TestPathMTU(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	setMTU(t, "bhtremote", 1400)
	eachFamily(t, func(t *testing.T, family int) {
		c, _, err := dial(t, m.one.namespace, at(m.a.of(family), 0), at(remoteAddresses.of(family), 80))
		check(t, err)
		if err := echo(c, 200_000); err != nil {
			t.Error(err)
		}
	})
}

func size(t *testing.T, m *ebpf.Map) (n int) {
	t.Helper()
	var last any
	for {
		key := make([]byte, m.KeySize())
		err := m.NextKey(last, key)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return n
		}
		check(t, err)
		last = key
		n++
	}
}

func TestValidation(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	for _, p := range []steer.Pod{
		{UID: "../x", Tenant: 1, Ifindex: 1, IPs: ips, MAC: mac},
		{UID: "", Tenant: 1, Ifindex: 1, IPs: ips, MAC: mac},
		{UID: fmt.Sprintf("%041d", 0), Tenant: 1, Ifindex: 1, IPs: ips, MAC: mac},
		{UID: "x", Tenant: 0, Ifindex: 1, IPs: ips, MAC: mac},
		{UID: "x", Tenant: 4096, Ifindex: 1, IPs: ips, MAC: mac},
		{UID: "x", Tenant: 1, IPs: ips, MAC: mac},
		{UID: "x", Tenant: 1, Ifindex: 1, MAC: mac},
		{UID: "x", Tenant: 1, Ifindex: 1, IPs: ips},
	} {
		if p.Validate() == nil {
			t.Errorf("%+v is accepted", p)
		}
	}
	if p := (steer.Pod{UID: "3a6c1c9e-0d0b-4e4e-8a1f-0f6b4d3c2b1a", Tenant: steer.MaxTenantIndex, Ifindex: 1, IPs: ips, MAC: mac}); p.Validate() != nil {
		t.Errorf("%+v: %v", p, p.Validate())
	}
	for _, ip := range []string{"0.0.0.0", "fe80::1%eth0"} {
		if _, err := addrKey(netip.MustParseAddr(ip)); err == nil {
			t.Errorf("%s is accepted", ip)
		}
	}
}

// Which generation gets a connection depends on a secret that stays for the next
// agent and is another one on each node.
func TestHashKey(t *testing.T) {
	m := newMesh(t)
	key := func(d *Datapath) (s datapathSettings) {
		t.Helper()
		check(t, d.maps[datapathMapConfig].Lookup(uint32(0), &s))
		return s
	}
	first := key(m.d)
	if first.HashKey == [2]uint32{} {
		t.Fatal("there is no secret")
	}
	for _, by := range []string{"the same version", "another"} {
		check(t, m.d.Close())
		if by == "another" {
			m.repin(datapathMapConfig, func(s *ebpf.MapSpec) { restruct(s, backwards) })
		}
		m.d = m.open()
		if again := key(m.d); again.HashKey != first.HashKey {
			t.Errorf("secret %x, after a start of %s %x", first.HashKey, by, again.HashKey)
		}
	}
	elsewhere := filepath.Join(filepath.Dir(m.pinDir), "other")
	other, err := Open(Options{PinDir: elsewhere})
	check(t, err)
	t.Cleanup(func() {
		other.Close()
		check(t, Uninstall(elsewhere))
	})
	if key(other).HashKey == first.HashKey {
		t.Error("two nodes have one secret")
	}
	// The same connections are spread otherwise by another secret.
	canary := startProxy(t, m.one.namespace, "canary")
	check(t, m.d.SetListeners(1, 1, canary.pid))
	check(t, m.d.SetWeight(1, 50))
	spread := func(s datapathSettings) (got string) {
		t.Helper()
		check(t, m.d.maps[datapathMapConfig].Put(uint32(0), s))
		for i := range 40 {
			c, greeting, err := dial(t, m.a.namespace, at(m.a.of(4), uint16(20000+i)), at(remoteAddresses.of(4), 80))
			check(t, err)
			check(t, c.(*net.TCPConn).SetLinger(0)) // its port is used again
			c.Close()
			got += greeting[len(greeting)-1:]
		}
		return got
	}
	second := first
	second.HashKey[1] ^= 1
	one := spread(first)
	for i := range 2 {
		second.HashKey[0] += uint32(i)
		if spread(second) == one {
			t.Errorf("%s by either secret", one)
		}
	}
}
