package fairness

import (
	"cmp"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/sidecar"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// variant says who shares a proxy and how connections come to it.
type variant struct {
	isolation   string
	redirection v1alpha1.Redirection
	tenant      func(*lab.Host) model.Tenant
	// cpuMillis limits team-b's proxies, and pace what its pods may begin in a second:
	// connections through their proxy, and flows beside it.
	cpuMillis, pace int64
	// sidecars are what the mesh is compared with: pods of their own have them.
	sidecars bool
}

func ofNode(*lab.Host) model.Tenant { return model.Tenant{Scope: model.ScopeNode} }
func ofNamespace(p *lab.Host) model.Tenant {
	return model.NamespaceTenant(p.Identity.Namespace)
}

const (
	ebpf = v1alpha1.RedirectionEBPF
	nft  = v1alpha1.RedirectionNetfilter
)

var variants = []variant{
	{"Node", ebpf, ofNode, 0, 0, false},
	{"Node", nft, ofNode, 0, 0, false},
	{"Namespace", ebpf, ofNamespace, 0, 0, false},
	{"Namespace", nft, ofNamespace, 0, 0, false},
	{"Namespace, cpu.limit 250m", ebpf, ofNamespace, 250, 0, false},
	{"Namespace, 50 new a second", ebpf, ofNamespace, 0, 50, false},
	{"Namespace, 50 new a second", nft, ofNamespace, 0, 50, false},
	{"sidecars", "iptables", nil, 0, 0, true},
}

// limits of team-b's proxies and pods.
func (v variant) limits() v1alpha1.Limits {
	return v1alpha1.Limits{MemoryMax: proxyMemory, CPUMillis: v.cpuMillis, NewConnections: v.pace, NewDirect: v.pace}
}

// shared says that the victim's proxies are team-b's, too.
func (v variant) shared() bool { return v.isolation == "Node" }

func (v variant) name() string { return v.isolation + " · " + string(v.redirection) }

// cpus are parted: pods, which are both ends of both loads, have the first half of
// them and proxies the other. What a proxy suffers from is then another proxy, and not
// the load that is made for it.
func cpus() (pods, proxies []int) {
	n := runtime.NumCPU()
	for i := range n {
		if i < max(n/2, 1) {
			pods = append(pods, i)
		}
		if i >= n/2 {
			proxies = append(proxies, i)
		}
	}
	return pods, proxies
}

// way is both ends of a team's load, and the proxies between them.
type way struct {
	from, to *lab.Host
	proxies  func() []int
}

// nodes are the lab with pods that have sidecars beside those of the mesh.
type nodes struct {
	*lab.Lab
	b *testing.B
	// sidecars of the teams, by name.
	sidecars map[string]way
}

func newNodes(b *testing.B) *nodes {
	n := &nodes{lab.NewWith(b, lab.Options{PathMTU: 1500, NoAccessLog: true}), b, map[string]way{}}
	_, proxies := cpus()
	for i, team := range []string{"team-a", "team-b"} {
		w := way{from: n.AddPod(n.Node1, fmt.Sprint("side", 2*i), 41+2*i), to: n.AddPod(n.Node2, fmt.Sprint("side", 2*i+1), 42+2*i)}
		var pids []int
		for _, h := range []*lab.Host{w.from, w.to} {
			pid := sidecar.Start(b, h, sidecar.Options{Name: "sidecar-" + h.Name, Group: "sidecars-" + h.Node.Name, Authority: n.Authority,
				Identity: model.Identity{TrustDomain: lab.TrustDomain, Namespace: team, ServiceAccount: "side"}})
			container.Pin(b, pid, proxies...)
			pids = append(pids, pid)
		}
		w.proxies = func() []int { return pids }
		n.sidecars[team] = w
	}
	for _, h := range []*lab.Node{n.Node1, n.Node2} {
		container.Pin(b, h.AgentPID(), proxies...) // and what it starts from now on
		// Nodes track connections, as kube-proxy and what pods' addresses are hidden by do.
		h.Do(b, func() {
			cmd := exec.Command("nft", "-f", "-")
			cmd.Stdin = strings.NewReader(`table ip cni { chain postrouting { type nat hook postrouting priority 100; ip saddr 10.77.0.0/16 ip daddr != 10.77.0.0/16 masquerade; }; }`)
			if out, err := cmd.CombinedOutput(); err != nil {
				b.Fatalf("nft: %v: %s", err, out)
			}
		})
	}
	return n
}

// way of a team with a variant.
func (n *nodes) way(v variant, team string) way {
	if v.sidecars {
		return n.sidecars[team]
	}
	w := way{from: n.A1, to: n.A3}
	if team == "team-b" {
		w = way{from: n.B1, to: n.B2}
	}
	w.proxies = func() (pids []int) {
		for _, h := range []*lab.Host{w.from, w.to} {
			for _, g := range h.Node.Tenant(h.Tenant.String()).Generations {
				pids = append(pids, g.PID)
			}
		}
		return pids
	}
	return w
}

// use gives all pods the proxies of a variant, and waits until those alone serve.
func (n *nodes) use(v variant) {
	if v.sidecars {
		return
	}
	n.b.Helper()
	for _, p := range n.Pods {
		p.Tenant = v.tenant(p)
	}
	n.Publish()
	_, proxies := cpus()
	for _, node := range []*lab.Node{n.Node1, n.Node2} {
		node.Redirection = v.redirection
		node.Limits = map[string]v1alpha1.Limits{"team-a": {MemoryMax: proxyMemory}, "team-b": v.limits(), "_node": {MemoryMax: 2 * proxyMemory}}
		node.WritePlan()
	}
	for _, node := range []*lab.Node{n.Node1, n.Node2} {
		lab.Eventually(n.b, "isolation "+v.name(), func() error { return settled(node, v) })
		node.WaitReady()
		i, err := node.Inspect()
		lab.Check(n.b, err)
		for _, t := range i.Tenants {
			for _, g := range t.Generations {
				container.Pin(n.b, g.PID, proxies...)
			}
		}
	}
}

// settled says what a node still lacks of a variant.
func settled(node *lab.Node, v variant) error {
	i, err := node.Inspect()
	if err != nil {
		return err
	}
	if i.Redirection != string(v.redirection) || i.Problem != "" {
		return fmt.Errorf("it is by %s: %s", i.Redirection, i.Problem)
	}
	var wanted []string
	for _, p := range node.Planned {
		wanted = append(wanted, p.Tenant.String())
	}
	slices.Sort(wanted)
	wanted = slices.Compact(wanted)
	if len(i.Tenants) != len(wanted) {
		return fmt.Errorf("%d tenants, want %v", len(i.Tenants), wanted)
	}
	limits := v.limits()
	for _, t := range i.Tenants {
		limited := t.Limits.CPUMillis == limits.CPUMillis && t.Limits.NewConnections == limits.NewConnections && t.Limits.NewDirect == limits.NewDirect
		if !slices.Contains(wanted, t.Name) || !t.Ready || t.Name == "team-b" && !limited {
			return fmt.Errorf("%s: ready %v, %s, limits %+v", t.Name, t.Ready, cmp.Or(t.Reason, "no reason"), t.Limits)
		}
	}
	return nil
}
