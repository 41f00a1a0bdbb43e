package xds

import (
	"net/netip"
	"regexp"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	typematcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// clusterInvalid is where the share of a backend goes that is wrong: there is no
// such cluster, which is answered with 500.
const clusterInvalid = "invalid"

// Routes are the routes of a service's address, and what a proxy must have before
// it gets them. The zero Routing leads to the service itself.
func Routes(vip netip.AddrPort, service model.ServiceKey, r model.Routing) (*routev3.RouteConfiguration, []resourceKey, error) {
	p := &packer{}
	b := &routeBuilder{packer: p, ipv6: vip.Addr().Is6(), used: map[Backend]bool{}}
	rules := r.Rules
	if len(rules) == 0 {
		rules = []model.Rule{{
			Match:  model.RequestMatch{Path: model.PathMatch{Kind: model.PathPrefix, Value: "/"}},
			Action: &model.Action{Backends: []model.Backend{{To: model.ServicePortKey{ServiceKey: service, Port: vip.Port()}, Weight: 1}}},
		}}
	}
	// The service was chosen by its address: whatever host the request names is fine.
	host := &routev3.VirtualHost{Name: "all", Domains: []string{"*"}, RetryPolicy: retryLost()}
	for _, rule := range rules {
		host.Routes = append(host.Routes, b.route(rule))
	}
	if leaves := indexed(rules); leaves != nil {
		host.Matcher, host.Routes = p.routeTree(leaves, host.Routes), nil
	}
	config := &routev3.RouteConfiguration{
		Name: HTTPName(vip), VirtualHosts: []*routev3.VirtualHost{host},
		// Clusters are on their own way, and there before.
		ValidateClusters: wrapperspb.Bool(false),
	}
	return config, b.needs(), p.err()
}

type routeBuilder struct {
	*packer
	ipv6     bool
	backends []Backend
	used     map[Backend]bool
	mirrors  bool
}

func (b *routeBuilder) needs() (out []resourceKey) {
	for _, backend := range b.backends {
		out = append(out, resourceKey{TypeCluster, backend.String()}, resourceKey{TypeEndpoints, backend.String()})
	}
	if b.mirrors {
		out = append(out, resourceKey{TypeListener, mirrorName}, resourceKey{TypeCluster, mirrorName})
	}
	return out
}

// cluster is the name of a backend's cluster.
func (b *routeBuilder) cluster(to model.ServicePortKey) string {
	if to == (model.ServicePortKey{}) {
		return clusterInvalid
	}
	backend := Backend{IPv6: b.ipv6, ServicePortKey: to}
	if !b.used[backend] {
		b.used[backend] = true
		b.backends = append(b.backends, backend)
	}
	return backend.String()
}

func (b *routeBuilder) route(rule model.Rule) *routev3.Route {
	a := rule.Action
	r := &routev3.Route{Match: match(rule.Match)}
	r.RequestHeadersToRemove, r.RequestHeadersToAdd = headers(a.RequestHeaders)
	r.ResponseHeadersToRemove, r.ResponseHeadersToAdd = headers(a.ResponseHeaders)
	total := uint32(0)
	for _, to := range a.Backends {
		total += to.Weight
	}
	switch {
	case a.Redirect != nil:
		r.Action = &routev3.Route_Redirect{Redirect: redirect(a.Redirect, rule.Match.Path)}
	case total == 0:
		r.Action = &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 500}}
	default:
		r.Action = &routev3.Route_Route{Route: b.forward(a, rule.Match.Path)}
	}
	return r
}

