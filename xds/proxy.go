package xds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// proxyState is a proxy, its listeners and the streams of its generations.
type proxyState struct {
	proxy   model.Proxy
	streams map[*stream]struct{}

	// seq counts the contents that the listeners had. A resource carries the seq at
	// which its content came, and since the pod that is waited for was in the
	// listeners from a certain seq on, whoever acknowledged that or a later one
	// serves the pod, however many more have come in between.
	seq  uint64
	sets map[Form]*listenerSet

	waiting   chan struct{} // closed and replaced at news for WaitServed; nil if nobody waits
	rejection string        // the last one of a listener
}

// listenerSet are a proxy's listeners in one form.
type listenerSet struct {
	stale bool
	// listeners are those that all generations have alike; see Store.outbound.
	listeners map[string]*resource
	// since is the seq from which on a workload was served as it is now.
	since map[string]servedSince
}

type servedSince struct {
	identity model.Identity
	ips      []netip.Addr
	outbound uint64
	inbound  uint64
}

func (p *proxyState) invalidate() {
	p.prune()
	for _, set := range p.sets {
		set.stale = true
	}
	for st := range p.streams {
		st.mark(TypeListener, wildcardName, false)
	}
}

// prune forgets the forms that no stream has, if there is one: it may be of the last
// process that had another.
func (p *proxyState) prune() {
	if len(p.streams) == 0 {
		return
	}
	used := map[Form]struct{}{}
	for st := range p.streams {
		for _, name := range listenerNames {
			used[st.form(name)] = struct{}{}
		}
	}
	maps.DeleteFunc(p.sets, func(f Form, _ *listenerSet) bool { return !has(used, f) })
}

// wake tells WaitServed to look again.
func (p *proxyState) wake() {
	if p.waiting != nil {
		close(p.waiting)
		p.waiting = nil
	}
}

