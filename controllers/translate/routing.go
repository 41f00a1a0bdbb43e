package translate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Bounds of what routes can make of one port of a service, for all clients or for
// those of one namespace. Every client's proxy holds all of it, so a route that
// would go beyond isn't accepted; the older ones stay.
const (
	MaxMatches  = 1024
	MaxBackends = 256
	MaxSize     = 4 << 20 // bytes, by model.Rule.Size
)

// Reasons of Accepted besides those of the Gateway API.
const (
	// ReasonConflicted is an HTTPRoute's on ports that a GRPCRoute has as well.
	ReasonConflicted = "Conflicted"
	// ReasonLimitExceeded is a route's that is one too many.
	ReasonLimitExceeded = "LimitExceeded"
)

// ServicePorts are the TCP ports of a Service as routes see them; nil for one that
// has no endpoints of its own.
func ServicePorts(s *corev1.Service) []ServicePort {
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return nil
	}
	headless := slices.Contains(s.Spec.ClusterIPs, corev1.ClusterIPNone)
	ports := []ServicePort{}
	for _, p := range s.Spec.Ports {
		if p.Protocol != corev1.ProtocolTCP && p.Protocol != "" || p.Port < 1 || p.Port > 65535 {
			continue
		}
		ports = append(ports, ServicePort{Name: p.Name, Port: uint16(p.Port), Protocol: protocol(p), Headless: headless})
	}
	return ports
}

// ServicePort is a port with what it speaks.
type ServicePort struct {
	Name     string
	Port     uint16
	Protocol model.Protocol
	// Headless is a port's of a Service without an address: it can be a backend, but
	// requests to it are requests to its pods.
	Headless bool
}

// protocol of a port: its appProtocol, or else what its name begins with.
func protocol(p corev1.ServicePort) model.Protocol {
	if p.AppProtocol != nil && *p.AppProtocol != "" {
		switch strings.ToLower(*p.AppProtocol) {
		case "http":
			return model.ProtocolHTTP
		case "kubernetes.io/h2c", "h2c", "http2", "grpc":
			return model.ProtocolHTTP2
		case "kubernetes.io/ws":
			return model.ProtocolHTTP1
		}
		return model.ProtocolOpaque
	}
	name, _, _ := strings.Cut(p.Name, "-")
	switch name {
	case "http":
		return model.ProtocolHTTP
	case "http2", "h2c", "grpc":
		return model.ProtocolHTTP2
	}
	return model.ProtocolUnknown
}

// References is what routes may refer to.
type References struct {
	// Ports of a Service; false if it doesn't exist.
	Ports func(model.ServiceKey) ([]ServicePort, bool)
	// Grants of a namespace.
	Grants func(namespace string) []*gatewayv1beta1.ReferenceGrant
}

// Outcome is what came of a route at one of its parents.
type Outcome struct {
	Parent gatewayv1.ParentReference
	// Generation of the route.
	Generation int64

	// accepted and resolved say what is wrong; zero for nothing.
	accepted, resolved refusal
	// note is added to the message of an accepted route.
	note string
}

