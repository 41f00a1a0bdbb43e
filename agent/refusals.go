package agent

import (
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
)

const (
	// refusedFor is how long one version has to refuse what the other takes until that
	// is told: both get a change at about the same time.
	refusedFor = 3 * time.Second
	// maxRefusals are remembered of a tenant.
	maxRefusals = 64
)

// resource that a proxy refused.
type resource struct{ kind, name string }

// refusal is what is known of a resource that a tenant's proxies refuse.
type refusal struct {
	// shared: another version refuses it as well, or did while this one has, or none
	// was there to compare with when it was refused first.
	shared bool
	// alone is since when one version refuses it and another that runs beside it
	// doesn't.
	alone time.Time
}

// told reports whether the refusal is one version's alone, and when to ask again if
// that isn't certain yet.
func (r refusal) told(now time.Time) (alone bool, again time.Duration) {
	if r.shared || r.alone.IsZero() {
		return false, 0
	}
	if left := refusedFor - now.Sub(r.alone); left > 0 {
		return false, left
	}
	return true, 0
}

// compareRefusals says which of what a tenant's processes refuse is a matter of their
// version. had is what it said before: what two versions refused stays shared when
// the older one has ended. configs are by generation.
func compareRefusals(had map[resource]refusal, processes []isolation.Process, configs [generations]relay.State, now time.Time) map[resource]refusal {
	out := map[resource]refusal{}
	refusing := map[resource]map[string]bool{} // by which versions
	connected := map[string]bool{}
	runs, settled := map[string]bool{}, true
	for _, p := range processes {
		if p.PID == 0 || p.Generation < 0 || p.Generation >= generations {
			settled = false
			continue
		}
		c := configs[p.Generation]
		runs[p.Version] = true
		if c.Connected && c.Listeners > 0 {
			connected[p.Version] = true
		} else {
			settled = false
		}
		for _, r := range c.Rejections {
			if r.InVain() {
				continue
			}
			k := resource{r.Type, r.Name}
			if refusing[k] == nil {
				refusing[k] = map[string]bool{}
			}
			refusing[k][p.Version] = true
		}
	}
	for k, by := range refusing {
		r, known := had[k]
		others, compared := 0, false
		for version := range runs {
			if !by[version] {
				others++
				compared = compared || connected[version]
			}
		}
		switch {
		case r.shared:
		case len(by) > 1:
			r = refusal{shared: true}
		case others == 0:
			r.shared = !known || r.alone.IsZero()
		case compared && r.alone.IsZero():
			r.alone = now
		}
		out[k] = r
	}
	// One that isn't connected may refuse it still.
	for k, r := range had {
		if _, now := out[k]; !now && !settled && len(out) < maxRefusals {
			out[k] = r
		}
	}
	return out
}

// rememberedRefusals are those of a tenant that an earlier agent told of.
func rememberedRefusals(s v1alpha1.NodeProxyStatus) map[string]map[resource]refusal {
	all := map[string]map[resource]refusal{}
	for _, t := range s.Tenants {
		for _, r := range t.Rejected {
			if r.Shared {
				if all[t.Name] == nil {
					all[t.Name] = map[resource]refusal{}
				}
				all[t.Name][resource{r.Type, r.Name}] = refusal{shared: true}
			}
		}
	}
	return all
}

// compareRefusalsOf brings what is known of a tenant's refusals up to date, and
// returns when to look again.
func (a *Agent) compareRefusalsOf(tp tenantPlan, r *round) time.Duration {
	had, known := a.last.refused[tp.tenant] // only this goroutine writes it
	if !known {
		a.mu.Lock()
		had = a.refusedBefore[tp.tenant.String()]
		a.mu.Unlock()
	}
	var configs [generations]relay.State
	for g := range configs {
		configs[g] = a.relay.State(relay.Key{Tenant: tp.tenant, Generation: g})
	}
	state, _ := a.bulkheads.State(tp.tenant)
	now, again := time.Now(), time.Duration(0)
	r.refused[tp.tenant] = compareRefusals(had, state.Processes, configs, now)
	for _, refused := range r.refused[tp.tenant] {
		if _, left := refused.told(now); left > 0 && (again == 0 || left < again) {
			again = left
		}
	}
	return again
}
