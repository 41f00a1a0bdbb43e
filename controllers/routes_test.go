package controllers

import (
	"fmt"
	"math"
	"reflect"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

func newHTTPService(name string, port int32) *corev1.Service {
	http := "http"
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name}, Spec: corev1.ServiceSpec{
		ClusterIPs: []string{"10.96.0.1"}, Ports: []corev1.ServicePort{{Port: port, AppProtocol: &http}},
	}}
}

func newHTTPRoute(name, parent, backend string) *gatewayv1.HTTPRoute {
	port := gatewayv1.PortNumber(80)
	return &gatewayv1.HTTPRoute{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name, Generation: 1}, Spec: gatewayv1.HTTPRouteSpec{
		CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{{Group: new(gatewayv1.Group("")), Kind: new(gatewayv1.Kind("Service")), Name: gatewayv1.ObjectName(parent)}}},
		Rules: []gatewayv1.HTTPRouteRule{{BackendRefs: []gatewayv1.HTTPBackendRef{{BackendRef: gatewayv1.BackendRef{
			BackendObjectReference: gatewayv1.BackendObjectReference{Name: gatewayv1.ObjectName(backend), Port: &port},
		}}}}},
	}}
}

// said is what a route's status says: the reason of Accepted and of ResolvedRefs.
func said(t *testing.T, c *cluster, namespace, name string) (accepted, resolved string) {
	t.Helper()
	w := &writer{Client: c, mesh: c.mesh, now: c.now}
	key := translate.RouteKey{Kind: translate.KindHTTPRoute, Namespace: namespace, Name: name}
	if _, err := w.writeRoute(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	var h gatewayv1.HTTPRoute
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: name}, &h); err != nil {
		t.Fatal(err)
	}
	version := h.ResourceVersion
	if _, err := w.writeRoute(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: name}, &h); err != nil || h.ResourceVersion != version {
		t.Errorf("status was written without a change: %v", err)
	}
	if len(h.Status.Parents) != 1 {
		return "", ""
	}
	return meta.FindStatusCondition(h.Status.Parents[0].Conditions, "Accepted").Reason, meta.FindStatusCondition(h.Status.Parents[0].Conditions, "ResolvedRefs").Reason
}

// What a route refers to comes and goes, and so does the whole Gateway API.
func TestRoutesFollowWhatTheyReferTo(t *testing.T) {
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newHTTPRoute("r", "web", "v2"))
	want := func(what, accepted, resolved string, rules int) {
		t.Helper()
		c.drain()
		if a, r := said(t, c, "a", "r"); a != accepted || r != resolved {
			t.Errorf("%s: Accepted %q, ResolvedRefs %q; want %q, %q", what, a, r, accepted, resolved)
		}
		got := 0
		for _, r := range c.store.Routings(model.ServiceKey{Namespace: "a", Name: "web"}) {
			got += len(r.Rules)
		}
		if got != rules {
			t.Errorf("%s: %d rules are in force; want %d", what, got, rules)
		}
	}
	service := func(s *corev1.Service, do func() error) {
		t.Helper()
		if err := do(); err != nil {
			t.Fatal(err)
		}
		if err := c.syncService(t.Context(), client.ObjectKeyFromObject(s)); err != nil {
			t.Fatal(err)
		}
	}
	want("no Service", "NoMatchingParent", "BackendNotFound", 0)
	web, v2 := newHTTPService("web", 80), newHTTPService("v2", 80)
	service(web, func() error { return c.Create(t.Context(), web) })
	want("the parent", "Accepted", "BackendNotFound", 1)
	service(v2, func() error { return c.Create(t.Context(), v2) })
	want("both", "Accepted", "ResolvedRefs", 1)
	v2.Spec.Ports[0].Port = 81
	service(v2, func() error { return c.Update(t.Context(), v2) })
	want("another port", "Accepted", "BackendNotFound", 1)
	service(web, func() error { return c.Delete(t.Context(), web) })
	want("the parent is gone", "NoMatchingParent", "BackendNotFound", 0)

	web.ResourceVersion = ""
	service(web, func() error { return c.Create(t.Context(), web) })
	want("the parent is back", "Accepted", "BackendNotFound", 1)
	served := false
	c.routing.served = func(string) bool { return served }
	if err := c.forgetKind(t.Context(), translate.KindHTTPRoute); err != nil {
		t.Fatal(err)
	}
	c.drain()
	if r := c.store.Routings(model.ServiceKey{Namespace: "a", Name: "web"}); len(r) != 0 || len(c.routing.routes)+len(c.routing.parents)+len(c.routing.backends)+len(c.routing.outcomes) != 0 {
		t.Errorf("without the kind there are still %+v, %+v", r, c.routing)
	}
	served = true
	if err := c.syncRoute(t.Context(), translate.RouteKey{Kind: translate.KindHTTPRoute, Namespace: "a", Name: "r"}); err != nil {
		t.Fatal(err)
	}
	want("the kind is back", "Accepted", "BackendNotFound", 1)
}

