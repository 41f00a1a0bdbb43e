package translate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// The kinds of routes that are understood.
const (
	KindHTTPRoute = "HTTPRoute"
	KindGRPCRoute = "GRPCRoute"
)

// RouteKey names a route. It is comparable.
type RouteKey struct{ Kind, Namespace, Name string }

func (k RouteKey) String() string { return k.Kind + " " + k.Namespace + "/" + k.Name }

// Route is an HTTPRoute or a GRPCRoute as far as it can be understood without
// other objects. It is immutable.
type Route struct {
	Key        RouteKey
	Generation int64
	Created    time.Time
	// Parents are those that are Services, in the order of the spec. There is none
	// for routes of gateways.
	Parents []RouteParent

	rules []routeRule
	// refused says why the whole route can't be used; zero if it can.
	refused refusal
}

// RouteParent is a Service that a route is for.
type RouteParent struct {
	Ref     gatewayv1.ParentReference
	Service model.ServiceKey
	// Port and Section, which is a port's name, are of the one that it is for; with
	// neither it is for all that speak HTTP.
	Port    uint16
	Section string
}

// refusal is a condition's reason and message.
type refusal struct{ reason, message string }

func (r refusal) isZero() bool { return r == refusal{} }

type routeRule struct {
	matches []rankedMatch
	// action lacks what refs become: backends and mirrors.
	action   model.Action
	backends []backendRef
	mirrors  []mirrorRef
}

// rankedMatch is a match with what its precedence is compared by: the larger
// first, from left to right.
type rankedMatch struct {
	model.RequestMatch
	rank [5]int
	size int
}

// backendRef is a reference that isn't resolved.
type backendRef struct {
	objectRef
	weight   uint32
	request  model.HeaderChange
	response model.HeaderChange
}

type mirrorRef struct {
	objectRef
	numerator, denominator uint32
}

// objectRef is what a backend is called.
type objectRef struct {
	field     string // where it is in the spec
	group     string
	kind      string
	namespace string
	name      string
	port      uint16 // 0 if there is none
}

// Services that the route is about, parents before backends, each once.
func (r *Route) Services() (parents, backends []model.ServiceKey) {
	add := func(list []model.ServiceKey, k model.ServiceKey) []model.ServiceKey {
		if slices.Contains(list, k) {
			return list
		}
		return append(list, k)
	}
	for _, p := range r.Parents {
		parents = add(parents, p.Service)
	}
	seen := map[model.ServiceKey]bool{}
	for _, ref := range r.refs() {
		if ref.isService() && !seen[ref.service()] {
			seen[ref.service()] = true
			backends = append(backends, ref.service())
		}
	}
	return parents, backends
}

func (r *Route) refs() []objectRef {
	var out []objectRef
	for _, rule := range r.rules {
		for _, b := range rule.backends {
			out = append(out, b.objectRef)
		}
		for _, m := range rule.mirrors {
			out = append(out, m.objectRef)
		}
	}
	return out
}

func (o objectRef) isService() bool { return o.group == "" && o.kind == "Service" }
func (o objectRef) service() model.ServiceKey {
	return model.ServiceKey{Namespace: o.namespace, Name: o.name}
}

// older orders routes as the Gateway API does when nothing else tells them apart.
func older(a, b *Route) int {
	return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Key.Namespace, b.Key.Namespace), cmp.Compare(a.Key.Name, b.Key.Name), cmp.Compare(a.Key.Kind, b.Key.Kind))
}

// routeReader gathers what is wrong with a route while it is read: the first
// problem counts.
type routeReader struct {
	namespace string
	refused   refusal
	// expressions and steps that were read since sized was called.
	expressions, steps int
}

// sized gives a match its size when all of it has been read.
func (r *routeReader) sized(m rankedMatch) rankedMatch {
	m.size = matchSize(m.RequestMatch, r.expressions, r.steps)
	r.expressions, r.steps = 0, 0
	return m
}

func (r *routeReader) refuse(reason gatewayv1.RouteConditionReason, format string, args ...any) {
	if r.refused.isZero() {
		r.refused = refusal{string(reason), fmt.Sprintf(format, args...)}
	}
}

func (r *routeReader) unsupported(format string, args ...any) {
	r.refuse(gatewayv1.RouteReasonUnsupportedValue, format, args...)
}

