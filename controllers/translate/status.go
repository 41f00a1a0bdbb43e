package translate

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Reasons of conditions, as the API types list them. TrustDomainMismatch is a
// topology's whose trust domain isn't the mesh's.
const (
	ReasonAccepted            = "Accepted"
	ReasonNothingSelected     = "NothingSelected"
	ReasonOverlaps            = "Overlaps"
	ReasonUnknownProxyVersion = "UnknownProxyVersion"
	ReasonInvalidSelector     = "InvalidSelector"
	ReasonTrustDomainMismatch = "TrustDomainMismatch"
	ReasonNotInMesh           = "NotInMesh"
	ReasonReady               = "Ready"
	ReasonProgressing         = "Progressing"
	ReasonNodesNotReady       = "NodesNotReady"
	ReasonProxiesNotReady     = "ProxiesNotReady"
	ReasonEnforced            = "Enforced"
	ReasonPartlyEnforced      = "PartlyEnforced"
	ReasonCapped              = "Capped"
	ReasonNoProxies           = "NoProxies"
	ReasonAsSpecified         = "AsSpecified"
	ReasonSharedProxy         = "SharedProxy"
	ReasonNodesDiffer         = "NodesDiffer"
	ReasonOlderDecides        = "OlderDecides"
	ReasonKnown               = "Known"
	ReasonNodesWithoutRanges  = "NodesWithoutRanges"
)

const (
	maxListed        = 5    // names in a message
	maxEnforcedNodes = 1000 // as the type allows
	maxMessage       = 8 << 10
)

// NodeView is a tenant's proxy on a node: wanted for pods of ours, and what the
// node's agent says of it.
type NodeView struct {
	Node   string
	Tenant model.Tenant
	// Pods of the tenant that are bound to the node.
	Pods int
	// Reported says whether the agent knows of the tenant; Status is its word.
	Reported bool
	Status   v1alpha1.NodeTenantStatus
	// Unheard says why that isn't about how the node is; "" if it is.
	Unheard string
	// Away says whether the node isn't there, so that nothing can be expected of it, and
	// Gone, whether its Node was removed.
	Away, Gone bool
	// Sources are the objects that refused resources were made of, by the resource's
	// name; those that aren't known are left out.
	Sources map[string]string
	// Cost of the tenant there, nil if it isn't known; Shares of it are namespaces'.
	Cost   *v1alpha1.NodeCost
	Shares []v1alpha1.NamespaceShare
	// ProxyVersions that the node can run; empty if its agent hasn't said.
	ProxyVersions []string
}

// TenantProxyStatus is what the owner of a tenant sees. Conditions keep the
// transition times of had.
func TenantProxyStatus(tenant model.Tenant, m Membership, nodes []NodeView, had []metav1.Condition, now metav1.Time) v1alpha1.TenantProxyStatus {
	s := v1alpha1.TenantProxyStatus{Tenant: tenant.String(), Version: m.Version, Proxies: int32(len(nodes))}
	nodes = byNode(nodes)
	if tenant.Scope == model.ScopeNode {
		withoutOthers(nodes)
	}
	var unreported, notReady []string
	away := map[string]string{}
	for _, n := range nodes {
		s.Pods += int32(n.Pods)
		reason := n.Status.Reason
		ready := n.Reported && n.Status.Ready && n.Unheard == ""
		switch {
		case ready:
			s.ReadyProxies++
			reason = ""
		case n.Away:
			reason = n.Unheard
			away[n.Node] = reason
		case n.Unheard != "":
			reason = n.Unheard
			notReady = append(notReady, n.Node+": "+reason)
		case n.Reported:
			notReady = append(notReady, n.Node+": "+cmp.Or(reason, "not ready"))
		default:
			reason = "the node's agent hasn't reported it yet"
			unreported = append(unreported, n.Node)
		}
		s.Nodes = append(s.Nodes, v1alpha1.TenantNodeStatus{
			Node: n.Node, Ready: ready, Reason: reason, Pods: int32(n.Pods), Weight: n.Status.Weight, Failure: n.Status.Failure, Generations: n.Status.Generations,
		})
	}
	c := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse}
	switch {
	case len(notReady) > 0:
		c.Reason, c.Message = ReasonProxiesNotReady, listed(notReady)
	case len(unreported) > 0:
		c.Reason, c.Message = ReasonProgressing, "waiting for the agents of "+listed(unreported)
	case len(nodes) == 0:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, ReasonReady, "the tenant has no pods"
	default:
		c.Status, c.Reason, c.Message = serving(s.ReadyProxies, s.Proxies)
	}
	besides(&c, away)
	s.Conditions = conditions(had, now, c, configured(nodes), stable(nodes), tenantBypass(m, nodes))
	return s
}

