package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent/podnet"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

const (
	// flowIdle is how long a connection that stayed where it was may be silent. The
	// kernel's keepalive asks after two hours, and most applications' much sooner.
	flowIdle = 2*time.Hour + 10*time.Minute
	// heldLimit is how long a tenant that has no pods any more, or a pod that isn't
	// in the mesh any more, waits for connections to end.
	heldLimit = 10 * time.Minute
	// untakenLimit is how long a tenant without pods, whose time is over, has for what is
	// in its tunnels and isn't a connection yet, on a busy machine too. A peer can fill
	// tunnels for as long as it likes.
	untakenLimit = 30 * time.Second
	// sweepPeriod is the least time between two looks for connections that ended.
	sweepPeriod = time.Second
)

// steer gives a pod its way. A pod that ran before it was steered, or was another
// tenant's, keeps its connections. One that begins has none, and those of one that
// was redirected in another way are its tenant's.
func (a *Agent) steer(want steer.Pod, record sandboxRecord, begins bool) error {
	if begins {
		return a.datapath.UpdatePod(want)
	}
	return a.datapath.MovePod(want, a.connections(record))
}

// connections reads those of a pod where they are: in a tenant's namespace, or in
// its own.
func (a *Agent) connections(record sandboxRecord) model.FlowReader {
	return func(from uint16) ([]model.Flow, error) {
		if from != 0 {
			if s, ok := a.tenantOf(from); ok {
				return bpf.EstablishedFlows(s.Netns, record.IPs...)
			}
			return nil, nil // with the tenant its connections have ended
		}
		if record.Netns != "" {
			if _, err := os.Stat(record.Netns); err == nil {
				return bpf.EstablishedFlows(record.Netns, record.IPs...)
			}
		}
		found, err := podnet.Find("/proc", []string{record.UID})
		if err != nil {
			return nil, err
		}
		process, ok := found[record.UID]
		if !ok {
			return nil, fmt.Errorf("pod %s/%s has no process that shows its network", record.Namespace, record.Name)
		}
		return bpf.EstablishedFlows(process.Netns, record.IPs...)
	}
}

// tenantOf is the tenant with this index.
func (a *Agent) tenantOf(index uint16) (isolation.State, bool) {
	for _, t := range a.bulkheads.Tenants() {
		if s, ok := a.bulkheads.State(t); ok && s.Index == index {
			return s, true
		}
	}
	return isolation.State{}, false
}

// sweep forgets connections that have ended. Each time it looks at all of them, so
// a round that comes back soon doesn't.
func (a *Agent) sweep() {
	if time.Since(a.swept) < sweepPeriod {
		return
	}
	a.swept = time.Now()
	if err := a.datapath.SweepFlows(flowIdle); err != nil {
		a.log.Error("connections that have ended can't be forgotten", "error", err)
	}
}

// held counts the connections that stayed with a tenant whose pods' new ones go
// elsewhere: by pod, and by tenant index. What is written down may have ended as it
// was, so that nobody saw the end: the tenant's sockets know.
func (a *Agent) held() (pods map[string]int, tenants map[uint16]int) {
	pods, tenants = map[string]int{}, map[uint16]int{}
	flows, err := a.datapath.HeldFlows()
	if err != nil {
		a.log.Error("connections that stayed where they were can't be read", "error", err)
	}
	open := map[uint16]map[string]int{}
	for uid, by := range flows {
		for index, n := range by {
			if index == 0 {
				continue
			}
			if open[index] == nil {
				open[index] = a.sockets(index)
			}
			if open[index] != nil {
				n = min(n, open[index][uid])
			}
			pods[uid] += n
			tenants[index] += n
		}
	}
	return pods, tenants
}

// sockets counts those of a tenant's proxies that are some pod's connections, by
// pod, tunnels left out; nil if it can't be told.
func (a *Agent) sockets(index uint16) map[string]int {
	count := map[string]int{}
	s, ok := a.tenantOf(index)
	if !ok {
		return count
	}
	owner := map[netip.Addr]string{}
	for _, uid := range a.sandboxes.uids() {
		if r, ok := a.sandboxes.get(uid); ok {
			for _, ip := range r.IPs {
				owner[ip.Unmap()] = uid
			}
		}
	}
	flows, err := bpf.EstablishedFlows(s.Netns, slices.Collect(maps.Keys(owner))...)
	if err != nil {
		a.log.Error("a tenant's connections can't be read", "index", index, "error", err)
		return nil
	}
	for _, f := range flows {
		if !f.IsTunnel() {
			count[owner[f.Pod.Addr()]]++
		}
	}
	return count
}

// release lets a pod go that isn't in the plan any more: at once if it has ended,
// otherwise when its connections through its tenant have.
func (a *Agent) release(uid string, held int) (again time.Duration, err error) {
	record, ok := a.sandboxes.get(uid)
	if !ok || !a.linkExists(record) {
		delete(a.released, uid)
		a.lastReading(uid)
		return resync, a.datapath.DeletePod(uid)
	}
	since, known := a.released[uid]
	if !known {
		a.lastReading(uid)
		if err := a.datapath.ReleasePod(uid, a.connections(record)); err != nil {
			return time.Second, err
		}
		a.released[uid] = time.Now()
		return time.Second, nil // to see what it held
	}
	if held > 0 && time.Since(since) < heldLimit {
		return time.Second, nil
	}
	if held > 0 {
		a.log.Warn("pod that left the mesh loses connections that haven't ended", "pod", record.Namespace+"/"+record.Name, "connections", held, "after", heldLimit)
	}
	// Before it is so: whoever comes next must not take it for one that begins.
	record.Left = true
	if err := a.sandboxes.put(record); err != nil {
		return time.Second, err
	}
	delete(a.released, uid)
	return resync, a.datapath.DeletePod(uid)
}

// waitsForFlows is how many connections a tenant without pods is still to finish.
func (a *Agent) waitsForFlows(t model.Tenant, held map[uint16]int, since time.Time) int {
	s, ok := a.bulkheads.State(t)
	if !ok || time.Since(since) >= heldLimit {
		return 0
	}
	return held[s.Index]
}

// restsUntil is until when a tenant that has been without pods since then, and that waits for
// no connection any more, ends at rest only. The time begins with the first question, for what
// it waited for before has taken as long as it liked, up to heldLimit.
func (a *Agent) restsUntil(t model.Tenant, idleSince time.Time) time.Time {
	since, ok := a.endingSince[t]
	if !ok {
		since = time.Now()
		a.endingSince[t] = since
	}
	until, last := since.Add(untakenLimit), idleSince.Add(max(heldLimit, a.o.Linger+untakenLimit))
	if last.Before(until) {
		return last
	}
	return until
}

// forgetEnd forgets that a tenant was to end.
func (a *Agent) forgetEnd(t model.Tenant) {
	delete(a.idleSince, t)
	delete(a.endingSince, t)
	delete(a.endFailed, t)
}

// isIdle reports whether a tenant without pods has no connection of a pod, and nothing in
// its tunnels that isn't one yet. What its proxy has read already it doesn't tell.
func (a *Agent) isIdle(s isolation.State) (bool, error) {
	open := a.sockets(s.Index)
	for _, n := range open {
		if n > 0 {
			return false, nil
		}
	}
	// Last, since this is what may come at any moment.
	n, err := bpf.Untaken(s.Netns)
	return open != nil && n == 0, err
}
