package agent

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/bulkhead-mesh/bulkhead/agent/image"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// plan is what should run on the node.
type plan struct {
	// uid and generation of the NodeProxy that it was made from.
	uid        types.UID
	generation int64
	// readySince is the plan's word for since when the node is Ready, nil if it has none.
	readySince *metav1.Time
	// redirection of all pods; "" is as it is.
	redirection v1alpha1.Redirection
	// limits of all proxies together.
	limits  isolation.Limits
	tenants []tenantPlan
	pods    []identity.Pod
	// traffic by UID, of pods for which there is more to say.
	traffic map[string]traffic
	// images that the node is to have.
	images []image.Source
	// outside are pods, by UID, that aren't in the mesh although their namespace is.
	outside map[string]bool
}

// traffic is what of a pod's connections doesn't go the mesh's way.
type traffic struct {
	exclusions     []steer.Exclusion
	strict, bypass bool
}

// tenantPlan is one tenant's proxy.
type tenantPlan struct {
	tenant model.Tenant
	limits isolation.Limits
	// connections that it takes.
	connections steer.ConnectionLimits
	// bandwidth of it with all but its own pods.
	bandwidth isolation.Bandwidth
	// workers of each process, 0 by default.
	workers int
	// version of Envoy that is to serve it.
	version string
	// drain is for how long what isn't wanted any more may finish; 0 for the agent's.
	drain time.Duration
	// canary is to serve beside it; nil for none.
	canary *canaryPlan
	// standby is why there is no warm standby that is wanted, "" otherwise.
	standby string
}

// canaryPlan is a second process of a tenant.
type canaryPlan struct {
	version string
	// weight is its share of new connections, in percent.
	weight int
	// standby: it is the warm standby, without a share. The kernel leads to it what
	// the first doesn't take.
	standby bool
}

// makePlan reads a NodeProxy. What makes no sense is left out and named in the
// error: the rest is in force.
func makePlan(np *v1alpha1.NodeProxy) (plan, error) {
	p := plan{uid: np.UID, generation: np.Generation, readySince: np.Spec.ReadySince, limits: processLimits(np.Spec.Limits), traffic: map[string]traffic{}, outside: map[string]bool{}}
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
			limits:      processLimits(t.Limits),
			connections: connectionLimits(t.Limits),
			bandwidth:   isolation.Bandwidth{Egress: t.Limits.Egress, Ingress: t.Limits.Ingress},
			workers:     int(max(0, min(t.Limits.Concurrency, isolation.MaxWorkers))),
			version:     t.Version,
			drain:       time.Duration(t.DrainSeconds) * time.Second,
		}
		if c := t.Canary; c != nil && c.Promoted {
			tp.version = c.Version
		} else if c != nil {
			tp.canary = &canaryPlan{version: c.Version, weight: int(c.Weight)}
		} else if t.Standby {
			tp.standby = standbyProblem(t.Limits)
			if tp.standby == "" {
				tp.canary = &canaryPlan{version: t.Version, standby: true}
			}
		}
		p.tenants = append(p.tenants, tp)
	}
	for _, i := range np.Spec.Images {
		p.images = append(p.images, image.Source{Version: i.Version, Reference: i.Image})
	}
	for _, o := range np.Spec.Outside {
		p.outside[o.UID] = true
	}
	namespaces := map[string]traffic{}
	for _, n := range np.Spec.Namespaces {
		t := traffic{strict: n.PlainText == v1alpha1.PlainTextStrict, bypass: n.EmergencyBypass}
		if n.PlainText != "" && n.PlainText != v1alpha1.PlainTextPermissive && !t.strict {
			errs = append(errs, fmt.Errorf("namespace %s: plainText %q isn't known to this agent: its pods take none", n.Name, n.PlainText))
			t.strict = true
		}
		var err error
		if t.exclusions, err = exclusions(n.Exclusions); err != nil {
			errs = append(errs, fmt.Errorf("namespace %s: %w", n.Name, err))
		}
		namespaces[n.Name] = t
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
		t := namespaces[n.Namespace]
		own, err := exclusions(n.Exclusions)
		if err != nil {
			errs = append(errs, fmt.Errorf("pod %s/%s: %w", n.Namespace, n.Name, err))
		}
		if t.exclusions = slices.Concat(t.exclusions, own); len(t.exclusions) > 0 || t.strict || t.bypass {
			p.traffic[n.UID] = t
		}
		p.pods = append(p.pods, identity.Pod{UID: n.UID, Namespace: n.Namespace, Name: n.Name, Identity: id, Tenant: tenant})
	}
	slices.SortFunc(p.tenants, func(a, b tenantPlan) int { return cmp.Compare(a.tenant.String(), b.tenant.String()) })
	slices.SortFunc(p.pods, func(a, b identity.Pod) int { return cmp.Compare(a.UID, b.UID) })
	return p, errors.Join(errs...)
}

// exclusions are those that make sense.
func exclusions(list []v1alpha1.Exclusion) (out []steer.Exclusion, err error) {
	var errs []error
	for _, e := range list {
		x := steer.Exclusion{Inbound: e.Direction == v1alpha1.DirectionInbound, Port: uint16(e.Port)}
		var err error
		switch {
		case e.Direction != v1alpha1.DirectionInbound && e.Direction != v1alpha1.DirectionOutbound:
			err = fmt.Errorf("direction %q isn't known to this agent", e.Direction)
		case e.Port < 0 || e.Port > 65535 || e.Port == 0 && e.CIDR == "":
			err = fmt.Errorf("port %d", e.Port)
		case e.CIDR != "":
			if x.Peer, err = netip.ParsePrefix(e.CIDR); err == nil && (x.Peer != x.Peer.Masked() || x.Peer.Addr().Is4In6()) {
				err = fmt.Errorf("cidr %q isn't a network", e.CIDR)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("exclusion is left out: %w", err))
			continue
		}
		out = append(out, x)
	}
	return out, errors.Join(errs...)
}

// pod finds a planned pod.
func (p plan) pod(uid string) (identity.Pod, bool) {
	i, ok := slices.BinarySearchFunc(p.pods, uid, func(pod identity.Pod, uid string) int { return cmp.Compare(pod.UID, uid) })
	if !ok {
		return identity.Pod{}, false
	}
	return p.pods[i], true
}

// names are the planned tenants.
func (p plan) names() (out []model.Tenant) {
	for _, tp := range p.tenants {
		out = append(out, tp.tenant)
	}
	return out
}

// has reports whether the tenant is planned.
func (p plan) has(t model.Tenant) bool {
	return slices.ContainsFunc(p.tenants, func(tp tenantPlan) bool { return tp.tenant == t })
}

// versions are all that tenants are to run.
func (p plan) versions() map[string]bool {
	all := map[string]bool{}
	for _, tp := range p.tenants {
		all[tp.version] = true
		if tp.canary != nil {
			all[tp.canary.version] = true
		}
	}
	return all
}