// serving is Ready where all proxies serve that are on nodes which are there: others are
// nobody's to mend but who runs the nodes, and Kubernetes tells of them.
func serving(serve, all int32) (metav1.ConditionStatus, string, string) {
	if serve == 0 && all > 0 {
		return metav1.ConditionUnknown, ReasonNodesAway, ""
	}
	return metav1.ConditionTrue, ReasonReady, fmt.Sprintf("all proxies serve: %d", serve)
}

// besides names the nodes that a condition isn't about.
func besides(c *metav1.Condition, away map[string]string) {
	if len(away) == 0 {
		return
	}
	if c.Status == metav1.ConditionTrue {
		c.Reason = ReasonNodesAway
	}
	c.Message = strings.TrimPrefix(c.Message+"; nobody knows how it is on "+describe(away), "; ")
}

// sharedName is the TenantProxy of a proxy that a namespace shares with others: no
// tenant of a namespace is called so.
const sharedName = "shared.node"

// TenantProxyName is what the object is called in a namespace that the tenant
// serves.
func TenantProxyName(t model.Tenant) string {
	const longest = 253
	name := t.String()
	switch {
	case t.Scope == model.ScopeNode:
		return sharedName
	case len(name) > longest:
		sum := sha256.Sum256([]byte(name))
		return strings.TrimRight(name[:longest-17], "-.") + "-" + hex.EncodeToString(sum[:8])
	}
	return name
}

// withoutOthers takes from what is said of a shared proxy what may be about the
// pods of other namespaces.
func withoutOthers(nodes []NodeView) {
	for i := range nodes {
		s := &nodes[i].Status
		if s.Failure != nil {
			f := *s.Failure
			f.Message, f.Log = "", ""
			s.Failure = &f
		}
		if s.Reason != "" {
			s.Reason = "see NodeProxy " + nodes[i].Node + ": the proxy is shared with other namespaces"
		}
		s.Rejected = nil
		s.Generations = slices.Clone(s.Generations)
		for g := range s.Generations {
			s.Generations[g].LastExit = ""
		}
	}
}

// PolicyInput is what an IsolationPolicy's status depends on.
type PolicyInput struct {
	// Member says whether the namespace is in the mesh.
	Member bool
	// Want are the limits of all policies of the namespace together, within Bounds of
	// its topology.
	Want   v1alpha1.Limits
	Bounds Bounds
	// Strict says whether the namespace is closed to plain text.
	Strict bool
	Nodes  []NodeView
}

