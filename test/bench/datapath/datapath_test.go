package datapath

import (
	"cmp"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/bench/sidecar"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

var (
	only = flag.String("only", "", "regular expression of what to measure: title/load/way")
	perf = flag.String("perf", "", "folder: record there with perf what the CPUs do in the last round")
	also = flag.Bool("tried", false, "measure settings of the nodes, too, which the product leaves alone")
	// BBR sets a timer for what it may not send yet, which is dear in a virtual machine.
	congestion = flag.String("congestion", "", "TCP's congestion control of pods, hosts and proxies, for example reno; the machine's own by default")
)

// way is what is between the two ends of the load.
type way struct {
	name string
	from *lab.Host
	to   netip.Addr
	// processes are the proxies on it.
	processes func() []int
	// redirection of from's node; the zero value is EBPF.
	redirection v1alpha1.Redirection
	// setting of the nodes, if there is one.
	setting *setting
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
	ld := &bench{Loader: loader.New(b), b: b}
	plain1 := l.AddPod(l.Node1, "plain1", 31)
	plain2 := l.AddPod(l.Node1, "plain2", 32)
	plain3 := l.AddPod(l.Node2, "plain3", 33)
	side := l.AddPod(l.Node1, "side", 34)
	proxy := sidecar.Start(b, side, sidecar.Options{})
	for _, h := range []*lab.Host{l.Outside, plain2, plain3, l.A2, l.B1, l.B2} {
		ld.servers = append(ld.servers, ld.Serve(h, "serve", h.Name, container.Pod))
	}
	for _, h := range []*lab.Host{plain1, side, l.A1} {
		loader.RoomForPorts(b, h)
	}
	publishService(b, l, l.B2)
	algorithm := congestionControl(b, l, plain1, plain2, plain3, side)

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
		{"Steering", "From a pod to a host outside, through one Envoy that forwards TCP as it comes: only how the connection gets there differs. Here and below TCP's congestion control is " + algorithm + ".", []*way{
			{name: "iptables REDIRECT to a sidecar", from: side, to: l.Outside.V4, processes: func() []int { return []int{proxy} }},
			{name: "eBPF to the tenant's Envoy", from: l.A1, to: l.Outside.V4, processes: proxies(l.A1)},
			{name: "Netfilter to the tenant's Envoy", from: l.A1, to: l.Outside.V4, processes: proxies(l.A1), redirection: v1alpha1.RedirectionNetfilter},
			{name: "no proxy", from: plain1, to: l.Outside.V4, processes: none},
		}},
		{"The whole way between nodes", "From pod to pod of another node: eBPF, Envoy, HBONE with mutual TLS, Envoy. Two Envoys that forward TCP as it comes, by iptables and eBPF, show what TLS and HTTP/2 add, and what they save.", []*way{
			{name: "no mesh", from: plain1, to: plain3.V4, processes: none},
			{name: "two Envoys, plain TCP", from: side, to: l.B2.V4, processes: func() []int { return append(proxies(l.B2)(), proxy) }},
			{name: "mesh, pod address", from: l.A1, to: l.B2.V4, processes: proxies(l.A1, l.B2)},
			{name: "mesh, service address", from: l.A1, to: l.B2.VIP.V4, processes: proxies(l.A1, l.B2)},
		}},
		{"The whole way on one node", "", []*way{
			{name: "no mesh", from: plain1, to: plain2.V4, processes: none},
			{name: "mesh, same tenant", from: l.A1, to: l.A2.V4, processes: proxies(l.A1)},
			{name: "mesh, two tenants", from: l.A1, to: l.B1.V4, processes: proxies(l.A1, l.B1)},
		}},
	}
	if *also {
		comparisons = append(comparisons, tried(b, l, way{from: l.A1, to: l.B2.V4, processes: proxies(l.A1, l.B2)}))
	}
	var tables []report.Table
	for _, c := range comparisons {
		if t := ld.compare(c); len(t.Rows) > 0 {
			tables = append(tables, t)
		}
	}
	report.Publish(b, "datapath", tables...)
}

