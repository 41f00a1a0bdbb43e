package agent

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bulkhead-mesh/bulkhead/agent/figures"
	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// tunnelHosts are what a tenant's proxies have of hosts for tunnels, by generation.
type tunnelHosts map[int]figures.TunnelHosts

// tunnelReadings are what proxies have of hosts for tunnels, as each told last. The zero
// value knows nothing yet.
type tunnelReadings struct {
	mu   sync.Mutex
	told map[relay.Key]figures.TunnelHosts
	// silent are those that didn't answer the last time.
	silent map[relay.Key]bool
}

// watchTunnels asks proxies every now and then for what they have of hosts for tunnels,
// until ctx ends. Where tenants share a proxy they share those, too: one that dials
// endpoints without end has others' connections closed, which nothing else tells.
func (a *Agent) watchTunnels(ctx context.Context) error {
	ticker := time.NewTicker(a.o.MeterPeriod)
	defer ticker.Stop()
	for {
		var proxies []relay.Key
		for _, t := range a.bulkheads.Tenants() {
			state, _ := a.bulkheads.State(t)
			for _, p := range state.Processes {
				proxies = append(proxies, relay.Key{Tenant: t, Generation: p.Generation})
			}
		}
		a.tunnels.read(ctx, proxies, a.askTunnels)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// askTunnels has a proxy say it.
func (a *Agent) askTunnels(ctx context.Context, p relay.Key) (figures.TunnelHosts, error) {
	body, err := a.bulkheads.Admin(ctx, p.Tenant, p.Generation, figures.TunnelHostsPath)
	if err != nil {
		a.log.Debug("hosts for tunnels aren't known", "tenant", p.Tenant.String(), "generation", p.Generation, "error", err)
		return figures.TunnelHosts{}, err
	}
	return figures.ReadTunnelHosts(string(body)), nil
}

// read asks all proxies that there are, a few at a time, and returns when each has
// answered or had its time. What one says is known at once, and of one that says nothing
// nothing is known. Those that were silent the last time are asked last, so that others'
// answers aren't held up by them again.
func (r *tunnelReadings) read(ctx context.Context, proxies []relay.Key, ask func(context.Context, relay.Key) (figures.TunnelHosts, error)) {
	var asking errgroup.Group
	asking.SetLimit(figuresReaders)
	for _, p := range r.begin(proxies) {
		asking.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, figuresTimeout)
			defer cancel()
			hosts, err := ask(ctx, p)
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.silent[p] = err != nil; err != nil {
				delete(r.told, p)
			} else {
				r.told[p] = hosts
			}
			return nil
		})
	}
	_ = asking.Wait()
}

// begin forgets proxies that aren't there any more, and returns the others in the order
// in which they are to be asked.
func (r *tunnelReadings) begin(proxies []relay.Key) (ordered []relay.Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	told, silent := r.told, r.silent
	r.told, r.silent = map[relay.Key]figures.TunnelHosts{}, map[relay.Key]bool{}
	for _, p := range proxies {
		if hosts, ok := told[p]; ok {
			r.told[p] = hosts
		}
		if r.silent[p] = silent[p]; !silent[p] {
			ordered = append(ordered, p)
		}
	}
	for _, p := range proxies {
		if silent[p] {
			ordered = append(ordered, p)
		}
	}
	return ordered
}

// all is what is known, by tenant.
func (r *tunnelReadings) all() map[model.Tenant]tunnelHosts {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := map[model.Tenant]tunnelHosts{}
	for p, hosts := range r.told {
		if all[p.Tenant] == nil {
			all[p.Tenant] = tunnelHosts{}
		}
		all[p.Tenant][p.Generation] = hosts
	}
	return all
}
