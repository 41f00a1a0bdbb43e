package isolation

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Where systemd is process 1, it leaves the tenants' cgroups alone: whatever it
// does to its own, theirs have their limits and processes.
func TestSystemdLeavesTenantsAlone(t *testing.T) { testSystemd(t, "") }

// So it does where they are in a cgroup that it has delegated, also when the unit's own
// process ends, and when the unit is stopped and started. Those without a process may go
// then. The unit's process is back when there is no proxy any more, at the latest.
func TestSystemdDelegates(t *testing.T) {
	const unit, slice = "bulkhead.service", "/sys/fs/cgroup/bulkhead.slice"
	wantSystemd(t)
	text, err := os.ReadFile("../config/systemd/" + unit)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/run/systemd/system/"+unit, text, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		systemctl(t, "stop", unit)
		if err := os.Remove("/run/systemd/system/" + unit); err != nil {
			t.Error(err)
		}
		systemctl(t, "daemon-reload")
	})
	systemctl(t, "daemon-reload")
	systemctl(t, "start", unit)
	keeper := func() string { return systemctl(t, "show", "--property=MainPID", "--value", unit) }
	kept := func() bool {
		pids, err := procs(filepath.Join(slice, unit, "keeper"))
		return err == nil && len(pids) == 1 && strconv.Itoa(pids[0]) == keeper()
	}
	wait(t, "the unit's process in a cgroup of its own", kept)
	for _, dir := range []string{slice, filepath.Join(slice, unit)} {
		if most, err := os.ReadFile(filepath.Join(dir, "pids.max")); err != nil || string(most) != "max\n" {
			t.Errorf("%s lets all proxies together have %q threads, %v", dir, most, err)
		}
	}
	m := testSystemd(t, "/bulkhead.slice/"+unit, deed{"the unit's process was killed", func() {
		before := keeper()
		pid, err := strconv.Atoi(before)
		if err != nil || pid <= 1 {
			t.Fatalf("the unit has the process %q", before)
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		wait(t, "systemd to notice", func() bool { return keeper() != before })
	}}, deed{"the unit was stopped", func() {
		systemctl(t, "stop", unit)
		if now := keeper(); now != "0" {
			t.Errorf("the unit has the process %s", now)
		}
	}}, deed{"the unit was started", func() {
		systemctl(t, "start", "--no-block", unit)
		// More often than systemd lets a unit fail by default.
		wait(t, "systemd to try on", func() bool {
			n, err := strconv.Atoi(systemctl(t, "show", "--property=NRestarts", "--value", unit))
			return kept() || err == nil && n > 6
		})
	}})
	for _, tenant := range m.Tenants() {
		if err := m.Delete(t.Context(), tenant); err != nil {
			t.Error(err)
		}
	}
	wait(t, "the unit's process to be back", kept)
}

// deed is something that systemd is made to do.
type deed struct {
	when string
	do   func()
}

func wantSystemd(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		t.Skip("systemd isn't process 1 here: make soak")
	}
}

func systemctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("systemctl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("systemctl %s: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func wait(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// testSystemd has systemd do things, those besides last, and looks at tenants below a
// parent after each.
func testSystemd(t *testing.T, parent string, besides ...deed) *Manager {
	wantSystemd(t)
	n := newNode(t)
	n.o.CgroupParent = parent
	m := n.open()
	n.serveXDS(m, tenantA, 1, nil)
	all := Limits{CPUWeight: 200, CPUMillis: 1800, MemoryHigh: 900 << 20, MemoryMax: 1 << 30, Pids: 900}
	if err := m.LimitAll(all); err != nil {
		t.Fatal(err)
	}
	limits := Limits{CPUWeight: 300, CPUMillis: 1500, MemoryHigh: 300 << 20, MemoryMax: 400 << 20, Pids: 200}
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: limits, Generations: []Generation{{1, dist.Default}}}); err != nil {
		t.Fatal(err)
	}
	before := n.waitLive(m, tenantA, 0)
	// One without processes, as between a proxy's end and the next one's start.
	idle := model.NamespaceTenant("idle")
	if _, err := m.Prepare(t.Context(), idle, 1500); err != nil {
		t.Fatal(err)
	}
	empty := m.cgroups.dirs(idle.FileName())
	if len(empty) == 0 {
		t.Fatal("a tenant without processes has no cgroup")
	}
	look := func(when string) {
		t.Helper()
		s, _ := m.State(tenantA)
		if s.Limits != limits || len(s.Unenforced) > 0 {
			t.Errorf("after %s the limits are %+v, unenforced %q", when, s.Limits, s.Unenforced)
		}
		if have, told := m.AllLimits(); have != all || len(told) > 0 {
			t.Errorf("after %s the limits of all are %+v, unenforced %q", when, have, told)
		}
		for _, dir := range m.cgroups.dirs(tenantA.FileName()) {
			if pids, err := procs(dir); err != nil || !slices.Contains(pids, before.PID) {
				t.Errorf("after %s: %s has the processes %v, %v", when, dir, pids, err)
			}
		}
		for _, dir := range empty {
			if _, err := os.Stat(dir); err != nil {
				t.Errorf("after %s: the empty cgroup is gone: %v", when, err)
			}
		}
	}
	for _, command := range [][]string{
		{"systemctl", "daemon-reload"},
		// One that wants all controllers, and then none does.
		{"systemd-run", "--collect", "-p", "Type=oneshot", "-p", "CPUQuota=50%", "-p", "CPUWeight=50", "-p", "MemoryMax=100M", "-p", "TasksMax=20", "-p", "Delegate=yes", "/bin/true"},
		{"systemctl", "daemon-reload"},
		// Limits of slices beside ours, and of the root's, come and go.
		{"systemctl", "set-property", "--runtime", "system.slice", "CPUWeight=20", "MemoryHigh=1G", "IOWeight=50", "AllowedCPUs=0"},
		{"systemctl", "set-property", "--runtime", "--", "-.slice", "CPUAccounting=yes", "IOAccounting=yes", "MemoryAccounting=yes"},
		{"systemd-run", "--collect", "--slice=bhsoak", "-p", "Type=oneshot", "-p", "MemoryMax=100M", "/bin/true"},
		{"systemctl", "stop", "bhsoak.slice"},
		{"systemctl", "revert", "system.slice"},
		{"systemctl", "reset-failed"},
		{"systemctl", "daemon-reexec"},
		{"systemd-run", "--collect", "-p", "Type=oneshot", "/bin/true"},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
		// What systemd puts off until it is idle has happened after the next answer.
		time.Sleep(200 * time.Millisecond)
		look(strings.Join(command, " "))
	}
	empty = nil // they may be gone
	for _, d := range besides {
		d.do()
		look(d.when)
	}
	// A cgroup can still be made, with all of its limits, also one that may have gone.
	for _, tenant := range []model.Tenant{tenantB, idle} {
		n.serveXDS(m, tenant, 1, nil)
		if err := m.Update(t.Context(), Spec{Tenant: tenant, Limits: limits, Generations: []Generation{{1, dist.Default}}}); err != nil {
			t.Error(err)
			continue
		}
		s, _ := m.State(tenant)
		if s.Limits != limits || len(s.Unenforced) > 0 || !m.cgroups.has(tenant.FileName(), s.Processes[0].PID) {
			t.Errorf("of %s the limits are %+v, unenforced %q, the processes %+v", tenant, s.Limits, s.Unenforced, s.Processes)
		}
	}
	if now := n.waitLive(m, tenantA, 0); now.PID != before.PID || now.Restarts != 0 {
		t.Errorf("the process is %+v, was %+v", now, before)
	}
	return m
}