// forward sends requests to backends, which have a weight together.
func (b *routeBuilder) forward(a *model.Action, path model.PathMatch) *routev3.RouteAction {
	out := &routev3.RouteAction{
		ClusterNotFoundResponseCode: routev3.RouteAction_INTERNAL_SERVER_ERROR,
		// Without one of its own, a route waits as long as the client does.
		Timeout: durationpb.New(a.Timeout),
	}
	if len(a.Backends) == 1 && !changes(a.Backends[0].RequestHeaders) && !changes(a.Backends[0].ResponseHeaders) {
		out.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: b.cluster(a.Backends[0].To)}
	} else {
		w := &routev3.WeightedCluster{}
		for _, to := range a.Backends {
			if to.Weight == 0 {
				continue
			}
			c := &routev3.WeightedCluster_ClusterWeight{Name: b.cluster(to.To), Weight: wrapperspb.UInt32(to.Weight)}
			c.RequestHeadersToRemove, c.RequestHeadersToAdd = headers(to.RequestHeaders)
			c.ResponseHeadersToRemove, c.ResponseHeadersToAdd = headers(to.ResponseHeaders)
			w.Clusters = append(w.Clusters, c)
		}
		out.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: w}
	}
	if a.Host != "" {
		out.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: a.Host}
	}
	if a.Path != nil {
		out.PrefixRewrite, out.RegexRewrite = rewrite(a.Path, path)
	}
	for _, m := range a.Mirrors {
		b.mirrors = true
		out.RequestMirrorPolicies = append(out.RequestMirrorPolicies, &routev3.RouteAction_RequestMirrorPolicy{
			Cluster: mirrorName, RequestHeadersMutations: mirrorHeaders(b.cluster(m.To)), DisableShadowHostSuffixAppend: true,
			RuntimeFraction: &corev3.RuntimeFractionalPercent{DefaultValue: &typev3.FractionalPercent{Numerator: m.Numerator, Denominator: denominators[m.Denominator]}},
		})
	}
	out.RetryPolicy = retryPolicy(a)
	return out
}

var denominators = map[uint32]typev3.FractionalPercent_DenominatorType{
	100: typev3.FractionalPercent_HUNDRED, 10_000: typev3.FractionalPercent_TEN_THOUSAND, 1_000_000: typev3.FractionalPercent_MILLION,
}

func retryPolicy(a *model.Action) *routev3.RetryPolicy {
	if a.Retry == nil && a.TryTimeout == 0 {
		return nil
	}
	out := &routev3.RetryPolicy{NumRetries: wrapperspb.UInt32(0)}
	if a.TryTimeout > 0 {
		out.PerTryTimeout = durationpb.New(a.TryTimeout)
	}
	if a.Retry == nil {
		return out
	}
	out.RetryOn = "connect-failure,refused-stream,reset"
	if len(a.Retry.Codes) > 0 {
		out.RetryOn += ",retriable-status-codes"
		out.RetriableStatusCodes = a.Retry.Codes
	}
	out.NumRetries = wrapperspb.UInt32(a.Retry.Attempts)
	if a.Retry.Backoff > 0 {
		out.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(a.Retry.Backoff)}
	}
	return out
}

// idempotent are the methods of which RFC 9110 says that a request may be sent again.
var idempotent = []string{"GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"}

// retryLost sends a request once more that was reset, or whose connection ended, before
// the headers of an answer were complete, for routes that say nothing of retries: a
// backend may close a pooled connection just when a request is sent, and the client would
// get 503 for it. Others than idempotent requests may have been carried out, and are never
// sent twice.
func retryLost() *routev3.RetryPolicy {
	out := &routev3.RetryPolicy{RetryOn: "reset", NumRetries: wrapperspb.UInt32(1)}
	for _, method := range idempotent {
		out.RetriableRequestHeaders = append(out.RetriableRequestHeaders, headerMatch(model.ValueMatch{Name: ":method", Value: method}))
	}
	return out
}

func match(m model.RequestMatch) *routev3.RouteMatch {
	out := &routev3.RouteMatch{}
	switch v := m.Path.Value; m.Path.Kind {
	case model.PathExact:
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: v}
	case model.PathRegex:
		out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: regex(v)}
	default:
		if v = trimSlash(v); v == "" {
			out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: "/"}
		} else {
			out.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: v}
		}
	}
	if m.Method != "" {
		out.Headers = append(out.Headers, headerMatch(model.ValueMatch{Name: ":method", Value: m.Method}))
	}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, headerMatch(h))
	}
	for _, q := range m.Query {
		out.QueryParameters = append(out.QueryParameters, &routev3.QueryParameterMatcher{
			Name: q.Name, QueryParameterMatchSpecifier: &routev3.QueryParameterMatcher_StringMatch{StringMatch: valueMatch(q)},
		})
	}
	return out
}

