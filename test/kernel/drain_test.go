package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A generation that isn't wanted any more finishes its connections, gets no new
// one, and ends with the last of them or at its deadline, also if the agent that
// set it was killed.
func TestDrain(t *testing.T) {
	const connections = 80
	l := lab.New(t)
	n := l.Node1
	restart := func() {
		n.Kill()
		n.Start()
		n.WaitReady()
	}
	generation := func(number int) (agent.InspectedGeneration, bool) {
		for _, g := range n.Tenant("team-a").Generations {
			if g.Generation == number {
				return g, true
			}
		}
		return agent.InspectedGeneration{}, false
	}
	ended := func() error {
		if g, ok := generation(1); ok {
			return fmt.Errorf("it still runs: %+v", g)
		}
		if _, err := os.Stat(filepath.Join(n.Isolation().RunDir, "tenants", "team-a", "xds1")); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the folder of its socket: %w", err)
		}
		return nil
	}
	// begin has both generations serve connections for some time, and then only
	// the first wanted.
	begin := func() (stop func(any), draining agent.InspectedGeneration) {
		t.Helper()
		n.Drain = time.Hour
		restart()
		n.Canary = 50
		n.WritePlan()
		n.WaitReady()
		before := n.Tenant("team-a").Steered[1]
		stop = l.A1.BeginUntil(t, "hold", fmt.Sprint("--connections=", connections), "--interval=100ms", "--timeout=20s", lab.At(l.B2.V4, app.GreetPort).String())
		lab.Eventually(t, "connections", func() error {
			if s := n.Tenant("team-a").Steered; s[0] < connections/4 || s[1] < before+connections/4 {
				return fmt.Errorf("the generations got %d", s)
			}
			return nil
		})
		n.Canary = 0
		n.WritePlan()
		n.WaitReady()
		lab.Eventually(t, "the drain", func() error {
			g, ok := generation(1)
			if !ok || g.DrainUntil == nil {
				return fmt.Errorf("%t %+v", ok, g)
			}
			draining = g
			return nil
		})
		return stop, draining
	}
	// survives kills the agent and sees the drain go on as it was, without new
	// connections.
	survives := func(was agent.InspectedGeneration) {
		t.Helper()
		restart()
		steered := n.Tenant("team-a").Steered[1]
		for range 20 {
			flow{from: l.A1, to: l.B2}.check(t, 4)
		}
		if now := n.Tenant("team-a").Steered[1]; now != steered {
			t.Errorf("a generation that drains got %d new connections", now-steered)
		}
		g, ok := generation(1)
		if !ok || g.PID != was.PID || g.DrainUntil == nil || !g.DrainUntil.Equal(*was.DrainUntil) {
			t.Errorf("after the agent's restart it is %+v, was %+v", g, was)
		}
	}

	var takes time.Duration // to see that a drain survives
	t.Run("last connection", func(t *testing.T) {
		stop, g := begin()
		begun := time.Now()
		survives(g)
		takes = time.Since(begun)
		var r app.RunResult
		stop(&r)
		if !r.OK || r.Held != connections {
			t.Errorf("%d of %d connections held, failures %+v", r.Held, connections, r.Failures)
		}
		lab.Eventually(t, "the end", ended)
	})
	t.Run("deadline", func(t *testing.T) {
		// What the plan says goes before what the agent was started with.
		n.PlanDrain = (4*takes + 10*time.Second).Truncate(time.Second)
		stop, g := begin()
		if until := time.Until(*g.DrainUntil); until > n.PlanDrain {
			t.Errorf("it ends in %s, by the plan within %s", until, n.PlanDrain)
		}
		survives(g)
		if left := time.Until(*g.DrainUntil); left < time.Second {
			t.Fatalf("the machine is too slow: %s of the drain are left", left)
		}
		lab.Eventually(t, "the end", ended)
		if late := time.Since(*g.DrainUntil); late < 0 || late > 20*time.Second {
			t.Errorf("it ended %s after its deadline", late)
		}
		var r app.RunResult
		stop(&r)
		if r.Held < connections/4 || r.Held > connections*3/4 {
			t.Errorf("%d of %d connections outlived it, of about half", r.Held, connections)
		}
		for i, s := range r.Seconds {
			if end := r.Started.Add(time.Duration(i+1) * time.Second); s.Failed > 0 && end.Before(*g.DrainUntil) {
				t.Errorf("%d exchanges failed %s before the deadline", s.Failed, g.DrainUntil.Sub(end))
			}
		}
	})
}
