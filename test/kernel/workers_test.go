package kernel

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// What a pod has with one destination meets one worker of its proxy, and so has one
// tunnel: with the first process, with another agent, after a crash and in a second
// generation.
func TestPairSharesTunnel(t *testing.T) { eachRedirection(t, testPairSharesTunnel) }

func testPairSharesTunnel(t *testing.T, l *lab.Lab) {
	const connections = 16
	n := l.Node1
	tunnels := func(to *lab.Host, family int) map[connection]bool {
		found := map[connection]bool{}
		for _, c := range established(t, n.Proxy("team-a")) {
			c.unacknowledged = 0
			if c.from.Addr() == l.A1.Of(family) && c.to == lab.At(to.Of(family), 15008) {
				found[c] = true
			}
		}
		return found
	}
	opens := func(when string, want int) {
		t.Helper()
		for _, to := range []*lab.Host{l.B2, l.A3, l.B1, l.A2} {
			for _, family := range []int{4, 6} {
				before := tunnels(to, family)
				for range connections { // one after the other: who finds no tunnel yet makes one
					lab.Check(t, greeted(dial(t, l.A1, lab.At(to.Of(family), app.GreetPort).String())))
				}
				made := 0
				for tunnel := range tunnels(to, family) {
					if !before[tunnel] {
						made++
					}
				}
				if made != want {
					t.Errorf("%s: %d connections to %s over IPv%d made %d tunnels, want %d", when, connections, to.Name, family, made, want)
				}
			}
		}
	}
	opens("at first", 1)
	n.Kill()
	n.Start()
	n.WaitReady()
	opens("with another agent", 0)
	former := n.Running("team-a").PID
	lab.Check(t, unix.Kill(former, unix.SIGKILL))
	lab.Eventually(t, "the proxy's return", func() error {
		if b := n.Tenant("team-a"); !b.Ready || lab.First(b).PID == former {
			return fmt.Errorf("%s, %+v", b.Reason, b.Generations)
		}
		return nil
	})
	opens("after a crash", 1)
	n.Canary = 100
	n.WritePlan()
	n.WaitReady()
	opens("in a second generation", 1)
}
