package kernel

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// The least that an IsolationPolicy can ask for is enough for Envoys to start and to
// serve: each limit by itself, and all of them at once.
func TestLeastLimits(t *testing.T) {
	// With the least CPU time an Envoy takes seconds to start while nothing else runs.
	const patience = 3 * lab.Patience
	l := lab.New(t)
	n := l.Node1
	for _, c := range []struct {
		name    string
		limits  v1alpha1.Limits
		standby bool
	}{
		{"all", v1alpha1.Limits{CPUMillis: 20, MemoryHigh: 32 << 20, MemoryMax: 48 << 20, Pids: 32}, false},
		{"threads of two", v1alpha1.Limits{Pids: 32, Concurrency: 4}, true},
		{"memory of two", v1alpha1.Limits{MemoryMax: 96 << 20, Concurrency: 4}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n.Limits, n.Standby = map[string]v1alpha1.Limits{"team-b": c.limits}, c.standby
			n.WritePlan()
			processes := map[bool]int{false: 1, true: 2}[c.standby]
			serves := func(not map[int]bool) map[int]bool {
				t.Helper()
				pids := map[int]bool{}
				lab.EventuallyWithin(t, patience, "processes that serve within the limits", func() error {
					b := n.Tenant("team-b")
					clear(pids)
					for _, g := range b.Generations {
						if pids[g.PID] = true; !g.Ready || not[g.PID] {
							return fmt.Errorf("%s; %+v", b.Reason, b.Generations)
						}
					}
					if !b.Ready || len(b.Generations) != processes || b.Limits.Pids != c.limits.Pids && c.limits.Pids != 0 || b.Limits.MemoryMax != c.limits.MemoryMax || b.Limits.CPUMillis != c.limits.CPUMillis {
						return fmt.Errorf("%s; %+v, %+v", b.Reason, b.Limits, b.Generations)
					}
					return nil
				})
				return pids
			}
			before := serves(nil)
			for pid := range before {
				lab.Check(t, unix.Kill(pid, unix.SIGKILL))
			}
			began := time.Now()
			lab.EventuallyWithin(t, patience, "their successors", func() error {
				b := n.Tenant("team-b")
				for _, g := range b.Generations {
					if g.PID == 0 || before[g.PID] {
						return fmt.Errorf("%+v", b.Generations)
					}
				}
				return nil
			})
			serves(before)
			t.Logf("it serves %s after its start", time.Since(began).Round(10*time.Millisecond))
			for _, g := range n.Tenant("team-b").Generations {
				if g.LastExit != "killed by SIGKILL" { // which isn't for memory
					t.Errorf("it ended again: %+v", g)
				}
			}
			flow{from: l.B1, to: l.B2}.check(t, 4)
		})
	}
}
