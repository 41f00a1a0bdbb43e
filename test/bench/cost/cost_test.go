package cost

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
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

var sidecars = flag.Int("sidecars", 110, "pods with a sidecar each: what a node may have")

const (
	tenants  = 30
	services = 20
	mebibyte = 1 << 20
)

// tenant is the pod of a further tenant.
func tenant(l *lab.Lab, i int) *lab.Host {
	return l.Node1.Pods[slices.IndexFunc(l.Node1.Pods, func(p *lab.Host) bool { return p.Name == fmt.Sprint("t", i) })]
}

func BenchmarkCost(b *testing.B) {
	l := lab.NewWith(b, lab.Options{PathMTU: 1500, NoAccessLog: true, Tenants: tenants - 2})
	ld := loader.New(b)
	server := ld.Serve(l.A3, "serve", "serve", container.Pod)
	var vips []netip.Addr
	for i := range services {
		vip := lab.Addresses(fmt.Sprintf("10.96.9.%d", i), fmt.Sprintf("fd96::9:%d", i))
		vips = append(vips, vip.V4)
		lab.Check(b, l.Store.SetService(model.Service{Namespace: "team-a", Name: fmt.Sprint("service-", i), VIPs: vip.Both(), Ports: []model.ServicePort{{
			Port: load.RequestPort, Endpoints: []model.Endpoint{{Addr: lab.At(l.A3.V4, load.RequestPort), Identity: l.A3.Identity}}}}}))
	}
	useServices := func(hosts ...*lab.Host) {
		for _, h := range hosts {
			for _, vip := range vips {
				ld.Exchange(h, load.PacedOptions{To: lab.At(vip, load.RequestPort), Rate: 100, Connections: 1, Duration: 10 * time.Millisecond, Patience: 5 * time.Second}, "first", container.Pod)
			}
		}
	}
	bills := bill(b, l, ld, server)
	memory := report.Table{Title: "Memory",
		Text:   fmt.Sprintf("Of the proxies of one node, of which each has used the same %d services: one for each tenant, one that all tenants share, and a sidecar with these services for each of %d pods. PSS has Envoy's text in parts, so that it adds up. Where there is one process, the text that others would share with it is its own. The aim is at most 16 MiB of private memory each, and 0.4 of the sidecars' PSS.", services, *sidecars),
		Header: []string{"", "proxies", "private MiB each", "PSS MiB each", "PSS MiB in all", "to the sidecars"}}
	type row struct {
		name         string
		n            int
		private, pss int64
	}
	var rows []row
	add := func(name string, pids []int) {
		r := row{name: name, n: len(pids)}
		for _, pid := range pids {
			pss, private := readMemory(b, pid)
			r.private, r.pss = r.private+private, r.pss+pss
		}
		rows = append(rows, r)
	}
	all := l.Node1.Pods
	for _, n := range []int{1, 10, tenants} {
		l.Node1.Planned = all[:2]
		if n > 1 {
			l.Node1.Planned = slices.Concat(all[:2], all[2:1+n])
		}
		settle(b, l.Node1, n)
		useServices(l.Node1.Planned...)
		add(fmt.Sprintf("a proxy each, %d tenants", n), pids(l.Node1))
	}
	for _, p := range l.Pods {
		p.Tenant = model.Tenant{Scope: model.ScopeNode}
	}
	l.Publish()
	l.Node2.WritePlan()
	settle(b, l.Node1, 1)
	useServices(l.Node1.Planned...)
	add(fmt.Sprintf("a shared proxy, %d tenants", tenants), pids(l.Node1))
	var side []int
	for i := range *sidecars {
		h := l.AddPod(l.Node1, fmt.Sprint("side", i), 120+i)
		side = append(side, sidecar.Start(b, h, sidecar.Options{Name: h.Name, Group: "sidecars", Authority: l.Authority, Services: vips,
			Identity: model.Identity{TrustDomain: lab.TrustDomain, Namespace: "side", ServiceAccount: h.Name}}))
	}
	add("sidecars", side)
	last := rows[len(rows)-1]
	for _, r := range rows {
		memory.Rows = append(memory.Rows, []string{r.name, fmt.Sprint(r.n), fmt.Sprintf("%.1f", float64(r.private)/float64(r.n)/mebibyte), fmt.Sprintf("%.1f", float64(r.pss)/float64(r.n)/mebibyte),
			fmt.Sprintf("%.0f", float64(r.pss)/mebibyte), fmt.Sprintf("%.2f", float64(r.pss)/float64(last.pss))})
	}
	report.Publish(b, "cost", bills, memory)
}

// settle waits until a node has the tenants of its plan, and those alone.
func settle(b *testing.B, n *lab.Node, tenants int) {
	b.Helper()
	n.WritePlan()
	lab.Eventually(b, fmt.Sprintf("%d tenants", tenants), func() error {
		i, err := n.Inspect()
		if err == nil && len(i.Tenants) != tenants {
			err = fmt.Errorf("%d tenants", len(i.Tenants))
		}
		return err
	})
	n.WaitReady()
}

// pids are a node's proxies.
func pids(n *lab.Node) (all []int) {
	seen := map[string]bool{}
	for _, p := range n.Planned {
		if name := p.Tenant.String(); !seen[name] {
			seen[name] = true
			for _, g := range n.Tenant(name).Generations {
				all = append(all, g.PID)
			}
		}
	}
	return all
}

// readMemory is a process's, in bytes; private is what it wrote and shares with nobody.
func readMemory(b *testing.B, pid int) (pss, private int64) {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	lab.Check(b, err)
	for line := range strings.Lines(string(text)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "Pss: %d kB", &kib); err == nil {
			pss = kib << 10
		}
		if _, err := fmt.Sscanf(line, "Private_Dirty: %d kB", &kib); err == nil {
			private = kib << 10
		}
	}
	return pss, private
}
