package model

import (
	"strconv"
	"time"
)

// Protocol is what a service says its port speaks.
type Protocol uint8

// The protocols. ProtocolUnknown is the zero value: the service doesn't say.
const (
	ProtocolUnknown Protocol = iota
	ProtocolHTTP             // whichever version of HTTP the client speaks
	ProtocolHTTP1            // HTTP/1.1, with upgrades to WebSocket
	ProtocolHTTP2            // HTTP/2 in plain text, gRPC among it
	ProtocolOpaque           // anything else
)

// Routing is how requests to one port of a service are handled. A port that has
// one is spoken to as HTTP at the client's proxy; connections to other ports pass
// as they are.
type Routing struct {
	Port uint16
	// Consumer is the namespace whose clients it is for; "" is for all clients whose
	// namespace has none of its own.
	Consumer string
	// Rules in the order of precedence: the first that matches counts, and a request
	// that matches none gets 404. Without any rule, all requests go to the service
	// itself: that is how something else than routes asks for HTTP.
	Rules []Rule
}

// Rule is what is done with the requests that match.
type Rule struct {
	Match  RequestMatch
	Action *Action
	// Size is about what it takes at each proxy that has it, in bytes; 0 if that isn't
	// known.
	Size int
}

// Origin is the rule of a route that an action was made from. It is comparable.
type Origin struct {
	Kind      string // HTTPRoute or GRPCRoute
	Namespace string
	Name      string
	Rule      string // its name, or else its place, from 0
}

// String names the rule: "HTTPRoute/team-a/split/0".
func (o Origin) String() string {
	return o.Kind + "/" + o.Namespace + "/" + o.Name + "/" + o.Rule
}

// RequestMatch matches when all that is set does. The zero value isn't valid: it
// has no path.
type RequestMatch struct {
	Path PathMatch
	// Method of the request; "" for any.
	Method  string
	Headers []ValueMatch
	Query   []ValueMatch
}

// PathMatch matches a request's path, without its query.
type PathMatch struct {
	Kind  PathKind
	Value string
}

// PathKind says how a path is compared.
type PathKind uint8

// The kinds.
const (
	PathPrefix PathKind = iota // whole segments: /a matches /a and /a/b, not /ab
	PathExact
	PathRegex // RE2, the whole path
)

// ValueMatch matches a header or a parameter of the query.
type ValueMatch struct {
	Name  string
	Value string
	// Regex says that Value is an RE2 expression for the whole value.
	Regex bool
}

// Action is what happens to a request. Exactly one of Redirect and Backends is
// looked at: without a redirect and without a backend that has a weight, the
// request gets 500.
type Action struct {
	Origin          Origin
	RequestHeaders  HeaderChange
	ResponseHeaders HeaderChange
	Redirect        *Redirect
	// Backends share the requests by weight.
	Backends []Backend
	// Host replaces the request's authority; "" leaves it.
	Host string
	// Path replaces the request's path; nil leaves it.
	Path    *PathChange
	Mirrors []Mirror
	// Timeout bounds the whole request, TryTimeout each attempt; 0 doesn't.
	Timeout, TryTimeout time.Duration
	// Retry is nil if there is one attempt only.
	Retry *Retry
}

// HeaderChange is applied in the order remove, set, add.
type HeaderChange struct {
	Remove []string
	Set    []Header
	Add    []Header
}

// Header is a header's name and value.
type Header struct{ Name, Value string }

// PathChange replaces a path, or the prefix of it that matched.
type PathChange struct {
	Prefix bool
	Value  string
}

// Redirect answers with another location. What isn't set stays as it was.
type Redirect struct {
	Code   int // 301, 302, 303, 307 or 308
	Scheme string
	Host   string
	Port   uint16
	Path   *PathChange
}

// ServiceKey names a service. It is comparable.
type ServiceKey struct{ Namespace, Name string }

// ServicePortKey names a port of a service. It is comparable, and its zero value
// names none.
type ServicePortKey struct {
	ServiceKey
	Port uint16
}

// String is "namespace/name:port".
func (k ServicePortKey) String() string {
	return k.Namespace + "/" + k.Name + ":" + strconv.Itoa(int(k.Port))
}

// Backend is where a share of the requests goes.
type Backend struct {
	// To is zero for a backend that is wrong: its share is answered with 500.
	To              ServicePortKey
	Weight          uint32
	RequestHeaders  HeaderChange
	ResponseHeaders HeaderChange
}

// Mirror gets a copy of a share of the requests; what it answers is dropped.
type Mirror struct {
	To ServicePortKey
	// Numerator of Denominator requests are copied; Denominator is 100, 10,000 or
	// 1,000,000.
	Numerator, Denominator uint32
}

// Retry says when a request is tried again.
type Retry struct {
	// Attempts besides the first.
	Attempts uint32
	// Codes of responses after which it is, besides failures to get any.
	Codes []uint32
	// Backoff bounds the time before the second attempt, of which Envoy waits a random
	// part, and twice as much before each further one; 0 is Envoy's 25 ms.
	Backoff time.Duration
}
