package translate

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// unstableFor is how long after the end of an old proxy that of the new one says
	// nothing of its version.
	unstableFor = 10 * time.Minute
	// roomForTwo are threads that two processes of a proxy have at least.
	roomForTwo = 64
	// maxHeldBack is how many namespaces a status has room for.
	maxHeldBack = 64
)

// Causes of a failure, as agents tell them.
const causeOutOfMemory = "OutOfMemory"

// ownFault says why what went wrong with a tenant's new proxy is to be looked for with
// the tenant and not with the version; "" if nothing says so. A namespace can bring
// its own proxies down, and must not keep all others from an upgrade by it.
func (r *rollout) ownFault(tenant string, p placed, g *v1alpha1.GenerationStatus, reason string) string {
	t, err := model.ParseTenant(tenant)
	if err != nil || t.Scope == model.ScopeNode {
		return "" // no namespace bounds what all share
	}
	have, usual := p.spec.Limits, Limits(nil, r.Bounds[t.Namespace])
	tighter := func(own, usual int64) bool { return own != 0 && (usual == 0 || own < usual) }
	switch f := p.status.Failure; {
	case reason == VerdictNotReady && tighter(have.CPUMillis, usual.CPUMillis):
		return fmt.Sprintf("its namespace's IsolationPolicies leave it %dm of CPU, less than the MeshTopology does", have.CPUMillis)
	case reason == VerdictCrashed && f != nil && f.Generation == g.Generation && f.Cause == causeOutOfMemory && tighter(have.MemoryMax, usual.MemoryMax):
		return fmt.Sprintf("its namespace's IsolationPolicies leave it %d MiB of memory, less than the MeshTopology does", have.MemoryMax>>20)
	case reason == VerdictCrashed && have.Pids < roomForTwo && tighter(have.Pids, usual.Pids):
		return fmt.Sprintf("its namespace's IsolationPolicies leave it %d threads, too few for two processes", have.Pids)
	}
	// Both processes are in one memory limit: one that takes it all may have the other
	// one killed, so the end of the old one excuses nothing.
	if f := p.status.Failure; reason == VerdictCrashed && f != nil && f.Cause == causeOutOfMemory {
		return ""
	}
	for _, place := range r.tenants[tenant] {
		if place.status == nil {
			continue
		}
		for _, old := range place.status.Generations {
			if old.Version != r.version && old.Restarts > 0 && old.StartedAt != nil && r.Now.Sub(old.StartedAt.Time) < unstableFor {
				return fmt.Sprintf("its proxy of Envoy %s ended by itself as well, on %s before %s", old.Version, place.node.Name, old.StartedAt.UTC().Format(time.RFC3339))
			}
		}
	}
	return ""
}

// holdBack has the rollout go on without a tenant, or without its whole namespace if
// another tenant of it stays behind already: an owner can make as many tenants as they
// have pods. It reports false if so many namespaces are behind that it must be the
// version.
func (r *rollout) holdBack(v v1alpha1.RolloutVerdict, why string) bool {
	namespace := NamespaceOf(v.Tenant)
	behind := map[string]bool{}
	for _, h := range r.status.HeldBack {
		behind[NamespaceOf(h.Tenant)] = true
	}
	percent := int32(10)
	if p := r.Rollout.Spec.MaxHeldBackPercent; p != nil {
		percent = *p
	}
	all := len(r.namespaces())
	most := all * int(percent) / 100
	if percent > 0 {
		most = max(most, 1)
	}
	h := v1alpha1.HeldBackTenant{Tenant: v.Tenant, Node: v.Node, Reason: v.Reason, Message: cutTo(v.Message+"; "+why, 1000), At: metav1.NewTime(r.Now)}
	if behind[namespace] {
		h.Tenant = namespace
		r.status.HeldBack = slices.DeleteFunc(r.status.HeldBack, func(h v1alpha1.HeldBackTenant) bool { return NamespaceOf(h.Tenant) == namespace })
	} else if n := len(behind); n >= min(most, maxHeldBack) || n+1 >= all {
		return false
	}
	r.status.HeldBack = append(r.status.HeldBack, h)
	r.status.ReachedAt = nil // who takes its place in the step is new to it
	return true
}

// namespaces of all tenants; what all share is like one.
func (r *rollout) namespaces() map[string]bool {
	all := map[string]bool{}
	for name := range r.tenants {
		all[NamespaceOf(name)] = true
	}
	return all
}

// NamespaceOf a tenant, by its name; the name itself if it belongs to none.
func NamespaceOf(tenant string) string {
	if t, err := model.ParseTenant(tenant); err == nil && t.Scope != model.ScopeNode {
		return t.Namespace
	}
	return tenant
}

func isHeldBack(s v1alpha1.ProxyRolloutStatus, tenant string) bool { return heldBack(s, tenant) != nil }

// heldBack is what a status says of a tenant, or of its namespace, that stays behind.
func heldBack(s v1alpha1.ProxyRolloutStatus, tenant string) *v1alpha1.HeldBackTenant {
	for i, h := range s.HeldBack {
		if h.Tenant == tenant || h.Tenant == NamespaceOf(tenant) {
			return &s.HeldBack[i]
		}
	}
	return nil
}

// without says which tenants the rollout goes on without, "" if none.
func (r *rollout) without() string {
	var names []string
	for _, h := range r.status.HeldBack {
		names = append(names, fmt.Sprintf("%s (%s on %s)", h.Tenant, h.Reason, h.Node))
	}
	if len(names) == 0 {
		return ""
	}
	return "; without " + listed(names) + ", which stay at the version before: see status.heldBack"
}

// RolledOutVersion is the version of a tenant whose MeshTopology asks for asked: what
// the rollouts that succeeded since made of it, one after another, but for those that
// held it back. tenant "" is any that none held back.
func RolledOutVersion(asked, tenant string, rollouts []v1alpha1.ProxyRollout) string {
	done := slices.DeleteFunc(slices.Clone(rollouts), func(r v1alpha1.ProxyRollout) bool {
		return r.Status.Phase != v1alpha1.RolloutSucceeded || r.Status.FinishedAt == nil || isHeldBack(r.Status, tenant)
	})
	slices.SortFunc(done, func(a, b v1alpha1.ProxyRollout) int {
		return cmp.Or(a.Status.FinishedAt.Compare(b.Status.FinishedAt.Time), cmp.Compare(a.Name, b.Name))
	})
	for _, r := range done {
		if slices.Contains(r.Status.From, asked) {
			asked = r.Status.Version
		}
	}
	return asked
}

// HeldBackTenants are those, and the whole namespaces, that rollouts held back: their
// version may be another than that of the rest.
func HeldBackTenants(rollouts []v1alpha1.ProxyRollout) (names []string) {
	for _, r := range rollouts {
		for _, h := range r.Status.HeldBack {
			names = append(names, h.Tenant)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
