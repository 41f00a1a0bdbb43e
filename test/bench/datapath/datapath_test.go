package datapath

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

var only = flag.String("only", "", "regular expression: the tables to measure, by title")

// way is what is between the two ends of the load.
type way struct {
	name string
	from *lab.Host
	to   netip.Addr
	// processes are the proxies on it.
	processes func() []int
}

// comparison is one table: ways that differ in one thing. The first is what the
// others are compared with.
type comparison struct {
	title, text string
	ways        []*way
}

func BenchmarkDatapath(b *testing.B) {
	// As wide as the hosts' links: the path's MTU is the tests' business.
	l := lab.NewWith(b, lab.Options{PathMTU: 1500, NoAccessLog: true})
	ld := newLoader(b)
	plain1 := l.AddPod(l.Node1, "plain1", 31)
	plain2 := l.AddPod(l.Node1, "plain2", 32)
	plain3 := l.AddPod(l.Node2, "plain3", 33)
	side := l.AddPod(l.Node1, "side", 34)
	sidecar := startSidecar(b, side)
	for _, h := range []*lab.Host{l.Outside, plain2, plain3, l.A2, l.B1, l.B2} {
		ld.serve(h)
	}
	for _, h := range []*lab.Host{plain1, side, l.A1} {
		roomForPorts(b, h)
	}
	publishService(b, l, l.B2)

	none := func() []int { return nil }
	proxies := func(hosts ...*lab.Host) func() []int {
		return func() (pids []int) {
			for _, h := range hosts {
				if pid := h.Node.Tenant(h.Tenant.String()).Generations[0].PID; !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
			return pids
		}
	}
	comparisons := []comparison{
		{"Steering", "From a pod to a host outside, through one Envoy that forwards TCP as it comes: only how the connection gets there differs.", []*way{
			{"iptables REDIRECT to a sidecar", side, l.Outside.V4, func() []int { return []int{sidecar} }},
			{"eBPF to the tenant's Envoy", l.A1, l.Outside.V4, proxies(l.A1)},
			{"no proxy", plain1, l.Outside.V4, none},
		}},
		{"The whole way between nodes", "From pod to pod of another node: eBPF, Envoy, HBONE with mutual TLS, Envoy.", []*way{
			{"no mesh", plain1, plain3.V4, none},
			{"mesh, pod address", l.A1, l.B2.V4, proxies(l.A1, l.B2)},
			{"mesh, service address", l.A1, l.B2.VIP.V4, proxies(l.A1, l.B2)},
		}},
		{"The whole way on one node", "", []*way{
			{"no mesh", plain1, plain2.V4, none},
			{"mesh, same tenant", l.A1, l.A2.V4, proxies(l.A1)},
			{"mesh, two tenants", l.A1, l.B1.V4, proxies(l.A1, l.B1)},
		}},
	}
	wanted, err := regexp.Compile(*only)
	lab.Check(b, err)
	comparisons = slices.DeleteFunc(comparisons, func(c comparison) bool { return !wanted.MatchString(c.title) })
	var tables []report.Table
	for _, c := range comparisons {
		tables = append(tables, ld.compare(c))
	}
	report.Publish(b, "datapath", tables...)
}

// compare measures all ways in alternation.
func (l *loader) compare(c comparison) report.Table {
	outcomes := make([][]outcome, len(kinds))
	for i := range outcomes {
		outcomes[i] = make([]outcome, len(c.ways))
	}
	for i := range c.ways { // what is found or made on demand
		for _, k := range kinds {
			l.run(c.ways[i], k, 100*time.Millisecond)
		}
	}
	for round := range *report.Rounds {
		for i, k := range kinds {
			for j := range c.ways {
				j = (j + round) % len(c.ways) // nobody is always the first
				outcomes[i][j].add(k, l.run(c.ways[j], k, *report.Duration))
			}
		}
		fmt.Fprintf(os.Stderr, "%s: round %d of %d\n", c.title, round+1, *report.Rounds)
	}
	t := report.Table{Title: c.title, Text: c.text, Header: []string{"load", "way", "requests/s or Gbit/s", "to the first", "p50 µs", "p99 µs",
		"CPU µs a request or ms a Gbit", "of it kernel", "to the first", "proxies"}}
	for i, k := range kinds {
		for j, w := range c.ways {
			t.Rows = append(t.Rows, outcomes[i][j].row(k, w.name, &outcomes[i][0]))
		}
	}
	return t
}

// publishService gives a pod's service the load's ports.
func publishService(b *testing.B, l *lab.Lab, h *lab.Host) {
	b.Helper()
	s := model.Service{Namespace: h.Identity.Namespace, Name: h.Name, VIPs: h.VIP.Both()}
	for _, port := range []uint16{load.RequestPort, load.BulkPort} {
		p := model.ServicePort{Port: port}
		for _, ip := range h.Both() {
			p.Endpoints = append(p.Endpoints, model.Endpoint{Addr: lab.At(ip, port), Identity: h.Identity})
		}
		s.Ports = append(s.Ports, p)
	}
	lab.Check(b, l.Store.SetService(s))
}
