package translate

import (
	"fmt"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Verdicts of a tenant's upgrade.
const (
	UpgradeNotYet     = "NotYet"
	UpgradeInProgress = "InProgress"
	UpgradeHealthy    = "Healthy"
	UpgradeRolledBack = "RolledBack"
	UpgradeAborted    = "Aborted"
)

// Upgrade is what the owner of a tenant is to know of the rollout that is at its
// proxies, or was last; nil if there is nothing to tell. version is the tenant's
// outside of it, rollouts are all, the oldest first.
func Upgrade(version string, nodes []NodeView, rollouts []v1alpha1.ProxyRollout) *v1alpha1.TenantUpgrade {
	var r *v1alpha1.ProxyRollout
	for i := range rollouts {
		if phase := rollouts[i].Status.Phase; phase != "" && phase != v1alpha1.RolloutPending {
			r = &rollouts[i]
		}
	}
	if r == nil || r.Status.Phase == v1alpha1.RolloutSucceeded || len(nodes) == 0 {
		return nil
	}
	s := r.Status
	u := &v1alpha1.TenantUpgrade{Rollout: r.Name, From: version, To: s.Version, Step: fmt.Sprintf("%d/%d", s.Step, len(r.Spec.Steps)), Since: s.StartedAt}
	serving := 0
	var waits string
	for _, n := range nodes {
		weight := int32(0)
		for _, g := range n.Status.Generations {
			if g.Version != s.Version || !g.Serving {
				continue
			}
			switch g.Role {
			case v1alpha1.RoleFirst:
				weight = 100
			case v1alpha1.RoleCanary:
				weight = n.Status.Weight
			}
		}
		u.Weight = max(u.Weight, weight)
		if weight > 0 {
			serving++
		}
		if n.Status.Waits != "" {
			waits = n.Node + ": " + n.Status.Waits
		}
	}
	change := fmt.Sprintf("from Envoy %s to %s by ProxyRollout %s, step %s", u.From, u.To, r.Name, u.Step)
	stop := fmt.Sprintf("who runs the mesh can stop it: bulkhead rollout abort %s", r.Name)
	switch s.Phase {
	case v1alpha1.RolloutRolledBack, v1alpha1.RolloutRollingBack:
		u.Verdict, u.Step = UpgradeRolledBack, ""
		if v := s.Verdict; v != nil {
			u.Since = &v.At
			// What was seen at another tenant may be about its pods.
			where := "at another tenant"
			for _, n := range nodes {
				if n.Tenant.String() == v.Tenant {
					if where = "here, on " + v.Node; n.Tenant.Scope != model.ScopeNode {
						where += ": " + v.Message
					}
				}
			}
			u.Message = fmt.Sprintf("Envoy %s was taken back (%s), seen %s; new connections go to %s. There is nothing that you have to do", u.To, v.Reason, where, u.From)
		}
	case v1alpha1.RolloutAborted, v1alpha1.RolloutAborting:
		u.Verdict, u.Step = UpgradeAborted, ""
		u.Message = fmt.Sprintf("the upgrade %s was aborted; new connections go to %s", change, u.From)
	default:
		switch {
		case serving == 0:
			u.Verdict = UpgradeNotYet
			u.Message = fmt.Sprintf("an upgrade %s is on its way; your connections aren't touched so far; %s", change, stop)
		case serving < len(nodes):
			u.Verdict = UpgradeInProgress
			u.Message = fmt.Sprintf("%s: up to %d %% of new connections go to the new one, on %d of %d nodes; %s", change, u.Weight, serving, len(nodes), stop)
		default:
			u.Verdict = UpgradeHealthy
			u.Message = fmt.Sprintf("%s: %d %% of new connections go to the new one, on all %d nodes; it serves, has not crashed and refused nothing; %s", change, u.Weight, len(nodes), stop)
		}
		if s.Phase == v1alpha1.RolloutPaused {
			u.Message += "; it is paused"
		}
		if waits != "" {
			u.Message += "; " + waits
		}
	}
	for _, n := range nodes {
		for _, g := range n.Status.Generations {
			if g.Role == v1alpha1.RoleLeaving && g.DrainUntil != nil {
				u.Message += fmt.Sprintf("; connections that were there before finish in %s, until %s at the latest", g.Version, g.DrainUntil.UTC().Format(time.RFC3339))
				u.Message = cutTo(u.Message, 2048)
				return u
			}
		}
	}
	u.Message = cutTo(u.Message, 2048)
	return u
}
