package agent

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// plan is what should run on the node.
type plan struct {
	// uid and generation of the NodeProxy that it was made from.
	uid        types.UID
	generation int64
	// redirection of all pods; "" is as it is.
	redirection v1alpha1.Redirection
	tenants     []tenantPlan
	pods        []identity.Pod
}

// tenantPlan is one tenant's proxy.
type tenantPlan struct {
	tenant model.Tenant
	limits isolation.Limits
	// generations in ascending order; the first is 0.
	generations []isolation.Generation
	// weight is the share of new connections, in percent, that generation 1 is to
	// get.
	weight int
}

// makePlan reads a NodeProxy. What makes no sense is left out and named in the
// error: the rest is in force.
func makePlan(np *v1alpha1.NodeProxy) (plan, error) {
	p := plan{uid: np.UID, generation: np.Generation}
	var errs []error
	switch np.Spec.Redirection {
	case "", v1alpha1.RedirectionEBPF:
		p.redirection = v1alpha1.RedirectionEBPF
	case v1alpha1.RedirectionNetfilter:
		p.redirection = v1alpha1.RedirectionNetfilter
	default:
		errs = append(errs, fmt.Errorf("redirection %q isn't known to this agent: it stays as it is", np.Spec.Redirection))
	}
	known := map[string]model.Tenant{}
	for _, t := range np.Spec.Tenants {
		tenant, err := model.ParseTenant(t.Name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if known[t.Name] = tenant; t.Version == "" {
			errs = append(errs, fmt.Errorf("tenant %s: no version of Envoy", t.Name))
			continue
		}
		tp := tenantPlan{
			tenant:      tenant,
			limits:      isolation.Limits(t.Limits),
			generations: []isolation.Generation{{Generation: 0, Version: t.Version}},
		}
		if c := t.Canary; c != nil {
			tp.generations = append(tp.generations, isolation.Generation{Generation: 1, Version: c.Version})
			tp.weight = int(c.Weight)
		}
		p.tenants = append(p.tenants, tp)
	}
	for _, n := range np.Spec.Pods {
		tenant, ok := known[n.Tenant]
		if !ok {
			errs = append(errs, fmt.Errorf("pod %s/%s: tenant %q isn't planned", n.Namespace, n.Name, n.Tenant))
			continue
		}
		id := model.Identity{TrustDomain: np.Spec.TrustDomain, Namespace: n.Namespace, ServiceAccount: n.ServiceAccount}
		if _, err := model.ParseIdentity(id.String()); err != nil {
			errs = append(errs, fmt.Errorf("pod %s/%s: %w", n.Namespace, n.Name, err))
			continue
		}
		p.pods = append(p.pods, identity.Pod{UID: n.UID, Namespace: n.Namespace, Name: n.Name, Identity: id, Tenant: tenant})
	}
	slices.SortFunc(p.tenants, func(a, b tenantPlan) int { return cmp.Compare(a.tenant.String(), b.tenant.String()) })
	slices.SortFunc(p.pods, func(a, b identity.Pod) int { return cmp.Compare(a.UID, b.UID) })
	return p, errors.Join(errs...)
}

// pod finds a planned pod.
func (p plan) pod(uid string) (identity.Pod, bool) {
	i, ok := slices.BinarySearchFunc(p.pods, uid, func(pod identity.Pod, uid string) int { return cmp.Compare(pod.UID, uid) })
	if !ok {
		return identity.Pod{}, false
	}
	return p.pods[i], true
}

// has reports whether the tenant is planned.
func (p plan) has(t model.Tenant) bool {
	return slices.ContainsFunc(p.tenants, func(tp tenantPlan) bool { return tp.tenant == t })
}
