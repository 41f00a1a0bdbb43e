package translate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// IsStrict reports whether the policies of a namespace close its pods to plain
// text.
func IsStrict(policies []v1alpha1.IsolationPolicy) bool {
	return slices.ContainsFunc(policies, func(p v1alpha1.IsolationPolicy) bool { return p.Spec.PlainText == v1alpha1.PlainTextStrict })
}

// NamespacePlan is what the plan of a node has to know of a namespace.
type NamespacePlan struct {
	// Version and Limits of its proxy.
	Version string
	// HeldBack are tenants that have another version, by name.
	HeldBack map[string]string
	Limits   v1alpha1.Limits
	// Standby: it has a second process.
	Standby bool
	// Bounds that Limits and Standby were made with.
	Bounds Bounds
	// Exclusions of all its pods.
	Exclusions []v1alpha1.Exclusion
	// Drain is for how long what was replaced may finish its connections; 0 is as
	// agents say.
	Drain time.Duration
	// Strict pods take no plain text.
	Strict bool
	// Bypass is the emergency bypass.
	Bypass bool
}

func (p NamespacePlan) node(name string) (n v1alpha1.NodeNamespace, needed bool) {
	n = v1alpha1.NodeNamespace{Name: name, Exclusions: p.Exclusions, EmergencyBypass: p.Bypass}
	if p.Strict {
		n.PlainText = v1alpha1.PlainTextStrict
	}
	return n, p.Strict || p.Bypass || len(p.Exclusions) > 0
}

// NodePlan is what a node's plan depends on.
type NodePlan struct {
	TrustDomain string
	// ReadySince is since when the node is Ready, or was last; nil if nobody says.
	ReadySince  *metav1.Time
	Redirection v1alpha1.Redirection
	// Limits of all proxies together.
	Limits  v1alpha1.Limits
	Members []Pod
	// OptedOut pods of the node.
	OptedOut []Pod
	// Had are tenants that the node has: they are the last to go where there is no
	// room for all.
	Had map[string]bool
	// Shared is what a proxy for all pods of a node runs.
	Shared NamespacePlan
	// Namespaces has all namespaces of the members.
	Namespaces map[string]NamespacePlan
}

// NodeProxySpec is a node's plan: its members and their tenants, sorted. It never
// has a canary: that field is a rollout's.
func NodeProxySpec(n NodePlan) v1alpha1.NodeProxySpec {
	spec := v1alpha1.NodeProxySpec{TrustDomain: n.TrustDomain, ReadySince: n.ReadySince, Redirection: n.Redirection, Limits: n.Limits}
	tenants, namespaces := n.tenants(), map[string]bool{}
	planned := map[string]bool{}
	for _, p := range n.Members {
		name, ns := p.Tenant.String(), n.Namespaces[p.Namespace]
		if !tenants[name] {
			continue
		}
		pod := v1alpha1.NodePod{UID: p.UID, Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount, Tenant: name}
		for _, e := range p.Exclusions {
			// A pod can't let in what its namespace is closed to.
			if e.Direction != v1alpha1.DirectionInbound || !ns.Strict {
				pod.Exclusions = append(pod.Exclusions, e)
			}
		}
		spec.Pods = append(spec.Pods, pod)
		if !planned[name] {
			planned[name] = true
			t := v1alpha1.NodeTenant{Name: name, Version: cmp.Or(ns.HeldBack[name], ns.HeldBack[p.Namespace], ns.Version), Limits: ns.Limits, DrainSeconds: int64(ns.Drain / time.Second), Standby: ns.Standby}
			if p.Tenant.Scope == model.ScopeNode {
				// No namespace's policy bounds what others use as well.
				t.DrainSeconds, t.Version, t.Limits, t.Standby = 0, n.Shared.Version, Limits(nil, n.Shared.Bounds), Standby(nil, n.Shared.Bounds)
			}
			spec.Tenants = append(spec.Tenants, t)
		}
		if !namespaces[p.Namespace] {
			namespaces[p.Namespace] = true
			if o, needed := ns.node(p.Namespace); needed {
				spec.Namespaces = append(spec.Namespaces, o)
			}
		}
	}
	for _, p := range n.OptedOut {
		spec.Outside = append(spec.Outside, v1alpha1.OutsidePod{UID: p.UID, Namespace: p.Namespace, Name: p.Name})
	}
	slices.SortFunc(spec.Outside, func(a, b v1alpha1.OutsidePod) int { return strings.Compare(a.UID, b.UID) })
	slices.SortFunc(spec.Namespaces, func(a, b v1alpha1.NodeNamespace) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(spec.Pods, func(a, b v1alpha1.NodePod) int { return strings.Compare(a.UID, b.UID) })
	slices.SortFunc(spec.Tenants, func(a, b v1alpha1.NodeTenant) int { return strings.Compare(a.Name, b.Name) })
	return spec
}

// MaxTenants is how many tenants a node has room for, as NodeProxy and the kernel's
// maps do.
const MaxTenants = 500

// tenants are those that there is room for: first those that the node has.
func (n NodePlan) tenants() map[string]bool {
	all := map[string]bool{}
	for _, p := range n.Members {
		all[p.Tenant.String()] = true
	}
	if len(all) <= MaxTenants {
		return all
	}
	names := slices.SortedFunc(maps.Keys(all), func(a, b string) int {
		if n.Had[a] != n.Had[b] {
			if n.Had[a] {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	for _, name := range names[MaxTenants:] {
		delete(all, name)
	}
	return all
}

// Crowded says that a node has no room for more tenants, or soon hasn't; "" if it
// has. want are all of them.
func Crowded(members []Pod) string {
	all := map[string]bool{}
	for _, p := range members {
		all[p.Tenant.String()] = true
	}
	switch n := len(all); {
	case n > MaxTenants:
		return fmt.Sprintf("%d of %d tenants find no room, at most %d: their pods don't start; move pods to other nodes, or have fewer and larger tenants", n-MaxTenants, n, MaxTenants)
	case n*10 > MaxTenants*9:
		return fmt.Sprintf("there are %d tenants, and room for %d", n, MaxTenants)
	}
	return ""
}

// SamePlan reports whether have is want, which is sorted, whatever canaries and images
// it has besides. The order of its lists doesn't count.
func SamePlan(have, want v1alpha1.NodeProxySpec) bool {
	have = *have.DeepCopy()
	have.Images = nil
	for i := range have.Tenants {
		have.Tenants[i].Canary = nil
	}
	slices.SortFunc(have.Tenants, func(a, b v1alpha1.NodeTenant) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(have.Namespaces, func(a, b v1alpha1.NodeNamespace) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(have.Outside, func(a, b v1alpha1.OutsidePod) int { return strings.Compare(a.UID, b.UID) })
	slices.SortFunc(have.Pods, func(a, b v1alpha1.NodePod) int { return strings.Compare(a.UID, b.UID) })
	return equality.Semantic.DeepEqual(have, want)
}
