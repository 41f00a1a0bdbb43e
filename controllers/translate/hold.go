package translate

import (
	"slices"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Drain is for how long a namespace's connections may go on in proxies that were
// replaced: the longest of its policies, 0 if none says.
func Drain(policies []v1alpha1.IsolationPolicy) (longest time.Duration) {
	for _, p := range policies {
		if p.Spec.Upgrades != nil {
			longest = max(longest, parseDuration(p.Spec.Upgrades.Drain, 0))
		}
	}
	return longest
}

// MayBegin is when an upgrade may begin with the tenants of a namespace, by all of its
// policies: now, or later.
func MayBegin(policies []v1alpha1.IsolationPolicy, now time.Time) time.Time {
	const rounds = 8 // policies whose windows never meet are bounded by the rollout
	at := now
	for range rounds {
		before := at
		for _, p := range policies {
			if u := p.Spec.Upgrades; u != nil {
				at = next(u, at)
			}
		}
		if at.Equal(before) {
			break
		}
	}
	return at
}

// next is the first moment from t on that a policy lets an upgrade begin.
func next(u *v1alpha1.UpgradePolicy, t time.Time) time.Time {
	if u.NotBefore != nil && u.NotBefore.After(t) {
		t = u.NotBefore.Time
	}
	first := time.Time{}
	for _, w := range u.Windows {
		start, err := time.Parse("15:04", w.Start)
		if err != nil {
			continue
		}
		day := t.UTC().Truncate(24 * time.Hour)
		// From the day before: its window may last still. And a week on.
		for i := -1; i <= 7; i++ {
			begin := day.AddDate(0, 0, i).Add(time.Duration(start.Hour())*time.Hour + time.Duration(start.Minute())*time.Minute)
			if len(w.Days) > 0 && !slices.Contains(w.Days, v1alpha1.Weekday(begin.Weekday().String())) || !begin.Add(parseDuration(w.Duration, 0)).After(t) {
				continue
			}
			if begin.Before(t) {
				begin = t
			}
			if first.IsZero() || begin.Before(first) {
				first = begin
			}
			break
		}
	}
	if first.IsZero() {
		return t
	}
	return first
}

// heldUntil is when the rollout may begin with a tenant; its namespace can't hold it
// back for longer than the rollout lets it.
func (r *rollout) heldUntil(tenant string) time.Time {
	t, err := model.ParseTenant(tenant)
	if err != nil || t.Scope == model.ScopeNode || r.status.StartedAt == nil {
		return time.Time{}
	}
	until, _ := hold(r.Rollout.Spec, r.status.StartedAt.Time, r.Policies[t.Namespace], r.Now)
	return until
}

// hold is until when policies hold a rollout back that started then, and until when
// they can at most.
func hold(spec v1alpha1.ProxyRolloutSpec, startedAt time.Time, policies []v1alpha1.IsolationPolicy, now time.Time) (until, most time.Time) {
	most = startedAt.Add(parseDuration(spec.MaxHold, 168*time.Hour))
	if until = MayBegin(policies, now); until.After(most) {
		until = most
	}
	return until, most
}
