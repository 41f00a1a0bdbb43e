package isolation

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// What bounds all tenants together: they share by their weights, none of them can be
// above it, and what one leaves idle another has.
func TestLimitAll(t *testing.T) {
	n := newNode(t)
	n.useStandin(map[int]string{1: "flood", 2: "flood"}, standinTargets{})
	m := n.open()
	if err := m.LimitAll(Limits{CPUMillis: 5}); err == nil {
		t.Error("5m of a CPU are accepted")
	}
	spec := func(name model.Tenant, weight int64) Spec {
		return Spec{Tenant: name, Limits: Limits{CPUWeight: weight, CPUMillis: 1900}, Generations: []Generation{{1, standinVersion}, {2, standinVersion}}}
	}
	for name, weight := range map[model.Tenant]int64{tenantA: 2000, tenantB: 100} {
		if err := m.Update(t.Context(), spec(name, weight)); err != nil {
			t.Fatal(err)
		}
		n.await(m, name, "doesn't run", func(s State) bool { return len(s.Processes) == 2 && s.Processes[0].PID != 0 && s.Processes[1].PID != 0 })
	}
	cpu := func(name model.Tenant) time.Duration {
		u, err := m.Usage(name)
		if err != nil {
			t.Fatal(err)
		}
		return u.CPU
	}
	// measured is how much each uses in a while.
	measured := func() (a, b time.Duration, share float64) {
		t.Helper()
		begin := time.Now()
		a, b = cpu(tenantA), cpu(tenantB)
		time.Sleep(2 * time.Second) // what is measured is a rate
		a, b = cpu(tenantA)-a, cpu(tenantB)-b
		return a, b, float64(a+b) / float64(time.Since(begin))
	}
	if runtime.NumCPU() <= 2 { // else they needn't share
		if a, b, _ := measured(); a < 2*b {
			t.Errorf("with weights of 20 to 1 they use %s and %s", a, b)
		}
	}
	if err := m.LimitAll(Limits{CPUMillis: 400, MemoryMax: 512 << 20, Pids: 200}); err != nil {
		t.Fatal(err)
	}
	if have, told := m.AllLimits(); have.CPUMillis != 400 || have.MemoryMax != 512<<20 || have.Pids != 200 || len(told) > 0 {
		t.Errorf("limits of all are %+v, unenforced %q", have, told)
	}
	if a, b, share := measured(); share > 0.46 || a == 0 || b == 0 {
		t.Errorf("with 400m together they use %.2f CPUs, %s and %s", share, a, b)
	}
	h, err := m.Hits(tenantA)
	if err != nil || h.Since.IsZero() || time.Since(h.Since) > time.Minute {
		t.Errorf("hits %+v, %v", h, err)
	}
	// Another manager, and a tenant that comes meanwhile.
	m.Close()
	m = n.open()
	if have, _ := m.AllLimits(); have.CPUMillis != 400 {
		t.Errorf("after a restart the limits of all are %+v", have)
	}
	if again, err := m.Hits(tenantA); err != nil || !again.Since.Equal(h.Since) {
		t.Errorf("after a restart hits count since %s, not %s: %v", again.Since, h.Since, err)
	}
	if err := m.Delete(t.Context(), tenantB); err != nil {
		t.Fatal(err)
	}
	n.await(m, tenantA, "doesn't use what all may when it is alone", func(State) bool {
		before, begin := cpu(tenantA), time.Now()
		time.Sleep(time.Second) // what is measured is a rate
		alone := float64(cpu(tenantA)-before) / float64(time.Since(begin))
		t.Logf("alone it uses %.2f CPUs of 0.4", alone)
		return alone >= 0.3
	})
	for _, l := range []Limits{{CPUMillis: 100}, {}} {
		if err := m.LimitAll(l); err != nil {
			t.Fatal(err)
		}
		if err := m.Update(t.Context(), spec(tenantA, 2000)); err != nil {
			t.Errorf("with %+v for all: %v", l, err)
		}
		if have, _ := m.AllLimits(); have.CPUMillis != l.CPUMillis || have.MemoryMax != 0 || have.Pids != 0 {
			t.Errorf("limits of all are %+v, want %+v", have, l)
		}
	}
	// On cgroup version 1 it was held below what all had.
	if s, _ := m.State(tenantA); s.Limits.CPUMillis != 1900 {
		t.Errorf("with no limit for all it has %+v", s.Limits)
	}
	if told := m.cgroups.unenforced(tenantA.FileName(), Limits{CPUMillis: 1 << 20, MemoryMax: 1 << 50}); len(told) != 2 {
		t.Errorf("of what is above the node's size is told: %q", told)
	}
}