// Routings are what the routes of a Service make of its ports, and what came of
// each route there, in the order of its parents. Routes that aren't for the
// Service are ignored.
func Routings(service model.ServiceKey, routes []*Route, refs References) ([]model.Routing, map[RouteKey][]Outcome) {
	routes = slices.SortedFunc(slices.Values(routes), older)
	ports, exists := refs.Ports(service)
	outcomes := map[RouteKey][]Outcome{}
	type scope struct {
		port     uint16
		consumer string
	}
	attached := map[scope]*attachment{}
	grpc := map[scope]bool{}
	type place struct {
		route   *Route
		actions []*model.Action
		index   int // of the outcome
		ports   []uint16
	}
	var places []place
	for _, r := range routes {
		actions, wrong := r.resolve(service, refs)
		for _, p := range r.Parents {
			if p.Service != service {
				continue
			}
			o := Outcome{Parent: p.Ref, Generation: r.Generation, accepted: r.refused, resolved: wrong}
			at, why := attach(r.Key.Kind, p, ports, exists)
			if o.accepted.isZero() {
				o.accepted = why
			}
			if o.accepted.isZero() {
				for _, n := range at {
					if r.Key.Kind == KindGRPCRoute {
						grpc[scope{n, consumer(r, service)}] = true
					}
				}
				places = append(places, place{r, actions, len(outcomes[r.Key]), at})
			}
			outcomes[r.Key] = append(outcomes[r.Key], o)
		}
	}
	for _, p := range places {
		o := &outcomes[p.route.Key][p.index]
		var taken, full, in []uint16
		var beyond refusal // of the last that is full
		for _, n := range p.ports {
			s := scope{n, consumer(p.route, service)}
			if p.route.Key.Kind != KindGRPCRoute && grpc[s] {
				taken = append(taken, n)
				continue
			}
			if attached[s] == nil {
				attached[s] = &attachment{backends: map[model.ServicePortKey]bool{}}
			}
			if why := attached[s].add(p.route, p.actions); !why.isZero() {
				full, beyond = append(full, n), why
				continue
			}
			in = append(in, n)
		}
		if len(full) > 0 {
			o.note = fmt.Sprintf("; not on %s: %s", portList(full), beyond.message)
		}
		switch {
		case len(in) == 0 && len(full) > 0:
			o.accepted = beyond
		case len(in) == 0 && len(taken) > 0:
			o.accepted = refusal{ReasonConflicted, fmt.Sprintf("a GRPCRoute has %s, and counts before HTTPRoutes", portList(taken))}
		case len(taken) > 0:
			o.note = fmt.Sprintf("; not on %s, which a GRPCRoute has", portList(taken)) + o.note
		}
		if o.accepted.isZero() {
			note := "in force on " + portList(in)
			if c := consumer(p.route, service); c != "" {
				note += fmt.Sprintf(" for clients in namespace %s, but for pods that share their node's proxy (isolation: Node)", c)
			}
			o.note = note + o.note
		}
	}
	var out []model.Routing
	for s, a := range attached {
		if len(a.routes) > 0 {
			out = append(out, model.Routing{Port: s.port, Consumer: s.consumer, Rules: a.rules()})
		}
	}
	slices.SortFunc(out, func(a, b model.Routing) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Consumer, b.Consumer))
	})
	return out, outcomes
}

// consumer is the namespace that a route is for; "" for the service's own routes,
// which are for everybody.
func consumer(r *Route, service model.ServiceKey) string {
	if r.Key.Namespace == service.Namespace {
		return ""
	}
	return r.Key.Namespace
}

