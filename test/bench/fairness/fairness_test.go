package fairness

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

const (
	// The victim's load: far below what the machine does.
	rate, connections, newEvery = 300, 8, 4
	// proxyMemory of a tenant; a proxy of two tenants has what both have.
	proxyMemory = 256 << 20
	// generatorCPU of each end of the aggressor, in thousandths: its load is to be on
	// the proxies, not on the CPUs.
	generatorCPU = 400
	// settle is between the aggressor's beginning and the victim's.
	settle = time.Second
)

// topology says who shares a proxy, and what team-b's may use.
type topology struct {
	name      string
	tenant    func(*lab.Host) model.Tenant
	cpuMillis int64
}

func ofNode(*lab.Host) model.Tenant { return model.Tenant{Scope: model.ScopeNode} }
func ofNamespace(p *lab.Host) model.Tenant {
	return model.NamespaceTenant(p.Identity.Namespace)
}

var topologies = []topology{
	{"Node", ofNode, 0},
	{"Namespace", ofNamespace, 0},
	{"Namespace, cpu.limit 250m", ofNamespace, 250},
}

// aggression is what team-b does meanwhile, until the context ends.
type aggression struct {
	name string
	run  func(context.Context, *lab.Lab, *generators)
}

var aggressions = []aggression{
	{"nothing", func(ctx context.Context, _ *lab.Lab, _ *generators) { <-ctx.Done() }},
	{"requests as fast as they go, 64 connections", flood(load.Options{Connections: 64})},
	{"connections as fast as they go, 64 at a time", flood(load.Options{Connections: 64, New: true})},
	{"four streams as fast as they go", flood(load.Options{Bulk: true}, load.Options{Bulk: true}, load.Options{Bulk: true}, load.Options{Bulk: true})},
	{"300 connections whose answers nobody reads", func(ctx context.Context, l *lab.Lab, g *generators) {
		g.repeat(ctx, l.B1, "unread", load.Options{To: lab.At(l.B2.V4, load.FlowPort), Connections: 300, Duration: time.Minute})
	}},
	{"20 changes a second of 200 services' endpoints", churn},
}

// flood makes loads of these kinds, each again when it ends.
func flood(all ...load.Options) func(context.Context, *lab.Lab, *generators) {
	return func(ctx context.Context, l *lab.Lab, g *generators) {
		done := make(chan struct{})
		for _, o := range all {
			o.To, o.Duration = lab.At(l.B2.V4, load.RequestPort), time.Minute
			if o.Bulk {
				o.To = lab.At(l.B2.V4, load.BulkPort)
			}
			go func() { g.repeat(ctx, l.B1, "run", o); done <- struct{}{} }()
		}
		for range all {
			<-done
		}
	}
}

// churn changes the endpoints of services of team-b, which its proxy uses.
func churn(ctx context.Context, l *lab.Lab, g *generators) {
	tick := time.NewTicker(time.Second / 20)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			for i := range services {
				lab.Check(g.b, l.Store.SetService(service(l, i, n)))
			}
		}
	}
}

const services = 200

func service(l *lab.Lab, i, version int) model.Service {
	s := model.Service{Namespace: l.B2.Identity.Namespace, Name: fmt.Sprintf("churn-%d", i), VIPs: lab.Addresses(fmt.Sprintf("10.96.7.%d", i), fmt.Sprintf("fd96::7:%d", i)).Both()}
	port := model.ServicePort{Port: load.RequestPort}
	for k := range 1 + version%2 {
		port.Endpoints = append(port.Endpoints, model.Endpoint{Addr: lab.At([]*lab.Host{l.B2, l.B1}[k].V4, load.RequestPort), Identity: l.B2.Identity})
	}
	s.Ports = []model.ServicePort{port}
	return s
}

// measured is what the rounds found of one aggression with one topology.
type measured struct {
	p50, p99, p999 report.Samples // µs
	failed, all    int
	first          string
}

