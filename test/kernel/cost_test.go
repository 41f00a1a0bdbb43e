package kernel

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// Each tenant pays for what it had, and for nothing else, whatever becomes of
// agents and pods meanwhile.
func TestCost(t *testing.T) { eachRedirection(t, testCost) }

func testCost(t *testing.T, l *lab.Lab) {
	const up, calls = 96 << 20, 40
	n := l.Node1
	cost := func(tenant string) v1alpha1.NodeCost {
		t.Helper()
		c := n.Tenant(tenant).Cost
		if c == nil {
			t.Fatalf("nothing is counted of %s", tenant)
		}
		return *c
	}
	beforeA, beforeB, repeated := cost("team-a"), cost("team-b"), repeatedSYNs(t, l)
	var r app.CallResult
	l.A1.Run(t, &r, "bulk", fmt.Sprint("--up=", up), lab.At(l.A3.V4, app.BulkPort).String())
	for range calls {
		l.A1.Call(t, "get", "http://"+lab.At(l.A3.V4, app.HTTPPort).String()+"/")
	}
	a, b := cost("team-a"), cost("team-b")
	sent, connections := a.BytesSent-beforeA.BytesSent, a.Connections-beforeA.Connections
	if sent < up || sent > up*115/100 {
		t.Errorf("team-a pays for %d bytes sent, of %d and headers", sent, up)
	}
	if !counts(uint64(connections), calls+1, repeatedSYNs(t, l)-repeated) {
		t.Errorf("team-a pays for %d connections, of %d", connections, calls+1)
	}
	if a.CPUMilliseconds <= beforeA.CPUMilliseconds || a.PrivateBytes < 4<<20 || a.PSSBytes < a.PrivateBytes || !a.Since.Equal(&beforeA.Since) {
		t.Errorf("team-a went from %+v to %+v", beforeA, a)
	}
	if b.BytesSent != beforeB.BytesSent || b.Connections != beforeB.Connections || b.CPUMilliseconds-beforeB.CPUMilliseconds > (a.CPUMilliseconds-beforeA.CPUMilliseconds)/2 {
		t.Errorf("team-b pays for what team-a had: from %+v to %+v; team-a from %+v to %+v", beforeB, b, beforeA, a)
	}

	// The next agent goes on where this one was killed, and a pod's last connections
	// are counted when it goes.
	n.Kill()
	repeated = repeatedSYNs(t, l)
	for range calls {
		l.A1.Call(t, "get", "http://"+lab.At(l.A3.V4, app.HTTPPort).String()+"/")
	}
	n.Start()
	n.WaitReady()
	next := cost("team-a")
	if got := next.Connections - a.Connections; !counts(uint64(got), calls, repeatedSYNs(t, l)-repeated) || !next.Since.Equal(&a.Since) || next.BytesSent < a.BytesSent || next.BytesSent > a.BytesSent+1<<20 {
		t.Errorf("%d connections without an agent are %d, and %d bytes became %d", calls, got, a.BytesSent, next.BytesSent)
	}
	repeated = repeatedSYNs(t, l)
	for range calls {
		l.A1.Call(t, "get", "http://"+lab.At(l.A3.V4, app.HTTPPort).String()+"/")
	}
	// Without `inspect`, which would read the pod's counters before it goes.
	before := scrape(t, n)[`bulkhead_tenant_pods{namespace="team-a",tenant="team-a"}`]
	n.Planned = slices.DeleteFunc(slices.Clone(n.Planned), func(p *lab.Host) bool { return p == l.A1 })
	n.WritePlan()
	lab.Eventually(t, "the pod's leave", func() error {
		if got := scrape(t, n)[`bulkhead_tenant_pods{namespace="team-a",tenant="team-a"}`]; got != before-1 {
			return fmt.Errorf("team-a has %v pods, and had %v", got, before)
		}
		return nil
	})
	if got := cost("team-a").Connections - next.Connections; !counts(uint64(got), calls, repeatedSYNs(t, l)-repeated) {
		t.Errorf("the last %d connections of a pod that left are %d", calls, got)
	}
	metrics := scrape(t, n)
	if cpu, want := metrics[`bulkhead_tenant_cpu_seconds_total{namespace="team-a",tenant="team-a"}`], cost("team-a").CPUMilliseconds; cpu*1000 < float64(want)/2 {
		t.Errorf("metrics know of %v s CPU, the account of %d ms", cpu, want)
	}
	if got := metrics[`bulkhead_tenant_memory_bytes{kind="private",namespace="team-a",tenant="team-a"}`]; got < 4<<20 {
		t.Errorf("metrics know of %v bytes of memory", got)
	}
}

// scrape reads the agent's metrics by name and labels.
func scrape(t *testing.T, n *lab.Node) map[string]float64 {
	t.Helper()
	all := map[string]float64{}
	for line := range strings.Lines(n.Metrics(t)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && strings.HasPrefix(name, "bulkhead_tenant_") {
			v, err := strconv.ParseFloat(value, 64)
			lab.Check(t, err)
			all[name] = v
		}
	}
	return all
}
