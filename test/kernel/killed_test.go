package kernel

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A tenant whose proxies die again and again is alone with it.
func TestProxyKilled(t *testing.T) { eachRedirection(t, testProxyKilled) }

func testProxyKilled(t *testing.T, l *lab.Lab) {
	const connections, kills = 1000, 3
	stop := l.A1.BeginUntil(t, "hold", fmt.Sprint("--connections=", connections), "--interval=1s", "--timeout=20s", lab.At(l.A3.V4, app.GreetPort).String())
	waitConnections(t, l.Node1, "team-a", connections)
	for i := range kills {
		for _, n := range []*lab.Node{l.Node1, l.Node2} {
			pid := n.Running("team-b").PID
			lab.Check(t, unix.Kill(pid, unix.SIGKILL))
			lab.Eventually(t, "the proxy's return", func() error {
				b := n.Tenant("team-b")
				if g := lab.First(b); !b.Ready || g.PID == pid || g.Restarts <= i {
					return fmt.Errorf("%s, %+v", b.Reason, b.Generations)
				}
				return nil
			})
			if told := n.Running("team-b").LastExit; told != "killed by SIGKILL" {
				t.Errorf("the exit is told as %q", told)
			}
		}
		flow{from: l.B1, to: l.B2}.check(t, 4)
	}
	var r app.RunResult
	stop(&r)
	if !r.OK || r.Held != connections || r.Exchanges < connections {
		t.Errorf("%d of %d connections held, %d exchanges, failures %+v", r.Held, connections, r.Exchanges, r.Failures)
	}
	for _, n := range []*lab.Node{l.Node1, l.Node2} {
		if a := n.Running("team-a"); a.Restarts > 0 {
			t.Errorf("the other tenant's proxy was started %d times again", a.Restarts)
		}
	}
}

// waitConnections waits until a tenant's proxy has so many connections.
func waitConnections(t *testing.T, n *lab.Node, tenant string, want int64) {
	t.Helper()
	lab.Eventually(t, fmt.Sprintf("%d connections of %s", want, tenant), func() error {
		if have := n.Tenant(tenant).Connections; have < want {
			return fmt.Errorf("it has %d", have)
		}
		return nil
	})
}

// Traffic doesn't notice that agents die.
func TestAgentKilled(t *testing.T) { eachRedirection(t, testAgentKilled) }

func testAgentKilled(t *testing.T, l *lab.Lab) {
	const kills, seconds = 5, 4 // at least, each
	stop := l.A1.BeginUntil(t, "load", "--protocol=http", "--connections=32", "--rate=1000", "--new-connection-ratio=0.5", lab.At(l.B2.V4, app.HTTPPort).String())
	for range kills {
		// Some of it with no agent at all.
		time.Sleep((seconds - 1) * time.Second)
		for _, n := range []*lab.Node{l.Node1, l.Node2} {
			n.Kill()
		}
		time.Sleep(time.Second)
		for _, n := range []*lab.Node{l.Node1, l.Node2} {
			n.Start()
			n.WaitReady()
		}
	}
	var r app.RunResult
	stop(&r)
	if !r.OK {
		t.Errorf("of %d requests failed: %+v", r.Exchanges+r.Failures.Total, r.Failures)
	}
	t.Logf("%d requests on %d connections, p99 %.1f ms", r.Exchanges, r.Connections, r.Latency.P99)
	if r.Connections < r.Exchanges/3 || len(r.Seconds) < kills*seconds {
		t.Errorf("%d connections for %d requests in %d seconds", r.Connections, r.Exchanges, len(r.Seconds))
	}
	silent := 0
	for i, s := range r.Seconds[:len(r.Seconds)-1] {
		silent++
		if s.OK > 0 {
			silent = 0
		}
		if silent == 5 { // a busy machine may stand still for one or two
			t.Errorf("five seconds up to %d had no request", i)
		}
	}
	for _, n := range []*lab.Node{l.Node1, l.Node2} {
		for _, tenant := range []string{"team-a", "team-b"} {
			if g := n.Tenant(tenant).Generations; len(g) != 1 || g[0].Restarts > 0 {
				t.Errorf("the proxies of %s on %s: %+v", tenant, n.Name, g)
			}
		}
	}
}
