package translate

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// GRPCRoute reads a GRPCRoute: gRPC's services and methods are paths.
func GRPCRoute(g *gatewayv1.GRPCRoute) *Route {
	route := newRoute(KindGRPCRoute, g.ObjectMeta, g.Spec.ParentRefs)
	if len(route.Parents) == 0 {
		return route
	}
	r := &routeReader{namespace: g.Namespace}
	rules := g.Spec.Rules
	if len(rules) == 0 {
		rules = []gatewayv1.GRPCRouteRule{{}}
	}
	for i, rule := range rules {
		route.rules = append(route.rules, r.grpcRule(fmt.Sprintf("spec.rules[%d]", i), model.Origin{
			Kind: KindGRPCRoute, Namespace: g.Namespace, Name: g.Name, Rule: string(deref(rule.Name, gatewayv1.SectionName(strconv.Itoa(i)))),
		}, rule))
	}
	route.refused = r.refused
	return route
}

func (r *routeReader) grpcRule(field string, origin model.Origin, rule gatewayv1.GRPCRouteRule) routeRule {
	out := routeRule{action: model.Action{Origin: origin}}
	for i, m := range rule.Matches {
		out.matches = append(out.matches, r.sized(r.grpcMatch(fmt.Sprintf("%s.matches[%d]", field, i), m)))
	}
	if len(out.matches) == 0 {
		out.matches = []rankedMatch{r.sized(r.grpcMatch(field, gatewayv1.GRPCRouteMatch{}))}
	}
	for i, f := range rule.Filters {
		field := fmt.Sprintf("%s.filters[%d]", field, i)
		switch f.Type {
		case gatewayv1.GRPCRouteFilterRequestHeaderModifier:
			out.action.RequestHeaders = r.headers(field, f.RequestHeaderModifier)
		case gatewayv1.GRPCRouteFilterResponseHeaderModifier:
			out.action.ResponseHeaders = r.headers(field, f.ResponseHeaderModifier)
		case gatewayv1.GRPCRouteFilterRequestMirror:
			out.mirrors = append(out.mirrors, r.mirror(field, f.RequestMirror))
		default:
			r.unsupported("%s: filters of the type %s aren't supported", field, f.Type)
		}
	}
	for i, b := range rule.BackendRefs {
		field := fmt.Sprintf("%s.backendRefs[%d]", field, i)
		ref := backendRef{objectRef: r.object(field, b.BackendObjectReference), weight: r.weight(b.BackendRef)}
		for j, f := range b.Filters {
			field := fmt.Sprintf("%s.filters[%d]", field, j)
			switch f.Type {
			case gatewayv1.GRPCRouteFilterRequestHeaderModifier:
				ref.request = r.headers(field, f.RequestHeaderModifier)
			case gatewayv1.GRPCRouteFilterResponseHeaderModifier:
				ref.response = r.headers(field, f.ResponseHeaderModifier)
			default:
				r.unsupported("%s: filters of the type %s aren't supported at a backend; put it at the rule", field, f.Type)
			}
		}
		out.backends = append(out.backends, ref)
	}
	if rule.SessionPersistence != nil {
		r.unsupported("%s: sessionPersistence isn't supported", field)
	}
	return out
}

// grpcMatch orders matches as GRPCRoute says: the longest service, the longest
// method, the most headers.
func (r *routeReader) grpcMatch(field string, m gatewayv1.GRPCRouteMatch) rankedMatch {
	out := rankedMatch{RequestMatch: model.RequestMatch{Path: model.PathMatch{Kind: model.PathPrefix, Value: "/"}}}
	if m.Method != nil {
		service, method := deref(m.Method.Service, ""), deref(m.Method.Method, "")
		out.rank = [5]int{len(service), len(method)}
		switch t := deref(m.Method.Type, gatewayv1.GRPCMethodMatchExact); t {
		case gatewayv1.GRPCMethodMatchExact:
			out.Path = exactMethod(service, method)
		case gatewayv1.GRPCMethodMatchRegularExpression:
			const any = "[^/]+"
			if service == "" {
				service = any
			}
			if method == "" {
				method = any
			}
			out.Path = model.PathMatch{Kind: model.PathRegex, Value: "/(?:" + service + ")/(?:" + method + ")"}
			r.regex(field+".method", service)
			r.regex(field+".method", method)
			r.regex(field+".method", out.Path.Value)
		default:
			r.unsupported("%s.method: the type %q isn't known", field, t)
		}
	}
	for i, h := range m.Headers {
		t := deref(h.Type, gatewayv1.GRPCHeaderMatchExact)
		if t != gatewayv1.GRPCHeaderMatchExact && t != gatewayv1.GRPCHeaderMatchRegularExpression {
			r.unsupported("%s.headers[%d]: the type %q isn't known", field, i, t)
		}
		out.Headers = append(out.Headers, r.value(fmt.Sprintf("%s.headers[%d]", field, i), strings.ToLower(string(h.Name)), h.Value, t == gatewayv1.GRPCHeaderMatchRegularExpression))
	}
	out.Headers = once(out.Headers)
	out.rank[2] = len(out.Headers)
	return out
}

func exactMethod(service, method string) model.PathMatch {
	switch {
	case service != "" && method != "":
		return model.PathMatch{Kind: model.PathExact, Value: "/" + service + "/" + method}
	case service != "":
		return model.PathMatch{Kind: model.PathPrefix, Value: "/" + service}
	case method != "":
		return model.PathMatch{Kind: model.PathRegex, Value: "/[^/]+/" + regexp.QuoteMeta(method)}
	}
	return model.PathMatch{Kind: model.PathPrefix, Value: "/"}
}
