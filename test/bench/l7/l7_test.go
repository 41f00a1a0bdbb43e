package l7

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

var (
	only = flag.String("only", "", "regular expression of the ways to measure")
	perf = flag.String("perf", "", "folder: record there with perf what the CPUs do in the last round")
)

// way is what is between the two ends of the load.
type way struct {
	name     string
	protocol load.Protocol
	// routes of the port; 0 for one that isn't HTTP.
	routes int
	port   uint16
	// byHand has Envoys that aren't the mesh's.
	byHand bool
}

var ways = []way{
	{"L4", load.HTTP1, 0, 9200, false},
	{"HTTP/1.1, one route", load.HTTP1, 1, 9201, false},
	{"HTTP/1.1, 500 routes", load.HTTP1, many, 9202, false},
	{"HTTP/1.1, by hand", load.HTTP1, 1, 9203, true},
	{"HTTP/2, one route", load.HTTP2, 1, 9204, false},
	{"HTTP/2, 500 routes", load.HTTP2, many, 9205, false},
	{"HTTP/2, by hand", load.HTTP2, 1, 9206, true},
	{"gRPC, one route", load.GRPC, 1, 9207, false},
	{"gRPC, 500 routes", load.GRPC, many, 9208, false},
	{"gRPC, by hand", load.GRPC, 1, 9209, true},
}

// many routes, of which the one that is asked for comes last.
const many = 500

var connections = []int{1, 16, 64}

// samples are what the rounds measured of one way and number of connections.
type samples struct{ rate, p50, p99, cpu report.Samples }

func BenchmarkL7(b *testing.B) {
	l := lab.NewWith(b, lab.Options{PathMTU: 1500, NoAccessLog: true})
	ld := loader.New(b)
	client, server := l.AddPod(l.Node1, "client", 31), l.AddPod(l.Node2, "server", 32)
	for _, h := range []*lab.Host{l.B2, server} {
		ld.Serve(h, "serve", h.Name, container.Pod)
	}
	byHand := startByHand(b, client, server)
	publish(b, l, l.B2, ways)
	mesh := []int{l.Node1.Tenant(l.A1.Tenant.String()).Generations[0].PID, l.Node2.Tenant(l.B2.Tenant.String()).Generations[0].PID}
	run := func(w way, n int, d time.Duration) load.Result {
		if w.byHand {
			return run(b, ld, client, load.Options{To: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), w.port), Connections: n, Protocol: w.protocol, Duration: d, Processes: byHand})
		}
		return run(b, ld, l.A1, load.Options{To: netip.AddrPortFrom(l.B2.VIP.V4, w.port), Connections: n, Protocol: w.protocol, Duration: d, Processes: mesh})
	}
	wanted, err := regexp.Compile(*only)
	lab.Check(b, err)
	var measured []way
	for _, w := range ways {
		if wanted.MatchString(w.name) {
			measured = append(measured, w)
			run(w, 64, 200*time.Millisecond) // the first: it must not fail either
		}
	}
	all := map[int][]samples{}
	for _, n := range connections {
		all[n] = make([]samples, len(measured))
	}
	for round := range *report.Rounds {
		for _, n := range connections {
			for i := range measured {
				i = (i + round) % len(measured)
				stop := func() {}
				if round == *report.Rounds-1 && *perf != "" && n == 16 {
					stop = loader.Record(b, *perf, measured[i].name)
				}
				r, s := run(measured[i], n, *report.Duration), &all[n][i]
				stop()
				s.rate = append(s.rate, float64(r.Requests)/r.Duration.Seconds())
				s.p50, s.p99 = append(s.p50, float64(r.P50)/1e3), append(s.p99, float64(r.P99)/1e3)
				s.cpu = append(s.cpu, float64(r.CPU.Processes)/1e3/float64(r.Requests))
			}
		}
		fmt.Fprintf(os.Stderr, "l7: round %d of %d\n", round+1, *report.Rounds)
	}
	t := report.Table{Title: "Requests that proxies read", Text: "From pod to pod of another node by a service's address, which leads there by its routes; of 500, the last one matches. By hand is the same Envoy twice, configured for nothing else: a connection manager with one route, mutual TLS for each connection, and TCP behind it; the client is beside the first one. CPU is that of both proxies. What is compared is compared round by round.",
		Header: []string{"connections", "way", "requests/s", "p50 µs", "p99 µs", "CPU ms per 1,000 requests", "CPU to one route"}}
	for _, n := range connections {
		for i, w := range measured {
			one := i
			for j, o := range measured {
				if o.routes == 1 && !o.byHand && o.protocol == w.protocol {
					one = j
				}
			}
			s := all[n][i]
			t.Rows = append(t.Rows, []string{fmt.Sprint(n), w.name, s.rate.Spread(), s.p50.String(), s.p99.String(), s.cpu.Spread(), s.cpu.Per(all[n][one].cpu).String()})
		}
	}
	report.Publish(b, "l7", t)
}

// publish gives a pod's service a port for each way of the mesh.
func publish(b *testing.B, l *lab.Lab, h *lab.Host, ways []way) {
	b.Helper()
	key := model.ServiceKey{Namespace: h.Identity.Namespace, Name: h.Name}
	s := model.Service{Namespace: key.Namespace, Name: key.Name, VIPs: h.VIP.Both()}
	var routings []model.Routing
	for _, w := range ways {
		if w.byHand {
			continue
		}
		p := model.ServicePort{Port: w.port, Protocol: model.ProtocolHTTP}
		for _, ip := range h.Both() {
			p.Endpoints = append(p.Endpoints, model.Endpoint{Addr: lab.At(ip, targets[w.protocol]), Identity: h.Identity})
		}
		s.Ports = append(s.Ports, p)
		if w.routes == 0 {
			continue
		}
		r := model.Routing{Port: w.port}
		for i := range w.routes {
			path := "/"
			if i < w.routes-1 {
				path = fmt.Sprintf("/service-%d/api", i)
			}
			r.Rules = append(r.Rules, model.Rule{
				Match:  model.RequestMatch{Path: model.PathMatch{Value: path}},
				Action: &model.Action{Backends: []model.Backend{{To: model.ServicePortKey{ServiceKey: key, Port: w.port}, Weight: 1}}},
			})
		}
		routings = append(routings, r)
	}
	lab.Check(b, l.Store.SetService(s))
	lab.Check(b, l.Store.SetRoutings(key, routings))
}

// targets are the ports of the load's server.
var targets = map[load.Protocol]uint16{load.HTTP1: load.HTTPPort, load.HTTP2: load.HTTP2Port, load.GRPC: load.HTTP2Port}

// run makes load, of which no request may fail.
func run(b *testing.B, ld *loader.Loader, from *lab.Host, o load.Options) (r load.Result) {
	b.Helper()
	if err := ld.Begin(b.Context(), from, "run", o, "load", container.Pod).Wait(&r); err != nil {
		b.Fatalf("%+v: %v", o, err)
	}
	return r
}
