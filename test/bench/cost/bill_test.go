package cost

import (
	"context"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// parts of the load, in percent, of three tenants of the first node.
var parts = []int{70, 20, 10}

const requests = 2000 // a second, of all

// bill has three tenants make a known load, and reads what they are billed on their node.
func bill(b *testing.B, l *lab.Lab, ld *loader.Loader, server int) report.Table {
	clients := []*lab.Host{l.A1, l.B1, tenant(l, 0)}
	shares, used := make([]report.Samples, len(parts)), make([]report.Samples, len(parts))
	// proxies' CPU by the scheduler, which the bill doesn't read.
	proxies := func() (all []time.Duration) {
		for _, p := range clients {
			all = append(all, readSched(b, p.Node.Tenant(p.Tenant.String()).Generations[0].PID))
		}
		return all
	}
	var billed, agents, ends, rest report.Samples
	worst, unbilled := 0.0, 0.0
	for range *report.Rounds {
		before, stat, agent, served := bills(b, l, clients), readCPU(b), l.Node1.AgentTime(b)+l.Node2.AgentTime(b), readSched(b, server)
		ran := proxies()
		var loads []*loader.Load
		for i, p := range clients {
			o := load.PacedOptions{To: lab.At(l.A3.V4, load.RequestPort), Rate: requests * parts[i] / 100, Connections: 16, Duration: 3 * *report.Duration}
			loads = append(loads, ld.Begin(context.Background(), p, "paced", o, "client-"+p.Name, container.Pod))
		}
		var own time.Duration
		for _, running := range loads {
			var r load.PacedResult
			if err := running.Wait(&r); err != nil || r.Failed > 0 {
				b.Fatalf("%d requests failed: %s, %v", r.Failed, r.FirstFailure, err)
			}
			own += running.CPU()
		}
		after := bills(b, l, clients)
		all := readCPU(b) - stat
		own += readSched(b, server) - served
		total, inAll := time.Duration(0), time.Duration(0)
		for i, now := range proxies() {
			ran[i] = now - ran[i]
			inAll += ran[i]
			total += after[i] - before[i]
		}
		for i := range clients {
			share, had := 100*float64(after[i]-before[i])/float64(total), 100*float64(ran[i])/float64(inAll)
			shares[i], used[i] = append(shares[i], share), append(used[i], had)
			worst, unbilled = max(worst, math.Abs(share-float64(parts[i]))), max(unbilled, math.Abs(share-had))
		}
		of := func(d time.Duration) float64 { return 100 * float64(d) / float64(all) }
		agentTime := l.Node1.AgentTime(b) + l.Node2.AgentTime(b) - agent
		billed, agents, ends = append(billed, of(total)), append(agents, of(agentTime)), append(ends, of(own))
		rest = append(rest, of(all-total-agentTime-own))
	}
	t := report.Table{Title: "Who pays",
		Text:   fmt.Sprintf("Three tenants of a node make %d requests a second, in parts that are known; what they are billed there is compared with that (aim: within 5 points), and with the CPU that the scheduler saw their proxies have: a proxy that has much to do needs less for a request, for it wakes up less often, so the bill isn't in proportion to requests. Below it, where the whole machine's CPU time was, by /proc/stat: the rest is the other node's proxy, interrupts that the kernel charges to nobody, and whatever else the machine does.", requests),
		Header: []string{"", "of the requests %", "of the proxies' CPU %", "of the bill %"}}
	for i, p := range clients {
		t.Rows = append(t.Rows, []string{p.Tenant.String(), fmt.Sprint(parts[i]), used[i].Spread(), shares[i].Spread()})
	}
	t.Rows = append(t.Rows, []string{"the largest difference to the bill, points", fmt.Sprintf("%.1f", worst), fmt.Sprintf("%.1f", unbilled), ""},
		[]string{"of the machine's CPU: billed on that node", "", "", billed.Spread()}, []string{"agents", "", "", agents.Spread()},
		[]string{"both ends of the load", "", "", ends.Spread()}, []string{"the rest", "", "", rest.Spread()})
	return t
}

// bills are the CPU time that the hosts' tenants are billed on the hosts' nodes.
func bills(b *testing.B, l *lab.Lab, hosts []*lab.Host) (all []time.Duration) {
	b.Helper()
	for _, h := range hosts {
		c := h.Node.Tenant(h.Tenant.String()).Cost
		if c == nil {
			b.Fatalf("nothing is counted of %s", h.Tenant)
		}
		all = append(all, time.Duration(c.CPUMilliseconds)*time.Millisecond)
	}
	return all
}

func readCPU(b *testing.B) time.Duration {
	b.Helper()
	c, err := load.ReadCPU()
	lab.Check(b, err)
	return c.All
}

func readSched(b *testing.B, pid int) time.Duration {
	b.Helper()
	s, err := load.ReadSched(pid)
	lab.Check(b, err)
	return s.Ran
}
