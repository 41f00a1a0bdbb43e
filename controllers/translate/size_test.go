package translate

import (
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Each match of a rule takes all that its filters and backends do, and an expression what
// its program does: objects of a megabyte could be a gigabyte at each client's proxy. What
// is too much isn't in force and says so; many routes of the usual kind are.
func TestSizeOfRoutes(t *testing.T) {
	to := func(header string) gatewayv1.HTTPBackendRef {
		b := gatewayv1.HTTPBackendRef{BackendRef: gatewayv1.BackendRef{BackendObjectReference: gatewayv1.BackendObjectReference{Name: "web", Port: new(gatewayv1.PortNumber(80))}}}
		b.Filters = []gatewayv1.HTTPRouteFilter{{Type: gatewayv1.HTTPRouteFilterRequestHeaderModifier, RequestHeaderModifier: &gatewayv1.HTTPHeaderFilter{
			Set: []gatewayv1.HTTPHeader{{Name: "x-a", Value: header}},
		}}}
		return b
	}
	matches := func(n int, kind gatewayv1.PathMatchType, path string) (out []gatewayv1.HTTPRouteMatch) {
		for i := range n {
			out = append(out, gatewayv1.HTTPRouteMatch{Path: &gatewayv1.HTTPPathMatch{Type: &kind, Value: new(fmt.Sprint(path, i))}})
		}
		return out
	}
	route := func(i int, rules ...gatewayv1.HTTPRouteRule) *Route {
		return HTTPRoute(&gatewayv1.HTTPRoute{
			ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: fmt.Sprint("r", i), CreationTimestamp: metav1.NewTime(born.Add(time.Duration(i) * time.Second))},
			Spec: gatewayv1.HTTPRouteSpec{CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{
				{Group: new(gatewayv1.Group("")), Kind: new(gatewayv1.Kind("Service")), Name: "web"},
			}}, Rules: rules},
		})
	}
	prefix, regex := gatewayv1.PathMatchPathPrefix, gatewayv1.PathMatchRegularExpression
	usual := gatewayv1.HTTPRouteRule{Matches: matches(8, prefix, "/api/v1/things/of/some/kind/"), BackendRefs: []gatewayv1.HTTPBackendRef{to("canary"), to("stable"), to("next")}}
	expressions := gatewayv1.HTTPRouteRule{Matches: matches(8, regex, "/api/v[0-9]+/things/[^/]+/.*"), BackendRefs: usual.BackendRefs}
	for name, c := range map[string]struct {
		route func(i int) *Route
		n     int // of so many routes
		// so many are in force
		least, most int
	}{
		"usual ones":        {func(i int) *Route { return route(i, usual) }, 128, 128, 128},
		"usual expressions": {func(i int) *Route { return route(i, expressions) }, 128, 128, 128},
		"large filters": {func(i int) *Route {
			return route(i, gatewayv1.HTTPRouteRule{Matches: matches(64, prefix, "/"), BackendRefs: []gatewayv1.HTTPBackendRef{to(strings.Repeat("x", 50_000))}})
		}, 16, 1, 1},
		"one object": {func(i int) *Route {
			return route(i, gatewayv1.HTTPRouteRule{Matches: matches(64, prefix, "/"), BackendRefs: []gatewayv1.HTTPBackendRef{to(strings.Repeat("x", 1_000_000))}})
		}, 1, 0, 0},
		"large paths": {func(i int) *Route {
			return route(i, gatewayv1.HTTPRouteRule{Matches: matches(64, prefix, "/"+strings.Repeat("x", 8000))})
		}, 16, 7, 7},
		// How large depends on the version of Unicode that Go has.
		"large expressions": {func(i int) *Route { return route(i, gatewayv1.HTTPRouteRule{Matches: matches(8, regex, `/\pL`)}) }, 128, 16, 32},
		"many small headers": {func(i int) *Route {
			return route(i, gatewayv1.HTTPRouteRule{Matches: matches(64, prefix, "/"), Filters: manyHeaders()})
		}, 16, 7, 7},
	} {
		t.Run(name, func(t *testing.T) {
			o := &routeObjects{services: map[model.ServiceKey][]ServicePort{{Namespace: "a", Name: "web"}: {{Port: 80, Protocol: model.ProtocolHTTP}}}}
			for i := range c.n {
				o.routes = append(o.routes, c.route(i))
			}
			routings, outcomes := Routings(model.ServiceKey{Namespace: "a", Name: "web"}, o.routes, o.references())
			size := 0
			for _, r := range routings {
				for _, rule := range r.Rules {
					size += rule.Size
				}
			}
			if size > MaxSize {
				t.Errorf("%d bytes are in force", size)
			}
			in := 0
			for i := range c.n {
				got := outcomes[RouteKey{KindHTTPRoute, "a", fmt.Sprint("r", i)}][0].accepted
				if got.isZero() && in == i {
					in++
				} else if got.reason != ReasonLimitExceeded {
					t.Fatalf("route %d, of which the first %d are in force, says %+v", i, in, got)
				}
			}
			if in < c.least || in > c.most {
				t.Errorf("%d routes of %d are in force; want %d to %d", in, c.n, c.least, c.most)
			}
		})
	}
}

func manyHeaders() (out []gatewayv1.HTTPRouteFilter) {
	change := &gatewayv1.HTTPHeaderFilter{}
	for i := range 64 {
		change.Remove = append(change.Remove, fmt.Sprint("x-", i))
		change.Add = append(change.Add, gatewayv1.HTTPHeader{Name: gatewayv1.HTTPHeaderName(fmt.Sprint("y-", i)), Value: "z"})
	}
	return []gatewayv1.HTTPRouteFilter{{Type: gatewayv1.HTTPRouteFilterResponseHeaderModifier, ResponseHeaderModifier: change}}
}
