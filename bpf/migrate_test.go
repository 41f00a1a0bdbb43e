package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// repin puts a map of another layout in the place of a pinned one, as a former
// version might have left it: change gets a copy of this build's.
func (m *mesh) repin(name string, change func(spec *ebpf.MapSpec)) {
	t := m.t
	t.Helper()
	path := filepath.Join(m.pinDir, "maps", name)
	now, err := ebpf.LoadPinnedMap(path, nil)
	check(t, err)
	defer now.Close()
	spec := m.d.spec.Maps[name].Copy()
	change(spec)
	former, err := ebpf.NewMap(spec)
	check(t, err)
	defer former.Close()
	convert := func(b []byte) []byte { return b }
	if spec.Value != m.d.spec.Maps[name].Value {
		convert, err = conversion(now, spec)
		check(t, err)
	}
	switch {
	case now.KeySize() == former.KeySize():
		check(t, copyEntries(former, now, convert, nil))
	case now.KeySize() > former.KeySize(): // without the last field
		check(t, copyEntries(former, now, convert, func(key, _ []byte) [][]byte { return [][]byte{key[:former.KeySize()]} }))
	}
	check(t, os.Remove(path))
	check(t, former.Pin(path))
}

// restruct changes the value's fields; each is put where there is room.
func restruct(spec *ebpf.MapSpec, change func([]btf.Member) []btf.Member) {
	s := spec.Value.(*btf.Struct)
	other := &btf.Struct{Name: s.Name, Members: change(slices.Clone(s.Members))}
	for i := range other.Members {
		other.Members[i].Offset = btf.Bits(other.Size * 8)
		n, _ := btf.Sizeof(other.Members[i].Type)
		other.Size += uint32(n+3) &^ 3
	}
	spec.Value, spec.ValueSize = other, other.Size
}

func without(name string) func([]btf.Member) []btf.Member {
	return func(all []btf.Member) []btf.Member {
		return slices.DeleteFunc(all, func(m btf.Member) bool { return m.Name == name })
	}
}

func backwards(all []btf.Member) []btf.Member {
	slices.Reverse(all)
	return all
}

func TestMigrate(t *testing.T) {
	for _, c := range []struct {
		name, maps string
		change     func(*ebpf.MapSpec)
	}{
		{"fields added", "pods veths per_pod", func(s *ebpf.MapSpec) {
			restruct(s, without(map[string]string{"pods": "bypass", "veths": "learned", "per_pod": "direct_due"}[s.Name]))
		}},
		{"fields added to a struct in it", "per_pod counters", func(s *ebpf.MapSpec) {
			restruct(s, func(all []btf.Member) []btf.Member {
				for i := range all {
					if d, ok := all[i].Type.(*btf.Struct); ok { // the drops
						all[i].Type = &btf.Struct{Name: d.Name, Size: d.Size - 8, Members: d.Members[:len(d.Members)-1]}
					}
				}
				return all
			})
		}},
		{"fields moved", "pods tenants veths flows per_pod counters", func(s *ebpf.MapSpec) { restruct(s, backwards) }},
		{"other sizes", "pods tenants veths flows node_addresses exclusions per_pod counters", func(s *ebpf.MapSpec) { s.MaxEntries /= 2 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMesh(t)
			serve(t, m.remote, 80)
			serve(t, m.remote, 81)
			check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 81}}))
			check(t, m.d.SetWeight(1, 30))
			held := m.holdAllOutbound(m.a, "proxy1")
			m.a.Tenant = 2
			check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
			m.hold(&held, "excluded", m.c.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 81), "app 10.77.1.4")
			// What each CPU has counted, of a veth that nobody uses.
			const unused = uint32(1 << 20)
			counted := make([]datapathPodCounters, ebpf.MustPossibleCPU())
			for i := range counted {
				counted[i].BytesSent, counted[i].Dropped.TooFast = uint64(i+1), uint64(i+1)<<32
			}
			check(t, m.d.maps[datapathMapPerPod].Put(unused, counted))
			steered := m.counters(1).Steered
			check(t, m.d.Close())
			for _, name := range strings.Fields(c.maps) {
				m.repin(name, c.change)
			}
			// As one leaves that is killed on the way.
			half := constant(t, ebpf.SchedCLS, 2)
			check(t, half.Pin(filepath.Join(m.pinDir, "maps", "pods_next")))
			var said string
			if m.d, said = m.openLogged(); strings.Contains(said, "made anew") {
				t.Errorf("not all is carried over: %s", said)
			}
			for _, name := range strings.Fields(c.maps) {
				if err := m.d.spec.Maps[name].Compatible(m.d.maps[name]); err != nil {
					t.Errorf("map %s: %v", name, err)
				}
				if _, err := os.Stat(filepath.Join(m.pinDir, "maps", name+"_next")); !os.IsNotExist(err) {
					t.Errorf("map %s: something is left", name)
				}
			}
			var carried []datapathPodCounters
			check(t, m.d.maps[datapathMapPerPod].Lookup(unused, &carried))
			if !slices.Equal(carried, counted) {
				t.Errorf("of counters %+v there are %+v", counted, carried)
			}
			if now := m.counters(1).Steered; now != steered {
				t.Errorf("%d connections are counted, before %d", now, steered)
			}
			// Nothing is set again: all was carried over.
			goOn(t, "migrated", held)
			m.greets("migrated", m.a.namespace, at(remoteAddresses.v4, 80), "proxy2")
			m.greets("migrated", m.c.namespace, at(remoteAddresses.v6, 80), "proxy1")
			m.greets("migrated", m.c.namespace, at(remoteAddresses.v6, 81), "app fd77:1::4")
			if pods, err := m.d.Pods(); err != nil || !slices.Equal(pods, []string{"a", "b", "c"}) {
				t.Errorf("pods %v, %v", pods, err)
			}
			if entry, err := m.d.tenant(1); err != nil || entry.Canary != 30 {
				t.Errorf("tenant 1: %+v, %v", entry, err)
			}
		})
	}
}

