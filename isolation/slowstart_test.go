package isolation

import (
	"testing"
	"time"
)

// What a tenant makes of a start, or of the end of one, holds up nobody who doesn't ask
// to wait for it: its limits can have it take as long as it may.
func TestSlowStartHoldsNobodyUp(t *testing.T) {
	n := newNode(t)
	n.useStandin(nil, standinTargets{})
	m := n.open()
	m.versions.digest = treeDigest
	m.o.Launcher = []string{"/bin/sleep", "300"} // it never becomes anything
	soon := func(what string, f func() error) {
		t.Helper()
		begin := time.Now()
		if err := f(); err != nil {
			t.Error(err)
		}
		if took := time.Since(begin); took > startTimeout/2 {
			t.Errorf("%s took %s", what, took)
		}
	}
	soon("an update", func() error {
		return m.Update(t.Context(), Spec{Tenant: tenantA, Generations: []Generation{{0, standinVersion}}, Unawaited: true})
	})
	s := n.await(m, tenantA, "isn't being started", func(s State) bool { return len(s.Processes) == 1 && s.Processes[0].PID != 0 })
	soon("its end", func() error { return m.Delete(t.Context(), tenantA) })
	if startTicksOf(s.Processes[0].PID) == s.Processes[0].StartTicks {
		t.Error("what was being started is left")
	}
}

// startTicksOf a process, 0 if there is none.
func startTicksOf(pid int) uint64 {
	ticks, err := startTicks(pid)
	if err != nil {
		return 0
	}
	return ticks
}