func BenchmarkFairness(b *testing.B) {
	l := lab.NewWith(b, lab.Options{PathMTU: 1500, NoAccessLog: true})
	g := &generators{loader.New(b), b}
	for _, h := range []*lab.Host{l.A3, l.B2} {
		g.Serve(h, "serve", h.Name+"-serve", limits(0))
	}
	g.Serve(l.B2, "flow", l.B2.Name+"-flow", limits(generatorCPU))
	for _, h := range []*lab.Host{l.A1, l.B1} {
		loader.RoomForPorts(b, h)
	}
	for i := range services {
		lab.Check(b, l.Store.SetService(service(l, i, 0)))
	}
	found := make([][]measured, len(aggressions))
	for i := range found {
		found[i] = make([]measured, len(topologies))
	}
	for round := range *report.Rounds {
		for j := range topologies {
			j = (j + round) % len(topologies) // nobody is always the first
			share(b, l, topologies[j])
			g.useServices(l)
			for i, a := range aggressions {
				found[i][j].add(measure(l, g, a))
			}
		}
		fmt.Fprintf(os.Stderr, "fairness: round %d of %d\n", round+1, *report.Rounds)
	}
	t := report.Table{Title: "A neighbour that misbehaves",
		Text: fmt.Sprintf("team-a makes %d requests a second from node to node, on %d connections and every %dth on one of its own, and counts from when a request was due; team-b, on the same two nodes, does what the first column says, its load bounded to %d thousandths of a CPU at either end.",
			rate, connections, newEvery, generatorCPU),
		Header: []string{"team-b", "isolation", "p50 µs", "p99 µs", "to alone", "p99.9 µs", "failed"}}
	for i, a := range aggressions {
		for j, top := range topologies {
			m := found[i][j]
			t.Rows = append(t.Rows, []string{a.name, top.name, m.p50.String(), m.p99.Spread(), m.p99.Per(found[0][j].p99).String(), m.p999.Spread(), m.failures()})
		}
	}
	report.Publish(b, "fairness", t)
}

func (m *measured) add(r load.PacedResult) {
	micros := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	m.p50, m.p99, m.p999 = append(m.p50, micros(r.P50)), append(m.p99, micros(r.P99)), append(m.p999, micros(r.P999))
	m.failed, m.all = m.failed+r.Failed, m.all+r.Requests
	if m.first == "" {
		m.first = r.FirstFailure
	}
}

func (m *measured) failures() string {
	if m.failed == 0 {
		return "0"
	}
	return fmt.Sprintf("%d of %d", m.failed, m.all)
}

// measure has the victim at work while team-b does something.
func measure(l *lab.Lab, g *generators, a aggression) load.PacedResult {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); a.run(ctx, l, g) }()
	time.Sleep(settle)
	r := g.paced(l.A1, load.PacedOptions{To: lab.At(l.A3.V4, load.RequestPort), Rate: rate, Connections: connections, NewEvery: newEvery, Duration: 3 * *report.Duration})
	cancel()
	<-ended
	return r
}

// share gives all pods the proxies of a topology, and waits until those alone serve.
func share(b *testing.B, l *lab.Lab, top topology) {
	b.Helper()
	for _, p := range l.Pods {
		p.Tenant = top.tenant(p)
	}
	l.Publish()
	for _, n := range []*lab.Node{l.Node1, l.Node2} {
		n.Limits = map[string]v1alpha1.Limits{"team-a": {MemoryMax: proxyMemory}, "team-b": {MemoryMax: proxyMemory, CPUMillis: top.cpuMillis}, "_node": {MemoryMax: 2 * proxyMemory}}
		n.WritePlan()
	}
	for _, n := range []*lab.Node{l.Node1, l.Node2} {
		var tenants []string
		for _, p := range n.Planned {
			if name := p.Tenant.String(); !slices.Contains(tenants, name) {
				tenants = append(tenants, name)
			}
		}
		lab.Eventually(b, "isolation "+top.name, func() error {
			i, err := n.Inspect()
			if err != nil {
				return err
			}
			for _, t := range i.Tenants {
				if !slices.Contains(tenants, t.Name) || !t.Ready || t.Name == "team-b" && t.Limits.CPUMillis != top.cpuMillis {
					return fmt.Errorf("%s: ready %v, %s, limits %+v", t.Name, t.Ready, t.Reason, t.Limits)
				}
			}
			return nil
		})
	}
}
