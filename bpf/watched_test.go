package bpf

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// watchedOf opens the map of a tenant's watched connections.
func (m *mesh) watchedOf(index uint16) *ebpf.Map {
	m.t.Helper()
	var id uint32
	check(m.t, m.d.maps[datapathMapWatched].Lookup(uint32(index), &id))
	flows, err := ebpf.NewMapFromID(ebpf.MapID(id))
	check(m.t, err)
	m.t.Cleanup(func() { flows.Close() })
	return flows
}

func mapID(t *testing.T, m *ebpf.Map) ebpf.MapID {
	t.Helper()
	info, err := m.Info()
	check(t, err)
	id, _ := info.ID()
	return id
}

// A tenant's connections push out none of another's, and are watched on by the next
// agent. Nothing of either is left when they aren't watched any more.
func TestWatchedRoom(t *testing.T) {
	m := newMesh(t)
	both := []*testTenant{m.one, m.two}
	update := func(watch bool) {
		t.Helper()
		for _, n := range both {
			n.Watch = watch
			check(t, m.d.UpdateTenant(n.Tenant))
		}
	}
	update(true)
	open := func(p *testPod) net.Conn {
		t.Helper()
		c, _, err := dial(t, p.namespace, netip.AddrPort{}, at(remoteAddresses.v4, brokenPort))
		check(t, err)
		return c
	}
	of1, of2 := m.watchedOf(1), m.watchedOf(2)
	first, second := []net.Conn{open(m.a)}, []net.Conn{open(m.b), open(m.b)}
	if a, b := size(t, of1), size(t, of2); a != 1 || b != 2 {
		t.Fatalf("%d and %d connections are watched, want 1 and 2", a, b)
	}
	most := int(of2.MaxEntries())
	for i := range 4 * most {
		f := datapathFlow{PodPort: uint16(i >> 16), PeerPort: uint16(i)}
		check(t, of2.Put(f, make([]byte, of2.ValueSize())))
	}
	if n := size(t, of2); n == 0 || n > most {
		t.Errorf("%d connections of tenant 2 are watched, want at most %d", n, most)
	}
	if n := size(t, of1); n != 1 {
		t.Errorf("%d connections of tenant 1 are watched, want still 1", n)
	}
	check(t, m.d.Close())
	m.d = m.open()
	update(true)
	if again := m.watchedOf(1); mapID(t, again) != mapID(t, of1) {
		t.Errorf("the next agent watches anew: in map %d, before %d", mapID(t, again), mapID(t, of1))
	}
	second = append(second, open(m.b))
	for _, c := range append(first, second...) {
		c.SetDeadline(time.Now().Add(patience))
		fmt.Fprintln(c, "on")
		io.Copy(io.Discard, c)
	}
	for index, want := range map[uint16]uint64{1: 1, 2: 3} {
		all, _, err := m.d.GenerationCounters(index)
		check(t, err)
		// Of tenant 2's first, the others may have pushed out any.
		if all[0].Connections != want || all[0].Resets == 0 || all[0].Resets > want || all[0].Unanswered != 0 {
			t.Errorf("of %d connections of tenant %d that were reset there are %+v", want, index, all[0])
		}
	}

	left := func(when string, want int) {
		t.Helper()
		for name, each := range map[string]int{datapathMapWatched: 1, datapathMapPerGeneration: steer.Generations} {
			if n := size(t, m.d.maps[name]); n != want*each {
				t.Errorf("%s %d entries are left in %s, want %d", when, n, name, want*each)
			}
		}
	}
	left("of two tenants", 2)
	// What was said of its veth is lost, as when it got another one.
	check(t, m.d.deleteVeth(uint32(m.one.HostIfindex)))
	update(false)
	left("of none", 0)
	update(true)
	if n := size(t, m.watchedOf(1)); n != 0 {
		t.Errorf("%d connections of before are watched", n)
	}
	check(t, m.d.DeleteTenant(2))
	left("of one that isn't deleted", 1)
}

// Room grows with the CPUs, each of which may keep some for itself.
func TestWatchedPerCPU(t *testing.T) {
	spec, err := loadDatapath()
	check(t, err)
	for cpus, want := range map[int]uint32{1: 2048, 8: 2048, 9: 2304, 256: 65536} {
		if got := watchedSpec(spec.Maps[datapathMapWatched].InnerMap, cpus).MaxEntries; got != want {
			t.Errorf("with %d CPUs there is room for %d connections, want %d", cpus, got, want)
		}
	}
}

// What a former agent watched in another map than this build's, which the kernel would
// take as well, is forgotten, once.
func TestWatchedIsReplaced(t *testing.T) {
	m := newMesh(t)
	m.one.Watch = true
	check(t, m.d.UpdateTenant(m.one.Tenant))
	wanted := watchedSpec(m.d.spec.Maps[datapathMapWatched].InnerMap, ebpf.MustPossibleCPU())
	for _, c := range []struct {
		name   string
		change func(*ebpf.MapSpec)
	}{
		{"of another size", func(s *ebpf.MapSpec) { s.MaxEntries /= 2 }},
		{"with another field", func(s *ebpf.MapSpec) {
			value := *s.Value.(*btf.Struct)
			value.Members = slices.Clone(value.Members)
			value.Members[slices.IndexFunc(value.Members, func(m btf.Member) bool { return m.Name == "closing" })].Name = "other"
			s.Value = &value
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := wanted.Copy()
			c.change(spec)
			former, err := ebpf.NewMap(spec)
			check(t, err)
			defer former.Close()
			check(t, m.d.maps[datapathMapWatched].Put(uint32(1), former))
			check(t, m.d.UpdateTenant(m.one.Tenant))
			now := m.watchedOf(1)
			if err := errors.Join(wanted.Compatible(now), sameFields(now, wanted)); err != nil || mapID(t, now) == mapID(t, former) {
				t.Errorf("it has map %d, %v; before %d", mapID(t, now), err, mapID(t, former))
			}
			check(t, m.d.UpdateTenant(m.one.Tenant))
			if again := m.watchedOf(1); mapID(t, again) != mapID(t, now) {
				t.Errorf("it has map %d, before %d", mapID(t, again), mapID(t, now))
			}
			m.greets("replaced", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
			if n := size(t, now); n != 1 {
				t.Errorf("%d connections are watched, want 1", n)
			}
		})
	}
}
