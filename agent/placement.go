package agent

import (
	"fmt"
	"slices"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
)

// generations is how many processes of a tenant run side by side at most.
const generations = 2

// none is the generation that there isn't.
const none = -1

// placement says which of a tenant's generations, 0 and 1, is what. Which process
// serves is a matter of versions: either generation can be the first.
type placement struct {
	// first is the generation of the planned version, or none while it has no room:
	// then former serves on.
	first int
	// former served before the plan asked for another version. It serves on until
	// the first is ready. Mostly none.
	former int
	// canary is the generation of the planned canary, or none; standby says that it
	// is no canary but a warm standby.
	canary  int
	standby bool
	// versions of the wanted generations; "" for those that aren't wanted.
	versions [generations]string
	// waits says what holds the plan up that time alone will change, "" if nothing.
	waits string
}

// place finds a generation for each process that the plan asks for. What runs and
// doesn't leave is kept where it is, so that nothing ends before what replaces it
// serves. prior is how they were placed before, if that is known: generations of
// one version are told apart by it. ready says of each generation whether its
// process takes connections, and have whether the node has a version. The error names what can't be had; the
// placement leaves what runs as it is then.
func place(tp tenantPlan, running []isolation.Process, prior *placement, ready [generations]bool, have func(version string) error) (placement, error) {
	pl := placement{first: none, former: none, canary: none}
	var at [generations]string
	var leaving [generations]bool
	for _, p := range running {
		if p.Generation < 0 || p.Generation >= generations {
			continue // of a later agent; it isn't wanted
		}
		if p.DrainUntil.IsZero() {
			at[p.Generation] = p.Version
		} else {
			leaving[p.Generation] = true
		}
	}
	hint := older(running)
	if prior != nil {
		hint = prior.first
	}
	err := pl.placeFirst(tp, hint, at, leaving, ready, have)
	if pl.first != none {
		pl.versions[pl.first] = tp.version
	}
	if pl.former != none {
		pl.versions[pl.former] = at[pl.former]
	}
	c := tp.canary
	if c == nil || pl.first == none || pl.former != none {
		return pl, err
	}
	other := 1 - pl.first
	if at[other] != c.version {
		switch missing := have(c.version); {
		case missing != nil: // no fault of what serves; it may be on its way
			pl.waits = fmt.Sprintf("the canary: %v", missing)
			return pl, err
		case leaving[other] || at[other] != "":
			pl.waits = fmt.Sprintf("the canary of version %s waits for the end of the process that leaves", c.version)
			return pl, err
		}
	}
	pl.canary, pl.standby, pl.versions[other] = other, c.standby, c.version
	return pl, err
}

// older is the generation whose process has run longest, or none.
func older(running []isolation.Process) int {
	g, since := none, time.Time{}
	for _, p := range running {
		if p.Generation >= 0 && p.Generation < generations && (g == none || p.StartedAt.Before(since)) {
			g, since = p.Generation, p.StartedAt
		}
	}
	return g
}

// placeFirst finds the generation that serves, and the one that does so until
// that is ready.
func (pl *placement) placeFirst(tp tenantPlan, hint int, at [generations]string, leaving, ready [generations]bool, have func(string) error) error {
	pl.first = slices.Index(at[:], tp.version)
	if hint != none && at[hint] == tp.version {
		pl.first = hint
	}
	if pl.first != none {
		other := 1 - pl.first
		if isCanary := tp.canary != nil && tp.canary.version == at[other]; at[other] != "" && !isCanary && !ready[pl.first] {
			pl.former = other
		}
		return nil
	}
	serving := none
	for g, version := range at {
		// Of two, the canary's place is the one to be had.
		if version != "" && (serving == none || ready[g] && (tp.canary == nil || version != tp.canary.version)) {
			serving = g
		}
	}
	if tp.canary != nil && tp.canary.standby && hint != none && at[hint] != "" && ready[hint] {
		serving = hint // the standby makes room, which has no connections to finish
	}
	if serving == none {
		pl.first = max(0, slices.Index(leaving[:], false))
		return nil
	}
	pl.former = serving
	if err := have(tp.version); err != nil {
		return fmt.Errorf("what runs stays at version %s: %w", at[serving], err)
	}
	if other := 1 - serving; at[other] == "" && !leaving[other] {
		pl.first = other
	} else {
		pl.waits = fmt.Sprintf("version %s waits for the end of the process that leaves", tp.version)
	}
	return nil
}

// wanted are the generations that isolation is to run.
func (pl placement) wanted() (out []isolation.Generation) {
	for g, version := range pl.versions {
		if version != "" {
			out = append(out, isolation.Generation{Generation: g, Version: version})
		}
	}
	return out
}

// serving is the generation that takes the connections that aren't a canary's, or
// none if no process does.
func (pl placement) serving(ready [generations]bool) int {
	for _, g := range []int{pl.first, pl.former} {
		if g != none && ready[g] {
			return g
		}
	}
	return none
}

// share is what generation 1 gets of new connections, and canary what of them
// the canary does, both in percent.
func (pl placement) share(tp tenantPlan, ready [generations]bool) (share, canary int) {
	serving := pl.serving(ready)
	if serving == none {
		if serving = pl.former; serving == none {
			serving = pl.first
		}
	}
	if pl.canary != none && ready[pl.canary] {
		canary = tp.canary.weight
	}
	if serving == 1 {
		return 100 - canary, canary
	}
	return canary, canary
}

// beside is the generation that serves what another joins, or none.
func (pl placement) beside(generation int) int {
	for _, g := range []int{pl.former, pl.first, pl.canary} {
		if g != none && g != generation {
			return g
		}
	}
	return none
}

// role says what a process is in the placement.
func (pl placement) role(p isolation.Process) v1alpha1.GenerationRole {
	switch {
	case !p.DrainUntil.IsZero():
		return v1alpha1.RoleLeaving
	case p.Generation == pl.first:
		return v1alpha1.RoleFirst
	case p.Generation == pl.canary && pl.standby:
		return v1alpha1.RoleStandby
	case p.Generation == pl.canary:
		return v1alpha1.RoleCanary
	case p.Generation == pl.former:
		return v1alpha1.RoleFormer
	}
	return v1alpha1.RoleLeaving
}
