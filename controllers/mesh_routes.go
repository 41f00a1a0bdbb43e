package controllers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"

	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// routeState is what a mesh knows of the Gateway API's routes. Its lock is the
// mesh's.
type routeState struct {
	// served reports whether the API server has a kind at all.
	served func(kind string) bool
	routes map[translate.RouteKey]*translate.Route
	// parents and backends are the routes that name a Service as such.
	parents, backends map[model.ServiceKey]map[translate.RouteKey]struct{}
	grants            map[string]map[string]*gatewayv1beta1.ReferenceGrant // namespace → name
	ports             map[model.ServiceKey][]translate.ServicePort         // of all Services
	outcomes          map[model.ServiceKey]map[translate.RouteKey][]translate.Outcome
}

func newRouteState() routeState {
	return routeState{
		served: func(string) bool { return false }, routes: map[translate.RouteKey]*translate.Route{},
		parents: map[model.ServiceKey]map[translate.RouteKey]struct{}{}, backends: map[model.ServiceKey]map[translate.RouteKey]struct{}{},
		grants: map[string]map[string]*gatewayv1beta1.ReferenceGrant{}, ports: map[model.ServiceKey][]translate.ServicePort{},
		outcomes: map[model.ServiceKey]map[translate.RouteKey][]translate.Outcome{},
	}
}

// loadRoutes brings all routes in; Services are in already.
func (m *mesh) loadRoutes(ctx context.Context) error {
	var errs []error
	for _, l := range []struct {
		kind string
		list client.ObjectList
	}{
		{kindReferenceGrant, &gatewayv1beta1.ReferenceGrantList{}},
		{translate.KindHTTPRoute, &gatewayv1.HTTPRouteList{}},
		{translate.KindGRPCRoute, &gatewayv1.GRPCRouteList{}},
	} {
		if !m.routing.served(l.kind) {
			continue
		}
		if err := m.reader.List(ctx, l.list, client.UnsafeDisableDeepCopy); err != nil {
			return fmt.Errorf("list %T: %w", l.list, err)
		}
		err := meta.EachListItem(l.list, func(o runtime.Object) error {
			object := o.(client.Object)
			if l.kind == kindReferenceGrant {
				return m.syncGrant(ctx, client.ObjectKeyFromObject(object))
			}
			return m.syncRoute(ctx, routeKey(object))
		})
		errs = append(errs, err)
	}
	m.mu.Lock()
	parents := slices.Collect(maps.Keys(m.routing.parents))
	m.mu.Unlock()
	for _, p := range parents {
		errs = append(errs, m.syncRouting(ctx, p))
	}
	return errors.Join(errs...)
}

// readRoute reads a route from the cache; nil if there is none.
func readRoute(ctx context.Context, m *mesh, key translate.RouteKey) (client.Object, *translate.Route, error) {
	if !m.routing.served(key.Kind) {
		return nil, nil, nil
	}
	name := client.ObjectKey{Namespace: key.Namespace, Name: key.Name}
	switch key.Kind {
	case translate.KindHTTPRoute:
		var h gatewayv1.HTTPRoute
		if found, err := m.get(ctx, name, &h); err != nil || !found {
			return nil, nil, err
		}
		return &h, translate.HTTPRoute(&h), nil
	case translate.KindGRPCRoute:
		var g gatewayv1.GRPCRoute
		if found, err := m.get(ctx, name, &g); err != nil || !found {
			return nil, nil, err
		}
		return &g, translate.GRPCRoute(&g), nil
	}
	return nil, nil, fmt.Errorf("%s isn't a kind of routes", key.Kind)
}

// syncRoute reads a route and has the Services looked at again that it is for, or
// was for.
func (m *mesh) syncRoute(ctx context.Context, key translate.RouteKey) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, route, err := readRoute(ctx, m, key)
	if err != nil {
		return err
	}
	s := &m.routing
	if old := s.routes[key]; old != nil {
		parents, backends := old.Services()
		forget(s.parents, parents, key)
		forget(s.backends, backends, key)
		delete(s.routes, key)
		m.triggers.routings.add(parents...)
	}
	if route == nil {
		return nil
	}
	m.triggers.routeStatus.add(key)
	if len(route.Parents) == 0 {
		return nil // a gateway's
	}
	parents, backends := route.Services()
	remember(s.parents, parents, key)
	remember(s.backends, backends, key)
	s.routes[key] = route
	m.triggers.routings.add(parents...)
	return nil
}