// limitedTenant has a tenant with limits of its own, on a node with limits of all.
func limitedTenant(t *testing.T) (n *node, m *Manager, all, own Limits) {
	t.Helper()
	n = newNode(t)
	n.useStandin(nil, standinTargets{})
	m = n.open()
	all, own = Limits{CPUMillis: 400, MemoryMax: 512 << 20, Pids: 200}, Limits{CPUWeight: 300, CPUMillis: 300, MemoryMax: 200 << 20, Pids: 100}
	if err := m.LimitAll(all); err != nil {
		t.Fatal(err)
	}
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: own, Generations: []Generation{{1, standinVersion}}}); err != nil {
		t.Fatal(err)
	}
	return n, m, all, own
}

// Whoever takes cgroups without a process away, as systemd does with a unit's: the next
// process has them again, with all limits.
func TestCgroupsComeBack(t *testing.T) {
	n, m, all, own := limitedTenant(t)
	if err := m.cgroups.remove(textCgroup); err != nil {
		t.Fatal(err)
	}
	p := n.waitLive(m, tenantA, 0)
	gone := func() bool {
		for _, of := range []string{tenantA.FileName(), everyone} {
			for _, dir := range m.cgroups.dirs(of) {
				if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
					return false
				}
			}
		}
		return true
	}
	startedAgain := func() bool {
		s, _ := m.State(tenantA)
		return len(s.Processes) == 1 && s.Processes[0].PID != 0 && s.Processes[0].PID != p.PID
	}
	// Its next start may be quicker than this.
	for removed := false; !removed; p = n.waitLive(m, tenantA, p.PID) {
		if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for removed = gone(); !removed && !startedAgain(); removed = gone() {
		}
	}
	if s, _ := m.State(tenantA); s.Limits != own || len(s.Unenforced) > 0 {
		t.Errorf("limits are %+v, unenforced %q", s.Limits, s.Unenforced)
	}
	if have, told := m.AllLimits(); have.CPUMillis != all.CPUMillis || have.MemoryMax != all.MemoryMax || have.Pids != all.Pids || len(told) > 0 {
		t.Errorf("limits of all are %+v, unenforced %q", have, told)
	}
	if !m.cgroups.has(tenantA.FileName(), p.PID) {
		t.Error("the process isn't in all of its tenant's cgroups")
	}
}

// While the kernel takes memory back for a lower limit, who only asks isn't held up: the
// agent's metrics and its loop among them.
func TestLimitsAreToldMeanwhile(t *testing.T) {
	n, m, all, own := limitedTenant(t)
	n.waitLive(m, tenantA, 0)
	m.limiting.Lock()
	m.cgroups.limitingAll.Lock()
	told := make(chan struct{})
	var s State
	var have Limits
	go func() {
		defer close(told)
		s, _ = m.State(tenantA)
		have, _ = m.AllLimits()
	}()
	select {
	case <-told:
	case <-time.After(time.Minute):
		t.Error("limits aren't told while others are written")
	}
	m.cgroups.limitingAll.Unlock()
	m.limiting.Unlock()
	<-told
	if s.Limits != own || have.CPUMillis != all.CPUMillis || have.MemoryMax != all.MemoryMax || have.Pids != all.Pids {
		t.Errorf("limits are %+v, those of all %+v", s.Limits, have)
	}
}

// A proxy starts with its limits, whatever has become of them since they were set: one
// start may have made the cgroup and failed before it had any.
func TestEachStartIsLimited(t *testing.T) {
	n, m, all, own := limitedTenant(t)
	p := n.waitLive(m, tenantA, 0)
	for _, of := range []string{tenantA.FileName(), everyone} {
		if refused, failed := m.cgroups.write(of, Limits{}); refused != nil || failed != nil {
			t.Fatal(refused, failed)
		}
	}
	if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.waitLive(m, tenantA, p.PID)
	if s, _ := m.State(tenantA); s.Limits != own {
		t.Errorf("limits are %+v", s.Limits)
	}
	if have, _ := m.AllLimits(); have.CPUMillis != all.CPUMillis || have.MemoryMax != all.MemoryMax || have.Pids != all.Pids {
		t.Errorf("limits of all are %+v", have)
	}
}

// A limit that can't be written isn't one that the kernel refuses.
func TestLimitsRefusedAndFailed(t *testing.T) {
	m := newNode(t).open()
	const tenant = "bhi-limits"
	if err := m.cgroups.ensure(tenant); err != nil {
		t.Fatal(err)
	}
	if refused, failed := m.cgroups.write(tenant, Limits{Pids: 1 << 40}); refused == nil || failed != nil {
		t.Errorf("of too many threads: refused %v, failed %v", refused, failed)
	}
	if err := m.cgroups.remove(tenant); err != nil {
		t.Fatal(err)
	}
	if refused, failed := m.cgroups.write(tenant, Limits{}); refused != nil || failed == nil {
		t.Errorf("without a cgroup: refused %v, failed %v", refused, failed)
	}
}
