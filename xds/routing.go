package xds

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// scope is what a routing is for.
type scope struct {
	port     uint16
	consumer string
}

// variant is which of the resources under one name a proxy has.
type variant struct {
	// from is where it is, as far as endpoints depend on it.
	from Place
	// routed endpoints are those of an address that is spoken to as HTTP.
	routed bool
	// consumer is whose routes they are.
	consumer string
	// form of listeners; 0 for what isn't one.
	form Form
}

// SetRoutings replaces all routings of a service; it need not be known yet. One
// that is refused stays as it was, and is named in the error by an *ObjectError.
func (s *Store) SetRoutings(service model.ServiceKey, routings []model.Routing) error {
	next, refused := map[scope]model.Routing{}, map[scope]error{}
	known := s.Routings(service)
	for _, r := range routings {
		at := scope{r.Port, r.Consumer}
		// All streams would wait for checks in the lock.
		same := slices.ContainsFunc(known, func(k model.Routing) bool { return at == scope{k.Port, k.Consumer} && reflect.DeepEqual(k, r) })
		if !same {
			refused[at] = checkRouting(service, r)
		}
		next[at] = r
	}
	var errs []error
	s.mu.Lock()
	defer s.mu.Unlock()
	had := s.routings[service]
	for at, err := range refused {
		if err == nil {
			continue
		}
		errs = append(errs, &ObjectError{Source{"Service", service.Namespace, service.Name}, err})
		if old, ok := had[at]; ok {
			next[at] = old
		} else {
			delete(next, at)
		}
	}
	if len(next) > 0 {
		s.routings[service] = next
	} else {
		delete(s.routings, service)
	}
	vips := s.services[service].VIPs
	changed := func(at scope) {
		for _, v := range vips {
			s.invalidateFor(TypeRoutes, HTTPName(netip.AddrPortFrom(v, at.port)), at.consumer)
			s.invalidateFor(TypeEndpoints, VIPName(netip.AddrPortFrom(v, at.port)), at.consumer)
		}
	}
	switched := func(at scope) {
		changed(at)
		for _, v := range vips {
			s.invalidateStraight(netip.AddrPortFrom(v, at.port), at.consumer)
		}
	}
	for at, r := range next {
		if old, ok := had[at]; !ok {
			switched(at)
		} else if !reflect.DeepEqual(old, r) {
			changed(at)
		}
	}
	for at := range had {
		if _, ok := next[at]; !ok {
			switched(at)
		}
	}
	return errors.Join(errs...)
}

// Routings are those of a service that are in force.
func (s *Store) Routings(service model.ServiceKey) []model.Routing {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.routings[service]))
}

// checkRouting builds what proxies would get: a route that Envoy would refuse must
// not take the others of its service with it.
func checkRouting(service model.ServiceKey, r model.Routing) error {
	if r.Port == 0 {
		return errors.New("a routing has no port")
	}
	for i, rule := range r.Rules {
		if rule.Action == nil {
			return fmt.Errorf("rule %d of port %d has no action", i, r.Port)
		}
	}
	m, _, err := Routes(netip.AddrPortFrom(netip.IPv4Unspecified(), r.Port), service, r)
	if err != nil {
		return err
	}
	return validate(m)
}

// invalidateFor marks a shared resource at those who hold it in the namespace
// consumer, or at all of them for "".
func (s *Store) invalidateFor(typeURL, name, consumer string) {
	e := s.shared[resourceKey{typeURL, name}]
	if e == nil {
		return
	}
	e.version++
	for st := range e.holders {
		if consumer == "" || st.key.Tenant.Namespace == consumer {
			st.mark(typeURL, name, false)
		}
	}
}

// invalidateVIP marks all of an address that another service has now, or none.
func (s *Store) invalidateVIP(vip netip.AddrPort) {
	s.invalidate(TypeEndpoints, VIPName(vip))
	s.invalidate(TypeRoutes, HTTPName(vip))
	s.invalidateStraight(vip, "")
}

// invalidateBackends marks what changed of a service as a backend of routes.
func (s *Store) invalidateBackends(old, now model.Service) {
	ports := map[uint16]bool{}
	for _, p := range old.Ports {
		ports[p.Port] = true
	}
	for _, p := range now.Ports {
		ports[p.Port] = true
	}
	for port := range ports {
		was, is := portNumbered(old, port), portNumbered(now, port)
		if reflect.DeepEqual(was, is) {
			continue
		}
		for _, ipv6 := range []bool{false, true} {
			name := Backend{ipv6, model.ServicePortKey{ServiceKey: serviceKey{Namespace: now.Namespace, Name: now.Name}, Port: port}}.String()
			s.invalidate(TypeEndpoints, name)
			if was.Protocol != is.Protocol {
				s.invalidate(TypeCluster, name)
			}
		}
	}
}

// routing of an address for clients of a namespace, and whose it is.
func (s *Store) routing(vip netip.AddrPort, namespace string) (r model.Routing, consumer string, ok bool) {
	byScope := s.routings[s.vips[vip]]
	if r, ok = byScope[scope{vip.Port(), namespace}]; ok {
		return r, namespace, true
	}
	r, ok = byScope[scope{vip.Port(), ""}]
	return r, "", ok
}

// variant of a resource that a stream's proxy has.
func (s *Store) variant(st *stream, typeURL, name string) variant {
	p := s.proxies[st.key]
	if p == nil {
		return variant{}
	}
	here := Place{Zone: p.proxy.Zone, Node: p.proxy.Node}
	switch typeURL {
	case TypeEndpoints:
		if vip, ok := parseVIPName(name); ok {
			if _, _, routed := s.routing(vip, st.key.Tenant.Namespace); routed {
				return variant{routed: true}
			}
			return variant{from: here.at(portOf(s.services[s.vips[vip]], vip))}
		}
		if b, ok := parseBackendName(name); ok {
			return variant{from: here.at(portNumbered(s.services[b.ServiceKey], b.Port))}
		}
	case TypeRoutes:
		if vip, ok := parseHTTPName(name); ok {
			_, consumer, _ := s.routing(vip, st.key.Tenant.Namespace)
			return variant{consumer: consumer}
		}
	case TypeListener:
		return variant{form: st.form(name)}
	}
	return variant{}
}

// buildRoutes makes the routes of an address. Without a routing they lead to the
// service itself: connections that began with one go on.
func (s *Store) buildRoutes(vip netip.AddrPort, consumer string) (proto.Message, []resourceKey, error) {
	service := s.vips[vip]
	return Routes(vip, service, s.routings[service][scope{vip.Port(), consumer}])
}
