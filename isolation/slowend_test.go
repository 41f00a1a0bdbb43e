package isolation

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// hold keeps a tenant's processes from ending, even if they are killed, until the end of
// the test or until they are let go.
func (n *node) hold(m *Manager, name model.Tenant) (letGo func()) {
	n.t.Helper()
	for _, dir := range m.cgroups.dirs(name.FileName()) {
		state := filepath.Join(dir, "freezer.state")
		if _, err := os.Stat(state); err != nil {
			continue
		}
		if err := writeFile(state, "FROZEN"); err != nil {
			n.t.Fatal(err)
		}
		letGo = func() { writeFile(state, "THAWED") }
		n.t.Cleanup(letGo) // before the manager is closed
		return letGo
	}
	n.t.Skip("there is no freezer of cgroup version 1: version 2's lets go of who is killed")
	return nil
}

// holdsNobodyUp fails if f takes as long as tenants can have it take.
func (n *node) holdsNobodyUp(what string, f func() error) {
	n.t.Helper()
	begin := time.Now()
	if err := f(); err != nil {
		n.t.Errorf("%s: %v", what, err)
	}
	if took := time.Since(begin); took > termGrace/2 {
		n.t.Errorf("%s took %s", what, took)
	}
}

// A process that isn't wanted any more, and that doesn't end, holds up nobody who doesn't
// ask to wait for it. What is wanted in its place begins when it has ended.
func TestSlowEndHoldsNobodyUp(t *testing.T) {
	n := newNode(t)
	n.useStandin(nil, standinTargets{})
	m := n.open()
	n.serveXDS(m, tenantA, 1, nil)
	update := func(generations ...Generation) func() error {
		return func() error {
			return m.Update(t.Context(), Spec{Tenant: tenantA, Generations: generations, Unawaited: true})
		}
	}
	wanted := Generation{1, standinVersion}
	if err := update(wanted)(); err != nil {
		t.Fatal(err)
	}
	first := n.waitLive(m, tenantA, 0)
	letGo := n.hold(m, tenantA)
	n.holdsNobodyUp("an update without it", update())
	leaves := func(s State) bool {
		return len(s.Processes) == 1 && s.Processes[0].PID == first.PID && !s.Processes[0].DrainUntil.IsZero() && s.Processes[0].DrainUntil.Before(time.Now())
	}
	if s, _ := m.State(tenantA); !leaves(s) {
		t.Errorf("while it ends there are %+v", s.Processes)
	}
	n.holdsNobodyUp("an update with another in its place", update(wanted))
	if s, _ := m.State(tenantA); !leaves(s) {
		t.Errorf("while another one waits there are %+v", s.Processes)
	}
	letGo()
	n.await(m, tenantA, "isn't without it", func(s State) bool { return len(s.Processes) == 0 })
	if err := update(wanted)(); err != nil {
		t.Fatal(err)
	}
	if second := n.waitLive(m, tenantA, first.PID); second.Restarts != 0 || !second.DrainUntil.IsZero() {
		t.Errorf("in its place there is %+v", second)
	}
}

// A tenant whose processes don't end holds up nobody: neither who ends it, nor who wants it
// again, nor the other tenants.
func TestSlowTenantEndHoldsNobodyUp(t *testing.T) {
	n := newNode(t)
	n.useStandin(nil, standinTargets{})
	m := n.open()
	spec := Spec{Tenant: tenantA, Generations: []Generation{{1, standinVersion}}, Unawaited: true}
	n.serveXDS(m, tenantA, 1, nil)
	if err := m.Update(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	first := n.waitLive(m, tenantA, 0)
	letGo := n.hold(m, tenantA)
	ends := func() error {
		if ended, err := m.End(tenantA, nil); ended || !errors.Is(err, ErrEnding) {
			t.Errorf("it has ended: %v, %v", ended, err)
		}
		return nil
	}
	n.holdsNobodyUp("the end", ends)
	n.holdsNobodyUp("the end, again", ends)
	n.holdsNobodyUp("what wants it again", func() error {
		if _, err := m.Prepare(t.Context(), tenantA, 1400); !errors.Is(err, ErrEnding) {
			t.Errorf("it is prepared while it ends: %v", err)
		}
		return nil
	})
	n.holdsNobodyUp("another tenant's start", func() error {
		return m.Update(t.Context(), Spec{Tenant: tenantB, Generations: []Generation{{1, standinVersion}}, Unawaited: true})
	})
	n.holdsNobodyUp("limits of all", func() error { return m.LimitAll(Limits{CPUMillis: 1500}) })
	letGo()
	n.await(m, tenantA, "can't begin again", func(State) bool {
		_, err := m.Prepare(t.Context(), tenantA, 1400)
		return err == nil
	})
	if startTicksOf(first.PID) == first.StartTicks {
		t.Error("its process is left")
	}
	n.serveXDS(m, tenantA, 1, nil)
	if err := m.Update(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	second := n.waitLive(m, tenantA, first.PID)
	// Nobody has asked what came of the end, and it isn't so any more.
	if deleted, err := n.deleteAtRest(m, tenantA, func() (bool, error) { return false, nil }); deleted || err != nil {
		t.Errorf("it ended: %v, %v", deleted, err)
	}
	if now := n.waitLive(m, tenantA, 0); now.PID != second.PID {
		t.Errorf("process %d, was %d", now.PID, second.PID)
	}
	if deleted, err := n.deleteAtRest(m, tenantA, nil); !deleted || err != nil {
		t.Errorf("it hasn't ended: %v, %v", deleted, err)
	}
}

// A proxy that doesn't answer holds up nobody who has it take its leave, and once it does
// it hears what was said last.
func TestSlowLeaveHoldsNobodyUp(t *testing.T) {
	n := newNode(t)
	m := n.open()
	p := n.run(m, tenantA, Limits{})
	if err := m.Kill(p.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for _, leaving := range []bool{true, false, true} {
		n.holdsNobodyUp("its leave", func() error { m.SetLeaving(tenantA, leaving); return nil })
	}
	if err := m.Kill(p.PID, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	// Envoy isn't live while it takes its leave.
	n.await(m, tenantA, "doesn't take its leave", func(s State) bool {
		_, err := adminGet(t.Context(), s.Netns, 1, "/ready", 64)
		return err != nil && strings.Contains(err.Error(), "DRAINING")
	})
	m.SetLeaving(tenantA, true)
	m.SetLeaving(tenantA, false)
	n.await(m, tenantA, "doesn't stay", func(s State) bool { return ready(t.Context(), s.Netns, 1) })
}