func trimSlash(path string) string { return strings.TrimRight(path, "/") }

func headerMatch(h model.ValueMatch) *routev3.HeaderMatcher {
	return &routev3.HeaderMatcher{Name: h.Name, HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: valueMatch(h)}}
}

func valueMatch(v model.ValueMatch) *typematcherv3.StringMatcher {
	if v.Regex {
		return &typematcherv3.StringMatcher{MatchPattern: &typematcherv3.StringMatcher_SafeRegex{SafeRegex: regex(v.Value)}}
	}
	return &typematcherv3.StringMatcher{MatchPattern: &typematcherv3.StringMatcher_Exact{Exact: v.Value}}
}

func regex(expression string) *typematcherv3.RegexMatcher {
	return &typematcherv3.RegexMatcher{Regex: expression}
}

// headers are a change in Envoy's terms: it removes first, then adds in order.
func headers(c model.HeaderChange) (remove []string, add []*corev3.HeaderValueOption) {
	list := func(hs []model.Header, action corev3.HeaderValueOption_HeaderAppendAction) {
		for _, h := range hs {
			// A percent sign would begin a command.
			v := strings.ReplaceAll(h.Value, "%", "%%")
			add = append(add, &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: h.Name, Value: v}, AppendAction: action, KeepEmptyValue: true})
		}
	}
	list(c.Set, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)
	list(c.Add, corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD)
	return c.Remove, add
}

func changes(c model.HeaderChange) bool { return len(c.Remove)+len(c.Set)+len(c.Add) > 0 }

func redirect(r *model.Redirect, path model.PathMatch) *routev3.RedirectAction {
	codes := map[int]routev3.RedirectAction_RedirectResponseCode{
		301: routev3.RedirectAction_MOVED_PERMANENTLY, 302: routev3.RedirectAction_FOUND, 303: routev3.RedirectAction_SEE_OTHER,
		307: routev3.RedirectAction_TEMPORARY_REDIRECT, 308: routev3.RedirectAction_PERMANENT_REDIRECT,
	}
	out := &routev3.RedirectAction{ResponseCode: codes[r.Code], HostRedirect: r.Host, PortRedirect: uint32(r.Port)}
	if r.Scheme != "" {
		out.SchemeRewriteSpecifier = &routev3.RedirectAction_SchemeRedirect{SchemeRedirect: r.Scheme}
		if r.Port == 0 {
			out.PortRedirect = map[string]uint32{"http": 80, "https": 443}[r.Scheme]
		}
	}
	switch {
	case r.Path == nil:
	case !r.Path.Prefix:
		out.PathRewriteSpecifier = &routev3.RedirectAction_PathRedirect{PathRedirect: r.Path.Value}
	default:
		prefix, re := rewrite(r.Path, path)
		if re != nil {
			out.PathRewriteSpecifier = &routev3.RedirectAction_RegexRewrite{RegexRewrite: re}
		} else {
			out.PathRewriteSpecifier = &routev3.RedirectAction_PrefixRewrite{PrefixRewrite: prefix}
		}
	}
	return out
}

// rewrite replaces a path: by Envoy's replacement of prefixes where that knows
// segments, or else by an expression.
func rewrite(c *model.PathChange, path model.PathMatch) (prefix string, re *typematcherv3.RegexMatchAndSubstitute) {
	substitute := func(expression, by string) *typematcherv3.RegexMatchAndSubstitute {
		return &typematcherv3.RegexMatchAndSubstitute{Pattern: regex(expression), Substitution: strings.ReplaceAll(by, `\`, `\\`)}
	}
	from, to := trimSlash(path.Value), trimSlash(c.Value)
	switch {
	case !c.Prefix:
		return "", substitute("^/.*$", c.Value)
	case from == "":
		return "", substitute("^/", to+"/")
	case to == "":
		return "", substitute("^"+regexp.QuoteMeta(from)+"/*", "/")
	}
	return to, nil
}
