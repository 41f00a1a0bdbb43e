package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/bulkhead-mesh/bulkhead/agent/podnet"
	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

const (
	// resync repeats what no event asked for.
	resync = 10 * time.Second
	// soon is when something that isn't ready yet is looked at again.
	soon = 50 * time.Millisecond
	// defaultMTU of a tenant none of whose pods is known yet.
	defaultMTU = 1500
)

// round is what one run of reconcile found out, for others to read.
type round struct {
	plan plan
	// known is false before the first plan.
	known bool
	// serving is the process whose sockets take the connections that aren't a
	// canary's, for tenants that have one.
	serving map[model.Tenant]process
	// problems of tenants, for people.
	problems map[model.Tenant]string
	// leaving is what tenants that aren't planned any more wait for, for people.
	leaving map[model.Tenant]string
	// steered pods, with the veth that carries their programs.
	steered map[string]steer.Pod
	// redirectionProblem is why pods aren't redirected as planned.
	redirectionProblem string
	// capacityProblem is what of the kernel's will be full soon.
	capacityProblem string
	// limitProblem is why the limits of all proxies together aren't as planned.
	limitProblem string
	// hits of tenants' limits.
	hits map[model.Tenant]tenantHits
	// placed says what each generation is, and weights what share of new connections
	// canaries have.
	placed  map[model.Tenant]placement
	weights map[model.Tenant]int
	// taking are the processes, by generation, whose sockets take connections.
	taking map[model.Tenant][generations]process
	// refused is what tenants' proxies refuse, and whether all versions do.
	refused map[model.Tenant]map[resource]refusal
}

// What wakes the loop is often a tenant's doing, and each round looks at all of
// them: beyond roundsAtOnce it comes roundsPerSecond times a second at most.
const (
	roundsPerSecond = 10
	roundsAtOnce    = 20
)

// loop runs reconcile until ctx ends.
func (a *Agent) loop(ctx context.Context) {
	pace := rate.NewLimiter(roundsPerSecond, roundsAtOnce)
	for pace.Wait(ctx) == nil {
		next := a.reconcile(ctx)
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-a.woken:
		case <-timer.C:
		}
		timer.Stop()
	}
	a.admitting.Wait()
}

// reconcile makes the node what the plan says, as far as it gets now, and returns
// when to come back.
func (a *Agent) reconcile(ctx context.Context) time.Duration {
	p, known := a.currentPlan()
	next := resync
	if !known {
		a.finishRound(round{})
		return next
	}
	r := round{plan: p, known: true, serving: map[model.Tenant]process{}, problems: map[model.Tenant]string{}, leaving: map[model.Tenant]string{},
		steered: map[string]steer.Pod{}, placed: map[model.Tenant]placement{}, weights: map[model.Tenant]int{}, taking: map[model.Tenant][generations]process{},
		refused: map[model.Tenant]map[resource]refusal{}}
	if err := a.ensureRedirection(p.redirection); err != nil {
		a.log.Error("redirection isn't as planned", "error", err)
		if r.redirectionProblem = err.Error(); a.steering().datapath == nil {
			a.setIdentities(nil)
			a.finishRound(r)
			return time.Second
		}
	}
	places, err := a.datapath.Placements()
	if err != nil {
		a.log.Error("steered pods can't be read", "error", err)
		a.finishRound(r)
		return time.Second
	}
	a.setIdentities(places)
	if err := a.bulkheads.LimitAll(p.limits); err != nil {
		a.log.Error("proxies together aren't limited as planned", "error", err)
		r.limitProblem = err.Error()
		next = time.Second
	}
	indexes := map[model.Tenant]uint16{}
	for _, tp := range p.tenants {
		index, again, err := a.ensureTenant(ctx, tp, &r)
		if err != nil {
			a.log.Error("tenant isn't as planned", "tenant", tp.tenant.String(), "error", err)
			r.problems[tp.tenant] = err.Error()
			again = time.Second
		}
		if index != 0 {
			indexes[tp.tenant] = index
		}
		if again > 0 {
			next = min(next, again)
		}
		if again := a.compareRefusalsOf(tp, &r); again > 0 {
			next = min(next, again)
		}
	}
	a.sweep()
	r.capacityProblem = a.checkCapacity()
	held := sync.OnceValues(a.held) // counted only if something is to go
	next = min(next, a.ensurePods(ctx, places, indexes, held, &r))
	next = min(next, a.removeTenants(ctx, held, &r), a.removeFormer(&r))
	r.hits = a.readHits(p)
	a.finishRound(r)
	return next
}