// withoutSides makes the map of flows that of a version without them.
func withoutSides(s *ebpf.MapSpec) {
	key := *s.Key.(*btf.Struct)
	key.Members = without("side")(slices.Clone(key.Members))
	key.Size -= 4
	s.Key, s.KeySize = &key, key.Size
}

// A former version didn't tell the two sides of a tenant apart: what stays at one goes on,
// and what is in the clear does, wherever each was written down.
func TestMigrateSides(t *testing.T) {
	m := newMesh(t)
	m.serveBothWays()
	held := m.holdAll(m.a, m.one, "proxy1")
	m.a.Tenant = 2
	check(t, m.d.MovePod(m.a.Pod, func(from uint16) ([]model.Flow, error) {
		flows, err := m.reader(m.a)(from)
		// While they are read, the programs write down what opens.
		held = append(held, m.holdAll(m.a, m.one, "proxy1")...)
		return flows, err
	}))
	m.hold(&held, "by the former tenant", m.one.namespace, at(m.a.v4, 0), at(remoteAddresses.v4, 80), "app "+m.a.v4.String())
	m.hold(&held, "in the clear", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 81), "app "+m.a.v4.String())
	m.hold(&held, "to the pod in the clear", m.remote, netip.AddrPort{}, at(m.a.v6, 8082), "app "+remoteAddresses.v6.String())
	check(t, m.d.Close())
	m.repin("flows", withoutSides)
	var said string
	if m.d, said = m.openLogged(); strings.Contains(said, "flows") && strings.Contains(said, "made anew") {
		t.Errorf("not all is carried over: %s", said)
	}
	goOn(t, "migrated", held)
	m.greets("migrated", m.a.namespace, at(remoteAddresses.v4, 80), "proxy2")
	m.greets("migrated", m.a.namespace, at(remoteAddresses.v4, 81), "app "+m.a.v4.String())
	check(t, m.d.Close())
	if m.d, said = m.openLogged(); said != "" {
		t.Errorf("the next agent says: %s", said)
	}
}

