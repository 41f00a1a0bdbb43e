package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// processLimits are what the kernel holds of processes.
func processLimits(l v1alpha1.Limits) isolation.Limits {
	return isolation.Limits{CPUWeight: l.CPUWeight, CPUMillis: l.CPUMillis, MemoryHigh: l.MemoryHigh, MemoryMax: l.MemoryMax, Pids: l.Pids}
}

// connectionLimits are what steering holds of connections.
func connectionLimits(l v1alpha1.Limits) steer.ConnectionLimits {
	bounded := func(n int64) uint32 { return uint32(max(0, min(n, math.MaxInt32))) }
	return steer.ConnectionLimits{Concurrent: bounded(l.Connections), NewPerSecond: bounded(l.NewConnections), DirectPerSecond: bounded(l.NewDirect)}
}

// enforcedLimits are both, as they were read back.
func enforcedLimits(l isolation.Limits, b isolation.Bandwidth, c steer.ConnectionLimits) v1alpha1.Limits {
	return v1alpha1.Limits{CPUWeight: l.CPUWeight, CPUMillis: l.CPUMillis, MemoryHigh: l.MemoryHigh, MemoryMax: l.MemoryMax, Pids: l.Pids,
		Connections: int64(c.Concurrent), NewConnections: int64(c.NewPerSecond), NewDirect: int64(c.DirectPerSecond), Egress: b.Egress, Ingress: b.Ingress}
}

// enforcedConnections reads back the bounds of a tenant's connections, and says
// which of those that are wanted the node can't hold.
func (a *Agent) enforcedConnections(tp tenantPlan, state isolation.State) (have steer.ConnectionLimits, unenforced []string) {
	steering := a.steering()
	if steering.datapath != nil {
		// A tenant that isn't there yet has none.
		have, _ = steering.datapath.ConnectionLimits(state.Index)
	}
	if steering.kind != v1alpha1.RedirectionEBPF || state.CgroupV2 != "" {
		return have, nil
	}
	if tp.bandwidth.Egress != 0 {
		unenforced = append(unenforced, "bandwidth.egress: the node has no cgroup version 2, where what goes to own pods is told apart")
	}
	if tp.connections.Concurrent != 0 {
		have.Concurrent = 0
		unenforced = append(unenforced, "connections.concurrent: the node has no cgroup version 2, where connections are counted")
	}
	return have, unenforced
}

// boundedBandwidth is what of it can be: eBPF tells by the tenant's cgroup what goes to
// its own pods.
func (a *Agent) boundedBandwidth(tp tenantPlan, b isolation.Bulkhead) isolation.Bandwidth {
	want := tp.bandwidth
	if a.steering().kind == v1alpha1.RedirectionEBPF && b.CgroupV2 == "" {
		want.Egress = 0
	}
	return want
}

// minStandby is the least memory for two Envoys.
const minStandby = 96 << 20

// standbyProblem is why limits leave no room for a second Envoy, "" if they do.
func standbyProblem(l v1alpha1.Limits) string {
	if l.MemoryMax > 0 && l.MemoryMax < minStandby {
		return fmt.Sprintf("warmStandby: memory.max is %d, and two Envoys need at least %d", l.MemoryMax, minStandby)
	}
	return ""
}

// threads are those with which the tenant's processes serve, the most of them, and
// who waits for another number.
func threads(tp tenantPlan, state isolation.State) (have int64, unenforced []string) {
	for _, p := range state.Processes {
		have = max(have, int64(p.Workers))
		if tp.workers != 0 && p.Workers != 0 && p.Workers != tp.workers {
			unenforced = append(unenforced, fmt.Sprintf("concurrency: generation %d keeps its number of threads (%d) until it starts again", p.Generation, p.Workers))
		}
	}
	return have, unenforced
}

// checkConnections compares what is counted of the connections of tenants that have a
// bound with the kernel's sockets, until ctx ends. It has a pace of its own: a tenant that
// is near its bound is looked at every second, and nothing else for it.
func (a *Agent) checkConnections(ctx context.Context) error {
	for {
		next := time.Second
		if p, known := a.currentPlan(); known {
			next = a.compareConnections(p)
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// compareConnections does it once, and returns when it is due again.
func (a *Agent) compareConnections(p plan) time.Duration {
	next := resync
	steering := a.steering()
	for _, tp := range p.tenants {
		s, ok := a.bulkheads.State(tp.tenant)
		if !ok || steering.datapath == nil || tp.connections.Concurrent == 0 || steering.kind == v1alpha1.RedirectionEBPF && s.CgroupV2 == "" {
			continue
		}
		again, err := steering.datapath.CheckConnections(s.Index, s.Netns)
		// The loop may be about to make the tenant, or to remove it.
		if err != nil && !errors.Is(err, steer.ErrUnknownTenant) && !errors.Is(err, fs.ErrNotExist) {
			a.log.Error("count of connections isn't checked", "tenant", tp.tenant.String(), "error", err)
		}
		next = min(next, again)
	}
	return next
}

// shed are connections that were dropped beyond the bounds of a tenant.
type shed struct{ tooMany, tooFast, directTooFast uint64 }

// readShed reads all tenants' at once.
func (a *Agent) readShed() map[model.Tenant]shed {
	d := a.steering().datapath
	if d == nil {
		return nil
	}
	counters, err := d.Counters()
	if err != nil {
		a.log.Error("connections that were dropped can't be read", "error", err)
		return nil
	}
	all := map[model.Tenant]shed{}
	for _, t := range a.bulkheads.Tenants() {
		if s, ok := a.bulkheads.State(t); ok {
			d := counters[s.Index].Dropped
			all[t] = shed{d.TooMany, d.TooFast, d.DirectTooFast}
		}
	}
	return all
}
