package translate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Reasons of a rollout's verdict.
const (
	VerdictCrashed          = "Crashed"
	VerdictNotReady         = "NotReady"
	VerdictConfigRejected   = "ConfigRejected"
	VerdictDeadlineExceeded = "DeadlineExceeded"
)

// judge returns why the rollout has to go back, or nil.
func (r *rollout) judge() *v1alpha1.RolloutVerdict {
	at := metav1.NewTime(r.Now)
	within := parseDuration(r.Rollout.Spec.ReadyWithin, 2*time.Minute)
	for _, name := range slices.Sorted(maps.Keys(r.tenants)) {
		for _, p := range r.tenants[name] {
			g := p.generation(r.version)
			if g == nil || !r.owns(p) {
				continue
			}
			if isHeldBack(r.status, name) || r.isStale(p.node) {
				continue
			}
			v := &v1alpha1.RolloutVerdict{Tenant: name, Node: p.node.Name, At: at}
			others := int32(0)
			for _, other := range p.status.Generations {
				if other.Version != r.version {
					others = max(others, other.Rejected)
				}
			}
			// A new agent doesn't know yet what its predecessor's proxies hold.
			since := g.StartedAt
			if agent := p.node.Status.AgentStartedAt; since != nil && agent != nil && agent.After(since.Time) {
				since = agent
			}
			// While it was away nobody could say that it serves.
			if back := r.ReadySince[p.node.Name]; since != nil && back.After(since.Time) {
				since = &metav1.Time{Time: back}
			}
			switch {
			case g.Restarts > 0:
				v.Reason, v.Message = VerdictCrashed, cutTo(fmt.Sprintf("the new proxy ended (restarts: %d, limit 0); the last time: %s", g.Restarts, cmp.Or(g.LastExit, "it could not be started")), 1000)
			case g.RefusedAlone != nil && *g.RefusedAlone > 0:
				v.Reason = VerdictConfigRejected
				v.Message = cutTo(fmt.Sprintf("the new proxy refused what the old one takes (resources: %d): %s", *g.RefusedAlone, rejectedNames(p.status)), 1000)
			case g.RefusedAlone == nil && g.Rejected > others: // by an agent of before
				v.Reason = VerdictConfigRejected
				v.Message = cutTo(fmt.Sprintf("the new proxy refused more (resources: %d) than the old one (%d): %s", g.Rejected, others, rejectedNames(p.status)), 1000)
			case r.Away[p.node.Name] != "": // what it says last is about what was
				continue
			case !g.Serving && since != nil && r.Now.Sub(since.Time) > within:
				v.Reason = VerdictNotReady
				v.Message = cutTo(fmt.Sprintf("the new proxy takes no connections %s after it or its agent started, limit %s: %s", r.Now.Sub(since.Time).Round(time.Second), within, cmp.Or(p.status.Waits, p.status.Reason, "no reason is known")), 1000)
			default:
				if !g.Serving && since != nil {
					r.again(within - r.Now.Sub(since.Time) + time.Second)
				}
				continue
			}
			if why := r.ownFault(name, p, g, v.Reason); why != "" {
				if r.holdBack(*v, why) {
					continue
				}
				v.Message = cutTo(fmt.Sprintf("%s; %s; tenants or namespaces left behind for such already: %d, of %d namespaces", v.Message, why, len(r.status.HeldBack), len(r.namespaces())), 1000)
			}
			return v
		}
	}
	if v := r.analyse(); v != nil {
		v.At = at
		return v
	}
	if deadline := parseDuration(r.Rollout.Spec.Deadline, 0); deadline > 0 {
		left := deadline - r.Now.Sub(r.status.StartedAt.Time)
		if left <= 0 {
			return &v1alpha1.RolloutVerdict{Reason: VerdictDeadlineExceeded, At: at, Message: fmt.Sprintf("it wasn't done within %s", deadline)}
		}
		r.again(left)
	}
	return nil
}

func rejectedNames(s *v1alpha1.NodeTenantStatus) string {
	var names []string
	for _, r := range s.Rejected {
		if r.Shared {
			continue
		}
		names = append(names, fmt.Sprintf("%s %s: %s", r.Type, r.Name, r.Message))
	}
	return listed(names)
}
