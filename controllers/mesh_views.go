package controllers

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/nodeservice"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// What writers and the agents' service ask the mesh.

// errNotLoaded is returned before the first picture is complete.
var errNotLoaded = errors.New("the operator doesn't know the whole mesh yet")

// Member reports the identity and tenant of a pod that is a workload of the mesh.
func (m *mesh) Member(p *corev1.Pod) (model.Identity, model.Tenant, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	pod := translate.NewPod(p, m.namespaces[p.Namespace].Membership)
	return pod.Identity, pod.Tenant, pod.Standing == translate.Member
}

// HasTenant reports whether a node has a pod, and so a proxy, of the tenant.
func (m *mesh) HasTenant(node string, tenant model.Tenant) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.proxies[tenant][node]) > 0
}

// Holders is the pod that holds an address, if there is one.
func (m *mesh) Holders(a netip.Addr) []nodeservice.Holder {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.pods[m.holders[a.Unmap()]]; p != nil {
		return []nodeservice.Holder{{UID: p.UID, Namespace: p.Namespace, Name: p.Name}}
	}
	return nil
}

// NodePodCIDRs are the node's pod ranges; none if Kubernetes doesn't assign them.
// It reports false for a node that isn't known.
func (m *mesh) NodePodCIDRs(node string) ([]netip.Prefix, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, ok := m.nodes[node]
	return n.PodCIDRs, ok
}

// Announce takes in the addresses of a pod that was read from the API server just
// now, for the proxy that serves it: until its status shows addresses, or it is
// gone. It returns once they are in the store. All of them are refused if one is.
func (m *mesh) Announce(node string, p *corev1.Pod, ips []netip.Addr) error {
	select {
	case <-m.loaded:
	default:
		return errNotLoaded
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if p.Spec.NodeName != node {
		return fmt.Errorf("pod %s/%s is bound to node %q, not to %s", p.Namespace, p.Name, p.Spec.NodeName, node)
	}
	addrs := translate.ValidAddrs(ips)
	if len(addrs) == 0 || len(addrs) != len(ips) {
		return fmt.Errorf("%v aren't a pod's addresses", ips)
	}
	n, ok := m.nodes[node]
	if !ok {
		return fmt.Errorf("node %s isn't known yet", node)
	}
	for _, a := range addrs {
		if !translate.InRanges(a, n.PodCIDRs) {
			return fmt.Errorf("%s isn't in the pod ranges of node %s", a, node)
		}
		if h := m.pods[m.holders[a]]; h != nil && h.UID != string(p.UID) {
			return fmt.Errorf("%s is held by the live pod %s", a, h.key)
		}
	}
	unseen := m.pods[string(p.UID)] == nil
	if err := m.setPod(p, addrs); err != nil {
		return err
	}
	st := m.pods[string(p.UID)]
	if st == nil || st.Standing != translate.Member {
		return fmt.Errorf("pod %s/%s is no workload of the mesh", p.Namespace, p.Name)
	}
	if unseen {
		// Without this, a pod that the informers never show would stay.
		st.announcedAt = m.now()
		m.triggers.pods.add(st.key)
	}
	for _, a := range addrs {
		if !slices.Contains(st.held, a) {
			return fmt.Errorf("%s isn't among the addresses of pod %s/%s: its status says %v", a, p.Namespace, p.Name, st.reported)
		}
	}
	return nil
}

// nodePlan is what a node's NodeProxy depends on.
type nodePlan struct {
	node        translate.Node
	known       bool
	trustDomain string
	redirection v1alpha1.Redirection
	limits      v1alpha1.Limits
	members     []translate.Pod
	optedOut    []translate.Pod
	shared      translate.NamespacePlan
	namespaces  map[string]translate.NamespacePlan // without what policies say
}

func (m *mesh) plan(node string) nodePlan {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := nodePlan{trustDomain: m.topologies.TrustDomain(), limits: m.topologies.NodeLimits(), members: m.members(node), namespaces: map[string]translate.NamespacePlan{}}
	p.node, p.known = m.nodes[node]
	p.redirection, _ = m.topologies.Redirection(p.node.Labels)
	p.optedOut = m.optedOut(node)
	shared := model.Tenant{Scope: model.ScopeNode}
	of := m.membershipOf(shared, m.proxies[shared][node])
	p.shared.Version, p.shared.Bounds = of.Version, of.Bounds
	for _, pod := range p.members {
		if _, ok := p.namespaces[pod.Namespace]; !ok {
			ns := m.namespaces[pod.Namespace]
			p.namespaces[pod.Namespace] = translate.NamespacePlan{Version: ns.Version, Bounds: ns.Bounds, Exclusions: m.topologies.Exclusions(ns.Topology), Strict: ns.Strict, Bypass: ns.Bypass}
		}
	}
	return p
}

// proxiesOf are the proxies that serve a namespace's members, with how many of them.
func (m *mesh) proxiesOf(namespace string) map[model.ProxyKey]int {
	keys := map[model.ProxyKey]int{}
	for _, p := range m.namespacePods[namespace] {
		if !p.Tenant.IsZero() {
			keys[model.ProxyKey{Node: p.Node, Tenant: p.Tenant}]++
		}
	}
	return keys
}

// views are the proxies that serve a namespace's members, by tenant and in no order.
func (m *mesh) views(namespace string) (translate.Membership, map[model.Tenant][]translate.NodeView) {
	m.mu.Lock()
	defer m.mu.Unlock()
	views := map[model.Tenant][]translate.NodeView{}
	for key, pods := range m.proxiesOf(namespace) {
		views[key.Tenant] = append(views[key.Tenant], m.view(key, pods))
	}
	return m.namespaces[namespace].Membership, views
}

// view is a proxy with some of its pods.
func (m *mesh) view(key model.ProxyKey, pods int) translate.NodeView {
	report := m.reports[key.Node]
	node, known := m.nodes[key.Node]
	v := translate.NodeView{Node: key.Node, Tenant: key.Tenant, Pods: pods, Unheard: translate.Unheard(node, report.readySince), ProxyVersions: report.versions}
	if !known {
		v.Unheard, v.Gone = noSuchNode, true // its report is still there for a while, and its pods for longer
	}
	v.Away = v.Gone || node.Away != ""
	v.Status, v.Reported = report.tenants[key.Tenant.String()]
	v.Sources = m.sources(v.Status.Rejected)
	c := report.costs[key.Tenant.String()]
	v.Cost, v.Shares = c.total, c.shares
	return v
}

// topologyInput walks all namespaces and the proxies of one topology.
func (m *mesh) topologyInput(name string) (translate.Topologies, translate.TopologyInput) {
	m.mu.Lock()
	defer m.mu.Unlock()
	in := translate.TopologyInput{TrustDomain: m.topologies.TrustDomain(), Lost: map[string]string{}, NotRenewed: map[string]string{}}
	proxies := map[model.ProxyKey]int{}
	for namespace, ns := range m.namespaces {
		if ns.Topology == name {
			in.Namespaces++
			for key, pods := range m.proxiesOf(namespace) {
				proxies[key] += pods // namespaces may share one
			}
		}
		if slices.Contains(ns.lost, name) {
			in.Lost[namespace] = ns.Topology
		}
	}
	without := map[string]bool{}
	for key, pods := range proxies {
		in.Proxies = append(in.Proxies, m.view(key, pods))
		if n, known := m.nodes[key.Node]; known && n.WithoutRanges() {
			without[key.Node] = true
		}
	}
	in.WithoutRanges = slices.Collect(maps.Keys(without))
	in.Bypasses = m.bypasses(name)
	for name, n := range m.nodes {
		if n.Linux {
			r := m.reports[name]
			in.Nodes = append(in.Nodes, translate.NodeRedirectionView{Node: name, Labels: n.Labels, Have: r.redirection, Why: r.notRedirected})
		}
	}
	in.Authority = m.authority
	for node, r := range m.reports {
		if r.notRenewed != "" {
			in.NotRenewed[node] = r.notRenewed
		}
	}
	return m.topologies, in
}

// untrusting are nodes with an agent that hasn't said yet that its proxies trust
// all roots of a bundle.
func (m *mesh) untrusting(bundle string) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.loaded:
	default:
		return []string{"unknown: the mesh isn't loaded yet"}
	}
	var nodes []string
	for name := range m.nodes {
		if r := m.reports[name]; r.agent && r.trustBundle != bundle {
			nodes = append(nodes, name)
		}
	}
	return nodes
}

