package agent

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bulkhead-mesh/bulkhead/agent/figures"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// tunnelHosts are what a tenant's proxies have of hosts for tunnels, by generation.
type tunnelHosts map[int]figures.TunnelHosts

// watchTunnels asks proxies every now and then for what they have of hosts for tunnels,
// until ctx ends. Where tenants share a proxy they share those, too: one that dials
// endpoints without end has others' connections closed, which nothing else tells.
func (a *Agent) watchTunnels(ctx context.Context) error {
	ticker := time.NewTicker(a.o.MeterPeriod)
	defer ticker.Stop()
	for {
		hosts := a.readTunnels(ctx)
		a.mu.Lock()
		a.tunnels = hosts
		a.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// readTunnels asks a few at a time. Of one that doesn't answer nothing is known, and the
// others don't wait for it longer than its time.
func (a *Agent) readTunnels(ctx context.Context) map[model.Tenant]tunnelHosts {
	var mu sync.Mutex
	all := map[model.Tenant]tunnelHosts{}
	var asking errgroup.Group
	asking.SetLimit(figuresReaders)
	for _, t := range a.bulkheads.Tenants() {
		state, _ := a.bulkheads.State(t)
		for _, p := range state.Processes {
			asking.Go(func() error {
				ctx, cancel := context.WithTimeout(ctx, figuresTimeout)
				defer cancel()
				body, err := a.bulkheads.Admin(ctx, t, p.Generation, figures.TunnelHostsPath)
				if err != nil {
					a.log.Debug("hosts for tunnels aren't known", "tenant", t.String(), "generation", p.Generation, "error", err)
					return nil
				}
				mu.Lock()
				defer mu.Unlock()
				if all[t] == nil {
					all[t] = tunnelHosts{}
				}
				all[t][p.Generation] = figures.ReadTunnelHosts(string(body))
				return nil
			})
		}
	}
	_ = asking.Wait()
	return all
}
