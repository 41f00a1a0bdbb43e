package translate

import (
	"maps"
	"slices"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// TenantFigures are how a tenant's processes of both versions fare, on all nodes
// where both serve.
type TenantFigures struct {
	Tenant   string
	Old, New v1alpha1.GenerationFigures
}

// CompareFigures adds up what nodes report of a rollout's canaries and of what serves
// beside them, by tenant in order: what is judged. Histograms are left out.
func CompareFigures(r *v1alpha1.ProxyRollout, nodes []v1alpha1.NodeProxy) (all []TenantFigures) {
	version := RolloutVersion(r.Spec.Target)
	by := map[string]*TenantFigures{}
	for _, n := range nodes {
		for _, t := range n.Status.Tenants {
			var old, new *v1alpha1.GenerationFigures
			for _, g := range t.Generations {
				switch {
				case g.Role == v1alpha1.RoleCanary && g.Version == version:
					new = g.Figures
				case g.Role == v1alpha1.RoleFirst && g.Version != version:
					old = g.Figures
				}
			}
			if old == nil || new == nil {
				continue
			}
			if by[t.Name] == nil {
				by[t.Name] = &TenantFigures{Tenant: t.Name}
			}
			addFigures(&by[t.Name].Old, old)
			addFigures(&by[t.Name].New, new)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(by)) {
		all = append(all, *by[name])
	}
	return all
}

func addFigures(sum, f *v1alpha1.GenerationFigures) {
	for _, of := range []func(*v1alpha1.GenerationFigures) *int64{
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.Connections },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.Unanswered },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.Resets },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.Upstreams },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.UpstreamFailures },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.Handshakes },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.HandshakeFailures },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.Tunnelled },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.TunnelErrors },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.Requests },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.ServerErrors },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.CPUMilliseconds },
		func(f *v1alpha1.GenerationFigures) *int64 { return &f.PrivateBytes },
	} {
		*of(sum) += *of(f)
	}
}
