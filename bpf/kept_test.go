package bpf

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// showing is as many connections of a pod as it likes to show.
func showing(p *testPod, n int) model.FlowReader {
	return func(uint16) (shown []model.Flow, err error) {
		for i := range n {
			shown = append(shown, model.Flow{Pod: at(p.v4, uint16(1+i%60000)), Peer: at(remoteAddresses.v4, uint16(1+i/60000)), Side: model.WireSide})
		}
		return shown, nil
	}
}

// keptOfPod counts what is written down of a pod.
func (m *mesh) keptOfPod(p *testPod) (n int) {
	m.t.Helper()
	key, err := addrKey(p.v4)
	check(m.t, err)
	check(m.t, m.d.eachFlow(func(f datapathFlow, _ datapathFlowState) {
		if f.Pod == key {
			n++
		}
	}))
	return n
}

func (m *mesh) wantKept(when string, p *testPod, want int) {
	m.t.Helper()
	if n := m.keptOfPod(p); n != want {
		m.t.Errorf("%s: %d connections of pod %s are written down, want %d", when, n, p.UID, want)
	}
}

// However many pods of a tenant join with however many connections, others' join with
// theirs, and dial in the clear.
func TestJoinsOfATenantAreBounded(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	joins := func(uid string, tenant uint16, last byte) *testPod {
		return m.pod(uid, tenant, pair{netip.AddrFrom4([4]byte{10, 77, 0, last}), netip.AddrFrom16([16]byte{0xfd, 0x77, 15: last})}, false)
	}
	d, e, f, g := joins("d", 1, 40), joins("e", 1, 41), joins("f", 1, 42), joins("g", 1, 43)
	other, more := joins("o", 2, 44), joins("p", 2, 45)

	check(t, m.d.MovePod(d.Pod, showing(d, 40_000)))
	check(t, m.d.MovePod(e.Pod, showing(e, 40_000)))
	m.wantKept("joined", d, 40_000)
	m.wantKept("joined second", e, model.MaxKept-40_000)
	wantCut := func(when string, tenant uint16, want uint64) {
		t.Helper()
		if n := m.counters(tenant).Cut; n != want {
			t.Errorf("%s: %d connections of tenant %d are counted as cut, want %d", when, n, tenant, want)
		}
	}
	wantCut("joined", 1, 2*40_000-model.MaxKept)
	// What is written down counts for the next agent, and after each sweep.
	check(t, m.d.Close())
	m.d = m.open()
	check(t, m.d.MovePod(f.Pod, showing(f, 70_000)))
	m.wantKept("adopted", f, 0)
	check(t, m.d.SweepFlows(time.Hour))
	// Of one that leaves, too, until it is let go.
	check(t, m.d.ReleasePod("d", func(uint16) ([]model.Flow, error) { return nil, nil }))
	check(t, m.d.MovePod(g.Pod, showing(g, 70_000)))
	m.wantKept("swept", g, 0)
	wantCut("adopted", 1, 140_000)

	check(t, m.d.MovePod(other.Pod, showing(other, 60_000)))
	m.wantKept("of another tenant", other, 60_000)
	wantCut("of another tenant", 2, 0)
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 80}}))
	m.greets("while a tenant has what it may", m.b.namespace, at(remoteAddresses.v4, 80), "app 10.77.0.3")
	check(t, m.d.SetExclusions(nil))

	// Room is there again when they are gone.
	check(t, m.d.DeletePod("d"))
	check(t, m.d.SweepFlows(time.Hour))
	check(t, m.d.DeletePod("f"))
	check(t, m.d.MovePod(f.Pod, showing(f, 100)))
	m.wantKept("released", f, 100)

	// A pod that stays halfway is its tenant's, too, and loses nothing that it had kept.
	calls, broken := 0, errors.New("broken")
	err := m.d.MovePod(more.Pod, func(from uint16) ([]model.Flow, error) {
		if calls++; calls == 2 {
			return nil, broken
		}
		return showing(more, 70_000)(from)
	})
	if !errors.Is(err, broken) {
		t.Fatalf("%v, want %v", err, broken)
	}
	left := model.MaxKept - 60_000 - m.keptOfPod(m.b) // which has dialled in the clear
	m.wantKept("halfway", more, left)
	last := joins("q", 2, 46)
	check(t, m.d.MovePod(last.Pod, showing(last, 10)))
	m.wantKept("behind one that is halfway", last, 0)
	check(t, m.d.Close())
	m.d = m.open()
	check(t, m.d.MovePod(more.Pod, showing(more, 70_000)))
	m.wantKept("all the way", more, left)
}

// What a pod brings that has left one tenant and can't join another yet is the other's.
func TestBroughtFromAFormerTenant(t *testing.T) {
	const room = 5
	m := newMesh(t)
	check(t, m.d.ReleasePod("a", nil))
	m.a.Tenant = 2
	flows := m.d.maps[datapathMapFlows]
	small, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: flows.KeySize(), ValueSize: flows.ValueSize(), MaxEntries: room})
	check(t, err)
	defer small.Close()
	m.d.maps[datapathMapFlows] = small
	err = m.d.MovePod(m.a.Pod, showing(m.a, room+1))
	m.d.maps[datapathMapFlows] = flows
	if err == nil {
		t.Fatal("there is room for all")
	}
	for tenant, want := range map[uint16]int{1: 0, 2: room} {
		if n, err := m.d.keptOf(tenant); n != want || err != nil {
			t.Errorf("tenant %d is charged with %d connections, %v, want %d", tenant, n, err, want)
		}
	}
}
