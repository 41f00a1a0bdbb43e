package controllers

import (
	"reflect"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// A route that is wrong, or that others were there before, is told so itself. Neither
// another route of its namespace hears of it nor is anything of another namespace
// changed, while it is there and when it goes. TestThousandsOfRoutes has many.
func TestBadRoutes(t *testing.T) {
	at := func(r *gatewayv1.HTTPRoute, path string) *gatewayv1.HTTPRoute {
		r.Spec.Rules[0].Matches = []gatewayv1.HTTPRouteMatch{{Path: &gatewayv1.HTTPPathMatch{Value: &path}}}
		return r
	}
	matching := func(expression string) *gatewayv1.HTTPRoute {
		r := at(newHTTPRoute("bad", "web", "v2"), expression)
		r.Spec.Rules[0].Matches[0].Path.Type = new(gatewayv1.PathMatchRegularExpression)
		return r
	}
	ported := func(port gatewayv1.PortNumber) *gatewayv1.HTTPRoute {
		r := newHTTPRoute("bad", "web", "v2")
		r.Spec.ParentRefs[0].Port = &port
		return r
	}
	nobody := model.ServicePortKey{} // answered with 500
	to := func(name string) model.ServicePortKey {
		return model.ServicePortKey{ServiceKey: model.ServiceKey{Namespace: "a", Name: name}, Port: 80}
	}
	for name, c := range map[string]struct {
		route              *gatewayv1.HTTPRoute
		accepted, resolved string
		// leads is where requests to / go, in the order in which rules are tried.
		leads []model.ServicePortKey
	}{
		"a backend that doesn't exist":      {newHTTPRoute("bad", "web", "gone"), "Accepted", "BackendNotFound", []model.ServicePortKey{nobody}},
		"a parent that doesn't exist":       {newHTTPRoute("bad", "gone", "v2"), "NoMatchingParent", "ResolvedRefs", nil},
		"a port that the backend hasn't":    {newHTTPRoute("bad", "web", "other-port"), "Accepted", "BackendNotFound", []model.ServicePortKey{nobody}},
		"a port that the parent hasn't":     {ported(81), "NoMatchingParent", "ResolvedRefs", nil},
		"a backend that doesn't speak HTTP": {newHTTPRoute("bad", "web", "opaque"), "Accepted", "UnsupportedProtocol", []model.ServicePortKey{nobody}},
		"a parent that doesn't speak HTTP":  {newHTTPRoute("bad", "opaque", "v2"), "NoMatchingParent", "ResolvedRefs", nil},
		"itself":                            {newHTTPRoute("bad", "web", "web"), "Accepted", "ResolvedRefs", []model.ServicePortKey{to("web")}},
		"a cycle":                           {newHTTPRoute("bad", "web", "back"), "Accepted", "ResolvedRefs", []model.ServicePortKey{to("back")}},
		"what an older route matches":       {at(newHTTPRoute("bad", "web", "web"), "/good"), "Accepted", "ResolvedRefs", nil},
		"an expression that is none":        {matching("/("), "UnsupportedValue", "ResolvedRefs", nil},
		"an expression of nothing":          {matching(""), "UnsupportedValue", "ResolvedRefs", nil},
		"a class that Envoy doesn't know":   {matching(`/\p{Letter}`), "UnsupportedValue", "ResolvedRefs", nil},
	} {
		t.Run(name, func(t *testing.T) {
			opaque := newHTTPService("opaque", 80)
			opaque.Spec.Ports[0].AppProtocol = new("tcp")
			good := at(newHTTPRoute("good", "web", "v2"), "/good")
			there := newHTTPRoute("there", "back", "web")
			other, service := newHTTPRoute("good", "web", "web"), newHTTPService("web", 80)
			other.Namespace, service.Namespace = "b", "b"
			k := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNamespace("b", "mesh"), newHTTPService("web", 80), newHTTPService("v2", 80),
				newHTTPService("back", 80), newHTTPService("other-port", 81), opaque, good, there, other, service)
			k.drain()
			untouched := func() map[string][]model.Routing {
				out := map[string][]model.Routing{}
				for _, s := range []model.ServiceKey{{Namespace: "b", Name: "web"}, {Namespace: "a", Name: "back"}} {
					if out[s.Namespace] = k.store.Routings(s); len(out[s.Namespace]) != 1 {
						t.Fatalf("%v has %+v", s, out[s.Namespace])
					}
				}
				return out
			}
			web := model.ServiceKey{Namespace: "a", Name: "web"}
			before, mine := untouched(), k.store.Routings(web)
			check := func(what string) {
				t.Helper()
				if after := untouched(); !reflect.DeepEqual(after, before) {
					t.Errorf("%s: others have %+v, had %+v", what, after, before)
				}
				for _, r := range []struct{ namespace, name string }{{"a", "good"}, {"a", "there"}, {"b", "good"}} {
					if a, resolved := said(t, k, r.namespace, r.name); a != "Accepted" || resolved != "ResolvedRefs" {
						t.Errorf("%s: %v says %s, %s", what, r, a, resolved)
					}
				}
			}
			sync := func(do func() error) {
				t.Helper()
				if err := do(); err != nil {
					t.Fatal(err)
				}
				if err := k.syncRoute(t.Context(), translate.RouteKey{Kind: translate.KindHTTPRoute, Namespace: "a", Name: "bad"}); err != nil {
					t.Fatal(err)
				}
				k.drain()
			}
			c.route.CreationTimestamp = metav1.NewTime(born.Add(time.Minute))
			sync(func() error { return k.Create(t.Context(), c.route) })
			if a, resolved := said(t, k, "a", "bad"); a != c.accepted || resolved != c.resolved {
				t.Errorf("it says %s, %s; want %s, %s", a, resolved, c.accepted, c.resolved)
			}
			check("with it")
			now := k.store.Routings(web)
			// The older route comes first, for its path is longer or it was there before.
			if len(now) != 1 || !reflect.DeepEqual(now[0].Rules[0], mine[0].Rules[0]) {
				t.Fatalf("the older route's rules are %+v, were %+v", now, mine)
			}
			var leads []model.ServicePortKey
			for _, r := range now[0].Rules {
				if r.Match.Path.Value == "/" {
					leads = append(leads, r.Action.Backends[0].To)
				}
			}
			if !reflect.DeepEqual(leads, c.leads) {
				t.Errorf("requests go to %+v, want %+v", leads, c.leads)
			}
			sync(func() error {
				return k.Delete(t.Context(), &gatewayv1.HTTPRoute{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "bad"}})
			})
			check("without it")
			if now := k.store.Routings(web); !reflect.DeepEqual(now, mine) {
				t.Errorf("when it has gone there is %+v, was %+v", now, mine)
			}
		})
	}
}
