package isolation

import (
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
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
	// One without processes, as between a proxy's end and the next one's start.
	idle := model.NamespaceTenant("idle")
	if _, err := m.Prepare(t.Context(), idle, 1500); err != nil {
		t.Fatal(err)
	}
	empty := m.cgroups.dirs(idle.FileName())
	if len(empty) == 0 {
		t.Fatal("a tenant without processes has no cgroup")
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
		s, _ := m.State(tenantA)
		if s.Limits != limits || len(s.Unenforced) > 0 {
			t.Errorf("after %s the limits are %+v, unenforced %q", command, s.Limits, s.Unenforced)
		}
		for _, dir := range m.cgroups.dirs(tenantA.FileName()) {
			if pids, err := procs(dir); err != nil || !slices.Contains(pids, before.PID) {
				t.Errorf("after %s: %s has the processes %v, %v", command, dir, pids, err)
			}
		}
		for _, dir := range empty {
			if _, err := os.Stat(dir); err != nil {
				t.Errorf("after %s: the empty cgroup is gone: %v", command, err)
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
