package translate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// proceed brings the tenants to the step, and leaves it when it may.
func (r *rollout) proceed() map[string]NodeRollout {
	s, spec := &r.status, r.Rollout.Spec
	lacking := r.lacking()
	if s.Weight != spec.Steps[s.Step-1].Weight {
		s.ReachedAt = nil // another step, or the step is another
	}
	for {
		step := spec.Steps[s.Step-1]
		taking := r.taking(int(s.Step))
		if spec.Paused {
			taking = r.begun()
		}
		waiting := r.count(taking, lacking)
		s.Weight, s.Tenants = step.Weight, int32(len(taking))
		last := int(s.Step) == len(spec.Steps)
		of := fmt.Sprintf("step %d of %d: Envoy %s gets %d %% of new connections (tenants: %d)", s.Step, len(spec.Steps), r.version, step.Weight, len(taking)) + r.without() + r.unread()
		switch {
		case spec.Paused:
			s.Phase, s.Message = v1alpha1.RolloutPaused, of+"; paused: set spec.paused to false to go on, or spec.abort to true to go back"
		case len(lacking) > int(spec.MaxUnavailable):
			// A step that was reached stays so: a node or a pod that comes later, or an
			// agent that starts anew, holds it up but doesn't have it begin again.
			s.Phase = v1alpha1.RolloutProgressing
			s.Message = fmt.Sprintf("%s; nodes that lack it or say nothing: %s (spec.maxUnavailable lets %d)", of, describe(lacking), spec.MaxUnavailable)
			if s.Step == 1 {
				// Nothing begins anywhere before the version is where it is needed. What has
				// begun stays: a node may have joined since.
				begun := r.begun()
				if len(begun) == 0 {
					s.Message += ", so nothing has begun anywhere"
				}
				return r.nodes(begun)
			}
		case len(waiting) > 0:
			s.Phase = v1alpha1.RolloutProgressing
			s.Message = of + "; waiting for " + listed(waiting)
		case last:
			s.Phase = v1alpha1.RolloutSucceeded
			return r.succeeded()
		default:
			approved, untried := spec.ApprovedSteps >= s.Step, r.untried(step)
			if untried && !approved {
				s.Phase, s.ReachedAt = v1alpha1.RolloutWaiting, nil
				s.Message = fmt.Sprintf("%s; nobody of this step is there to try it: set spec.approvedSteps to %d to go on all the same, or spec.abort to true to go back", of, s.Step)
				break
			}
			if s.ReachedAt == nil {
				at := metav1.NewTime(r.Now)
				s.ReachedAt = &at
			}
			pause := parseDuration(step.Pause, 0)
			left := pause - r.Now.Sub(s.ReachedAt.Time)
			if approved = approved || !step.Approval; approved && (untried || left <= 0) {
				s.Step, s.ReachedAt = s.Step+1, nil
				continue
			}
			s.Phase = v1alpha1.RolloutWaiting
			if !approved {
				s.Message = fmt.Sprintf("%s; reached everywhere, waits for approval: set spec.approvedSteps to %d", of, s.Step)
			} else {
				s.Message = fmt.Sprintf("%s; reached everywhere, goes on at %s", of, s.ReachedAt.Add(pause).UTC().Format(time.RFC3339))
				r.again(left)
			}
		}
		return r.nodes(taking)
	}
}

// outlook says of a rollout at work since when it is, whether anything is wrong with it,
// when it ends and how it is stopped; "" of one that isn't.
func (r *rollout) outlook() string {
	now := v1alpha1.ProxyRollout{Spec: r.Rollout.Spec, Status: r.status}
	s, out := r.status, ""
	switch s.Phase {
	case v1alpha1.RolloutProgressing, v1alpha1.RolloutWaiting:
		out = ending(&now, r.Now)
	case v1alpha1.RolloutPaused:
	default:
		return ""
	}
	if s.ReachedTenants > 0 {
		out = "; what serves has not crashed, and fares no worse than the old version as far as can be told" + out
	}
	return "; it began at " + s.StartedAt.UTC().Format(time.RFC3339) + out + lastly(&now) + "; to take it back: " + abortBy(r.Rollout.Name)
}

// maxNote is how long an event's note is at most: the API takes 1,024 bytes.
const maxNote = 1000

