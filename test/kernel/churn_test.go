package kernel

import (
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// churn is a node whose pods come, go and change tenants.
type churn struct {
	t      *testing.T
	l      *lab.Lab
	n      *lab.Node
	random *rand.Rand
	// always are planned all the time; pods are those that move, gone those whose
	// network has ended.
	always, pods []*lab.Host
	tenants      []model.Tenant
	planned      map[*lab.Host]bool
	gone         map[*lab.Host]bool
	faults       map[string]int
}

// 200 pods join, leave and change tenants at random, with faults, while other
// pods' connections go on. In the end there is exactly what is planned.
func TestPodsComeAndGo(t *testing.T) { eachRedirection(t, testPodsComeAndGo) }

func testPodsComeAndGo(t *testing.T, l *lab.Lab) {
	const pods, connections, moving = 200, 100, 30 * time.Second
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	c := &churn{t: t, l: l, random: rand.New(rand.NewPCG(seed, 1)),
		planned: map[*lab.Host]bool{}, gone: map[*lab.Host]bool{}, faults: map[string]int{}}
	c.n = c.l.Node1
	c.always = slices.Clone(c.n.Planned)
	for i := range 4 {
		c.tenants = append(c.tenants, model.Tenant{Scope: model.ScopeServiceAccount, Namespace: "moving", Name: fmt.Sprint("t", i)})
	}
	for i := range pods {
		p := c.l.AddPod(c.n, fmt.Sprintf("m%d", i), 30+i)
		p.Identity = model.Identity{TrustDomain: lab.TrustDomain, Namespace: "moving", ServiceAccount: fmt.Sprint("s", i%7)}
		c.pods, c.n.Pods = append(c.pods, p), append(c.n.Pods, p)
	}
	stop := c.l.A1.BeginUntil(t, "hold", fmt.Sprint("--connections=", connections), "--interval=200ms", "--timeout=20s", lab.At(c.l.B2.V4, app.GreetPort).String())
	moved := map[*lab.Host]bool{}
	steps := 0
	for end := time.Now().Add(moving); time.Now().Before(end) || len(moved) < pods || !c.hadAllFaults(); steps++ {
		if time.Now().After(end.Add(2 * lab.Patience)) {
			t.Fatalf("%d pods have moved, faults: %v", len(moved), c.faults)
		}
		for range 5 + c.random.IntN(20) {
			p := c.pods[c.random.IntN(pods)]
			if len(moved) < pods && c.random.IntN(2) == 0 {
				// One that hasn't been there yet.
				p = c.pods[slices.IndexFunc(c.pods, func(p *lab.Host) bool { return !moved[p] })]
			}
			moved[p] = true
			c.move(p)
		}
		c.plan()
		c.fault()
		// Plans may come faster than they can be done.
		time.Sleep(time.Duration(c.random.IntN(800)) * time.Millisecond)
	}
	t.Logf("%d plans, faults: %v", steps, c.faults)
	maps.DeleteFunc(c.planned, func(p *lab.Host, _ bool) bool { return c.gone[p] })
	c.plan()
	lab.Eventually(t, "exactly what is planned", c.exact)
	// Nobody was forgotten: all of it goes as well.
	clear(c.planned)
	c.plan()
	lab.Eventually(t, "nothing but what stayed", c.exact)
	var r app.RunResult
	stop(&r)
	if !r.OK || r.Held != connections {
		t.Errorf("%d of %d connections of pods that stayed held, failures %+v", r.Held, connections, r.Failures)
	}
	for _, tenant := range []string{"team-a", "team-b"} {
		if g := c.n.Running(tenant); g.Restarts > 0 {
			t.Errorf("the proxy of %s was started again: %+v", tenant, g)
		}
	}
}

// move has a pod join, leave or change its tenant.
func (c *churn) move(p *lab.Host) {
	switch {
	case c.gone[p]:
		delete(c.planned, p)
	case c.planned[p] && c.random.IntN(2) == 0:
		delete(c.planned, p)
	default:
		c.planned[p] = true
		p.Tenant = c.tenants[c.random.IntN(len(c.tenants))]
	}
}

// plan tells the agent and the server of configuration.
func (c *churn) plan() {
	c.n.Planned = slices.Clone(c.always)
	proxies := map[model.Tenant]*model.Proxy{}
	for _, p := range c.pods {
		if !c.planned[p] {
			continue
		}
		c.n.Planned = append(c.n.Planned, p)
		w := model.Workload{UID: p.Name, Namespace: p.Identity.Namespace, Name: p.Name, Node: c.n.Name, Identity: p.Identity, Tenant: p.Tenant, IPs: p.Both()}
		lab.Check(c.t, c.l.Store.SetWorkload(w))
		if proxies[p.Tenant] == nil {
			proxies[p.Tenant] = &model.Proxy{Node: c.n.Name, Tenant: p.Tenant}
		}
		proxies[p.Tenant].Workloads = append(proxies[p.Tenant].Workloads, w)
	}
	for _, p := range proxies {
		lab.Check(c.t, c.l.Store.SetProxy(*p))
	}
	c.n.WritePlan()
}

// faults that there are: the agent or a proxy is killed, a veth goes or gets another
// name, the plan is no plan.
var faults = []string{"agent", "proxy", "link", "rename", "plan"}

func (c *churn) hadAllFaults() bool {
	return !slices.ContainsFunc(faults, func(kind string) bool { return c.faults[kind] == 0 })
}

// fault breaks something, most of the time.
func (c *churn) fault() {
	n := c.random.IntN(len(faults) + 2)
	if n >= len(faults) {
		return
	}
	kind := faults[n]
	switch kind {
	case "agent":
		c.n.Kill()
		c.n.Start()
	case "proxy":
		i, err := c.n.Inspect()
		if err != nil {
			return // it has just been started
		}
		for _, tenant := range i.Tenants {
			if strings.HasPrefix(tenant.Name, "moving") && len(tenant.Generations) > 0 && tenant.Generations[0].PID > 0 {
				unix.Kill(tenant.Generations[0].PID, unix.SIGKILL)
				break
			}
		}
	case "link", "rename":
		p := c.pods[c.random.IntN(len(c.pods))]
		if c.gone[p] || kind == "link" && len(c.gone) > len(c.pods)/4 {
			return
		}
		c.n.Do(c.t, func() {
			name, renamed := "pod"+p.Name, "ren"+p.Name
			veth, err := netlink.LinkByName(name)
			if err != nil {
				name, renamed = renamed, name
				veth, err = netlink.LinkByName(name)
			}
			lab.Check(c.t, err)
			if kind == "link" {
				lab.Check(c.t, netlink.LinkDel(veth))
				c.gone[p] = true
				return
			}
			lab.Check(c.t, netlink.LinkSetName(veth, renamed))
		})
	case "plan":
		lab.Check(c.t, os.WriteFile(c.n.PlanFile(), []byte("tenants: [{name: Not a tenant}, nothing"), 0o600))
		time.Sleep(300 * time.Millisecond) // long enough to be read
		c.n.WritePlan()
	}
	c.faults[kind]++
}

// exact compares the kernel with the plan.
func (c *churn) exact() error {
	tenants, uids := map[string]bool{}, map[string]bool{}
	for _, p := range c.n.Planned {
		tenants[p.Tenant.String()], uids[p.Name] = true, true
	}
	i, err := c.n.Inspect()
	if err != nil {
		return err
	}
	if i.Problem != "" {
		return fmt.Errorf("the agent has a problem: %s", i.Problem)
	}
	told, steered, pids := map[string]bool{}, map[string]bool{}, map[string]int{}
	for _, tenant := range i.Tenants {
		told[tenant.Name] = true
		if !tenant.Ready || len(tenant.Generations) != 1 {
			return fmt.Errorf("tenant %s: %s %+v", tenant.Name, tenant.Reason, tenant.Generations)
		}
		pids[tenant.Name] = tenant.Generations[0].PID
		for _, p := range tenant.Pods {
			steered[p.UID] = true
		}
	}
	for _, compare := range []struct {
		what      string
		have, are map[string]bool
	}{
		{"tenants", told, tenants}, {"steered pods", steered, uids},
		{"network namespaces", c.entries(c.n.Isolation().RunDir, "netns"), tenants},
		{"states", c.entries(c.n.Isolation().RunDir, "state"), tenants},
		{"folders", c.entries(c.n.Isolation().RunDir, "tenants"), tenants},
		{"logs", c.entries(c.n.Isolation().LibDir, "log"), tenants},
	} {
		if !maps.Equal(compare.have, compare.are) {
			return fmt.Errorf("%s: %s", compare.what, difference(compare.have, compare.are))
		}
	}
	checks := []func() error{
		func() error { return c.exactCgroups(pids) }, func() error { return c.exactLinks(uids, len(tenants)) }, func() error { return c.exactMap(uids) },
	}
	if c.n.Redirection == v1alpha1.RedirectionNetfilter {
		checks = []func() error{checks[0], func() error { return c.exactRuleset(uids, len(tenants)) }}
	}
	for _, check := range checks {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (c *churn) entries(dir ...string) map[string]bool {
	list, err := os.ReadDir(filepath.Join(dir...))
	lab.Check(c.t, err)
	names := map[string]bool{}
	for _, e := range list {
		names[e.Name()] = true
	}
	return names
}

func difference(have, want map[string]bool) string {
	var b strings.Builder
	for name := range have {
		if !want[name] {
			fmt.Fprintf(&b, "%s is left, ", name)
		}
	}
	for name := range want {
		if !have[name] {
			fmt.Fprintf(&b, "%s is missing, ", name)
		}
	}
	return strings.TrimSuffix(b.String(), ", ")
}

// exactCgroups wants one cgroup a tenant in each hierarchy, with its proxy alone in
// it, and no such process anywhere else.
func (c *churn) exactCgroups(pids map[string]int) error {
	name := c.n.Isolation().CgroupName
	roots, err := filepath.Glob("/sys/fs/cgroup/*/" + name)
	lab.Check(c.t, err)
	if _, err := os.Stat("/sys/fs/cgroup/" + name); err == nil {
		roots = append(roots, "/sys/fs/cgroup/"+name)
	}
	if len(roots) == 0 {
		return fmt.Errorf("no cgroups")
	}
	for _, root := range roots {
		if info, err := os.Lstat(filepath.Dir(root)); err == nil && info.Mode()&fs.ModeSymlink != 0 {
			continue // another name of a hierarchy
		}
		found := map[string]bool{}
		lab.Check(c.t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && path != root && !strings.HasPrefix(d.Name(), "_") {
				found[d.Name()] = true
				b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
				if err == nil && strings.TrimSpace(string(b)) != strconv.Itoa(pids[d.Name()]) {
					found[fmt.Sprintf("%s with processes %q", d.Name(), b)] = true
				}
			}
			return nil
		}))
		want := map[string]bool{}
		for tenant := range pids {
			want[tenant] = true
		}
		if !maps.Equal(found, want) {
			return fmt.Errorf("cgroups in %s: %s", root, difference(found, want))
		}
	}
	return nil
}

// exactLinks wants the pods' programs on the veths of planned pods alone, and a
// veth with its program for each tenant.
func (c *churn) exactLinks(uids map[string]bool, tenants int) (err error) {
	c.n.Do(c.t, func() {
		links, listErr := netlink.LinkList()
		if listErr != nil { // interrupted, while the agent adds or removes one
			err = listErr
			return
		}
		veths := 0
		for _, l := range links {
			name, index := l.Attrs().Name, l.Attrs().Index
			ingress, egress := programs(index, ebpf.AttachTCXIngress), programs(index, ebpf.AttachTCXEgress)
			uid, isPod := strings.CutPrefix(name, "pod")
			if !isPod {
				uid, isPod = strings.CutPrefix(name, "ren")
			}
			switch {
			case isPod && uids[uid] && (ingress != 1 || egress != 1), isPod && !uids[uid] && ingress+egress > 0:
				err = fmt.Errorf("%s has %d and %d programs, planned: %t", name, ingress, egress, uids[uid])
			case strings.HasPrefix(name, "bh"):
				if veths++; ingress != 1 {
					err = fmt.Errorf("%s has %d programs", name, ingress)
				}
			}
		}
		if veths != tenants {
			err = fmt.Errorf("%d veths of %d tenants", veths, tenants)
		}
	})
	return err
}

func programs(ifindex int, attach ebpf.AttachType) int {
	r, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: attach})
	if err != nil {
		return -1
	}
	return len(r.Programs)
}

