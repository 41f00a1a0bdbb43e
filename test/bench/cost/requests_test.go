package cost

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/bench/sidecar"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// busy connections of each of the two teams, with a request under way on each.
const busy = 16

// way is how the teams' requests get to the other node.
type way struct {
	name  string
	pairs [][2]*lab.Host
	// use has it ready, and returns the proxies on it.
	use func() []int
	// Of each round: requests a second, and milliseconds of CPU for 1,000 requests, of
	// the proxies and of the whole machine.
	rate, proxies, machine report.Samples
}

func BenchmarkRequests(b *testing.B) {
	l := lab.NewWith(b, lab.Options{PathMTU: 1500, NoAccessLog: true})
	ld := loader.New(b)
	teams := [][2]*lab.Host{{l.A1, l.A3}, {l.B1, l.B2}}
	var besides [][2]*lab.Host
	var side []int
	for i, pair := range teams {
		var pods [2]*lab.Host
		for end, n := range []*lab.Node{l.Node1, l.Node2} {
			h := l.AddPod(n, fmt.Sprint("side", 2*i+end), 41+2*i+end)
			side = append(side, sidecar.Start(b, h, sidecar.Options{Name: "sidecar-" + h.Name, Group: "sidecars-" + n.Name, Authority: l.Authority,
				Identity: model.Identity{TrustDomain: lab.TrustDomain, Namespace: pair[0].Identity.Namespace, ServiceAccount: "side"}}))
			pods[end] = h
		}
		besides = append(besides, pods)
	}
	for _, pairs := range [][][2]*lab.Host{teams, besides} {
		for _, p := range pairs {
			ld.Serve(p[1], "serve", "serve-"+p[1].Name, container.Pod)
		}
	}
	by := func(tenants int, tenant func(*lab.Host) model.Tenant) func() []int {
		return func() []int {
			for _, p := range l.Pods {
				p.Tenant = tenant(p)
			}
			l.Publish()
			settle(b, l.Node1, tenants)
			settle(b, l.Node2, tenants)
			return append(pids(l.Node1), pids(l.Node2)...)
		}
	}
	ways := []*way{
		{name: "a proxy for each tenant", pairs: teams, use: by(len(teams), func(p *lab.Host) model.Tenant { return model.NamespaceTenant(p.Identity.Namespace) })},
		{name: "a shared proxy", pairs: teams, use: by(1, func(*lab.Host) model.Tenant { return model.Tenant{Scope: model.ScopeNode} })},
		{name: "sidecars", pairs: besides, use: func() []int { return side }},
	}
	for round := range *report.Rounds {
		for k := range ways {
			w := ways[(k+round)%len(ways)]
			w.measure(b, ld, w.use())
		}
		fmt.Fprintf(os.Stderr, "requests: round %d of %d\n", round+1, *report.Rounds)
	}
	t := report.Table{Title: "CPU for 1,000 requests at full load",
		Text:   fmt.Sprintf("Two teams of a node make requests to the other one as fast as they are answered, on %d connections each, which stay: through a proxy for each on both nodes, through one that they share, and through a sidecar at each of the four pods. Proxies' CPU is the scheduler's count, the machine's is all of /proc/stat with both ends of the load.", busy),
		Header: []string{"", "requests/s", "proxies' CPU ms", "to the shared proxy", "to sidecars", "the machine's CPU ms"}}
	shared, sidecars := ways[1], ways[2]
	for _, w := range ways {
		t.Rows = append(t.Rows, []string{w.name, w.rate.Spread(), w.proxies.Spread(), w.proxies.Per(shared.proxies).String(), w.proxies.Per(sidecars.proxies).String(), w.machine.Spread()})
	}
	report.Publish(b, "cost-requests", t)
}

// measure has both teams load a way at once.
func (w *way) measure(b *testing.B, ld *loader.Loader, proxies []int) {
	b.Helper()
	run := func(d time.Duration) (requests int) {
		var loads []*loader.Load
		for _, p := range w.pairs {
			o := load.Options{To: lab.At(p[1].V4, load.RequestPort), Connections: busy, Duration: d}
			loads = append(loads, ld.Begin(context.Background(), p[0], "run", o, "client-"+p[0].Name, container.Pod))
		}
		for _, running := range loads {
			var r load.Result
			if err := running.Wait(&r); err != nil {
				b.Fatalf("%s: %v", w.name, err)
			}
			requests += r.Requests
		}
		return requests
	}
	run(200 * time.Millisecond) // what is made on demand
	before, err := load.ReadCPU(proxies...)
	lab.Check(b, err)
	begun := time.Now()
	thousands := float64(run(*report.Duration)) / 1000
	took := time.Since(begun).Seconds()
	after, err := load.ReadCPU(proxies...)
	lab.Check(b, err)
	milliseconds := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	w.rate = append(w.rate, 1000*thousands/took)
	w.proxies = append(w.proxies, milliseconds(after.Processes-before.Processes)/thousands)
	w.machine = append(w.machine, milliseconds(after.All-before.All)/thousands)
}
