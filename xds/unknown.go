package xds

import (
	"slices"
	"time"
)

// Addresses that nobody has. Pods dial them by mistake, or after the pod or service
// that had them is gone, or to fill a proxy's memory. Envoy never lets go of a
// cluster by itself, and asks for a name once and never again, also after the
// cluster was removed; it takes it at once when it is sent again. So the cluster of
// such an address is removed after a while, and the name is remembered: if the
// address becomes somebody's, the proxy gets the cluster unasked.
//
// The cluster of an address that is somebody's stays, used or not: nobody would
// tell that it is wanted again.

// isUnknown reports whether name is an address that nobody has.
func (s *Store) isUnknown(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unknown(name)
}

func (s *Store) unknown(name string) bool {
	if vip, ok := parseVIPName(name); ok {
		_, known := s.vips[vip]
		return !known
	}
	if addr, ok := parsePodName(name); ok {
		return len(s.addrs[addr]) == 0
	}
	return false
}

// roomForUnknown reports whether one more unknown name may be held. For it, one is
// forgotten that was let go before.
func (st *stream) roomForUnknown(typeURL string) bool {
	st.mu.Lock()
	sub := st.types[typeURL]
	if len(sub.unknown) < st.server.opts.MaxUnknown {
		st.mu.Unlock()
		return true
	}
	forgotten := ""
	for name, since := range sub.unknown {
		if since.IsZero() {
			forgotten = name
			break
		}
	}
	if forgotten != "" {
		delete(sub.unknown, forgotten)
		delete(sub.names, forgotten)
	}
	st.mu.Unlock()
	if forgotten == "" {
		return false
	}
	st.server.store.release(st, typeURL, forgotten)
	st.server.metrics.names.WithLabelValues(shortType(typeURL)).Dec()
	return true
}

// note keeps account of whether r is of an unknown address. It reports false if the
// proxy was told to forget it, and nothing has changed that.
func (st *stream) note(sub *subscription, r *resource) bool {
	if !r.unknown {
		delete(sub.unknown, r.name())
		return true
	}
	since, had := sub.unknown[r.name()]
	if !had {
		st.addUnknown(sub, r.typeURL, r.name())
	}
	return !had || !since.IsZero() || r.typeURL != TypeCluster
}

func (st *stream) addUnknown(sub *subscription, typeURL, name string) {
	if sub.unknown == nil {
		sub.unknown = map[string]time.Time{}
	}
	sub.unknown[name] = time.Now()
	if typeURL == TypeCluster && st.sweep == nil {
		st.sweepIn(st.server.opts.UnknownFor)
	}
}

func (st *stream) sweepIn(d time.Duration) {
	st.sweep = time.AfterFunc(d, func() {
		st.mu.Lock()
		st.swept = true
		st.mu.Unlock()
		st.wake()
	})
}

// letGo has the proxy forget the clusters of addresses that nobody has had for long.
func (st *stream) letGo() error {
	st.mu.Lock()
	if !st.swept {
		st.mu.Unlock()
		return nil
	}
	st.swept, st.sweep = false, nil
	sub, now := st.types[TypeCluster], time.Now()
	var names []string
	next := time.Duration(0)
	for name, since := range sub.unknown {
		if since.IsZero() {
			continue
		}
		if left := st.server.opts.UnknownFor - now.Sub(since); left > 0 {
			if next == 0 || left < next {
				next = left
			}
			continue
		}
		sub.unknown[name] = time.Time{}
		delete(sub.held, name)
		names = append(names, name)
	}
	if next > 0 {
		st.sweepIn(next)
	}
	st.mu.Unlock()
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	st.server.metrics.letGo.Add(float64(len(names)))
	return st.remove(removal{TypeCluster, names})
}