// attach finds the ports that a parent stands for. A port that the route names is
// taken at its word; otherwise only those count that say that they speak HTTP, so
// that a route can't break a port on which the server speaks first.
func attach(kind string, parent RouteParent, ports []ServicePort, exists bool) ([]uint16, refusal) {
	service := parent.Service
	noParent := func(format string, args ...any) ([]uint16, refusal) {
		return nil, refusal{string(gatewayv1.RouteReasonNoMatchingParent), fmt.Sprintf(format, args...)}
	}
	if !exists {
		return noParent("there is no Service %s/%s", service.Namespace, service.Name)
	}
	if len(ports) > 0 && ports[0].Headless {
		return noParent("Service %s/%s is headless: it has no address at which requests could be routed, only its pods have", service.Namespace, service.Name)
	}
	if parent.Port != 0 || parent.Section != "" {
		for _, p := range ports {
			switch {
			case parent.Port != 0 && p.Port != parent.Port || parent.Section != "" && p.Name != parent.Section:
			case p.Protocol == model.ProtocolOpaque:
				return noParent("port %d of Service %s/%s doesn't speak HTTP, by its appProtocol", p.Port, service.Namespace, service.Name)
			default:
				return []uint16{p.Port}, refusal{}
			}
		}
		switch {
		case parent.Section == "":
			return noParent("Service %s/%s has no TCP port %d", service.Namespace, service.Name, parent.Port)
		case parent.Port == 0:
			return noParent("Service %s/%s has no TCP port named %q", service.Namespace, service.Name, parent.Section)
		}
		return noParent("Service %s/%s has no TCP port %d named %q", service.Namespace, service.Name, parent.Port, parent.Section)
	}
	var speak, speak2 []uint16
	for _, p := range ports {
		switch p.Protocol {
		case model.ProtocolHTTP2:
			speak2 = append(speak2, p.Port)
			fallthrough
		case model.ProtocolHTTP, model.ProtocolHTTP1:
			speak = append(speak, p.Port)
		}
	}
	switch {
	case kind == KindGRPCRoute && len(speak2) > 0:
		return speak2, refusal{}
	case len(speak) > 0:
		return speak, refusal{}
	case len(ports) == 1 && ports[0].Protocol == model.ProtocolUnknown:
		return []uint16{ports[0].Port}, refusal{}
	}
	return noParent("no port of Service %s/%s says that it speaks HTTP: set its appProtocol, or the port or sectionName in the parentRef", service.Namespace, service.Name)
}

func portList(ports []uint16) string {
	var s []string
	for _, p := range ports {
		s = append(s, fmt.Sprint(p))
	}
	if len(s) == 1 {
		return "port " + s[0]
	}
	return "ports " + strings.Join(s, ", ")
}

// attachment gathers the routes of one port and scope.
type attachment struct {
	routes   []attachedRoute
	matches  int
	size     int
	backends map[model.ServicePortKey]bool
}

type attachedRoute struct {
	route   *Route
	actions []*model.Action // by rule
}

func (a *attachment) add(r *Route, actions []*model.Action) refusal {
	for _, had := range a.routes {
		if had.route == r {
			return refusal{} // two parents with the same port
		}
	}
	matches, size := 0, 0
	more := map[model.ServicePortKey]bool{}
	for i, rule := range r.rules {
		matches += len(rule.matches)
		of := actionSize(actions[i])
		for _, m := range rule.matches {
			size += m.size + of
		}
		for _, b := range actions[i].Backends {
			more[b.To] = true
		}
		for _, m := range actions[i].Mirrors {
			more[m.To] = true
		}
	}
	for b := range more {
		if a.backends[b] || b == (model.ServicePortKey{}) {
			delete(more, b)
		}
	}
	if a.matches+matches > MaxMatches || len(a.backends)+len(more) > MaxBackends {
		return refusal{ReasonLimitExceeded, fmt.Sprintf("older routes have most of the %d matches and %d backends that one port of a Service may have", MaxMatches, MaxBackends)}
	}
	if a.size+size > MaxSize {
		return refusal{ReasonLimitExceeded, fmt.Sprintf("with older routes it takes %d KiB, and one port of a Service may have %d; each match takes what its rule's filters and backends do", (a.size+size)>>10, MaxSize>>10)}
	}
	a.matches += matches
	a.size += size
	for b := range more {
		a.backends[b] = true
	}
	a.routes = append(a.routes, attachedRoute{r, actions})
	return refusal{}
}

// rules in the order of precedence; of equal ones the older route's, and then the
// first, count.
func (a *attachment) rules() []model.Rule {
	type ranked struct {
		rank [5]int
		rule model.Rule
	}
	var all []ranked
	for _, r := range a.routes {
		for i, rule := range r.route.rules {
			size := actionSize(r.actions[i])
			for _, m := range rule.matches {
				all = append(all, ranked{m.rank, model.Rule{Match: m.RequestMatch, Action: r.actions[i], Size: m.size + size}})
			}
		}
	}
	slices.SortStableFunc(all, func(x, y ranked) int { return slices.Compare(y.rank[:], x.rank[:]) })
	out := make([]model.Rule, len(all))
	for i := range all {
		out[i] = all[i].rule
	}
	return out
}