// A namespace with thousands of routes, most of them wrong, hears of each what is wrong
// with it, and costs the others nothing: their routes stay, and a change of one of the
// thousands is handled in time.
func TestThousandsOfRoutes(t *testing.T) {
	const n = 5000
	kinds := []struct {
		parent, backend    string
		accepted, resolved string
	}{
		{"web", "web", "Accepted", "ResolvedRefs"}, // to itself
		{"web", "v2", "Accepted", "ResolvedRefs"},
		{"v2", "web", "Accepted", "ResolvedRefs"}, // and back
		{"web", "gone", "Accepted", "BackendNotFound"},
		{"gone", "web", "NoMatchingParent", "ResolvedRefs"},
		{"web", "other-port", "Accepted", "BackendNotFound"},
	}
	objects := []client.Object{newTopology("t", "mesh"), newNamespace("a", "mesh"), newNamespace("b", "mesh"), newHTTPService("web", 80), newHTTPService("v2", 80), newHTTPService("other-port", 81)}
	good, service := newHTTPRoute("good", "web", "web"), newHTTPService("web", 80)
	good.Namespace, service.Namespace, service.Spec.ClusterIPs = "b", "b", []string{"10.96.0.2"}
	objects = append(objects, good, service)
	for i := range n {
		k := kinds[i%len(kinds)]
		r := newHTTPRoute(fmt.Sprintf("r%04d", i), k.parent, k.backend)
		path := fmt.Sprintf("/%d", i)
		r.Spec.Rules[0].Matches = []gatewayv1.HTTPRouteMatch{{Path: &gatewayv1.HTTPPathMatch{Value: &path}}}
		objects = append(objects, r)
	}
	began := time.Now()
	c := newCluster(t, objects...)
	t.Logf("%d routes: %s", n, time.Since(began))
	mine := model.ServiceKey{Namespace: "b", Name: "web"}
	before := c.store.Routings(mine)
	if len(before) != 1 || len(before[0].Rules) != 1 {
		t.Fatalf("another namespace has %+v", before)
	}
	limited := 0
	for i := range n {
		k := kinds[i%len(kinds)]
		key := translate.RouteKey{Kind: translate.KindHTTPRoute, Namespace: "a", Name: fmt.Sprintf("r%04d", i)}
		outcomes, known := c.routeOutcomes(c.routing.routes[key])
		if !known || len(outcomes) != 1 {
			t.Fatalf("%s has no outcome", key)
		}
		status := translate.RouteStatus(c.routing.routes[key], outcomes, nil, metav1.NewTime(born))
		accepted := meta.FindStatusCondition(status[0].Conditions, "Accepted").Reason
		if accepted == translate.ReasonLimitExceeded {
			limited++
			accepted = "Accepted"
		}
		if resolved := meta.FindStatusCondition(status[0].Conditions, "ResolvedRefs").Reason; accepted != k.accepted || resolved != k.resolved {
			t.Fatalf("%s, to %s of %s: %s, %s", key, k.backend, k.parent, accepted, resolved)
		}
		if i < len(kinds) {
			if a, r := said(t, c, "a", key.Name); a != k.accepted || r != k.resolved {
				t.Errorf("%s says %s, %s", key, a, r)
			}
		}
	}
	if want := n - n/6 - translate.MaxMatches - n/6; limited < want-10 || limited > want+10 {
		t.Errorf("%d routes are beyond the limit; want %d", limited, want)
	}
	// One of them changes, again and again.
	const changes = 10
	least := time.Duration(math.MaxInt64) // of all, for a machine may be busy meanwhile
	for i := range changes {
		began = time.Now()
		var r gatewayv1.HTTPRoute
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: "a", Name: "r0000"}, &r); err != nil {
			t.Fatal(err)
		}
		path := fmt.Sprintf("/changed-%d", i)
		r.Spec.Rules[0].Matches[0].Path.Value = &path
		if err := c.Update(t.Context(), &r); err != nil {
			t.Fatal(err)
		}
		if err := c.syncRoute(t.Context(), translate.RouteKey{Kind: translate.KindHTTPRoute, Namespace: "a", Name: "r0000"}); err != nil {
			t.Fatal(err)
		}
		c.drain()
		least = min(least, time.Since(began))
	}
	t.Logf("a change: %s", least)
	if least > time.Second {
		t.Errorf("a change of one route takes %s", least)
	}
	if after := c.store.Routings(mine); !reflect.DeepEqual(after, before) {
		t.Errorf("another namespace's routes changed: %+v", after)
	}
}