// IsolationPolicyStatus tells what is enforced where.
func IsolationPolicyStatus(p *v1alpha1.IsolationPolicy, in PolicyInput, now metav1.Time) v1alpha1.IsolationPolicyStatus {
	s := v1alpha1.IsolationPolicyStatus{ObservedGeneration: p.Generation}
	nodes := slices.DeleteFunc(byNode(in.Nodes), func(n NodeView) bool { return n.Gone })
	var waiting []string
	var bounded []NodeView
	shared := false
	// What a node that is away had enforced when it was heard last stays so: without its
	// agent all is as it was, and after a start nothing runs before it is enforced anew.
	away := map[string]string{}
	for _, n := range nodes {
		if n.Tenant.Scope == model.ScopeNode {
			shared = true
			// Its counts are of other namespaces' pods, too.
			enforced := n.Reported && n.Status.StrictPods >= n.Status.Pods
			switch {
			case !in.Strict:
			case enforced && n.Away:
				away[n.Node] = n.Unheard
			case n.Unheard != "":
				waiting = append(waiting, n.Node+": "+n.Unheard)
			case !enforced:
				waiting = append(waiting, n.Node)
			}
			continue
		}
		bounded = append(bounded, n)
		if n.Reported && n.Status.Limits != (v1alpha1.Limits{}) && len(s.Nodes) < maxEnforcedNodes {
			s.Nodes = append(s.Nodes, v1alpha1.EnforcedLimits{Node: n.Node, Tenant: n.Tenant.String(), Limits: n.Status.Limits,
				Unenforced: n.Status.Unenforced, Hits: n.Status.Hits})
		}
		enforced := n.Reported && enforces(n.Status, in.Want) && (!in.Strict || int(n.Status.StrictPods) >= n.Pods)
		switch {
		case enforced && n.Away:
			away[n.Node] = n.Unheard
		case n.Unheard != "":
			waiting = append(waiting, n.Node+": "+n.Unheard)
		case !enforced && n.Reported && n.Status.Reason != "":
			waiting = append(waiting, n.Node+": "+n.Status.Reason)
		case !enforced:
			waiting = append(waiting, n.Node)
		}
	}
	accepted := metav1.Condition{Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionTrue, Reason: ReasonAccepted, Message: "the policy is in force", ObservedGeneration: p.Generation}
	ready := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, ObservedGeneration: p.Generation}
	if cut := capped(&p.Spec.ProxyLimits, in.Bounds); cut != "" {
		accepted.Reason, accepted.Message = ReasonCapped, "the policy is in force within the ceilings of the namespace's MeshTopology: "+cut
	}
	if shared && boundsProxies(&p.Spec.ProxyLimits) {
		accepted.Status, accepted.Reason = metav1.ConditionFalse, ReasonSharedProxy
		accepted.Message = "pods of the namespace share a proxy with others on each node (isolation: Node), which no namespace's policy bounds"
	}
	switch {
	case !in.Member:
		accepted.Status, accepted.Reason = metav1.ConditionFalse, ReasonNotInMesh
		accepted.Message = "no MeshTopology selects the namespace, so it has no proxies to bound"
		ready.Reason, ready.Message = ReasonNoProxies, "the namespace has no proxies"
	case len(nodes) == 0:
		ready.Reason, ready.Message = ReasonNoProxies, "the namespace has no pods, so no proxies"
	case len(waiting) > 0:
		ready.Reason, ready.Message = ReasonProgressing, "not enforced yet on "+listed(waiting)
	default:
		ready.Status, ready.Reason, ready.Message = metav1.ConditionTrue, ReasonEnforced, fmt.Sprintf("enforced (nodes: %d)", len(nodes))
		if len(away) > 0 {
			ready.Reason = ReasonNodesAway
		}
		if told := notHeld(bounded); len(told) > 0 {
			ready.Reason = ReasonPartlyEnforced
			ready.Message = "enforced but for " + listed(told)
		}
		if len(away) > 0 {
			ready.Message += "; on these when they were heard last: " + describe(away)
		}
	}
	s.Conditions = conditions(p.Status.Conditions, now, accepted, ready)
	return s
}

// TopologyInput is what a MeshTopology's status depends on.
type TopologyInput struct {
	// TrustDomain of the mesh.
	TrustDomain string
	// Namespaces that are in the mesh by this topology.
	Namespaces int
	// Lost are namespaces that it selects and an older one has: namespace → topology.
	Lost map[string]string
	// Authority is how the mesh's authority is.
	Authority AuthorityView
	// NotRenewed says of nodes why they hold certificates that weren't renewed in time.
	NotRenewed map[string]string
	// Proxies of all of its tenants.
	Proxies []NodeView
	// Nodes that can run proxies.
	Nodes []NodeRedirectionView
	// WithoutRanges are nodes with pods of it whose addresses nobody knows the ranges of.
	WithoutRanges []string
	// Bypasses that the topology asks for.
	Bypasses []BypassView
}