// exactRuleset wants a planned pod's two chains, its addresses and its name in the
// node's table, and a chain for each tenant's veth, of which there are no more.
func (c *churn) exactRuleset(uids map[string]bool, tenants int) (err error) {
	pods, chains, err := steered(c.t, c.n)
	if err != nil || pods != len(uids) || chains != tenants {
		return fmt.Errorf("%d pods and %d tenants have chains, %d and %d are planned, %v", pods, chains, len(uids), tenants, err)
	}
	c.n.Do(c.t, func() {
		table := &nftables.Table{Name: "bulkhead", Family: nftables.TableFamilyNetdev}
		names := map[string]bool{}
		for set, want := range map[string]int{"pods": len(uids), "addresses4": len(uids), "addresses6": len(uids), "sent4": len(uids), "sent6": len(uids),
			"owners4": len(uids), "owners6": len(uids), "macs4": len(uids), "self6": len(uids), "tenants": tenants, "tenant_of": tenants, "tenant_macs": tenants} {
			elements, listErr := (&nftables.Conn{}).GetSetElements(&nftables.Set{Table: table, Name: set})
			if listErr != nil || len(elements) != want {
				err = fmt.Errorf("the set %s has %d elements, want %d: %v", set, len(elements), want, listErr)
			}
			for _, e := range elements {
				if set == "pods" {
					names[e.Comment] = true
				}
			}
		}
		if !maps.Equal(names, uids) {
			err = fmt.Errorf("pods of the table: %s", difference(names, uids))
		}
		links, listErr := netlink.LinkList()
		veths := 0
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, "bh") {
				veths++
			}
		}
		if listErr != nil || veths != tenants {
			err = fmt.Errorf("%d veths of %d tenants: %v", veths, tenants, listErr)
		}
	})
	return err
}

// exactMap wants the pods' pins, and counts the addresses that the kernel steers by.
func (c *churn) exactMap(uids map[string]bool) error {
	if pinned := c.entries(c.n.PinDir(), "pods"); !maps.Equal(pinned, uids) {
		return fmt.Errorf("pinned pods: %s", difference(pinned, uids))
	}
	want := 2 * len(uids)
	m, err := ebpf.LoadPinnedMap(filepath.Join(c.n.PinDir(), "maps", "pods"), &ebpf.LoadPinOptions{ReadOnly: true})
	lab.Check(c.t, err)
	defer m.Close()
	count := 0
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	for entries := m.Iterate(); entries.Next(&key, &value); {
		count++
	}
	if count != want {
		return fmt.Errorf("the map of pods has %d addresses, want %d", count, want)
	}
	return nil
}
