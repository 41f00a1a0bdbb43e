package relay

import (
	"maps"
	"slices"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// Warm has a proxy get the clusters that another proxy of its tenant found on
// demand, ahead of the connections that would ask for them: an Envoy takes
// clusters that it didn't ask for, and looks there first. It returns what the
// proxy lacks still, sorted; repeat it until that is nothing. What the other one
// finds later, each finds by itself.
func (r *Relay) Warm(key, like Key) (lacking []string) {
	e, other := r.endpoint(key), r.endpoint(like)
	if e == nil || other == nil {
		return nil
	}
	other.mu.Lock()
	wanted := maps.Clone(other.found)
	other.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	for name, exists := range wanted {
		if _, told := e.found[name]; exists && !told {
			lacking = append(lacking, name)
		}
	}
	slices.Sort(lacking)
	if e.warming = len(lacking) > 0; e.warming {
		e.ahead = lacking
		select {
		case e.warm <- struct{}{}:
		default:
		}
	}
	return lacking
}

// found notes what a proxy knows of names of clusters that it has by name: that
// they exist, or don't.
func (r *Relay) found(key Key, st downstream, names []string, exist bool) {
	e := r.endpoint(key)
	if e == nil || len(names) == 0 {
		return
	}
	e.mu.Lock()
	if e.current == st {
		for _, name := range names {
			e.found[name] = exist
		}
	}
	tell := e.warming
	e.mu.Unlock()
	if tell { // nobody else waits for it
		r.changed(key.Tenant)
	}
}

// forget drops what a proxy knew of clusters that it doesn't have by name any more.
func (r *Relay) forget(key Key, st downstream, names []string) {
	e := r.endpoint(key)
	if e == nil || len(names) == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.current == st {
		for _, name := range names {
			delete(e.found, name)
		}
	}
}

// getAhead asks for what Warm wants, as if the proxy did.
func (s *stream) getAhead() error {
	e := s.relay.endpoint(s.key)
	sub := s.subs[TypeCluster]
	if e == nil || sub == nil {
		return nil // it hasn't asked for anything yet; Warm is repeated
	}
	e.mu.Lock()
	names := e.ahead
	e.ahead = nil
	e.mu.Unlock()
	names = slices.DeleteFunc(slices.Clone(names), func(name string) bool { _, has := sub.names[name]; return has })
	if len(names) == 0 {
		return nil
	}
	c, err := sub.apply(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResourceNamesSubscribe: names}, false)
	if err != nil {
		return err
	}
	s.log.Info("proxy gets ahead what the other generation holds", "clusters", len(c.subscribe))
	s.relay.forget(s.key, s.down, c.unsubscribe)
	s.relay.found(s.key, s.down, c.dropped, false)
	s.ask(TypeCluster, c, nil, false)
	return nil
}

// gotAhead adds to a proxy's first request of clusters those that it holds without
// having asked for them: another relay has got them ahead, and this one is to keep
// them current.
func (s *stream) gotAhead(r *discovery.DeltaDiscoveryRequest) {
	var names []string
	for name := range r.InitialResourceVersions {
		if !slices.Contains(r.ResourceNamesSubscribe, name) && s.good.onDemand(TypeCluster, name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return
	}
	if len(r.ResourceNamesSubscribe) == 0 {
		names = append(names, wildcard) // no longer what no name at all means
	}
	slices.Sort(names)
	r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, names...)
}

// named are the resources that a proxy has by name.
func (s *subscription) named(names []string) (out []string) {
	for _, name := range names {
		if _, ok := s.names[name]; ok {
			out = append(out, name)
		}
	}
	return out
}