func TestSidesOfFormerVersions(t *testing.T) {
	const pod, wire = datapathSideSIDE_POD, datapathSideSIDE_WIRE
	other, tunnel := datapathFlow{PodPort: 40000, PeerPort: 80}, datapathFlow{PodPort: 40000, PeerPort: hbonePort}
	for _, c := range []struct {
		name     string
		flow     datapathFlow
		state    datapathFlowState
		knowsLed bool
		want     []datapathSide
	}{
		{"in the clear", other, datapathFlowState{Learned: 1, Led: 1, Outbound: 1}, true, []datapathSide{wire}},
		{"dialled by the pod", other, datapathFlowState{Tenant: 1, Learned: 1, Led: 1, Outbound: 1}, true, []datapathSide{pod}},
		{"dialled by its peer", other, datapathFlowState{Tenant: 1, Learned: 1, Led: 1}, true, []datapathSide{wire}},
		{"opened as the pod", other, datapathFlowState{Tenant: 1, Learned: 1, Outbound: 1}, true, []datapathSide{wire}},
		{"opened to the pod", other, datapathFlowState{Tenant: 1, Learned: 1}, true, []datapathSide{pod}},
		{"written by the agent", other, datapathFlowState{Tenant: 1}, true, []datapathSide{wire, pod}},
		{"of a version that didn't know who led it", other, datapathFlowState{Tenant: 1, Learned: 1, Outbound: 1}, false, []datapathSide{wire, pod}},
		{"a tunnel", tunnel, datapathFlowState{Tenant: 1}, true, []datapathSide{wire}},
		{"the far end of a tunnel", datapathFlow{PodPort: hbonePort, PeerPort: 40000}, datapathFlowState{Tenant: 1, Learned: 1}, true, []datapathSide{wire}},
		{"dialled from the tunnels' port", datapathFlow{PodPort: hbonePort, PeerPort: 80}, datapathFlowState{Tenant: 1, Learned: 1, Led: 1, Outbound: 1}, true, []datapathSide{pod}},
	} {
		if got := sidesOf(c.flow, c.state, c.knowsLed); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// What can't be carried over is closed, never misread.
func TestMigrateRefused(t *testing.T) {
	for _, c := range []struct {
		name, of string
		change   func(*ebpf.MapSpec)
	}{
		{"a field of another type", "pods", func(s *ebpf.MapSpec) {
			restruct(s, func(all []btf.Member) []btf.Member {
				all[0].Type = &btf.Int{Name: "unsigned short", Size: 2}
				return all
			})
		}},
		{"keys of other fields", "pods", func(s *ebpf.MapSpec) {
			s.Key = &btf.Struct{Name: "addr", Size: 16, Members: []btf.Member{{Name: "words", Type: s.Key.(*btf.Struct).Members[0].Type}}}
		}},
		{"without types", "pods", func(s *ebpf.MapSpec) { s.Key, s.Value, s.ValueSize = nil, nil, s.ValueSize+4 }},
		{"another kind of map", "tenants", func(s *ebpf.MapSpec) { s.Type = ebpf.LRUHash }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMesh(t)
			serve(t, m.remote, 80)
			spec := m.d.spec.Maps[c.of].Copy()
			c.change(spec)
			former, err := ebpf.NewMap(spec)
			check(t, err)
			defer former.Close()
			filled := make([]byte, spec.ValueSize)
			check(t, copyEntries(former, m.d.maps[c.of], func([]byte) []byte { return filled }, nil))
			if size(t, former) == 0 {
				t.Fatal("no entries")
			}
			check(t, m.d.Close())
			path := filepath.Join(m.pinDir, "maps", c.of)
			check(t, os.Remove(path))
			check(t, former.Pin(path))
			var said string
			if m.d, said = m.openLogged(); !strings.Contains(said, "TCP of the node's mesh pods is dropped") {
				t.Errorf("nobody is told: %s", said)
			}
			if n := size(t, m.d.maps[c.of]); n != 0 {
				t.Errorf("%d entries were carried over", n)
			}
			dropped := func() uint64 { p := m.counters(1).Dropped; return p.Spoofed + p.NoTenant }
			before := dropped()
			syn(t, m.a.namespace, m.a.v4, at(remoteAddresses.v4, 80), func() bool { return dropped() > before })
			check(t, m.d.UpdateTenant(m.one.Tenant))
			check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
			check(t, m.d.UpdatePod(m.a.Pod))
			m.greets("updated", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
		})
	}
}

// What nothing is steered by may be of another kind: what it held is lost, and connections
// go on. The map of watched connections was one for all tenants, and says nothing of those
// that it takes.
func TestMigrateWatched(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*ebpf.MapSpec)
	}{
		{"connections", func(s *ebpf.MapSpec) { *s = *s.InnerMap }},
		{"maps with other values", func(s *ebpf.MapSpec) { s.InnerMap.Value, s.InnerMap.ValueSize = nil, s.InnerMap.ValueSize+8 }},
		{"maps with other keys", func(s *ebpf.MapSpec) { s.InnerMap.Key, s.InnerMap.KeySize = nil, s.InnerMap.KeySize+4 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMesh(t)
			check(t, m.d.Close())
			spec := m.d.spec.Maps[datapathMapWatched].Copy()
			c.change(spec)
			former, err := ebpf.NewMap(spec)
			check(t, err)
			defer former.Close()
			path := filepath.Join(m.pinDir, "maps", datapathMapWatched)
			check(t, os.Remove(path))
			check(t, former.Pin(path))
			var said string
			if m.d, said = m.openLogged(); !strings.Contains(said, "what it held is lost") || strings.Contains(said, "is dropped") {
				t.Errorf("it says: %s", said)
			}
			m.greets("nothing is set again", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
			m.one.Watch = true
			check(t, m.d.UpdateTenant(m.one.Tenant))
			m.greets("watched", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
			if all, _, err := m.d.GenerationCounters(1); err != nil || all[0].Connections != 1 {
				t.Errorf("counted %+v, %v, want one connection", all[0], err)
			}
			check(t, m.d.Close())
			if m.d, said = m.openLogged(); strings.Contains(said, "made anew") {
				t.Errorf("the next agent says: %s", said)
			}
		})
	}
}

func TestUsage(t *testing.T) {
	m := newMesh(t)
	usage := func() map[string]steer.Usage {
		list, err := m.d.Usage()
		check(t, err)
		all := map[string]steer.Usage{}
		for _, u := range list {
			all[u.Map] = u
		}
		return all
	}
	all := usage()
	for name, want := range map[string][2]int{"pods": {6, 4096}, "tenants": {2, 512}, "veths": {5, 4096}, "per_pod": {5, 4096}, "flows": {0, 262144}, "counters": {3, 513}} {
		if got := all["BPF map "+name]; [2]int{got.Entries, got.Max} != want {
			t.Errorf("%s: %+v, want %v", name, got, want)
		}
	}
	list, err := m.d.Usage()
	check(t, err)
	if err := steer.NearlyFull(list); err != nil {
		t.Errorf("of %+v: %v", list, err)
	}
	pod := func(n int) steer.Pod {
		return steer.Pod{UID: fmt.Sprint("p", n), Tenant: 1, Ifindex: m.a.Ifindex, MAC: m.a.MAC,
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 78, byte(n >> 8), byte(n)})}}
	}
	pods := m.d.maps[datapathMapPods]
	fill := func(n int) {
		for i := size(t, pods); i < n; i++ {
			key, err := addrKey(pod(i).IPs[0])
			check(t, err)
			check(t, pods.Put(key, datapathPod{Tenant: 1, Uid: uidBytes("filler")}))
		}
	}
	fill(3687)
	list, err = m.d.Usage()
	check(t, err)
	err = steer.NearlyFull(list)
	if !errors.Is(err, steer.ErrNearlyFull) || !strings.Contains(err.Error(), "map pods has 3687 of 4096 entries") || strings.Contains(err.Error(), "veths") {
		t.Errorf("of %+v: %v", all["pods"], err)
	}
	fill(4096)
	err = m.d.UpdatePod(pod(5000))
	if err == nil || !strings.Contains(err.Error(), "map pods is full with 4096 entries") {
		t.Errorf("a pod too many: %v", err)
	}
	// What is there goes on.
	check(t, m.d.UpdatePod(m.a.Pod))
	m.greets("full", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
}

