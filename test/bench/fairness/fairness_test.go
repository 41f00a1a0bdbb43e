package fairness

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

var only = flag.String("only", "", "regular expression of what to measure, beside a tenant alone: aggression/isolation · redirection")

const (
	// The victim's load: far below what the machine does.
	rate, connections, newEvery = 300, 8, 4
	// proxyMemory of a tenant; a proxy of two tenants has what both have.
	proxyMemory = 256 << 20
	// generatorCPU of each end of the aggressor, in thousandths: both together leave
	// some of a CPU.
	generatorCPU = 400
	// settle is between the aggressor's beginning and the victim's.
	settle = time.Second
)

// bench is what measures.
type bench struct {
	*loader.Loader
	b *testing.B
	n *nodes
}

// victim and aggressor are where the ends of the loads are. What measures waits for
// nobody.
func victim() container.Limits {
	pods, _ := cpus()
	return container.Limits{Group: "victim", Memory: container.Pod.Memory, CPUWeight: 10000, CPUs: pods, Prompt: true}
}

func aggressor() container.Limits {
	pods, _ := cpus()
	return container.Limits{Memory: container.Pod.Memory, CPUMillis: generatorCPU, CPUs: pods}
}

// repeat makes a load until the context ends, again whenever it fails: an aggressor
// whose proxy ends doesn't give up.
func (g *bench) repeat(ctx context.Context, h *lab.Host, what string, o load.Options) {
	for ctx.Err() == nil {
		var ignored any
		g.Begin(ctx, h, what, o, "aggressor", aggressor()).Wait(&ignored)
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// useServices has team-b's proxy hold the services that change: it has what was asked
// for once.
func (g *bench) useServices() {
	for i := range services {
		g.Exchange(g.n.B1, load.PacedOptions{To: lab.At(serviceVIP(i).V4, load.RequestPort), Rate: 100, Connections: 1, Duration: 10 * time.Millisecond, Patience: 5 * time.Second}, "services", container.Pod)
	}
}

// measured is what the rounds found of one aggression with one variant.
type measured struct {
	p50, p99, p999 report.Samples // ms
	// wait is of the victim's proxies, in µs for each time that they got a CPU; late is
	// what the victim's client was late by itself at the 99th percentile, in µs; cpu is
	// that of the victim's proxies, in ms for 1,000 requests, where they are its alone.
	wait, late, cpu report.Samples
	// tracked are the connections in the node's table in the end.
	tracked     report.Samples
	failed, all int
	first       string
	// ended counts measurements that a proxy of the victim didn't live through.
	ended int
}

func BenchmarkFairness(b *testing.B) {
	pods, _ := cpus()
	g := &bench{Loader: loader.New(b), b: b}
	g.n = newNodes(b)
	container.Pin(b, os.Getpid(), pods...) // it is the operator, too
	for _, ends := range []struct{ a, b way }{{g.n.way(variants[0], "team-a"), g.n.way(variants[0], "team-b")}, {g.n.sidecars["team-a"], g.n.sidecars["team-b"]}} {
		g.Serve(ends.a.to, "serve", ends.a.to.Name+"-serve", victim())
		g.Serve(ends.b.to, "serve", ends.b.to.Name+"-serve", aggressor())
		g.Serve(ends.b.to, "flow", ends.b.to.Name+"-flow", aggressor())
		loader.RoomForPorts(b, ends.a.from)
		loader.RoomForPorts(b, ends.b.from)
	}
	for i := range services {
		lab.Check(b, g.n.Store.SetService(service(g.n.Lab, i, 0)))
	}
	publishHuge(g)
	wanted, err := regexp.Compile(*only)
	lab.Check(b, err)
	found := make([][]measured, len(aggressions))
	for i := range found {
		found[i] = make([]measured, len(variants))
	}
	for round := range *report.Rounds {
		for j := range variants {
			j = (j + round) % len(variants) // nobody is always the first
			v, ready := variants[j], false
			for i, a := range aggressions {
				if a.meshOnly && v.sidecars || v.pace > 0 && !a.begins || !wanted.MatchString(a.name+"/"+v.name()) {
					continue
				}
				if !ready {
					g.n.use(v)
					ready = true
				}
				if a.meshOnly {
					g.useServices() // a proxy that ended under what was before has none
				}
				g.measure(v, a, &found[i][j])
				found[i][j].tracked = append(found[i][j].tracked, g.tracked())
			}
		}
		fmt.Fprintf(os.Stderr, "fairness: round %d of %d\n", round+1, *report.Rounds)
	}
	report.Publish(b, "fairness", results(found)...)
}

// measure has the victim at work while team-b does something.
func (g *bench) measure(v variant, a aggression, m *measured) {
	w := g.n.way(v, "team-a")
	// A first one makes what is made on demand.
	o := load.PacedOptions{To: lab.At(w.to.V4, load.RequestPort), Rate: rate, Connections: connections, NewEvery: newEvery, Duration: 100 * time.Millisecond, Patience: 5 * time.Second}
	g.Exchange(w.from, o, "victim", victim())
	g.forgetTracked()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); a.run(ctx, g, g.n.way(v, "team-b")) }()
	time.Sleep(settle)
	proxies := w.proxies()
	before, errBefore := load.ReadSched(proxies...)
	o.Duration, o.Patience = 3**report.Duration, time.Second
	r := g.Exchange(w.from, o, "victim", victim())
	after, errAfter := load.ReadSched(proxies...)
	cancel()
	<-ended
	m.add(r)
	err := cmp.Or(errBefore, errAfter)
	switch {
	case err == nil:
		m.addSched(after.Minus(before), r.Requests)
	case v.shared():
		// With the neighbour's memory its own has run out: that is a result.
		m.ended++
	default:
		g.b.Fatalf("%s, %s: a proxy of the victim ended: %v", v.name(), a.name, err)
	}
}

// forgetTracked empties the nodes' tables of connections: what was left would be the next
// one's.
func (g *bench) forgetTracked() {
	for _, h := range []*lab.Node{g.n.Node1, g.n.Node2} {
		h.Do(g.b, func() { lab.Check(g.b, netlink.ConntrackTableFlush(netlink.ConntrackTable)) })
	}
}

// tracked are the connections in the table of the node that the loads come from.
func (g *bench) tracked() (n float64) {
	g.n.Node1.Do(g.b, func() {
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		lab.Check(g.b, err)
		n, err = strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		lab.Check(g.b, err)
	})
	return n
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (m *measured) addSched(s load.Sched, requests int) {
	m.wait = append(m.wait, 1000*ms(s.Waited)/float64(max(s.Turns, 1)))
	m.cpu = append(m.cpu, ms(s.Ran)/float64(requests)*1000)
}

func (m *measured) add(r load.PacedResult) {
	m.p50, m.p99, m.p999 = append(m.p50, ms(r.P50)), append(m.p99, ms(r.P99)), append(m.p999, ms(r.P999))
	m.late = append(m.late, 1000*ms(r.Late))
	m.failed, m.all = m.failed+r.Failed, m.all+r.Requests
	if m.first == "" {
		m.first = r.FirstFailure
	}
}

func (m *measured) failures() string {
	s := "0"
	if m.failed > 0 {
		s = fmt.Sprintf("%d of %d", m.failed, m.all)
	}
	if m.ended > 0 {
		s += fmt.Sprintf(", a proxy ended in %d of %d rounds", m.ended, len(m.p99))
	}
	return s
}