// mtu is the smallest of the tenant's pods: a larger packet would be lost on the
// way to one of them.
func (a *Agent) mtu(t model.Tenant, p plan) int {
	mtu := 0
	for _, pod := range p.pods {
		if pod.Tenant != t {
			continue
		}
		if r, ok := a.sandboxes.get(pod.UID); ok && r.MTU > 0 && (mtu == 0 || r.MTU < mtu) {
			mtu = r.MTU
		}
	}
	if mtu == 0 {
		return defaultMTU
	}
	return mtu
}

// heldCounts are held's counts, as of the first time that they are asked for.
type heldCounts func() (pods map[string]int, tenants map[uint16]int)

// ensurePods steers the planned pods and lets go of all others.
func (a *Agent) ensurePods(ctx context.Context, places map[string]model.Placement, indexes map[model.Tenant]uint16, held heldCounts, r *round) time.Duration {
	next, p := resync, r.plan
	steered, err := a.datapath.Pods()
	if err != nil {
		a.log.Error("steered pods can't be read", "error", err)
		return time.Second
	}
	former := a.formerPods()
	a.discover(p)
	for _, pod := range p.pods {
		record, ok := a.sandboxes.get(pod.UID)
		index := indexes[pod.Tenant]
		if !ok || index == 0 {
			continue
		}
		t, place := p.traffic[pod.UID], places[pod.UID]
		known, redirected := slices.Contains(steered, pod.UID), slices.Contains(former, pod.UID)
		begins := !known && (redirected || record.ContainerID != "" && !record.Left)
		to := index
		if place.Tenant != index && !t.bypass && !(begins && redirected) {
			// Before its proxy serves it, new connections go on where they went.
			ready, again, err := a.canMove(ctx, pod, record, begins, r.serving)
			if err != nil {
				r.problems[pod.Tenant] = fmt.Sprintf("pod %s/%s goes on elsewhere: %v", pod.Namespace, pod.Name, err)
				next = min(next, time.Second)
			}
			switch {
			case ready:
			case place.Tenant == 0:
				continue
			case a.hasTenant(place.Tenant):
				to, next = place.Tenant, min(next, again)
			}
		}
		want := steer.Pod{UID: pod.UID, Tenant: to, Ifindex: record.Ifindex, IPs: record.IPs, MAC: record.MAC,
			Exclusions: t.exclusions, Strict: t.strict, Bypass: t.bypass}
		if err := a.steer(want, record, begins); err != nil {
			if !a.linkExists(record) {
				a.sandboxes.drop(pod.UID) // it has ended; the plan will say so soon
				continue
			}
			a.log.Error("pod isn't steered", "pod", pod.Namespace+"/"+pod.Name, "error", err)
			r.problems[pod.Tenant] = fmt.Sprintf("pod %s/%s isn't steered: %v", pod.Namespace, pod.Name, err)
			next = time.Second
			continue
		}
		if was := a.last.steered[pod.UID].Bypass; was != want.Bypass { // only this goroutine writes it
			a.log.Warn("emergency bypass of a pod", "pod", pod.Namespace+"/"+pod.Name, "on", want.Bypass)
		}
		r.steered[pod.UID] = want
		if to == index {
			delete(a.released, pod.UID)
			a.forgetAdmission(pod.UID)
		}
		if record.Left {
			record.Left = false
			if err := a.sandboxes.put(record); err != nil {
				a.log.Error("pod is still taken for one that has left the mesh", "pod", pod.Namespace+"/"+pod.Name, "error", err)
			}
		}
	}
	for uid := range a.admissions {
		if _, ok := p.pod(uid); !ok {
			a.forgetAdmission(uid)
		}
	}
	for _, uid := range steered {
		if _, ok := p.pod(uid); ok {
			continue
		}
		byPod, _ := held()
		again, err := a.release(uid, byPod[uid])
		if err != nil {
			a.log.Error("pod is still steered", "uid", uid, "error", err)
			again = time.Second
		}
		next = min(next, again)
	}
	for _, uid := range a.sandboxes.uids() {
		if _, ok := p.pod(uid); ok {
			continue
		}
		if record, ok := a.sandboxes.get(uid); ok && !a.linkExists(record) {
			a.sandboxes.drop(uid)
		}
	}
	return next
}

