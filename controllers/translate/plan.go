package translate

import (
	"slices"
	"strings"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// DefaultPids is how many threads and processes a proxy may have where no
// IsolationPolicy says.
const DefaultPids = 512

// Limits are the strictest of the policies of a namespace; weights count as
// limits: the smallest wins.
func Limits(policies []v1alpha1.IsolationPolicy) v1alpha1.Limits {
	var l v1alpha1.Limits
	for _, p := range policies {
		stricter(&l, policyLimits(p.Spec))
	}
	if l.Pids == 0 {
		l.Pids = DefaultPids
	}
	if l.MemoryMax != 0 && l.MemoryHigh > l.MemoryMax {
		// From two policies: the smaller is the stricter.
		l.MemoryHigh = l.MemoryMax
	}
	return l
}

func policyLimits(s v1alpha1.IsolationPolicySpec) v1alpha1.Limits {
	var l v1alpha1.Limits
	if c := s.CPU; c != nil {
		if c.Weight != nil {
			l.CPUWeight = *c.Weight
		}
		if c.Limit != nil {
			l.CPUMillis = c.Limit.MilliValue()
		}
	}
	if m := s.Memory; m != nil {
		if m.High != nil {
			l.MemoryHigh = m.High.Value()
		}
		if m.Max != nil {
			l.MemoryMax = m.Max.Value()
		}
	}
	if s.Pids != nil {
		l.Pids = *s.Pids
	}
	return l
}

func stricter(l *v1alpha1.Limits, by v1alpha1.Limits) {
	for _, f := range []struct {
		to   *int64
		from int64
	}{
		{&l.CPUWeight, by.CPUWeight}, {&l.CPUMillis, by.CPUMillis}, {&l.MemoryHigh, by.MemoryHigh}, {&l.MemoryMax, by.MemoryMax}, {&l.Pids, by.Pids},
	} {
		if f.from != 0 && (*f.to == 0 || f.from < *f.to) {
			*f.to = f.from
		}
	}
}

// TenantPlan is what the plan of a node has to know of a tenant.
type TenantPlan struct {
	Version string
	Limits  v1alpha1.Limits
}

// NodePlan is what a node's plan depends on.
type NodePlan struct {
	TrustDomain string
	Redirection v1alpha1.Redirection
	Members     []Pod
	// Tenant is asked once for each tenant, by namespace.
	Tenant func(namespace string) TenantPlan
}

// NodeProxySpec is a node's plan: its members and their tenants, sorted. It never
// has a canary: that field is a rollout's.
func NodeProxySpec(n NodePlan) v1alpha1.NodeProxySpec {
	spec := v1alpha1.NodeProxySpec{TrustDomain: n.TrustDomain, Redirection: n.Redirection}
	seen := map[string]bool{}
	for _, p := range n.Members {
		name := p.Tenant.String()
		spec.Pods = append(spec.Pods, v1alpha1.NodePod{UID: p.UID, Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount, Tenant: name})
		if !seen[name] {
			seen[name] = true
			t := n.Tenant(p.Namespace)
			spec.Tenants = append(spec.Tenants, v1alpha1.NodeTenant{Name: name, Version: t.Version, Limits: t.Limits})
		}
	}
	slices.SortFunc(spec.Pods, func(a, b v1alpha1.NodePod) int { return strings.Compare(a.UID, b.UID) })
	slices.SortFunc(spec.Tenants, func(a, b v1alpha1.NodeTenant) int { return strings.Compare(a.Name, b.Name) })
	return spec
}

// SamePlan reports whether have is want, whatever canaries it has besides. The
// order of lists doesn't count.
func SamePlan(have, want v1alpha1.NodeProxySpec) bool {
	if have.TrustDomain != want.TrustDomain || have.Redirection != want.Redirection || len(have.Tenants) != len(want.Tenants) || len(have.Pods) != len(want.Pods) {
		return false
	}
	tenants := map[string]v1alpha1.NodeTenant{}
	for _, t := range have.Tenants {
		t.Canary = nil
		tenants[t.Name] = t
	}
	for _, t := range want.Tenants {
		if tenants[t.Name] != t {
			return false
		}
	}
	pods := map[string]v1alpha1.NodePod{}
	for _, p := range have.Pods {
		pods[p.UID] = p
	}
	for _, p := range want.Pods {
		if pods[p.UID] != p {
			return false
		}
	}
	return true
}
