package translate

import (
	"fmt"
	"strconv"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// maxTries bounds what one request can become.
const maxTries = 10

// HTTPRoute reads an HTTPRoute. Its hostnames say nothing to a mesh: a Service is
// known by its address.
func HTTPRoute(h *gatewayv1.HTTPRoute) *Route {
	route := newRoute(KindHTTPRoute, h.ObjectMeta, h.Spec.ParentRefs)
	if len(route.Parents) == 0 {
		return route
	}
	r := &routeReader{namespace: h.Namespace}
	for i, rule := range h.Spec.Rules {
		route.rules = append(route.rules, r.httpRule(fmt.Sprintf("spec.rules[%d]", i), model.Origin{
			Kind: KindHTTPRoute, Namespace: h.Namespace, Name: h.Name, Rule: string(deref(rule.Name, gatewayv1.SectionName(strconv.Itoa(i)))),
		}, rule))
	}
	route.refused = r.refused
	return route
}

func (r *routeReader) httpRule(field string, origin model.Origin, rule gatewayv1.HTTPRouteRule) routeRule {
	out := routeRule{action: model.Action{Origin: origin}}
	for i, m := range rule.Matches {
		out.matches = append(out.matches, r.sized(rankHTTP(r.httpMatch(fmt.Sprintf("%s.matches[%d]", field, i), m))))
	}
	if len(out.matches) == 0 {
		out.matches = []rankedMatch{r.sized(rankHTTP(model.RequestMatch{Path: model.PathMatch{Kind: model.PathPrefix, Value: "/"}}))}
	}
	for i, f := range rule.Filters {
		r.httpFilter(fmt.Sprintf("%s.filters[%d]", field, i), f, &out)
	}
	if out.action.Redirect != nil && (out.action.Path != nil || out.action.Host != "") {
		r.refuse(gatewayv1.RouteReasonIncompatibleFilters, "%s: a redirect and a rewrite exclude each other", field)
	}
	if out.action.Redirect != nil && len(rule.BackendRefs) > 0 {
		r.refuse(gatewayv1.RouteReasonIncompatibleFilters, "%s: a rule that redirects has no backends", field)
	}
	for _, p := range []*model.PathChange{out.action.Path, redirectPath(out.action.Redirect)} {
		if p == nil || !p.Prefix {
			continue
		}
		for _, m := range out.matches {
			if m.Path.Kind != model.PathPrefix {
				r.unsupported("%s: ReplacePrefixMatch needs matches of the type PathPrefix only", field)
			}
		}
	}
	for i, b := range rule.BackendRefs {
		out.backends = append(out.backends, r.httpBackend(fmt.Sprintf("%s.backendRefs[%d]", field, i), b))
	}
	if t := rule.Timeouts; t != nil {
		out.action.Timeout = r.duration(field+".timeouts.request", t.Request)
		out.action.TryTimeout = r.duration(field+".timeouts.backendRequest", t.BackendRequest)
	}
	if rule.Retry != nil {
		out.action.Retry = r.retry(field+".retry", rule.Retry)
	}
	if rule.SessionPersistence != nil {
		r.unsupported("%s: sessionPersistence isn't supported", field)
	}
	return out
}

// rankHTTP orders matches as HTTPRoute says: exact paths, then the longest, then
// those with a method, then the most headers, then the most parameters. Regular
// expressions, of which it says nothing, come between exact paths and prefixes.
func rankHTTP(m model.RequestMatch) rankedMatch {
	kinds := map[model.PathKind]int{model.PathExact: 2, model.PathRegex: 1, model.PathPrefix: 0}
	length := len(m.Path.Value)
	if m.Path.Kind == model.PathPrefix {
		length = len(strings.TrimRight(m.Path.Value, "/"))
	}
	return rankedMatch{RequestMatch: m, rank: [5]int{kinds[m.Path.Kind], length, min(len(m.Method), 1), len(m.Headers), len(m.Query)}}
}

func redirectPath(r *model.Redirect) *model.PathChange {
	if r == nil {
		return nil
	}
	return r.Path
}

func (r *routeReader) httpMatch(field string, m gatewayv1.HTTPRouteMatch) model.RequestMatch {
	out := model.RequestMatch{Path: model.PathMatch{Kind: model.PathPrefix, Value: "/"}}
	if m.Path != nil {
		out.Path.Value = deref(m.Path.Value, "/")
		switch t := deref(m.Path.Type, gatewayv1.PathMatchPathPrefix); t {
		case gatewayv1.PathMatchPathPrefix:
		case gatewayv1.PathMatchExact:
			out.Path.Kind = model.PathExact
		case gatewayv1.PathMatchRegularExpression:
			out.Path.Kind = model.PathRegex
			r.regex(field+".path", out.Path.Value)
		default:
			r.unsupported("%s.path: the type %q isn't known", field, t)
		}
		if out.Path.Kind != model.PathRegex && (!strings.HasPrefix(out.Path.Value, "/") || strings.ContainsAny(out.Path.Value, "?#")) {
			r.unsupported("%s.path: %q isn't an absolute path", field, out.Path.Value)
		}
	}
	out.Method = string(deref(m.Method, ""))
	for i, h := range m.Headers {
		t := deref(h.Type, gatewayv1.HeaderMatchExact)
		if t != gatewayv1.HeaderMatchExact && t != gatewayv1.HeaderMatchRegularExpression {
			r.unsupported("%s.headers[%d]: the type %q isn't known", field, i, t)
		}
		name := strings.ToLower(string(h.Name))
		if name == "host" {
			name = ":authority"
		}
		out.Headers = append(out.Headers, r.value(fmt.Sprintf("%s.headers[%d]", field, i), name, h.Value, t == gatewayv1.HeaderMatchRegularExpression))
	}
	for i, q := range m.QueryParams {
		t := deref(q.Type, gatewayv1.QueryParamMatchExact)
		if t != gatewayv1.QueryParamMatchExact && t != gatewayv1.QueryParamMatchRegularExpression {
			r.unsupported("%s.queryParams[%d]: the type %q isn't known", field, i, t)
		}
		out.Query = append(out.Query, r.value(fmt.Sprintf("%s.queryParams[%d]", field, i), string(q.Name), q.Value, t == gatewayv1.QueryParamMatchRegularExpression))
	}
	out.Headers, out.Query = once(out.Headers), once(out.Query)
	return out
}

func (r *routeReader) httpFilter(field string, f gatewayv1.HTTPRouteFilter, rule *routeRule) {
	twice := func(is bool) {
		if is {
			r.refuse(gatewayv1.RouteReasonIncompatibleFilters, "%s: there are several filters of the type %s", field, f.Type)
		}
	}
	switch f.Type {
	case gatewayv1.HTTPRouteFilterRequestHeaderModifier:
		twice(!isEmpty(rule.action.RequestHeaders))
		rule.action.RequestHeaders = r.headers(field, f.RequestHeaderModifier)
	case gatewayv1.HTTPRouteFilterResponseHeaderModifier:
		twice(!isEmpty(rule.action.ResponseHeaders))
		rule.action.ResponseHeaders = r.headers(field, f.ResponseHeaderModifier)
	case gatewayv1.HTTPRouteFilterRequestMirror:
		rule.mirrors = append(rule.mirrors, r.mirror(field, f.RequestMirror))
	case gatewayv1.HTTPRouteFilterRequestRedirect:
		twice(rule.action.Redirect != nil)
		rule.action.Redirect = r.redirect(field, f.RequestRedirect)
	case gatewayv1.HTTPRouteFilterURLRewrite:
		twice(rule.action.Path != nil || rule.action.Host != "")
		if f.URLRewrite == nil {
			r.unsupported("%s has no content", field)
			return
		}
		rule.action.Host = string(deref(f.URLRewrite.Hostname, ""))
		rule.action.Path = r.pathChange(field, f.URLRewrite.Path)
	default:
		r.unsupported("%s: filters of the type %s aren't supported", field, f.Type)
	}
}

func isEmpty(c model.HeaderChange) bool { return len(c.Remove)+len(c.Set)+len(c.Add) == 0 }

func (r *routeReader) redirect(field string, f *gatewayv1.HTTPRequestRedirectFilter) *model.Redirect {
	if f == nil {
		r.unsupported("%s has no content", field)
		return nil
	}
	out := &model.Redirect{
		Code: deref(f.StatusCode, 302), Scheme: deref(f.Scheme, ""), Host: string(deref(f.Hostname, "")), Port: port(f.Port), Path: r.pathChange(field, f.Path),
	}
	switch out.Code {
	case 301, 302, 303, 307, 308:
	default:
		r.unsupported("%s: the status code %d isn't supported", field, out.Code)
	}
	if out.Scheme != "" && out.Scheme != "http" && out.Scheme != "https" {
		r.unsupported("%s: the scheme %q isn't supported", field, out.Scheme)
	}
	return out
}

func (r *routeReader) pathChange(field string, p *gatewayv1.HTTPPathModifier) *model.PathChange {
	if p == nil {
		return nil
	}
	c := &model.PathChange{}
	switch p.Type {
	case gatewayv1.FullPathHTTPPathModifier:
		c.Value = deref(p.ReplaceFullPath, "")
	case gatewayv1.PrefixMatchHTTPPathModifier:
		c.Prefix, c.Value = true, deref(p.ReplacePrefixMatch, "")
	default:
		r.unsupported("%s: the path modifier %q isn't known", field, p.Type)
	}
	if strings.ContainsFunc(c.Value, func(x rune) bool { return x <= ' ' || x == 0x7f }) {
		r.unsupported("%s: the path %q has blanks or control characters", field, c.Value)
	}
	if !strings.HasPrefix(c.Value, "/") {
		c.Value = "/" + c.Value
	}
	return c
}

func (r *routeReader) httpBackend(field string, b gatewayv1.HTTPBackendRef) backendRef {
	out := backendRef{objectRef: r.object(field, b.BackendObjectReference), weight: r.weight(b.BackendRef)}
	for i, f := range b.Filters {
		field := fmt.Sprintf("%s.filters[%d]", field, i)
		switch f.Type {
		case gatewayv1.HTTPRouteFilterRequestHeaderModifier:
			out.request = r.headers(field, f.RequestHeaderModifier)
		case gatewayv1.HTTPRouteFilterResponseHeaderModifier:
			out.response = r.headers(field, f.ResponseHeaderModifier)
		default:
			r.unsupported("%s: filters of the type %s aren't supported at a backend; put it at the rule", field, f.Type)
		}
	}
	return out
}

func (r *routeReader) retry(field string, f *gatewayv1.HTTPRouteRetry) *model.Retry {
	out := &model.Retry{Attempts: uint32(max(0, deref(f.Attempts, 1))), Backoff: r.duration(field+".backoff", f.Backoff)}
	if out.Attempts > maxTries {
		r.unsupported("%s: %d attempts are more than %d", field, out.Attempts, maxTries)
	}
	for _, c := range f.Codes {
		if c < 400 || c > 599 {
			r.unsupported("%s: %d isn't the code of an error", field, c)
		}
		out.Codes = append(out.Codes, uint32(c))
	}
	return out
}
