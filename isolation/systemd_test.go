package isolation

import (
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// Where systemd is process 1, it leaves the tenants' cgroups alone: whatever it
// does to its own, theirs have their limits and processes.
func TestSystemdLeavesTenantsAlone(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		t.Skip("systemd isn't process 1 here: make soak")
	}
	n := newNode(t)
	m := n.open()
	n.serveXDS(m, tenantA, 1, nil)
	limits := Limits{CPUWeight: 300, CPUMillis: 1500, MemoryHigh: 300 << 20, MemoryMax: 400 << 20, Pids: 200}
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: limits, Generations: []Generation{{1, dist.Default}}}); err != nil {
		t.Fatal(err)
	}
	before := n.waitLive(m, tenantA, 0)
	for _, command := range [][]string{
		{"systemctl", "daemon-reload"},
		// One that wants all controllers, and then none does.
		{"systemd-run", "--collect", "-p", "Type=oneshot", "-p", "CPUQuota=50%", "-p", "CPUWeight=50", "-p", "MemoryMax=100M", "-p", "TasksMax=20", "-p", "Delegate=yes", "/bin/true"},
		{"systemctl", "daemon-reload"},
		{"systemctl", "daemon-reexec"},
		{"systemd-run", "--collect", "-p", "Type=oneshot", "/bin/true"},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
		// What systemd puts off until it is idle has happened after the next answer.
		time.Sleep(200 * time.Millisecond)
		s, _ := m.State(tenantA)
		if s.Limits != limits || len(s.Unenforced) > 0 {
			t.Errorf("after %s the limits are %+v, unenforced %q", command, s.Limits, s.Unenforced)
		}
		for _, dir := range m.cgroups.dirs(tenantA.FileName()) {
			if pids, err := procs(dir); err != nil || !slices.Contains(pids, before.PID) {
				t.Errorf("after %s: %s has the processes %v, %v", command, dir, pids, err)
			}
		}
	}
	// A cgroup can still be made, with all of its limits.
	n.serveXDS(m, tenantB, 1, nil)
	if err := m.Update(t.Context(), Spec{Tenant: tenantB, Limits: limits, Generations: []Generation{{1, dist.Default}}}); err != nil {
		t.Error(err)
	}
	if s, _ := m.State(tenantB); s.Limits != limits {
		t.Errorf("the limits of a new tenant are %+v", s.Limits)
	}
	if now := n.waitLive(m, tenantA, 0); now.PID != before.PID || now.Restarts != 0 {
		t.Errorf("the process is %+v, was %+v", now, before)
	}
}