// discover finds the networks of planned pods that no CNI ADD told of.
func (a *Agent) discover(p plan) {
	var unknown []string
	for _, pod := range p.pods {
		if _, ok := a.sandboxes.get(pod.UID); !ok {
			unknown = append(unknown, pod.UID)
		}
	}
	found, err := podnet.Find("/proc", unknown)
	if err != nil {
		a.log.Error("running pods can't be found", "error", err)
		return
	}
	for uid, process := range found {
		pod, _ := p.pod(uid)
		n, err := podnet.Inspect(process.Netns, "eth0")
		if err == nil {
			err = a.sandboxes.put(sandboxRecord{UID: uid, Namespace: pod.Namespace, Name: pod.Name,
				IPs: n.IPs, Ifindex: n.Ifindex, Ifname: n.Ifname, MTU: n.MTU, MAC: n.MAC})
		}
		if err != nil {
			a.log.Error("running pod can't join", "pod", pod.Namespace+"/"+pod.Name, "error", err)
		}
	}
}

// removeTenants ends the proxies of tenants that have no pods here any more.
func (a *Agent) removeTenants(ctx context.Context, held heldCounts, r *round) time.Duration {
	next, p := resync, r.plan
	used, err := a.usedTenants()
	if err != nil {
		a.log.Error("steered pods can't be read", "error", err)
		return time.Second
	}
	for _, t := range a.bulkheads.Tenants() {
		if p.has(t) {
			continue
		}
		if s, ok := a.bulkheads.State(t); ok && used[s.Index] {
			a.forgetEnd(t)
			r.leaving[t] = "it isn't planned any more, and its pods wait there for the proxy of their new tenant"
			continue
		}
		since, ok := a.idleSince[t]
		if !ok {
			since = time.Now()
			a.idleSince[t] = since
			// Tunnels would bring it new connections for as long as they last.
			delete(a.staying, t)
			a.bulkheads.SetLeaving(t, true)
		}
		if left := a.o.Linger - time.Since(since); left > 0 {
			next = min(next, left)
			continue
		}
		_, byTenant := held()
		if n := a.waitsForFlows(t, byTenant, since); n > 0 {
			delete(a.endingSince, t)
			r.leaving[t] = fmt.Sprintf("it has no pods here any more and ends with the connections that began there (%d), or at %s",
				n, since.Add(heldLimit).UTC().Format(time.RFC3339))
			next = min(next, time.Second)
			continue
		}
		until := a.restsUntil(t, since)
		atRest := time.Now().Before(until)
		removed, err := a.removeTenant(ctx, t, atRest)
		ending := errors.Is(err, isolation.ErrEnding) // and wakes the loop when it is over
		if !ending {
			a.endFailed[t] = err
		}
		switch {
		case a.endFailed[t] != nil:
			r.leaving[t] = fmt.Sprintf("it has no pods here any more and isn't removed: %v", a.endFailed[t])
			if !ending {
				a.log.Error("tenant isn't removed", "tenant", t.String(), "error", err)
				next = time.Second
			}
			continue
		case !removed && atRest:
			r.leaving[t] = fmt.Sprintf("it has no pods here any more and ends when it has taken what came through its tunnels, or at %s",
				until.UTC().Format(time.RFC3339))
			if !ending {
				next = min(next, soon)
			}
			continue
		case !removed:
			r.leaving[t] = "it has no pods here any more, and its proxies are being ended"
			continue
		}
		a.forgetEnd(t)
	}
	a.removeUnknownTenants()
	if err := a.relay.KeepLastGood(p.names()); err != nil {
		a.log.Error("last good configuration stays", "error", err)
	}
	return next
}