// EventNote is a message as an event tells it, which has less room than a status. Messages
// end with when it is over and how it is stopped, so what is cut is the middle.
func EventNote(message string) string {
	if len(message) <= maxNote {
		return message
	}
	end := message[len(message)-maxNote*2/3:]
	if i := strings.Index(end, "; "); i >= 0 {
		end = end[i:]
	} else {
		end = ""
	}
	return cutTo(message, maxNote-len(end)) + end
}

// taking are the tenants that take part in a step, with their weights: a tenant's
// never falls.
func (r *rollout) taking(step int) map[string]int32 {
	// Who takes part stays, whoever comes after: a tenant that joins the mesh must not
	// take another one's place. Those that are held back are the last.
	rank := map[string]int{}
	for name := range r.tenants {
		if isHeldBack(r.status, name) {
			continue
		}
		switch until := r.heldUntil(name); {
		case r.has(name):
			rank[name] = -1
		case until.After(r.Now):
			rank[name], r.held[name] = 1, until
		}
	}
	names := slices.SortedFunc(maps.Keys(r.tenants), func(a, b string) int {
		return cmp.Or(cmp.Compare(rank[a], rank[b]), strings.Compare(a, b))
	})
	names = slices.DeleteFunc(names, func(name string) bool { return isHeldBack(r.status, name) })
	all := map[string]int32{}
	for _, s := range r.Rollout.Spec.Steps[:step] {
		n := len(names)
		switch {
		case len(s.Namespaces) > 0:
			n = 0
			for _, name := range names {
				if t, err := model.ParseTenant(name); err == nil && slices.Contains(s.Namespaces, t.Namespace) {
					all[name] = max(all[name], s.Weight)
				}
			}
		case s.TenantsPercent != nil:
			n = min(n, (len(r.tenants)*int(*s.TenantsPercent)+99)/100)
		}
		for _, name := range names[:n] {
			all[name] = max(all[name], s.Weight)
		}
		for name, had := range all {
			all[name] = max(had, s.Weight)
		}
	}
	return all
}

// untried reports whether a step says nothing of the version: all whom it is about are
// left behind, or the namespaces that it names have no tenants.
func (r *rollout) untried(step v1alpha1.RolloutStep) bool {
	left := len(step.Namespaces) > 0
	for name := range r.tenants {
		if len(step.Namespaces) > 0 && !slices.Contains(step.Namespaces, NamespaceOf(name)) {
			continue
		}
		if !isHeldBack(r.status, name) {
			return false
		}
		left = true
	}
	return left
}

// has reports whether a tenant takes part already.
func (r *rollout) has(tenant string) bool {
	return slices.ContainsFunc(r.tenants[tenant], r.owns)
}

// begun are the tenants that take part already, with the weights that they have.
func (r *rollout) begun() map[string]int32 {
	out := map[string]int32{}
	for name, places := range r.tenants {
		for _, p := range places {
			if r.owns(p) && !isHeldBack(r.status, name) {
				out[name] = max(out[name], p.spec.Canary.Weight)
			}
		}
	}
	return out
}

// count returns which tenants haven't reached the step, and on which nodes.
func (r *rollout) count(taking map[string]int32, lacking map[string]string) (waiting []string) {
	r.status.ReachedTenants = 0
	for _, name := range slices.Sorted(maps.Keys(taking)) {
		if until, held := r.held[name]; held {
			waiting = append(waiting, fmt.Sprintf("%s, which its namespace holds back until %s", name, until.UTC().Format(time.RFC3339)))
			r.again(until.Sub(r.Now))
			continue
		}
		reached, lag := true, 0
		for _, p := range r.tenants[name] {
			switch {
			case lacking[p.node.Name] != "":
				lag++
			case r.isAnothers(p):
				waiting = append(waiting, name+" on "+p.node.Name+r.awaited(p))
				reached = false
			case !p.reached(r.version, taking[name]):
				waiting = append(waiting, name+" on "+p.node.Name)
				reached = false
			}
		}
		mayLag := len(lacking) <= int(r.Rollout.Spec.MaxUnavailable) && lag < len(r.tenants[name])
		if reached && (lag == 0 || mayLag) {
			r.status.ReachedTenants++
		}
	}
	return waiting
}

// reached reports whether the node says that the version has its weight there.
func (p placed) reached(version string, weight int32) bool {
	g := p.generation(version)
	if g == nil || !g.Serving {
		return false
	}
	if weight == 100 {
		return g.Role == v1alpha1.RoleFirst
	}
	return g.Role == v1alpha1.RoleCanary && p.status.Weight == weight || g.Role == v1alpha1.RoleFirst
}
