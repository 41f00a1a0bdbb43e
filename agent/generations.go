package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// ensureTenant runs one tenant's proxy. again is 0 if nothing has to be looked at
// soon.
func (a *Agent) ensureTenant(ctx context.Context, tp tenantPlan, r *round) (index uint16, again time.Duration, err error) {
	t := tp.tenant
	a.forgetEnd(t)
	b, err := a.bulkheads.Prepare(ctx, t, a.mtu(t, r.plan))
	if err != nil {
		return 0, 0, fmt.Errorf("prepare its namespaces: %w", err)
	}
	if err := a.datapath.UpdateTenant(steer.Tenant{Index: b.Index, Netns: b.Netns, HostIfindex: b.HostIfindex,
		TenantIfindex: b.TenantIfindex, TenantMAC: b.TenantMAC, CgroupV2: b.CgroupV2, Connections: tp.connections, BoundEgress: tp.bandwidth.Egress > 0,
		Watch: tp.canary != nil && !tp.canary.standby && tp.canary.weight > 0}); err != nil {
		return b.Index, 0, fmt.Errorf("steer to it: %w", err)
	}
	state, _ := a.bulkheads.State(t)
	var prior *placement
	if before, ok := a.last.placed[t]; ok { // only this goroutine writes it
		prior = &before
	}
	pl, placeErr := place(tp, state.Processes, prior, a.taking(tp, state), a.bulkheads.HasVersion)
	// One that goes keeps its configuration current to its end.
	wanted, leaving, retireErr := a.retire(tp, pl, state, b)
	for _, g := range slices.Concat(wanted, leaving) {
		key := relay.Key{Tenant: t, Generation: g.Generation}
		if err := a.bulkheads.MakeXDSDir(t, g.Generation); err != nil {
			return b.Index, again, err
		}
		if err := a.relay.Listen(key, relay.Socket{Path: b.XDSSocket(g.Generation), UID: b.UID, Version: a.bulkheads.Runnable(t, g)}); err != nil {
			return b.Index, again, fmt.Errorf("serve its configuration: %w", err)
		}
	}
	// What runs is looked at even if the update fails: bad input changes nothing. A start
	// that its tenant makes slow holds up nobody else: its end wakes the loop.
	updateErr := errors.Join(placeErr, retireErr, a.bulkheads.Update(ctx, isolation.Spec{
		Tenant: t, MTU: a.mtu(t, r.plan), Limits: tp.limits, Bandwidth: a.boundedBandwidth(tp, b), Workers: tp.workers, Generations: wanted,
		Unawaited: true, Drain: cmp.Or(tp.drain, a.o.Drain)}))
	a.closeEnded(tp, wanted)
	ready, err := a.takeListeners(tp, pl, b)
	switch {
	case errors.Is(err, unix.EPERM): // for good
		updateErr = errors.Join(updateErr, fmt.Errorf("lead connections to it: %w", err))
	case err != nil:
		again = soon
		a.log.Debug("listeners can't be taken yet", "tenant", t.String(), "error", err)
	}
	if pl.waits != "" {
		again = time.Second // mostly something tells before
	}
	if pl.former != none && pl.first != none && ready[pl.first] {
		again = soon // the next step is due
	}
	g := pl.serving(ready)
	if g == none && pl.canary != none && ready[pl.canary] {
		g = pl.canary // while the first is away, all goes there
	}
	if g != none {
		r.serving[t] = a.taken[relay.Key{Tenant: t, Generation: g}]
		if !a.staying[t] {
			a.bulkheads.SetLeaving(t, false)
			a.staying[t] = true
		}
	}
	var taking [generations]process
	for g, serves := range ready {
		if serves {
			taking[g] = a.taken[relay.Key{Tenant: t, Generation: g}]
		}
	}
	r.taking[t] = taking
	share, canary := pl.share(tp, ready)
	if err := a.datapath.SetWeight(b.Index, share); err != nil {
		return b.Index, again, errors.Join(updateErr, fmt.Errorf("set weight: %w", err))
	}
	r.placed[t], r.weights[t] = pl, canary
	return b.Index, again, updateErr
}

// taking says which generations' processes take connections, as far as this agent
// has seen to it.
func (a *Agent) taking(tp tenantPlan, state isolation.State) (ready [generations]bool) {
	for _, p := range state.Processes {
		if p.Generation < 0 || p.Generation >= generations {
			continue
		}
		taken, ok := a.taken[relay.Key{Tenant: tp.tenant, Generation: p.Generation}]
		ready[p.Generation] = ok && p.PID != 0 && taken == process{p.PID, p.StartTicks}
	}
	return ready
}