// usedTenants are those that pods are at by what the kernel has: one that couldn't be
// moved, or let go, is where it was, and the index may be another tenant's later.
func (a *Agent) usedTenants() (map[uint16]bool, error) {
	places, err := a.datapath.Placements()
	used := map[uint16]bool{}
	for _, place := range places {
		used[place.Tenant] = true
	}
	return used, err
}

// removeTenant ends the processes first: while one runs, the programs guard what
// leaves its namespace. With atRest it does so only if nothing is under way; otherwise
// it changes nothing, and removed is false. While they end it returns an
// isolation.ErrEnding, and is to be called again.
func (a *Agent) removeTenant(ctx context.Context, t model.Tenant, atRest bool) (removed bool, err error) {
	state, known := a.bulkheads.State(t)
	if known {
		var idle func() (bool, error)
		if atRest {
			idle = func() (bool, error) { return a.isIdle(state) }
		}
		if ended, err := a.bulkheads.End(t, idle); err != nil || !ended {
			return false, err
		}
	}
	for generation := range 2 {
		if known {
			// The redirection may have changed, and the one of now never had it.
			if err := a.datapath.ClearListeners(state.Index, generation); err != nil && !errors.Is(err, steer.ErrUnknownTenant) {
				return false, err
			}
		}
		key := relay.Key{Tenant: t, Generation: generation}
		a.relay.Close(key)
		delete(a.taken, key)
	}
	if err := a.bulkheads.Delete(ctx, t); err != nil {
		return false, err
	}
	if !known {
		return true, nil // removeUnknownTenants finds what is left
	}
	return true, a.datapath.DeleteTenant(state.Index)
}

// removeUnknownTenants removes steering to tenants of which nothing else is left.
func (a *Agent) removeUnknownTenants() {
	indexes, err := a.datapath.Tenants()
	if err != nil {
		a.log.Error("steered tenants can't be read", "error", err)
		return
	}
	known := map[uint16]bool{}
	for _, t := range a.bulkheads.Tenants() {
		if s, ok := a.bulkheads.State(t); ok {
			known[s.Index] = true
		}
	}
	for _, index := range indexes {
		if known[index] {
			continue
		}
		if err := a.datapath.DeleteTenant(index); err != nil {
			a.log.Error("steering to a tenant that is gone stays", "index", index, "error", err)
		}
	}
}

// wake asks for a round of reconcile.
func (a *Agent) wake() {
	select {
	case a.woken <- struct{}{}:
	default:
	}
}

// finishRound publishes what a round found out and wakes those who wait for it.
func (a *Agent) finishRound(r round) {
	a.mu.Lock()
	a.last = r
	close(a.roundEnd)
	a.roundEnd = make(chan struct{})
	a.mu.Unlock()
	a.reportStatus()
}

// roundDone is closed at the end of the next round.
func (a *Agent) roundDone() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.roundEnd
}

func (a *Agent) currentPlan() (plan, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.plan, a.planKnown
}

func (a *Agent) planned(uid string) (identity.Pod, bool) {
	p, _ := a.currentPlan()
	return p.pod(uid)
}

// isSteered reports whether the pod's programs are on this very veth.
func (a *Agent) isSteered(record sandboxRecord) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	pod, ok := a.last.steered[record.UID]
	return ok && pod.Ifindex == record.Ifindex
}

// isOutside reports whether the plan says that the pod isn't in the mesh.
func (a *Agent) isOutside(uid string) bool {
	p, _ := a.currentPlan()
	return p.outside[uid]
}

// isBypassed reports whether the pod's new connections are to pass in the clear.
func (a *Agent) isBypassed(uid string) bool {
	p, _ := a.currentPlan()
	return p.traffic[uid].bypass
}

func (a *Agent) hasTenant(index uint16) bool {
	_, there := a.tenantOf(index)
	return there
}

func (a *Agent) isServing(t model.Tenant) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, ok := a.last.serving[t]
	return ok
}
