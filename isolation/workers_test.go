package isolation

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// An Envoy serves with as many threads as it was started with; another number is
// its next start's.
func TestWorkers(t *testing.T) {
	n := newNode(t)
	m := n.open()
	threads := func(pid int) int {
		t.Helper()
		// Their names aren't to be had: Envoy sees no /proc to write them to.
		tasks, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "task"))
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	spec := Spec{Tenant: tenantA, Workers: MaxWorkers + 1, Generations: []Generation{{1, dist.Default}}}
	if err := m.Update(t.Context(), spec); err == nil {
		t.Errorf("%d workers are accepted", spec.Workers)
	}
	p := n.run(m, tenantA, Limits{CPUMillis: 1000})
	one := threads(p.PID)
	spec.Workers = 3
	if err := m.Update(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if s, _ := m.State(tenantA); s.Processes[0].PID != p.PID || p.Workers != 1 || s.Processes[0].Workers != 1 {
		t.Errorf("the process that runs is %+v, was %+v", s.Processes[0], p)
	}
	if err := m.Kill(p.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p = n.waitLive(m, tenantA, p.PID)
	if three := threads(p.PID); p.Workers != 3 || three < one+2 {
		t.Errorf("with 1 it had %d threads, with 3, told as %d, it has %d", one, p.Workers, three)
	}
}
