package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/isolation"
)

// ensureTenant runs one tenant's proxy. again is 0 if nothing has to be looked at
// soon.
func (a *Agent) ensureTenant(ctx context.Context, tp tenantPlan, r *round) (index uint16, again time.Duration, err error) {
	t := tp.tenant
	delete(a.idleSince, t)
	b, err := a.bulkheads.Prepare(ctx, t, a.mtu(t, r.plan))
	if err != nil {
		return 0, 0, fmt.Errorf("prepare its namespaces: %w", err)
	}
	if err := a.datapath.UpdateTenant(bpf.Tenant{Index: b.Index, Netns: b.Netns, HostIfindex: b.HostIfindex,
		TenantIfindex: b.TenantIfindex, HostMAC: b.HostMAC, TenantMAC: b.TenantMAC, CgroupV2: b.CgroupV2}); err != nil {
		return b.Index, 0, fmt.Errorf("steer to it: %w", err)
	}
	// One that goes keeps its configuration current to its end.
	wanted, leaving, retireErr := a.retire(tp, b)
	for _, g := range slices.Concat(wanted, leaving) {
		key := relay.Key{Tenant: t, Generation: g.Generation}
		if err := a.bulkheads.MakeXDSDir(t, g.Generation); err != nil {
			return b.Index, again, err
		}
		if err := a.relay.Listen(key, relay.Socket{Path: b.XDSSocket(g.Generation), UID: b.UID, Version: a.bulkheads.Runnable(t, g)}); err != nil {
			return b.Index, again, fmt.Errorf("serve its configuration: %w", err)
		}
	}
	// What runs is looked at even if the update fails: bad input changes nothing.
	updateErr := errors.Join(retireErr, a.bulkheads.Update(ctx, isolation.Spec{
		Tenant: t, MTU: a.mtu(t, r.plan), Limits: tp.limits, Generations: wanted, Drain: a.o.Drain}))
	a.closeEnded(tp)
	ready, err := a.takeListeners(tp, b)
	if err != nil {
		again = soon
		a.log.Debug("listeners can't be taken yet", "tenant", t.String(), "error", err)
	}
	if ready[0] {
		r.serving[t] = a.taken[relay.Key{Tenant: t}]
	}
	weight := 0
	if ready[1] {
		weight = tp.weight
	}
	if err := a.datapath.SetWeight(b.Index, weight); err != nil {
		return b.Index, again, errors.Join(updateErr, fmt.Errorf("set weight: %w", err))
	}
	r.weights[t] = weight
	return b.Index, again, updateErr
}

// retire returns the tenant's generations as isolation is to have them, and those
// that run and aren't wanted any more: they get no new connection and drain, until
// they have ended. One that can't be kept from new connections stays wanted.
func (a *Agent) retire(tp tenantPlan, b isolation.Bulkhead) (wanted, leaving []isolation.Generation, err error) {
	wanted = slices.Clone(tp.generations)
	state, _ := a.bulkheads.State(tp.tenant)
	for _, p := range state.Processes {
		if slices.ContainsFunc(tp.generations, func(g isolation.Generation) bool { return g.Generation == p.Generation }) {
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

// closeEnded stops serving configuration to generations that are neither planned
// nor running.
func (a *Agent) closeEnded(tp tenantPlan) {
	state, _ := a.bulkheads.State(tp.tenant)
	for generation := range 2 {
		planned := slices.ContainsFunc(tp.generations, func(g isolation.Generation) bool { return g.Generation == generation })
		runs := slices.ContainsFunc(state.Processes, func(p isolation.Process) bool { return p.Generation == generation })
		if !planned && !runs {
			a.relay.Close(relay.Key{Tenant: tp.tenant, Generation: generation})
		}
	}
}

// takeListeners hands the sockets of each generation that can serve to the
// kernel's steering. ready says which generations take connections now.
func (a *Agent) takeListeners(tp tenantPlan, b isolation.Bulkhead) (ready [2]bool, err error) {
	state, ok := a.bulkheads.State(tp.tenant)
	if !ok {
		return ready, nil
	}
	var errs []error
	for _, g := range tp.generations {
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
