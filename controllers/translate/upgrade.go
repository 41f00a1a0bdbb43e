package translate

import (
	"fmt"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Verdicts of a tenant's upgrade.
const (
	UpgradeNotYet     = "NotYet"
	UpgradeOnHold     = "OnHold"
	UpgradeInProgress = "InProgress"
	UpgradeHealthy    = "Healthy"
	UpgradeHeldBack   = "HeldBack"
	UpgradeRolledBack = "RolledBack"
	UpgradeAborted    = "Aborted"
)

// UpgradeInput is what a tenant's owner is told of an upgrade by.
type UpgradeInput struct {
	// Version is the tenant's outside of the rollout.
	Version string
	// Nodes have proxies of one tenant.
	Nodes []NodeView
	// Rollouts are all, the oldest first.
	Rollouts []v1alpha1.ProxyRollout
	// Policies of the tenant's namespace.
	Policies []v1alpha1.IsolationPolicy
	// Told is what the owner was told last, nil if nothing.
	Told *v1alpha1.TenantUpgrade
	Now  time.Time
}

// Upgrade is what the owner of a tenant is to know of the rollout that is at its
// proxies, or was last; nil if there is nothing to tell.
func Upgrade(in UpgradeInput) *v1alpha1.TenantUpgrade {
	version, nodes := in.Version, byNode(in.Nodes)
	var r *v1alpha1.ProxyRollout
	for i := range in.Rollouts {
		if phase := in.Rollouts[i].Status.Phase; phase != "" && phase != v1alpha1.RolloutPending {
			r = &in.Rollouts[i]
		}
	}
	if r == nil || len(nodes) == 0 {
		return nil
	}
	s, tenant := r.Status, nodes[0].Tenant
	left := heldBack(s, tenant.String())
	if s.Phase == v1alpha1.RolloutSucceeded && left == nil {
		return nil
	}
	u := &v1alpha1.TenantUpgrade{Rollout: r.Name, From: version, To: s.Version, Step: fmt.Sprintf("%d/%d", s.Step, len(r.Spec.Steps)), Since: s.StartedAt}
	serving, unheard := 0, map[string]string{}
	var waits string
	for _, n := range nodes {
		if n.Unheard != "" {
			unheard[n.Node] = n.Unheard
			continue
		}
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
	if u.Since != nil {
		change += ", since " + u.Since.UTC().Format(time.RFC3339)
	}
	var until, most time.Time
	if u.Since != nil && tenant.Scope != model.ScopeNode {
		until, most = hold(r.Spec, u.Since.Time, in.Policies, in.Now)
	}
	// Of nodes that aren't heard nobody can say that, and what they said before stays told.
	untouched := "; your connections aren't touched so far"
	told := int32(0)
	if len(unheard) > 0 {
		untouched = ""
		if t := in.Told; t != nil && t.Rollout == r.Name && t.Since.Equal(u.Since) && !IsOver(t) {
			told = t.Weight
		}
	}
	stop := "" // comes last, and whole
	switch s.Phase {
	case v1alpha1.RolloutRolledBack, v1alpha1.RolloutRollingBack:
		u.Verdict, u.Step = UpgradeRolledBack, ""
		if v := s.Verdict; v != nil {
			u.Since = &v.At
			// What was seen at another tenant may be about its pods.
			where := "at another tenant"
			if v.Tenant == "" {
				where = "in the mesh as a whole: " + v.Message
			}
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
		case left != nil:
			h := left
			u.Verdict, u.Step, u.Since = UpgradeHeldBack, "", &h.At
			u.Message = fmt.Sprintf("Envoy %s was taken back here alone (%s on %s): %s. New connections go to %s; the other tenants go on. Mend what it says, and the next ProxyRollout brings it",
				u.To, h.Reason, h.Node, h.Message, u.From)
			u.Message = cutTo(u.Message, 2048)
			return u
		case serving == 0 && told > 0:
			u.Verdict, u.Weight = UpgradeInProgress, told
			if len(unheard) == len(nodes) {
				u.Verdict = in.Told.Verdict
			}
			u.Message = fmt.Sprintf("%s: how far it is here isn't known; as it was heard last, up to %d %% of new connections go to the new one", change, told)
		case serving == 0 && until.After(in.Now):
			at := metav1.NewTime(until)
			u.Verdict, u.HeldUntil = UpgradeOnHold, &at
			u.Message = fmt.Sprintf("an upgrade %s is held back here by your namespace's IsolationPolicies (%s) until %s%s. To let it begin now, take notBefore and windows out of their spec.upgrades; to hold it back for longer, set notBefore: until %s at the latest, then it begins whatever they say",
				change, listed(holders(in.Policies)), until.UTC().Format(time.RFC3339), untouched, most.UTC().Format(time.RFC3339))
		case serving == 0:
			u.Verdict = UpgradeNotYet
			u.Message = fmt.Sprintf("an upgrade %s is on its way%s", change, untouched)
		case serving < len(nodes):
			u.Verdict = UpgradeInProgress
			u.Message = fmt.Sprintf("%s: up to %d %% of new connections go to the new one, on %d of %d nodes", change, u.Weight, serving, len(nodes))
		default:
			u.Verdict = UpgradeHealthy
			u.Message = fmt.Sprintf("%s: %d %% of new connections go to the new one, on all nodes (%d); it serves, has not crashed and refused nothing", change, u.Weight, len(nodes))
			if u.Weight == 100 {
				u.Message += "; here it is done, and goes on elsewhere"
			}
		}
		u.Paused = s.Phase == v1alpha1.RolloutPaused
		u.Message += nextMove(r, in.Now)
		if waits != "" {
			u.Message += "; " + waits
		}
		stop = "; who runs the mesh can stop it: " + abortBy(r.Name)
	}
	u.Message += finishing(nodes)
	if len(unheard) > 0 {
		u.Message += "; how it is on these nodes isn't known: " + describe(unheard)
	}
	u.Message = cutTo(u.Message, 2048-len(stop)) + stop
	return u
}

// EndedUpgrade is the upgrade that a tenant's owner was told of last, if it has
// succeeded there: the tenant has its version now, and the owner is told of none any
// more, or of the next. It is nil otherwise.
func EndedUpgrade(t *v1alpha1.TenantProxy, version string, now *v1alpha1.TenantUpgrade, rollouts []v1alpha1.ProxyRollout) *v1alpha1.TenantUpgrade {
	if t == nil || t.Status.Upgrade == nil {
		return nil
	}
	had := t.Status.Upgrade
	if had.To != version || had.Verdict == UpgradeHeldBack || now != nil && now.Rollout == had.Rollout {
		return nil
	}
	if !slices.ContainsFunc(rollouts, func(r v1alpha1.ProxyRollout) bool {
		return r.Name == had.Rollout && r.Status.Phase == v1alpha1.RolloutSucceeded && r.Status.Version == had.To
	}) {
		return nil
	}
	return had
}

// IsOver reports whether nothing comes any more of the upgrade that an owner is told of.
func IsOver(u *v1alpha1.TenantUpgrade) bool {
	return u.Verdict == UpgradeHeldBack || u.Verdict == UpgradeRolledBack || u.Verdict == UpgradeAborted
}

// Behind lists the nodes whose agents don't say that all new connections of the tenant
// go to a version, and why of those that can't; "" if all do.
func Behind(nodes []NodeView, version string) string {
	var names []string
	for _, n := range nodes {
		if n.Unheard != "" {
			names = append(names, n.Node+" ("+n.Unheard+")")
			continue
		}
		if !slices.ContainsFunc(n.Status.Generations, func(g v1alpha1.GenerationStatus) bool {
			return g.Version == version && g.Role == v1alpha1.RoleFirst && g.Serving
		}) {
			names = append(names, n.Node)
		}
	}
	slices.Sort(names)
	return listed(names)
}

// nextMove says what comes next of a rollout, and when.
func nextMove(r *v1alpha1.ProxyRollout, now time.Time) string {
	s, next := r.Status, ""
	switch {
	case s.Phase == v1alpha1.RolloutPaused:
		next = "; it is paused"
	case s.Phase != v1alpha1.RolloutWaiting || s.Step < 1 || int(s.Step) > len(r.Spec.Steps):
	case s.ReachedAt == nil, // see untried
		r.Spec.Steps[s.Step-1].Approval && r.Spec.ApprovedSteps < s.Step:
		next = "; the next step waits for the approval of who runs the mesh"
	default:
		next = "; the next step begins at " + s.ReachedAt.Add(parseDuration(r.Spec.Steps[s.Step-1].Pause, 0)).UTC().Format(time.RFC3339)
	}
	if s.Phase != v1alpha1.RolloutPaused {
		next += ending(r, now)
	}
	return next + lastly(r)
}

// lastly says by when a rollout has to be over, "" if it hasn't.
func lastly(r *v1alpha1.ProxyRollout) string {
	deadline := parseDuration(r.Spec.Deadline, 0)
	if deadline <= 0 || r.Status.StartedAt == nil {
		return ""
	}
	return "; what isn't done by " + r.Status.StartedAt.Add(deadline).UTC().Format(time.RFC3339) + " is taken back"
}

// abortBy is how a rollout is taken back by who has nothing but kubectl.
func abortBy(name string) string {
	return fmt.Sprintf(`kubectl patch proxyrollout %s --type=merge -p '{"spec":{"abort":true}}'`, name)
}

// ending says when a rollout is over at the earliest.
func ending(r *v1alpha1.ProxyRollout, now time.Time) string {
	s, steps := r.Status, r.Spec.Steps
	if s.Step < 1 || int(s.Step) > len(steps) {
		return ""
	}
	var pauses time.Duration
	approvals := 0
	for i := int(s.Step) - 1; i < len(steps)-1; i++ { // the last one is its end
		untried := i == int(s.Step)-1 && s.Phase == v1alpha1.RolloutWaiting && s.ReachedAt == nil
		pauses += parseDuration(steps[i].Pause, 0)
		if (steps[i].Approval || untried) && int(r.Spec.ApprovedSteps) <= i {
			approvals++
		}
	}
	own := parseDuration(steps[s.Step-1].Pause, 0)
	switch {
	case approvals > 0:
		return fmt.Sprintf("; it ends with step %d; approvals that it still needs: %d", len(steps), approvals)
	case pauses == 0:
		return "; it ends when all tenants have followed"
	case s.ReachedAt == nil:
		return fmt.Sprintf("; it ends %s after this step is reached at the earliest", pauses)
	case s.Phase == v1alpha1.RolloutWaiting || s.ReachedAt.Add(own).After(now):
		return "; it ends at " + s.ReachedAt.Add(pauses).UTC().Format(time.RFC3339) + " at the earliest"
	// The step was reached, its pause is over, and something holds it up since.
	case pauses == own:
		return "; it ends when all tenants have followed"
	}
	return fmt.Sprintf("; it ends %s after this step is reached again at the earliest", pauses-own)
}

// holders are the policies that say when upgrades may begin.
func holders(policies []v1alpha1.IsolationPolicy) (names []string) {
	for _, p := range policies {
		if u := p.Spec.Upgrades; u != nil && (u.NotBefore != nil || len(u.Windows) > 0) {
			names = append(names, p.Name)
		}
	}
	slices.Sort(names)
	return names
}

// finishing says until when connections last that were there before.
func finishing(nodes []NodeView) string {
	for _, n := range nodes {
		for _, g := range n.Status.Generations {
			if n.Unheard == "" && g.Role == v1alpha1.RoleLeaving && g.DrainUntil != nil {
				return fmt.Sprintf("; connections that were there before finish in %s, until %s at the latest", g.Version, g.DrainUntil.UTC().Format(time.RFC3339))
			}
		}
	}
	return ""
}