// resolve looks the route's references up, as they are at one of its parents: an action
// for each rule, and the first that is wrong. A wrong backend keeps its weight, for its
// share gets 500.
func (r *Route) resolve(parent model.ServiceKey, refs References) ([]*model.Action, refusal) {
	var wrong refusal
	look := func(o objectRef) model.ServicePortKey {
		to, why := r.lookup(o, parent, refs)
		if wrong.isZero() {
			wrong = why
		}
		return to
	}
	var out []*model.Action
	for _, rule := range r.rules {
		action := rule.action
		for _, b := range rule.backends {
			action.Backends = append(action.Backends, model.Backend{To: look(b.objectRef), Weight: b.weight, RequestHeaders: b.request, ResponseHeaders: b.response})
		}
		for _, m := range rule.mirrors {
			if to := look(m.objectRef); to != (model.ServicePortKey{}) && m.numerator > 0 {
				action.Mirrors = append(action.Mirrors, model.Mirror{To: to, Numerator: m.numerator, Denominator: m.denominator})
			}
		}
		out = append(out, &action)
	}
	return out, wrong
}

// lookup finds the port that a reference means; zero with a reason if it is wrong.
func (r *Route) lookup(o objectRef, parent model.ServiceKey, refs References) (model.ServicePortKey, refusal) {
	fail := func(reason gatewayv1.RouteConditionReason, format string, args ...any) (model.ServicePortKey, refusal) {
		return model.ServicePortKey{}, refusal{string(reason), o.field + ": " + fmt.Sprintf(format, args...)}
	}
	if !o.isService() {
		return fail(gatewayv1.RouteReasonInvalidKind, "only Services can be backends, not %s %s", o.kind, o.group)
	}
	if o.namespace != r.Key.Namespace && !r.permitted(o, parent, refs) {
		return fail(gatewayv1.RouteReasonRefNotPermitted, "no ReferenceGrant in namespace %s lets %ss of %s refer to Service %s", o.namespace, r.Key.Kind, r.Key.Namespace, o.name)
	}
	ports, exists := refs.Ports(o.service())
	if !exists {
		return fail(gatewayv1.RouteReasonBackendNotFound, "there is no Service %s/%s", o.namespace, o.name)
	}
	i := slices.IndexFunc(ports, func(p ServicePort) bool { return p.Port == o.port && o.port != 0 })
	switch {
	case i < 0:
		return fail(gatewayv1.RouteReasonBackendNotFound, "Service %s/%s has no TCP port %d", o.namespace, o.name, o.port)
	case ports[i].Protocol == model.ProtocolOpaque:
		return fail(gatewayv1.RouteReasonUnsupportedProtocol, "port %d of Service %s/%s doesn't speak HTTP, by its appProtocol", o.port, o.namespace, o.name)
	}
	return model.ServicePortKey{ServiceKey: o.service(), Port: o.port}, refusal{}
}

// permitted reports whether a route may refer into another namespace. At a parent it may
// to the parent itself: that is where the requests go without it. From another one it
// would lead there whoever calls that.
func (r *Route) permitted(o objectRef, parent model.ServiceKey, refs References) bool {
	if o.service() == parent {
		return true
	}
	for _, g := range refs.Grants(o.namespace) {
		from := slices.ContainsFunc(g.Spec.From, func(f gatewayv1beta1.ReferenceGrantFrom) bool {
			return f.Group == gatewayv1.GroupName && string(f.Kind) == r.Key.Kind && string(f.Namespace) == r.Key.Namespace
		})
		to := slices.ContainsFunc(g.Spec.To, func(t gatewayv1beta1.ReferenceGrantTo) bool {
			return t.Group == "" && t.Kind == "Service" && (t.Name == nil || string(*t.Name) == o.name)
		})
		if from && to {
			return true
		}
	}
	return false
}