// CertificateTTL is how long certificates of a namespace's workloads are to live.
func (m *mesh) CertificateTTL(namespace string) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.namespaces[namespace].CertificateTTL
}

// membership is the mesh's trust domain and namespaces, sorted.
func (m *mesh) membership() (trustDomain string, namespaces []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	namespaces = []string{}
	for name := range maps.Keys(m.namespaces) {
		if m.namespaces[name].IsMember() {
			namespaces = append(namespaces, name)
		}
	}
	slices.Sort(namespaces)
	return m.topologies.TrustDomain(), namespaces
}

// tenantNodes are the nodes where a namespace has proxies.
func (m *mesh) tenantNodes(namespace string) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	nodes := map[string]bool{}
	for key := range m.proxiesOf(namespace) {
		nodes[key.Node] = true
	}
	return slices.Collect(maps.Keys(nodes))
}

// bypasses are a topology's emergency bypasses, as they are asked for and as nodes
// say they are.
func (m *mesh) bypasses(topology string) []translate.BypassView {
	var views []translate.BypassView
	for _, b := range m.topologies.Bypasses(topology) {
		v := translate.BypassView{EmergencyBypass: b}
		if ns := m.namespaces[b.Namespace]; ns.Topology == topology {
			v.Member = true
			for key, pods := range m.proxiesOf(b.Namespace) {
				v.Pods += pods
				v.Bypassed += min(pods, int(m.view(key, pods).Status.BypassedPods))
			}
		}
		views = append(views, v)
	}
	return views
}

// noSuchNode is why a node isn't heard whose pods aren't gone yet.
const noSuchNode = "there is no such Node"

// away are the nodes that do nothing that they are told, and why; and since when the
// others are there. A node that is in neither isn't known: it is gone, or new.
func (m *mesh) away() (nodes map[string]string, readySince map[string]time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	nodes, readySince = map[string]string{}, map[string]time.Time{}
	for name, n := range m.nodes {
		if n.Away != "" {
			nodes[name] = n.Away
		} else {
			readySince[name] = n.ReadySince
		}
	}
	return nodes, readySince
}

// bounds of all namespaces of the mesh.
func (m *mesh) bounds() map[string]translate.Bounds {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := map[string]translate.Bounds{}
	for name, ns := range m.namespaces {
		if ns.IsMember() {
			all[name] = ns.Bounds
		}
	}
	return all
}

// everything are the names of all nodes, and of all namespaces of the mesh.
func (m *mesh) everything() (nodes, namespaces []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, ns := range m.namespaces {
		if ns.IsMember() {
			namespaces = append(namespaces, name)
		}
	}
	return slices.Collect(maps.Keys(m.nodes)), namespaces
}
