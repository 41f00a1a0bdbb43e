package kernel

import (
	"fmt"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// olderEnvoy is another version than the default.
const olderEnvoy = "1.39.3"

// All proxies of two nodes change their version and back, by another version in
// the plan and by a canary that is promoted, and no request fails. Connections that
// last go on in the process where they began.
func TestUpgrade(t *testing.T) { eachRedirection(t, testUpgrade) }

func testUpgrade(t *testing.T, l *lab.Lab) {
	const held, rate = 20, 1000
	nodes := []*lab.Node{l.Node1, l.Node2}
	for _, n := range nodes {
		n.Drain = time.Hour
		n.Kill()
		n.Start()
		n.WaitReady()
	}
	began := time.Now()
	begin := func() (stop func(any)) {
		t.Helper()
		return l.A1.BeginUntil(t, "load", "--protocol=http", "--connections=32", fmt.Sprint("--rate=", rate), "--new-connection-ratio=0.5", lab.At(l.B2.V4, app.HTTPPort).String())
	}
	load := begin()
	// They stay in the default version's processes, which are the second to leave.
	hold := l.A1.BeginUntil(t, "hold", fmt.Sprint("--connections=", held), "--interval=100ms", "--timeout=20s", lab.At(l.B2.V4, app.GreetPort).String())
	lab.Eventually(t, "the held connections", func() error {
		if s := l.Node1.Tenant("team-a").Steered; s[0] < held {
			return fmt.Errorf("steered %d", s)
		}
		return nil
	})
	steered := func() (sum uint64) {
		for _, n := range nodes {
			s := n.Tenant("team-a").Steered
			sum += s[0] + s[1]
		}
		return sum
	}
	for _, n := range nodes {
		n.Version = olderEnvoy
		n.WritePlan()
		n.WaitServing(olderEnvoy)
	}
	before := steered()
	lab.Eventually(t, "load on the older version", func() error {
		if now := steered(); now < before+rate/2 {
			return fmt.Errorf("%d connections", now-before)
		}
		return nil
	})
	// The processes of the default version have the held connections still, so its
	// place isn't free: the way back waits for them. Here they are let go by the end
	// of the hold.
	lab.Eventually(t, "the former version's leave", func() error {
		for _, g := range l.Node1.Tenant("team-a").Generations {
			if g.Version == dist.Default && g.DrainUntil == nil {
				return fmt.Errorf("%+v", g)
			}
		}
		return nil
	})
	var h app.RunResult
	hold(&h)
	if !h.OK || h.Held != held {
		t.Errorf("%d of %d connections were held over the upgrade: %+v", h.Held, held, h.Failures)
	}
	var r app.RunResult
	load(&r)
	if !r.OK {
		t.Errorf("of %d requests failed on the way there: %+v", r.Exchanges+r.Failures.Total, r.Failures)
	}
	t.Logf("there: %d requests on %d connections in %s, p99 %.1f ms", r.Exchanges, r.Connections, time.Since(began).Round(time.Second), r.Latency.P99)

	load = begin()
	for _, n := range nodes {
		for _, weight := range []int{1, 50} {
			n.Canary, n.CanaryVersion = weight, dist.Default
			n.WritePlan()
			n.WaitReady()
		}
		n.Promoted = true
		n.WritePlan()
		n.WaitServing(dist.Default)
		// What a rollout does last: the version is the tenant's own.
		n.Version, n.Canary, n.Promoted = "", 0, false
		n.WritePlan()
		n.WaitReady()
		n.WaitServing(dist.Default)
	}
	// Tunnels are told with the next connection in them; without one they'd stay for a minute.
	for _, n := range nodes {
		lab.Eventually(t, "the end of the older version on "+n.Name, func() error {
			for _, tenant := range []string{"team-a", "team-b"} {
				if g := n.Tenant(tenant).Generations; len(g) != 1 || g[0].Version != dist.Default || g[0].Restarts > 0 {
					return fmt.Errorf("%s: %+v", tenant, g)
				}
			}
			return nil
		})
	}
	r = app.RunResult{}
	load(&r)
	if !r.OK || r.Connections < r.Exchanges/3 {
		t.Errorf("of %d requests on %d connections failed on the way back: %+v", r.Exchanges+r.Failures.Total, r.Connections, r.Failures)
	}
	t.Logf("back: %d requests on %d connections, p99 %.1f ms", r.Exchanges, r.Connections, r.Latency.P99)
}

// A generation that joins holds what the one beside it found on demand before it
// takes connections: it serves them without the operator.
func TestCanaryIsWarm(t *testing.T) {
	l := lab.New(t)
	nodes := []*lab.Node{l.Node1, l.Node2}
	flows := []flow{{from: l.A1, to: l.B2}, {from: l.A1, to: l.A2}, {from: l.B1, to: l.B2}}
	for _, f := range flows {
		f.check(t, 4)
	}
	for _, n := range nodes {
		n.Canary, n.CanaryVersion = 1, olderEnvoy
		n.WritePlan()
		n.WaitReady()
		n.StopOperator()
	}
	for _, n := range nodes {
		n.Promoted = true
		n.WritePlan()
		n.WaitServing(olderEnvoy)
	}
	for _, f := range flows {
		f.check(t, 4)
	}
}