func newRoute(kind string, m metav1.ObjectMeta, parents []gatewayv1.ParentReference) *Route {
	route := &Route{Key: RouteKey{kind, m.Namespace, m.Name}, Generation: m.Generation, Created: m.CreationTimestamp.Time}
	for _, p := range parents {
		if deref(p.Group, gatewayv1.GroupName) != corev1.GroupName || deref(p.Kind, "Gateway") != "Service" {
			continue
		}
		route.Parents = append(route.Parents, RouteParent{
			Ref: p, Service: model.ServiceKey{Namespace: string(deref(p.Namespace, gatewayv1.Namespace(m.Namespace))), Name: string(p.Name)},
			Port: port(p.Port), Section: string(deref(p.SectionName, "")),
		})
	}
	return route
}

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}

func port(p *gatewayv1.PortNumber) uint16 {
	if p == nil || *p < 1 || *p > 65535 {
		return 0
	}
	return uint16(*p)
}

func (r *routeReader) object(field string, b gatewayv1.BackendObjectReference) objectRef {
	return objectRef{
		field: field, group: string(deref(b.Group, "")), kind: string(deref(b.Kind, "Service")),
		namespace: string(deref(b.Namespace, gatewayv1.Namespace(r.namespace))), name: string(b.Name), port: port(b.Port),
	}
}

// headers reads a header filter. Envoy doesn't let go of the headers that make a
// request what it is.
func (r *routeReader) headers(field string, f *gatewayv1.HTTPHeaderFilter) model.HeaderChange {
	var c model.HeaderChange
	if f == nil {
		r.unsupported("%s has no content", field)
		return c
	}
	name := func(n string) string {
		n = strings.ToLower(n)
		if n == "host" || n == "" || strings.HasPrefix(n, ":") {
			r.unsupported("%s: the header %q can't be changed; for the host use a URLRewrite", field, n)
		}
		return n
	}
	list := func(in []gatewayv1.HTTPHeader) (out []model.Header) {
		for _, h := range in {
			if strings.ContainsFunc(h.Value, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }) {
				r.unsupported("%s: the value of %s has control characters", field, h.Name)
			}
			out = append(out, model.Header{Name: name(string(h.Name)), Value: h.Value})
		}
		return out
	}
	c.Set, c.Add = list(f.Set), list(f.Add)
	for _, n := range f.Remove {
		c.Remove = append(c.Remove, name(n))
	}
	return c
}

// mirror reads a mirror filter; all requests are copied unless it says less.
func (r *routeReader) mirror(field string, f *gatewayv1.HTTPRequestMirrorFilter) mirrorRef {
	if f == nil {
		r.unsupported("%s has no content", field)
		return mirrorRef{}
	}
	m := mirrorRef{objectRef: r.object(field+".requestMirror.backendRef", f.BackendRef), numerator: 100, denominator: 100}
	switch {
	case f.Percent != nil:
		m.numerator = uint32(max(0, *f.Percent))
	case f.Fraction != nil:
		// Envoy knows three denominators; a millionth is as near as it gets.
		d := int64(deref(f.Fraction.Denominator, 100))
		if d <= 0 {
			r.unsupported("%s: the fraction's denominator is %d", field, d)
			d = 1
		}
		m.numerator, m.denominator = uint32(min(int64(f.Fraction.Numerator)*1_000_000/d, 1_000_000)), 1_000_000
	}
	return m
}

// value reads how a header or query parameter is compared.
func (r *routeReader) value(field, name, value string, regex bool) model.ValueMatch {
	if regex {
		r.regex(field, value)
	}
	return model.ValueMatch{Name: name, Value: value, Regex: regex}
}

// once keeps the first of several values of a name, as the Gateway API demands.
func once(list []model.ValueMatch) []model.ValueMatch {
	var out []model.ValueMatch
	for _, v := range list {
		if !slices.ContainsFunc(out, func(o model.ValueMatch) bool { return o.Name == v.Name }) {
			out = append(out, v)
		}
	}
	return out
}

func (r *routeReader) weight(b gatewayv1.BackendRef) uint32 {
	return uint32(max(0, deref(b.Weight, 1)))
}

// duration reads one; "" and nil are 0.
func (r *routeReader) duration(field string, d *gatewayv1.Duration) time.Duration {
	if d == nil {
		return 0
	}
	v, err := time.ParseDuration(string(*d))
	if err != nil || v < 0 {
		r.unsupported("%s: %q isn't a duration", field, *d)
		return 0
	}
	return v
}