// A pod whose connections find no room stays where it is.
func TestFlowsFull(t *testing.T) {
	m := newMesh(t)
	held := m.holdAllOutbound(m.a, "proxy1")
	m.a.Tenant = 2
	flows := m.d.maps[datapathMapFlows]
	small, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: flows.KeySize(), ValueSize: flows.ValueSize(), MaxEntries: 1})
	check(t, err)
	m.d.maps[datapathMapFlows] = small
	err = m.d.MovePod(m.a.Pod, m.reader(m.a))
	if err == nil || !strings.Contains(err.Error(), "map flows is full with 1 entries") {
		t.Errorf("%v", err)
	}
	m.d.maps[datapathMapFlows] = flows
	check(t, small.Close())
	goOn(t, "full", held)
	m.greets("full", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
	check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
	goOn(t, "moved", held)
	m.greets("moved", m.a.namespace, at(remoteAddresses.v4, 80), "proxy2")
	check(t, m.d.SweepFlows(time.Hour))
}

// What the programs of a former version write down while this one's are loaded is carried
// over as well, and what has ended since doesn't come back.
func TestMigrateLate(t *testing.T) {
	m := newMesh(t)
	spec := m.d.spec.Maps[datapathMapFlows]
	check(t, m.d.Close())
	m.repin("flows", withoutSides)
	path := filepath.Join(m.pinDir, "maps", "flows")
	former, err := ebpf.LoadPinnedMap(path, nil)
	check(t, err)
	defer former.Close()
	write := func(port uint16) (now datapathFlow) {
		t.Helper()
		pod, err := addrKey(m.a.v4)
		check(t, err)
		now = datapathFlow{Pod: pod, Peer: pod, PodPort: port, PeerPort: 80, Side: datapathSideSIDE_WIRE}
		key, err := binary.Append(nil, binary.NativeEndian, now)
		check(t, err)
		check(t, former.Put(key[:former.KeySize()], datapathFlowState{Learned: 1, Led: 1, BytesSent: uint64(port)}))
		return now
	}
	d := &Datapath{log: slog.New(slog.DiscardHandler)}
	before := write(1)
	flows, err := d.adoptMap(path, spec)
	check(t, err)
	defer flows.Close()
	check(t, flows.Delete(before)) // it has ended
	after := write(2)
	d.copyLate()
	var s datapathFlowState
	if err := flows.Lookup(after, &s); err != nil || s.BytesSent != 2 {
		t.Errorf("what came later: %+v, %v", s, err)
	}
	check(t, flows.Delete(after))
	last := write(3)
	d.copyLate()
	if err := flows.Lookup(last, &s); err != nil || s.BytesSent != 3 {
		t.Errorf("what came last: %+v, %v", s, err)
	}
	if n := size(t, flows); n != 1 {
		t.Errorf("%d connections, want 1: those that have ended come back", n)
	}
	d.endLate()
}

// How many connections a tenant has is counted on, however often the version changes.
func TestMigrateLoads(t *testing.T) {
	m := newMesh(t)
	m.counting(steer.ConnectionLimits{Concurrent: 100})
	held := m.holdAllOutbound(m.a, "proxy1")
	m.waitConnections(1, 2)
	for i, change := range []func(*ebpf.MapSpec){
		func(s *ebpf.MapSpec) { restruct(s, without("events_due")) },
		func(s *ebpf.MapSpec) { s.MaxEntries /= 2 },
		func(s *ebpf.MapSpec) { restruct(s, backwards) },
	} {
		check(t, m.d.Close())
		m.repin(datapathMapLoads, change)
		var said string
		if m.d, said = m.openLogged(); strings.Contains(said, "made anew") {
			t.Errorf("change %d: not all is carried over: %s", i+1, said)
		}
		if n, err := m.d.Connections(1); n != 2 || err != nil {
			t.Errorf("change %d: %d connections, %v, want 2", i+1, n, err)
		}
		goOn(t, "migrated", held)
	}
	check(t, held[0].Close())
	m.waitConnections(1, 1)
}
