package fairness

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// aggression is what team-b does meanwhile, until the context ends.
type aggression struct {
	name string
	run  func(context.Context, *bench, way)
	// meshOnly: sidecars here have a static configuration.
	meshOnly bool
	// begins: what it has too much of are beginnings, which a pace bounds.
	begins bool
}

var aggressions = []aggression{
	{"nothing", func(ctx context.Context, _ *bench, _ way) { <-ctx.Done() }, false, true},
	{"requests as fast as they go, 64 connections", flood(load.RequestPort, load.Options{Connections: 64}), false, false},
	{"connections as fast as they go, 64 at a time", flood(load.RequestPort, load.Options{Connections: 64, New: true}), false, true},
	{"four streams as fast as they go", flood(load.BulkPort, load.Options{Bulk: true}, load.Options{Bulk: true}, load.Options{Bulk: true}, load.Options{Bulk: true}), false, false},
	{"HTTP with 50 KiB of headers and 1 MiB of body, 8 at a time", huge, false, false},
	{"300 connections whose answers nobody reads", func(ctx context.Context, g *bench, w way) {
		g.repeat(ctx, w.from, "unread", load.Options{To: lab.At(w.to.V4, load.FlowPort), Connections: 300, Duration: time.Minute})
	}, false, false},
	{"20 changes a second of 200 services' endpoints", churn, true, false},
	{"SYNs and UDP from all ports, as many as conntrack holds", scan, false, true},
}

// flood makes loads of these kinds, each again when it ends.
func flood(port uint16, all ...load.Options) func(context.Context, *bench, way) {
	return func(ctx context.Context, g *bench, w way) {
		var running sync.WaitGroup
		for _, o := range all {
			o.To, o.Duration = lab.At(w.to.V4, port), time.Minute
			running.Go(func() { g.repeat(ctx, w.from, "run", o) })
		}
		running.Wait()
	}
}

// huge has team-b's proxy read what it sends; sidecars pass it on as it comes.
func huge(ctx context.Context, g *bench, w way) {
	to := lab.At(w.to.V4, load.BulkPort)
	if w.from == g.n.B1 {
		to = lab.At(hugeVIP.V4, load.BulkPort)
	}
	g.repeat(ctx, w.from, "huge", load.Options{To: to, Connections: 8, Duration: time.Minute})
}

var hugeVIP = lab.Addresses("10.96.8.1", "fd96::8:1")

// publishHuge makes the service whose requests are read.
func publishHuge(b *bench) {
	h := b.n.B2
	key := model.ServiceKey{Namespace: h.Identity.Namespace, Name: "huge"}
	lab.Check(b.b, b.n.Store.SetService(model.Service{Namespace: key.Namespace, Name: key.Name, VIPs: hugeVIP.Both(), Ports: []model.ServicePort{{
		Port: load.BulkPort, Protocol: model.ProtocolHTTP, Endpoints: []model.Endpoint{{Addr: lab.At(h.V4, load.BulkPort), Identity: h.Identity}}}}}))
	lab.Check(b.b, b.n.Store.SetRoutings(key, []model.Routing{{Port: load.BulkPort, Rules: []model.Rule{{
		Match:  model.RequestMatch{Path: model.PathMatch{Value: "/"}},
		Action: &model.Action{Backends: []model.Backend{{To: model.ServicePortKey{ServiceKey: key, Port: load.BulkPort}, Weight: 1}}},
	}}}}))
}

// scan fills what is kept for connections that nobody goes on with: the proxy's
// listener, and the node's conntrack and its ports by way of what the node hides.
func scan(ctx context.Context, g *bench, w way) {
	var running sync.WaitGroup
	running.Go(func() {
		g.repeat(ctx, w.from, "scan", load.Options{From: w.from.V4, To: lab.At(w.to.V4, load.RequestPort), Duration: time.Minute})
	})
	running.Go(func() {
		g.repeat(ctx, w.from, "scan", load.Options{From: w.from.V4, To: lab.At(g.n.Outside.V4, 0), Duration: time.Minute})
	})
	running.Wait()
}

// churn changes the endpoints of services of team-b, which its proxy uses.
func churn(ctx context.Context, g *bench, _ way) {
	tick := time.NewTicker(time.Second / 20)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			for i := range services {
				lab.Check(g.b, g.n.Store.SetService(service(g.n.Lab, i, n)))
			}
		}
	}
}

const services = 200

func serviceVIP(i int) lab.Pair {
	return lab.Addresses(fmt.Sprintf("10.96.7.%d", i), fmt.Sprintf("fd96::7:%d", i))
}

func service(l *lab.Lab, i, version int) model.Service {
	s := model.Service{Namespace: l.B2.Identity.Namespace, Name: fmt.Sprintf("churn-%d", i), VIPs: serviceVIP(i).Both()}
	port := model.ServicePort{Port: load.RequestPort}
	for k := range 1 + version%2 {
		port.Endpoints = append(port.Endpoints, model.Endpoint{Addr: lab.At([]*lab.Host{l.B2, l.B1}[k].V4, load.RequestPort), Identity: l.B2.Identity})
	}
	s.Ports = []model.ServicePort{port}
	return s
}