// compare measures all ways in alternation.
func (l *bench) compare(c comparison) report.Table {
	b := l.b
	wanted, err := regexp.Compile(*only)
	lab.Check(b, err)
	type measurement struct{ kind, way int }
	outcomes := map[measurement]*outcome{}
	for i, k := range kinds {
		for j, w := range c.ways {
			if wanted.MatchString(c.title + "/" + k.name + "/" + w.name) {
				outcomes[measurement{i, j}] = &outcome{}
				l.steer(w)
				l.run(w, k, 100*time.Millisecond) // what is found or made on demand
			}
		}
	}
	for round := range *report.Rounds {
		for i, k := range kinds {
			for j := range c.ways {
				m := measurement{i, (j + round) % len(c.ways)} // nobody is always the first
				if o := outcomes[m]; o != nil {
					l.steer(c.ways[m.way])
					stop := func() {}
					if round == *report.Rounds-1 && *perf != "" {
						stop = loader.Record(b, *perf, c.title+" "+k.name+" "+c.ways[m.way].name)
					}
					o.add(k, l.run(c.ways[m.way], k, *report.Duration))
					stop()
				}
			}
		}
		fmt.Fprintf(os.Stderr, "%s: round %d of %d\n", c.title, round+1, *report.Rounds)
	}
	t := report.Table{Title: c.title, Text: c.text, Header: []string{"load", "way", "requests/s or Gbit/s", "to the first", "p50 µs", "p99 µs",
		"CPU µs a request or ms a Gbit", "of it kernel", "to the first", "proxies"}}
	for i, k := range kinds {
		for j, w := range c.ways {
			if o := outcomes[measurement{i, j}]; o != nil {
				t.Rows = append(t.Rows, o.row(k, w.name, outcomes[measurement{i, 0}]))
			}
		}
	}
	return t
}

// steer makes the node of the way's pod use its redirection, and the nodes have its
// setting.
func (l *bench) steer(w *way) {
	b := l.b
	b.Helper()
	if l.setting != w.setting {
		if l.setting != nil {
			l.setting.off()
		}
		if l.setting = w.setting; l.setting != nil {
			l.setting.on()
		}
	}
	n, r := w.from.Node, cmp.Or(w.redirection, v1alpha1.RedirectionEBPF)
	if n.Redirection == r {
		return
	}
	n.Redirection = r
	n.WritePlan()
	lab.Eventually(b, "the redirection by "+string(r), func() error {
		if i, err := n.Inspect(); err != nil || i.Redirection != string(r) || i.Problem != "" {
			return fmt.Errorf("it is by %s: %s, %v", i.Redirection, i.Problem, err)
		}
		return nil
	})
	n.WaitReady()
	// The first packet after a change may be lost, and comes again a second later.
	l.run(w, kinds[0], 50*time.Millisecond)
}

// congestionControl sets the algorithm that is asked for, and says which it is.
func congestionControl(b *testing.B, l *lab.Lab, plain ...*lab.Host) (algorithm string) {
	b.Helper()
	const setting = "ipv4/tcp_congestion_control"
	namespaces := []*lab.Namespace{l.Outside.Namespace}
	for _, h := range slices.Concat(l.Pods, plain) {
		namespaces = append(namespaces, h.Namespace)
	}
	for _, n := range []*lab.Node{l.Node1, l.Node2} {
		for _, tenant := range []string{"team-a", "team-b"} {
			namespaces = append(namespaces, n.Proxy(tenant))
		}
	}
	for _, n := range namespaces {
		n.Do(b, func() {
			if *congestion != "" {
				lab.Sysctl(b, setting+"="+*congestion)
			}
			text, err := os.ReadFile("/proc/sys/net/" + setting)
			lab.Check(b, err)
			algorithm = strings.TrimSpace(string(text))
		})
	}
	return algorithm
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
