package xds

import (
	"strings"
)

// A resource may need others: the endpoint that leads into an internal listener
// that listener, routes the clusters that they lead to. It is sent once the proxy
// has acknowledged those, and what it had under the name serves until then. What
// nobody asks for by name, clusters of backends and internal listeners, is sent
// because it is needed, and stays among the stream's names as if asked for.

// ready reports whether the proxy has all that r needs. If not, what is missing is
// on its way, and r is looked at again when it is acknowledged. Only the sender
// calls it.
func (st *stream) ready(r *resource) bool {
	if len(r.needs) == 0 {
		return true
	}
	self := resourceKey{r.typeURL, r.name()}
	ready := true
	var adopt []resourceKey
	st.mu.Lock()
	for _, need := range r.needs {
		if st.uses[self] == nil {
			st.uses[self] = map[resourceKey]struct{}{}
		}
		st.uses[self][need] = struct{}{} // besides what the version before needs
		sub := st.types[need.typeURL]
		if sub != nil && !has(sub.names, need.name) && (need.typeURL == TypeCluster || need.typeURL == TypeListener) {
			adopt = append(adopt, need)
		}
		// While any cluster waits for its endpoints, Envoy acknowledges none. That it
		// took the endpoints says that it has the cluster.
		if need.typeURL == TypeCluster || sub != nil && sub.has(need.name) {
			continue
		}
		ready = false
		if st.blocked[need] == nil {
			st.blocked[need] = map[resourceKey]struct{}{}
		}
		st.blocked[need][self] = struct{}{}
	}
	st.mu.Unlock()
	for _, need := range adopt {
		if st.server.store.hold(st, need.typeURL, need.name) {
			st.server.metrics.names.WithLabelValues(shortType(need.typeURL)).Inc()
			st.mark(need.typeURL, need.name, true)
		}
	}
	return ready
}

// unblock has those looked at again that wait for a resource, or for any of a type
// with the name "".
func (st *stream) unblock(key resourceKey) {
	st.mu.Lock()
	var waiting []resourceKey
	for need, waiters := range st.blocked {
		if need == key || key.name == "" && need.typeURL == key.typeURL {
			for w := range waiters {
				waiting = append(waiting, w)
			}
			delete(st.blocked, need)
		}
	}
	st.mu.Unlock()
	for _, w := range waiting {
		st.mark(w.typeURL, w.name, true)
	}
}

// settle lets go of what only older versions of r needed, if the proxy has
// acknowledged this one. Only the sender calls it, so that a removal can't
// overtake what brings a name back.
func (st *stream) settle(r *resource) error {
	self := resourceKey{r.typeURL, r.name()}
	st.mu.Lock()
	if h := st.types[r.typeURL].held[r.name()]; h == nil || h.acked != r.version() {
		st.mu.Unlock()
		return nil
	}
	now := map[resourceKey]struct{}{}
	for _, need := range r.needs {
		now[need] = struct{}{}
	}
	if len(now) == len(st.uses[self]) {
		st.mu.Unlock()
		return nil // uses is at least now
	}
	st.uses[self] = now
	sub := st.types[TypeCluster]
	var gone []string
	if sub != nil {
		for name := range sub.names {
			if strings.HasPrefix(name, backendPrefix) && !st.used(resourceKey{TypeCluster, name}) {
				gone = append(gone, name)
				delete(sub.names, name)
				delete(sub.held, name)
				// Its endpoints go with it, and the proxy says so later than the cluster may be
				// needed again: that it had acknowledged them tells nothing of the next one.
				if eps := st.types[TypeEndpoints]; eps != nil {
					delete(eps.held, name)
				}
			}
		}
	}
	st.mu.Unlock()
	if len(gone) == 0 {
		return nil
	}
	for _, name := range gone {
		st.server.store.release(st, TypeCluster, name)
		st.server.metrics.names.WithLabelValues(shortType(TypeCluster)).Dec()
	}
	return st.remove(removal{TypeCluster, gone})
}

func (st *stream) used(key resourceKey) bool {
	for _, needs := range st.uses {
		if has(needs, key) {
			return true
		}
	}
	return false
}