// SetProxy adds or replaces a proxy. Workloads that can't be served are left out
// and named in the error, each with an *ObjectError; the others are in force.
func (s *Store) SetProxy(proxy model.Proxy) error {
	key := proxy.Key()
	if key.Node == "" || key.Tenant.IsZero() {
		return &ObjectError{proxySource(key), errors.New("it has no node or tenant")}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, refused := servedIdentities(s.network, proxy)
	p := s.proxies[key]
	if p == nil {
		p = &proxyState{streams: map[*stream]struct{}{}, sets: map[Form]*listenerSet{}}
		s.proxies[key] = p
		s.announce()
	} else if reflect.DeepEqual(p.proxy, proxy) {
		return refused
	}
	moved := p.proxy.Zone != proxy.Zone
	p.proxy = proxy
	if moved {
		for st := range p.streams {
			st.markAll(TypeEndpoints)
		}
	}
	p.invalidate()
	p.wake()
	return refused
}

// DeleteProxy forgets a proxy and ends its streams. What the proxy has, it keeps.
func (s *Store) DeleteProxy(key model.ProxyKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.proxies[key]
	if p == nil {
		return
	}
	delete(s.proxies, key)
	for st := range p.streams {
		st.end(errProxyGone)
	}
	p.wake()
}

var errProxyGone = errors.New("the proxy has no pods on this node any more")

// listeners are p's in a form, built if they are stale.
func (s *Store) listeners(p *proxyState, f Form) *listenerSet {
	set := p.sets[f]
	if set == nil {
		set = &listenerSet{stale: true}
		p.sets[f] = set
	}
	if !set.stale {
		return set
	}
	set.stale = false
	s.builds++
	ls, err := listenersOf(f, s.network, p.proxy)
	if ls == nil {
		s.refuse(TypeListener, listenerOutbound, err) // SetProxy told of single workloads
		return set
	}
	next, changed := map[string]*resource{}, false
	for _, l := range ls {
		r, err := encode(l.Name, proxySource(p.proxy.Key()), l)
		if err != nil {
			s.refuse(TypeListener, l.Name, err)
			return set
		}
		f.mark(r)
		key := commonKey{f, l.Name}
		if c := s.common[key]; c != nil && c.Version == r.version() {
			r.wire = c
		} else {
			s.common[key] = r.wire
		}
		if old := set.listeners[l.Name]; old != nil && old.version() == r.version() {
			r = old
		} else {
			r.seq, changed = p.seq+1, true
		}
		next[l.Name] = r
	}
	if changed {
		p.seq++
	}
	set.listeners = next
	set.note(s.network, p.proxy)
	return set
}

// note keeps from when on each workload is served.
func (l *listenerSet) note(n model.Network, proxy model.Proxy) {
	next := map[string]servedSince{}
	identities, _ := servedIdentities(n, proxy)
	owners := map[netip.Addr]model.Identity{}
	for _, s := range identities {
		for _, prefix := range s.prefixes {
			owners[prefix.Addr()] = s.identity
		}
	}
	for _, w := range proxy.Workloads {
		if w.Identity.IsZero() || len(w.IPs) == 0 || slices.ContainsFunc(w.IPs, func(a netip.Addr) bool { return owners[a] != w.Identity }) {
			continue // not served, or not at all of its addresses
		}
		now := servedSince{identity: w.Identity, ips: w.IPs}
		if old, ok := l.since[w.UID]; ok && old.identity == now.identity && slices.Equal(old.ips, now.ips) {
			now = old
		} else {
			now.outbound, now.inbound = l.listeners[listenerOutbound].seq, l.listeners[listenerInbound].seq
		}
		next[w.UID] = now
	}
	l.since = next
}

// waitServed returns once all streams of the proxy, one at least, acknowledged
// listeners that serve the workload.
func (s *Store) waitServed(ctx context.Context, key model.ProxyKey, uid string) error {
	for {
		s.mu.Lock()
		p := s.proxies[key]
		var missing string
		var wait chan struct{}
		if p == nil {
			missing, wait = "it isn't known", s.changed
		} else if missing = s.unserved(p, uid); missing != "" {
			if p.waiting == nil {
				p.waiting = make(chan struct{})
			}
			wait = p.waiting
		}
		s.mu.Unlock()
		if missing == "" {
			return nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return fmt.Errorf("wait until %s serves pod %s: %s: %w", proxySource(key), uid, missing, ctx.Err())
		}
	}
}

// unserved says what is missing until the workload is served; "" if nothing.
func (s *Store) unserved(p *proxyState, uid string) string {
	const unservable = "the pod isn't among the workloads that it can serve, or has no address"
	if len(p.streams) == 0 {
		if _, ok := s.listeners(p, s.newest).since[uid]; !ok {
			return unservable
		}
		return "its Envoy isn't connected"
	}
	for st := range p.streams {
		if !st.opened(TypeListener) {
			return "its Envoy hasn't acknowledged any listener" // nor told of which form it has them
		}
		out, in := s.listeners(p, st.form(listenerOutbound)), s.listeners(p, st.form(listenerInbound))
		since, ok := out.since[uid]
		if !ok || in.listeners == nil {
			return unservable
		}
		for _, l := range []struct {
			r   *resource
			seq uint64
		}{{s.outbound(st, p), since.outbound}, {in.listeners[listenerInbound], in.since[uid].inbound}} {
			if !st.hasListener(l.r, l.seq) {
				if p.rejection != "" {
					return "its Envoy refused the configuration: " + p.rejection
				}
				return "its Envoy hasn't acknowledged the listener " + l.r.name()
			}
		}
	}
	return ""
}

// recheck has WaitServed look again at what a stream holds.
func (s *Store) recheck(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.proxies[st.key]; p != nil && has(p.streams, st) {
		p.wake()
	}
}

// acknowledged is called when a stream answered about a listener.
func (s *Store) acknowledged(st *stream, rejection string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.proxies[st.key]; p != nil && has(p.streams, st) {
		p.rejection = rejection
		p.wake()
	}
}