func remember(index map[model.ServiceKey]map[translate.RouteKey]struct{}, services []model.ServiceKey, key translate.RouteKey) {
	for _, k := range services {
		if index[k] == nil {
			index[k] = map[translate.RouteKey]struct{}{}
		}
		index[k][key] = struct{}{}
	}
}

func forget(index map[model.ServiceKey]map[translate.RouteKey]struct{}, services []model.ServiceKey, key translate.RouteKey) {
	for _, k := range services {
		delete(index[k], key)
		if len(index[k]) == 0 {
			delete(index, k)
		}
	}
}

// syncGrant has the routes looked at again that refer into the grant's namespace.
func (m *mesh) syncGrant(ctx context.Context, key types.NamespacedName) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &m.routing
	g, found := &gatewayv1beta1.ReferenceGrant{}, false
	if s.served(kindReferenceGrant) {
		var err error
		if found, err = m.get(ctx, key, g); err != nil {
			return err
		}
	}
	if found {
		add(s.grants, key.Namespace, key.Name, g)
	} else {
		remove(s.grants, key.Namespace, key.Name)
	}
	for service := range s.backends {
		if service.Namespace == key.Namespace {
			m.touchBackend(service)
		}
	}
	return nil
}

// setPorts notes a Service's ports, nil and false for one that is gone, and has
// those looked at again whom that concerns.
func (m *mesh) setPorts(service model.ServiceKey, ports []translate.ServicePort, exists bool) {
	s := &m.routing
	had, existed := s.ports[service]
	if exists {
		s.ports[service] = ports
	} else {
		delete(s.ports, service)
	}
	if existed == exists && slices.Equal(had, ports) {
		return
	}
	if len(s.parents[service]) > 0 {
		m.triggers.routings.add(service)
	}
	m.touchBackend(service)
}

// touchBackend has the parents looked at again of routes that refer to a Service.
func (m *mesh) touchBackend(service model.ServiceKey) {
	for key := range m.routing.backends[service] {
		parents, _ := m.routing.routes[key].Services()
		m.triggers.routings.add(parents...)
	}
}

// syncRouting translates the routes of a Service.
func (m *mesh) syncRouting(_ context.Context, service model.ServiceKey) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &m.routing
	var routes []*translate.Route
	for key := range s.parents[service] {
		routes = append(routes, s.routes[key])
	}
	routings, outcomes := translate.Routings(service, routes, translate.References{
		Ports: func(k model.ServiceKey) ([]translate.ServicePort, bool) { p, ok := s.ports[k]; return p, ok },
		Grants: func(namespace string) []*gatewayv1beta1.ReferenceGrant {
			return slices.Collect(maps.Values(s.grants[namespace]))
		},
	})
	had := s.outcomes[service]
	if len(outcomes) > 0 {
		s.outcomes[service] = outcomes
	} else {
		delete(s.outcomes, service)
	}
	for key, o := range outcomes {
		if !reflect.DeepEqual(had[key], o) {
			m.triggers.routeStatus.add(key)
		}
	}
	for key := range had {
		if outcomes[key] == nil {
			m.triggers.routeStatus.add(key)
		}
	}
	if err := m.store.SetRoutings(service, routings); err != nil {
		// What was in force stays; trying again would change nothing.
		m.log.Error("routes aren't in force", "service", service, "error", err)
	}
	return nil
}

// routeOutcomes are what came of a route; false while that isn't known yet of each
// of its parents.
func (m *mesh) routeOutcomes(r *translate.Route) ([]translate.Outcome, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	parents, _ := r.Services()
	var all []translate.Outcome
	for _, p := range parents {
		list := m.routing.outcomes[p][r.Key]
		if len(list) == 0 || list[0].Generation != r.Generation {
			return nil, false
		}
		all = append(all, list...)
	}
	return all, true
}

// forgetKind has all objects of a kind looked at again that is gone.
func (m *mesh) forgetKind(ctx context.Context, kind string) error {
	m.mu.Lock()
	var routes []translate.RouteKey
	for key := range m.routing.routes {
		if key.Kind == kind {
			routes = append(routes, key)
		}
	}
	var grants []types.NamespacedName
	if kind == kindReferenceGrant {
		for namespace, list := range m.routing.grants {
			for name := range list {
				grants = append(grants, types.NamespacedName{Namespace: namespace, Name: name})
			}
		}
	}
	m.mu.Unlock()
	var errs []error
	for _, key := range routes {
		errs = append(errs, m.syncRoute(ctx, key))
	}
	for _, key := range grants {
		errs = append(errs, m.syncGrant(ctx, key))
	}
	return errors.Join(errs...)
}
