package agent

import (
	"errors"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/isolation"
)

func TestPlace(t *testing.T) {
	const a, b, c = "1.39.3", "1.40.0", "1.40.0+4f53cda18c2b"
	run := func(generation int, version string) isolation.Process {
		return isolation.Process{Generation: generation, Version: version, PID: 10 + generation, StartedAt: time.Unix(int64(generation), 0)}
	}
	leaves := func(p isolation.Process) isolation.Process {
		p.DrainUntil = time.Unix(100, 0)
		return p
	}
	canary := func(version string, weight int) *canaryPlan { return &canaryPlan{version: version, weight: weight} }
	standby := func(version string) *canaryPlan { return &canaryPlan{version: version, standby: true} }
	errGone := errors.New("gone")
	for _, tc := range []struct {
		name     string
		version  string
		canary   *canaryPlan
		running  []isolation.Process
		prior    *placement
		ready    [2]bool
		lacks    string
		versions [2]string
		// first, former and canary generation; share of generation 1.
		first, former, second, share int
		waits, fails                 bool
	}{
		{name: "nothing runs", version: a, versions: [2]string{a, ""}, first: 0, former: none, second: none},
		{name: "as planned", version: a, running: []isolation.Process{run(0, a)}, ready: [2]bool{true},
			versions: [2]string{a, ""}, first: 0, former: none, second: none},
		{name: "as planned in generation 1", version: a, running: []isolation.Process{run(1, a)}, ready: [2]bool{false, true},
			versions: [2]string{"", a}, first: 1, former: none, second: none, share: 100},
		{name: "canary begins", version: a, canary: canary(b, 10), running: []isolation.Process{run(0, a)}, ready: [2]bool{true},
			versions: [2]string{a, b}, first: 0, former: none, second: 1},
		{name: "canary serves", version: a, canary: canary(b, 10), running: []isolation.Process{run(0, a), run(1, b)}, ready: [2]bool{true, true},
			versions: [2]string{a, b}, first: 0, former: none, second: 1, share: 10},
		{name: "canary in generation 0", version: a, canary: canary(b, 10), running: []isolation.Process{run(0, b), run(1, a)}, ready: [2]bool{true, true},
			versions: [2]string{b, a}, first: 1, former: none, second: 0, share: 90},
		{name: "canary of the same version", version: a, canary: canary(a, 10), running: []isolation.Process{run(0, a), run(1, a)}, ready: [2]bool{true, true},
			versions: [2]string{a, a}, first: 0, former: none, second: 1, share: 10},
		{name: "the same, the other way round", version: a, canary: canary(a, 10), running: []isolation.Process{run(0, a), run(1, a)}, ready: [2]bool{true, true},
			prior: &placement{first: 1}, versions: [2]string{a, a}, first: 1, former: none, second: 0, share: 90},
		{name: "standby begins", version: a, canary: standby(a), running: []isolation.Process{run(0, a)}, ready: [2]bool{true},
			versions: [2]string{a, a}, first: 0, former: none, second: 1},
		{name: "the first died, and the standby serves", version: a, canary: standby(a), running: []isolation.Process{run(0, a), run(1, a)}, ready: [2]bool{false, true},
			prior: &placement{first: 0}, versions: [2]string{a, a}, first: 0, former: none, second: 1},
		{name: "standby of a first in generation 1", version: a, canary: standby(a), running: []isolation.Process{run(0, a), run(1, a)}, ready: [2]bool{true, true},
			prior: &placement{first: 1}, versions: [2]string{a, a}, first: 1, former: none, second: 0, share: 100},
		{name: "the standby makes room for another version", version: b, canary: standby(b), running: []isolation.Process{run(0, a), run(1, a)}, ready: [2]bool{true, true},
			prior: &placement{first: 0}, versions: [2]string{a, ""}, first: none, former: 0, second: none, waits: true},
		{name: "standby isn't wanted any more", version: a, running: []isolation.Process{run(0, a), run(1, a)}, ready: [2]bool{true, true},
			prior: &placement{first: 0}, versions: [2]string{a, ""}, first: 0, former: none, second: none},
		{name: "promoted", version: b, running: []isolation.Process{run(0, a), run(1, b)}, ready: [2]bool{true, true},
			versions: [2]string{"", b}, first: 1, former: none, second: none, share: 100},
		{name: "promoted before it is ready", version: b, running: []isolation.Process{run(0, a), run(1, b)}, ready: [2]bool{true, false},
			versions: [2]string{a, b}, first: 1, former: 0, second: none},
		{name: "promoted, after the agent's restart", version: b, running: []isolation.Process{run(0, a), run(1, b)},
			versions: [2]string{a, b}, first: 1, former: 0, second: none},
		{name: "given back", version: a, running: []isolation.Process{run(0, a), run(1, b)}, ready: [2]bool{true, true},
			versions: [2]string{a, ""}, first: 0, former: none, second: none},
		{name: "given back to one that died", version: a, running: []isolation.Process{run(0, a), run(1, b)}, ready: [2]bool{false, true},
			versions: [2]string{a, b}, first: 0, former: 1, second: none, share: 100},
		{name: "another version begins", version: b, running: []isolation.Process{run(0, a)}, ready: [2]bool{true},
			versions: [2]string{a, b}, first: 1, former: 0, second: none},
		{name: "another version, back", version: a, running: []isolation.Process{run(1, b)}, ready: [2]bool{false, true},
			versions: [2]string{a, b}, first: 0, former: 1, second: none, share: 100},
		{name: "another version has no room yet", version: c, running: []isolation.Process{run(0, a), leaves(run(1, b))}, ready: [2]bool{true},
			versions: [2]string{a, ""}, first: none, former: 0, second: none, waits: true},
		{name: "another version ends the canary first", version: c, canary: canary(b, 50), running: []isolation.Process{run(0, a), run(1, b)}, ready: [2]bool{true, true},
			versions: [2]string{a, ""}, first: none, former: 0, second: none, waits: true},
		{name: "canary has no room yet", version: a, canary: canary(c, 50), running: []isolation.Process{run(0, a), leaves(run(1, b))}, ready: [2]bool{true},
			versions: [2]string{a, ""}, first: 0, former: none, second: none, waits: true},
		{name: "another canary ends the one before", version: a, canary: canary(c, 50), running: []isolation.Process{run(0, a), run(1, b)}, ready: [2]bool{true, true},
			versions: [2]string{a, ""}, first: 0, former: none, second: none, waits: true},
		{name: "only what leaves runs", version: a, running: []isolation.Process{leaves(run(0, a))},
			versions: [2]string{"", a}, first: 1, former: none, second: none, share: 100},
		{name: "all of it leaves", version: a, running: []isolation.Process{leaves(run(0, a)), leaves(run(1, b))},
			versions: [2]string{a, ""}, first: 0, former: none, second: none},
		{name: "a version that isn't there", version: c, lacks: c, running: []isolation.Process{run(0, a)}, ready: [2]bool{true},
			versions: [2]string{a, ""}, first: none, former: 0, second: none, fails: true},
		{name: "a canary that isn't there", version: a, canary: canary(c, 50), lacks: c, running: []isolation.Process{run(0, a)}, ready: [2]bool{true},
			versions: [2]string{a, ""}, first: 0, former: none, second: none, waits: true},
		{name: "a canary that runs is none that isn't there", version: a, canary: canary(c, 50), lacks: c, running: []isolation.Process{run(0, a), run(1, c)}, ready: [2]bool{true, true},
			versions: [2]string{a, c}, first: 0, former: none, second: 1, share: 50},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tp := tenantPlan{version: tc.version, canary: tc.canary}
			pl, err := place(tp, tc.running, tc.prior, tc.ready, func(version string) error {
				if version == tc.lacks {
					return errGone
				}
				return nil
			})
			if errors.Is(err, errGone) != tc.fails {
				t.Errorf("error %v", err)
			}
			if pl.versions != tc.versions || pl.first != tc.first || pl.former != tc.former || pl.canary != tc.second || (pl.waits != "") != tc.waits {
				t.Errorf("placed as %+v", pl)
			}
			if share, _ := pl.share(tp, tc.ready); share != tc.share {
				t.Errorf("generation 1 gets %d %%, want %d", share, tc.share)
			}
		})
	}
}
