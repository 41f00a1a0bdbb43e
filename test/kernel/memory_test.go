package kernel

import (
	"fmt"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A tenant that uses more memory than it may is killed, alone, and is named; the
// others don't notice.
func TestOutOfMemory(t *testing.T) {
	const neighbours, greedy = 300, 6000
	l := lab.New(t)
	n := l.Node1
	n.Limits = map[string]v1alpha1.Limits{"team-b": {MemoryMax: 72 << 20}}
	n.WritePlan()
	lab.Eventually(t, "the limit", func() error {
		if got := n.Tenant("team-b").Limits.MemoryMax; got != n.Limits["team-b"].MemoryMax {
			return fmt.Errorf("it is %d", got)
		}
		return nil
	})
	before := n.Running("team-b")
	stop := l.A1.BeginUntil(t, "hold", fmt.Sprint("--connections=", neighbours), "--interval=200ms", "--timeout=20s", lab.At(l.A3.V4, app.GreetPort).String())
	waitConnections(t, n, "team-a", neighbours)
	// Each of them takes about 20 KB there.
	leak := l.B1.Begin(t, "hold", fmt.Sprint("--connections=", greedy), "--interval=5s", "--duration=12s", "--timeout=10s",
		lab.At(l.B2.V4, app.GreetPort).String())
	lab.Eventually(t, "the kill", func() error {
		g := lab.First(n.Tenant("team-b"))
		if g.Restarts == before.Restarts || !strings.HasSuffix(g.LastExit, "out of memory") {
			return fmt.Errorf("%+v", g)
		}
		return nil
	})
	var r, lost app.RunResult
	leak(&lost)
	stop(&r)
	if lost.OK {
		t.Errorf("the greedy tenant has all of its %d connections", lost.Held)
	}
	if !r.OK || r.Held != neighbours {
		t.Errorf("%d of %d connections of the neighbour held, failures %+v", r.Held, neighbours, r.Failures)
	}
	for _, node := range []*lab.Node{l.Node1, l.Node2} {
		if g := node.Running("team-a"); g.Restarts > 0 {
			t.Errorf("the neighbour on %s was started again: %+v", node.Name, g)
		}
	}
	if g := l.Node2.Running("team-b"); g.Restarts > 0 {
		t.Errorf("the tenant on the other node was started again: %+v", g)
	}
	named := false
	for line := range strings.Lines(n.AgentLog(t)) {
		named = named || strings.Contains(line, `"A proxy ended."`) && strings.Contains(line, `"team-b"`) && strings.Contains(line, "out of memory")
		if strings.Contains(line, `"A proxy ended."`) && strings.Contains(line, `"team-a"`) {
			t.Errorf("the neighbour ended: %s", line)
		}
	}
	if !named {
		t.Error("the agent's log doesn't name the tenant")
	}
	// It comes back, and serves.
	lab.Eventually(t, "its return", func() error {
		if b := n.Tenant("team-b"); !b.Ready {
			return fmt.Errorf("%s", b.Reason)
		}
		return nil
	})
	flow{from: l.B1, to: l.B2}.check(t, 4)
}