// retire returns the tenant's generations as isolation is to have them, and those
// that run and aren't wanted any more: they get no new connection and drain, until
// they have ended. One that can't be kept from new connections stays wanted.
func (a *Agent) retire(tp tenantPlan, pl placement, state isolation.State, b isolation.Bulkhead) (wanted, leaving []isolation.Generation, err error) {
	wanted = pl.wanted()
	for _, p := range state.Processes {
		if slices.ContainsFunc(wanted, func(g isolation.Generation) bool { return g.Generation == p.Generation }) {
			continue
		}
		g := isolation.Generation{Generation: p.Generation, Version: p.Version}
		delete(a.taken, relay.Key{Tenant: tp.tenant, Generation: p.Generation})
		if clearErr := a.datapath.ClearListeners(b.Index, p.Generation); clearErr != nil {
			err = errors.Join(err, fmt.Errorf("keep new connections from generation %d: %w", p.Generation, clearErr))
			wanted = append(wanted, g)
			continue
		}
		leaving = append(leaving, g)
	}
	return wanted, leaving, err
}

// closeEnded stops serving configuration to generations that are neither wanted
// nor running.
func (a *Agent) closeEnded(tp tenantPlan, wanted []isolation.Generation) {
	state, _ := a.bulkheads.State(tp.tenant)
	for generation := range generations {
		planned := slices.ContainsFunc(wanted, func(g isolation.Generation) bool { return g.Generation == generation })
		runs := slices.ContainsFunc(state.Processes, func(p isolation.Process) bool { return p.Generation == generation })
		if !planned && !runs {
			a.relay.Close(relay.Key{Tenant: tp.tenant, Generation: generation})
		}
	}
}

// takeListeners hands the sockets of each generation that can serve to the
// kernel's steering. ready says which generations take connections now.
func (a *Agent) takeListeners(tp tenantPlan, pl placement, b isolation.Bulkhead) (ready [generations]bool, err error) {
	state, ok := a.bulkheads.State(tp.tenant)
	if !ok {
		return ready, nil
	}
	var errs []error
	for _, g := range pl.wanted() {
		key := relay.Key{Tenant: tp.tenant, Generation: g.Generation}
		i := slices.IndexFunc(state.Processes, func(p isolation.Process) bool { return p.Generation == g.Generation })
		if i < 0 || state.Processes[i].PID == 0 {
			delete(a.taken, key)
			continue
		}
		p := state.Processes[i]
		taken := process{p.PID, p.StartTicks}
		if a.taken[key] == taken {
			ready[g.Generation] = true
			continue
		}
		// The sockets of a process that ended have left the kernel's map by
		// themselves. One that an earlier agent took and that has just come back to
		// our relay goes on serving meanwhile.
		if !p.Live || a.relay.State(key).Listeners == 0 {
			continue
		}
		if err := a.warm(tp, g.Generation, pl.beside(g.Generation), state); err != nil && time.Since(p.StartedAt) < warmPatience {
			errs = append(errs, err)
			continue
		}
		if err := a.datapath.SetListeners(b.Index, g.Generation, p.PID); err != nil {
			errs = append(errs, err)
			continue
		}
		a.log.Info("proxy takes connections", "tenant", tp.tenant.String(), "generation", g.Generation, "version", p.Version, "pid", p.PID)
		a.taken[key] = taken
		ready[g.Generation] = true
	}
	return ready, errors.Join(errs...)
}

// warmPatience is for how long a process may wait, since it started, for what the
// one beside it holds: it must not be kept from serving by an operator that is away.
const warmPatience = 10 * time.Second

// errCold is why a process that lives takes no connections yet.
var errCold = errors.New("it doesn't hold yet what the generation beside it holds")

// warm has a process that joins another get what that one has found on demand, so
// that its first connections don't wait for it. Where none serves, there is nobody
// to wait for.
func (a *Agent) warm(tp tenantPlan, generation, beside int, state isolation.State) error {
	if beside == none || !a.taking(tp, state)[beside] {
		return nil
	}
	key := relay.Key{Tenant: tp.tenant, Generation: generation}
	if lacking := a.relay.Warm(key, relay.Key{Tenant: tp.tenant, Generation: beside}); len(lacking) > 0 {
		return fmt.Errorf("generation %d: %w: %d resources, %s among them", generation, errCold, len(lacking), lacking[0])
	}
	return nil
}