// MeshTopologyStatus tells what a topology came to.
func MeshTopologyStatus(t *v1alpha1.MeshTopology, all Topologies, in TopologyInput, now metav1.Time) v1alpha1.MeshTopologyStatus {
	s := v1alpha1.MeshTopologyStatus{ObservedGeneration: t.Generation, Namespaces: int32(in.Namespaces), Proxies: int32(len(in.Proxies))}
	version := cmp.Or(t.Spec.Proxy.Version, DefaultProxyVersion)
	waiting, lacking := map[string]bool{}, map[string]bool{}
	notReady, away := map[string]string{}, map[string]string{} // why of those that aren't heard
	for _, p := range in.Proxies {
		s.Pods += int32(p.Pods)
		switch {
		case p.Away:
			away[p.Node] = p.Unheard
		case p.Unheard != "":
			notReady[p.Node] = " (" + p.Unheard + ")"
		case p.Reported && p.Status.Ready:
			s.ReadyProxies++
		case p.Reported:
			notReady[p.Node] = ""
		default:
			waiting[p.Node] = true
		}
		if len(p.ProxyVersions) > 0 && !slices.Contains(p.ProxyVersions, version) {
			lacking[p.Node] = true
		}
	}
	accepted := metav1.Condition{Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionFalse, ObservedGeneration: t.Generation}
	own := cmp.Or(t.Spec.TrustDomain, DefaultTrustDomain)
	switch problem := all.problem(t.Name); {
	case in.TrustDomain != "" && own != in.TrustDomain:
		accepted.Reason = ReasonTrustDomainMismatch
		accepted.Message = fmt.Sprintf("the mesh has the trust domain %q, from its first MeshTopology on; delete this one and create it with that", in.TrustDomain)
	case problem != "":
		accepted.Reason, accepted.Message = ReasonInvalidSelector, problem
	case len(in.Lost) > 0:
		accepted.Reason, accepted.Message = ReasonOverlaps, overlaps(in.Lost)
	case len(lacking) > 0:
		accepted.Reason = ReasonUnknownProxyVersion
		accepted.Message = fmt.Sprintf("the agents have no Envoy %s on %s; see status.proxyVersions of the NodeProxies", version, listed(keys(lacking)))
	case in.Namespaces == 0:
		accepted.Status = metav1.ConditionTrue
		accepted.Reason, accepted.Message = ReasonNothingSelected, "no namespace has the labels that a rule asks for ("+selectors(t.Spec.Rules)+"); label one, or correct the rule"
	default:
		accepted.Status = metav1.ConditionTrue
		accepted.Reason, accepted.Message = ReasonAccepted, fmt.Sprintf("namespaces in the mesh: %d", in.Namespaces)
	}
	ready := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, ObservedGeneration: t.Generation}
	switch {
	case len(notReady) > 0:
		var on []string
		for _, node := range slices.Sorted(maps.Keys(notReady)) {
			on = append(on, node+notReady[node])
		}
		ready.Reason, ready.Message = ReasonNodesNotReady, "proxies aren't ready on "+listed(on)
	case len(waiting) > 0:
		ready.Reason, ready.Message = ReasonProgressing, "waiting for the agents of "+listed(keys(waiting))
	default:
		ready.Status, ready.Reason, ready.Message = serving(s.ReadyProxies, s.Proxies)
	}
	besides(&ready, away)
	redirected := redirectedCondition(t.Name, all, in.Nodes)
	redirected.ObservedGeneration = t.Generation
	identity := identityCondition(t, all, in)
	identity.ObservedGeneration = t.Generation
	bypasses, bypass := bypassStatus(t.Status.Bypasses, in.Bypasses, now)
	bypass.ObservedGeneration = t.Generation
	s.Bypasses = bypasses
	ranges := rangesCondition(in.WithoutRanges)
	ranges.ObservedGeneration = t.Generation
	s.Conditions = conditions(t.Status.Conditions, now, accepted, ready, redirected, identity, ranges, bypass)
	return s
}

func (t Topologies) problem(name string) string {
	for _, i := range t.items {
		if i.name == name {
			return i.problem
		}
	}
	return ""
}

func overlaps(lost map[string]string) string {
	var list []string
	for ns, winner := range lost {
		list = append(list, fmt.Sprintf("%s (in %s)", ns, winner))
	}
	slices.Sort(list)
	return "older MeshTopologies select these namespaces as well, and count: " + listed(list)
}

// conditions keeps the transition time of each condition whose status stays.
func conditions(had []metav1.Condition, now metav1.Time, want ...metav1.Condition) []metav1.Condition {
	var out []metav1.Condition
	for _, c := range want {
		c.LastTransitionTime = now
		if old := meta.FindStatusCondition(had, c.Type); old != nil && old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
		if len(c.Message) > maxMessage {
			c.Message = c.Message[:maxMessage]
		}
		out = append(out, c)
	}
	return out
}

func byNode(nodes []NodeView) []NodeView {
	nodes = slices.Clone(nodes)
	slices.SortFunc(nodes, func(a, b NodeView) int { return strings.Compare(a.Node, b.Node) })
	return nodes
}

// selectors are those of a topology's rules, for people.
func selectors(rules []v1alpha1.TenancyRule) string {
	var out []string
	for i := range rules[:min(len(rules), maxListed)] {
		out = append(out, metav1.FormatLabelSelector(&rules[i].NamespaceSelector))
	}
	if len(rules) > maxListed {
		out = append(out, "…")
	}
	return strings.Join(out, " or ")
}

func listed(names []string) string {
	if len(names) > maxListed {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:maxListed], ", "), len(names)-maxListed)
	}
	return strings.Join(names, ", ")
}

func keys(m map[string]bool) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
