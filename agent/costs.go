package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/agent/cost"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// meter reads what tenants take until ctx ends, and tells it now and then.
func (a *Agent) meter(ctx context.Context) error {
	ticker := time.NewTicker(a.o.MeterPeriod)
	defer ticker.Stop()
	var told time.Time
	for {
		a.readCosts()
		if time.Since(told) >= a.o.CostPeriod {
			told = time.Now()
			a.tellCosts()
		}
		select {
		case <-ctx.Done():
			a.readCosts() // the agent after this one goes on from here
			return nil
		case <-ticker.C:
		}
	}
}

// tellCosts has the status say what tenants have taken until now.
func (a *Agent) tellCosts() {
	costs := map[model.Tenant]cost.Account{}
	for _, t := range a.bulkheads.Tenants() {
		if account, ok := a.costs.Account(t); ok {
			costs[t] = account
		}
	}
	a.mu.Lock()
	a.toldCosts = costs
	a.mu.Unlock()
	a.reportStatus()
}

// readCosts adds what the node's tenants have taken to their accounts.
func (a *Agent) readCosts() {
	a.mu.Lock()
	r, d := a.last, a.datapath.datapath
	a.mu.Unlock()
	if !r.known || d == nil {
		return
	}
	traffic, err := d.PodCounters()
	if err != nil {
		a.log.Error("pods' traffic isn't counted", "error", err)
		return
	}
	usages, readings, err := readUsages(a.bulkheads.Tenants(), a.bulkheads.Usage)
	if err != nil {
		a.log.Error("tenants' use isn't counted", "error", err)
	}
	for _, p := range r.plan.pods {
		if reading, ok := readings[p.Tenant]; ok {
			if c, ok := traffic[p.UID]; ok {
				reading.Pods[p.UID] = podReading(p, c, a.tellsHandshakes())
			}
		}
	}
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		a.log.Error("tenants' use isn't counted", "error", fmt.Errorf("read the time since boot: %w", err))
		return
	}
	if err := a.costs.Add(time.Now(), time.Duration(boot.Nano()), readings); err != nil {
		a.log.Error("costs aren't kept for the agent after this one", "error", err)
	}
	a.mu.Lock()
	a.usages = usages
	a.mu.Unlock()
}

// readUsages reads one tenant after the other: what becomes of one of them changes
// nothing for the others. The error is of all that couldn't be read.
func readUsages(tenants []model.Tenant, read func(model.Tenant) (isolation.Usage, error)) (map[model.Tenant]isolation.Usage, map[model.Tenant]cost.Reading, error) {
	usages, readings := map[model.Tenant]isolation.Usage{}, map[model.Tenant]cost.Reading{}
	var errs []error
	for _, t := range tenants {
		u, err := read(t)
		switch {
		case errors.Is(err, fs.ErrNotExist): // it has ended meanwhile
		case err != nil:
			errs = append(errs, err)
			readings[t] = cost.Reading{Unread: true, Pods: map[string]cost.PodReading{}}
		default:
			usages[t] = u
			readings[t] = cost.Reading{CPU: u.CPU, Private: u.Private, PSS: u.PSS, Pods: map[string]cost.PodReading{}}
		}
	}
	return usages, readings, errors.Join(errs...)
}

// tellsHandshakes reports whether they are counted. It is the node's, not a tenant's, of
// which the last reading comes when it may be gone.
func (a *Agent) tellsHandshakes() bool {
	return a.bulkheads.HasCgroupV2() && a.steering().kind == v1alpha1.RedirectionEBPF
}

// podReading counts a pod's connections by their handshakes where those are told:
// whoever reaches a pod can send it SYNs.
func podReading(p identity.Pod, c steer.PodCounters, handshakes bool) cost.PodReading {
	connections := c.Outbound + c.Inbound + c.Plain + c.NodePlain
	if handshakes {
		connections = c.Accepted
	}
	return cost.PodReading{Namespace: p.Namespace, Traffic: cost.Traffic{BytesSent: c.BytesSent, BytesReceived: c.BytesReceived, Connections: connections}}
}

// lastReading counts what a pod had before its counters go.
func (a *Agent) lastReading(uid string) {
	p, ok := a.last.plan.pod(uid) // only the loop, which calls this, writes it
	if _, steered := a.last.steered[uid]; !ok || !steered {
		return
	}
	counters, err := a.datapath.PodCounters()
	if err != nil {
		a.log.Error("the last traffic of a pod isn't counted", "pod", p.Namespace+"/"+p.Name, "error", err)
		return
	}
	if c, ok := counters[uid]; ok {
		a.costs.Leave(p.Tenant, uid, podReading(p, c, a.tellsHandshakes()))
	}
}

// costOf is what the status says of a tenant's account.
func costOf(account cost.Account) (*v1alpha1.NodeCost, []v1alpha1.NamespaceShare) {
	total := nodeCost(account.Cost)
	var shares []v1alpha1.NamespaceShare
	for _, ns := range slices.Sorted(maps.Keys(account.Namespaces)) {
		const most = 1000 // that the API takes
		if len(shares) < most {
			shares = append(shares, v1alpha1.NamespaceShare{Name: ns, Cost: nodeCost(account.Namespaces[ns])})
		}
	}
	return &total, shares
}

func nodeCost(c cost.Cost) v1alpha1.NodeCost {
	const mebibyte = 1 << 20
	return v1alpha1.NodeCost{
		Since: metav1.NewTime(c.Since.UTC().Truncate(time.Second)), At: metav1.NewTime(c.At.UTC().Truncate(time.Second)),
		Taken: v1alpha1.Taken{
			CPUMilliseconds:        c.CPU.Milliseconds(),
			PrivateMebibyteSeconds: int64(c.PrivateByteSeconds / mebibyte),
			PSSMebibyteSeconds:     int64(c.PSSByteSeconds / mebibyte),
			BytesSent:              int64(c.BytesSent), BytesReceived: int64(c.BytesReceived),
			Connections: int64(c.Connections),
		},
		PrivateBytes: c.Private, PSSBytes: c.PSS,
	}
}
