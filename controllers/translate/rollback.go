package translate

import (
	"fmt"
	"maps"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// silence is how long an agent may say nothing of what it is told before a rollout
// that goes back doesn't wait for it.
const silence = 30 * time.Second

// takeBack gives all connections back, and says when that is so.
func (r *rollout) takeBack() map[string]NodeRollout {
	s := &r.status
	if s.StoppedAt == nil {
		at := metav1.NewTime(r.Now)
		s.StoppedAt = &at
	}
	var waiting []string
	away := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(r.tenants)) {
		for _, p := range r.tenants[name] {
			if p.spec.Version == r.version {
				continue // its own by now
			}
			g := p.generation(r.version)
			stale := r.isStale(p.node)
			switch left := silence - r.Now.Sub(s.StoppedAt.Time); {
			// A canary that has ended is one until its agent has followed: the next rollout
			// of this version must not be judged by it.
			case !r.owns(p) && !stale && (g == nil || g.Role != v1alpha1.RoleCanary && !g.Serving):
			case r.Away[p.node.Name] != "":
				away[p.node.Name] = r.Away[p.node.Name]
			case left <= 0 && !r.owns(p) && stale:
				away[p.node.Name] = staleReport
			case left <= 0 && !r.owns(p) && p.node.Status.ObservedGeneration < p.node.Generation:
				away[p.node.Name] = "its agent says nothing"
			default:
				waiting = append(waiting, name+" on "+p.node.Name)
				if left > 0 {
					r.again(left)
				}
			}
		}
	}
	why := "it was aborted"
	done, doing := v1alpha1.RolloutAborted, v1alpha1.RolloutAborting
	if v := s.Verdict; v != nil {
		done, doing = v1alpha1.RolloutRolledBack, v1alpha1.RolloutRollingBack
		why = v.Message
		if v.Tenant != "" {
			why = fmt.Sprintf("%s on %s: %s", v.Tenant, v.Node, v.Message)
		}
	}
	if s.Phase, s.Message = done, "all new connections go to the version before; "+why; len(waiting) > 0 {
		s.Phase, s.Message = doing, fmt.Sprintf("going back (%s); still to do: %s", why, listed(waiting))
	}
	if len(away) > 0 {
		s.Message += "; follow when they are back: " + describe(away)
	}
	s.Weight, s.ReachedAt = 0, nil
	return nil
}
