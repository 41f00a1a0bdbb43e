package isolation

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Each limit that a tenant meets is counted, as the kernel does, and for nobody else.
func TestHits(t *testing.T) {
	n := newNode(t)
	n.useStandin(map[int]string{1: "flood", 2: "leak"}, standinTargets{})
	m := n.open()
	if err := m.Update(t.Context(), Spec{Tenant: tenantB, Limits: Limits{CPUMillis: 1900}, Generations: []Generation{{3, standinVersion}}}); err != nil {
		t.Fatal(err)
	}
	l := Limits{CPUMillis: 300, MemoryMax: 64 << 20}
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: l, Generations: []Generation{{1, standinVersion}, {2, standinVersion}}}); err != nil {
		t.Fatal(err)
	}
	hits := func(enough func(Hits) bool) (h Hits) {
		t.Helper()
		n.await(m, tenantA, "doesn't meet its limits", func(State) bool {
			var err error
			if h, err = m.Hits(tenantA); err != nil {
				t.Fatal(err)
			}
			return enough(h)
		})
		return h
	}
	begin := time.Now()
	h := hits(func(h Hits) bool { return h.Throttled > 3 && h.OOMKills > 0 })
	if h.ThrottledFor == 0 || h.ThrottledFor > 8*time.Since(begin) || h.Pids != 0 || h.Since.IsZero() {
		t.Errorf("hits %+v", h)
	}
	if h, err := m.Hits(tenantB); err != nil || h.Throttled+h.OOMKills+h.Pids > 0 {
		t.Errorf("hits of the neighbour %+v, %v", h, err)
	}
	// Its next process has more threads than one.
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: Limits{Pids: 1}, Generations: []Generation{{1, standinVersion}}}); err != nil {
		t.Log(err) // the process may not get far
	}
	if s, _ := m.State(tenantA); s.Processes[0].PID != 0 {
		unix.Kill(s.Processes[0].PID, unix.SIGKILL)
	}
	hits(func(h Hits) bool { return h.Pids > 0 })
}
