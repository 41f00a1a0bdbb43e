package relay

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// The types that a tenant proxy may ask for. Secrets are answered on the node,
// the others by the operator.
const (
	TypeListener    = "type.googleapis.com/envoy.config.listener.v3.Listener"
	TypeFilterChain = "type.googleapis.com/envoy.config.listener.v3.FilterChain"
	TypeCluster     = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	TypeEndpoints   = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	TypeRoute       = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	TypeSecret      = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
)

// kinds says which types exist and which of them may be asked for by wildcard.
var kinds = map[string]struct {
	short    string
	wildcard bool
}{
	TypeListener:    {"LDS", true},
	TypeFilterChain: {"FCDS", false},
	TypeCluster:     {"CDS", true},
	TypeEndpoints:   {"EDS", false},
	TypeRoute:       {"RDS", false},
	TypeSecret:      {"SDS", false},
}

const (
	// maxNames bounds what one proxy can make the relay remember per type.
	maxNames = 16384
	// maxName is the longest resource name. A SPIFFE ID has at most 588 bytes.
	maxName = 1024
	// maxNameBytes bounds one proxy's names of a type together: 16,384 of the longest that
	// pods can dial, with a fifth to spare.
	maxNameBytes = 1 << 20
	// maxToldBytes bounds what the operator is told in one message of the versions that a
	// proxy has. It takes 4 MiB, with the names.
	maxToldBytes = 5 << 19
	// maxUnacked bounds the responses that a proxy hasn't answered yet.
	maxUnacked = 512
	// maxWildcard is more than there are static clusters and listeners.
	maxWildcard = 256
	// maxHeld are the versions that a proxy may tell of: beyond the names that it asked
	// for, it has what the wildcard gave it.
	maxHeld  = maxNames + maxWildcard
	wildcard = "*"
)

// errRefused is what a proxy gets whose request no Envoy would send.
var errRefused = errors.New("request refused")

// subscription is what one proxy wants of one type and what it has. It is owned
// by one stream's loop.
type subscription struct {
	wildcard bool
	names    map[string]struct{}
	bytes    int // of names
	// held are the versions that the proxy acknowledged, by name.
	held map[string]string
	// waiting are the names that nobody has answered yet ("*" for the wildcard).
	waiting map[string]struct{}
	// vain are the names that don't exist. They are the first to make room.
	vain map[string]struct{}
	// refused counts names that were asked for in vain.
	refused int
}

// change is what one request does to a subscription.
type change struct {
	subscribe, unsubscribe []string
	// dropped names were over the bound: the proxy hears that they don't exist.
	dropped []string
}

func (c change) empty() bool { return len(c.subscribe)+len(c.unsubscribe) == 0 }

func newSubscription() *subscription {
	return &subscription{names: map[string]struct{}{}, held: map[string]string{}, waiting: map[string]struct{}{}, vain: map[string]struct{}{}}
}

func checkName(name string) error {
	if name == "" || len(name) > maxName || !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fmt.Errorf("%w: a resource name of %d bytes isn't one", errRefused, len(name))
	}
	return nil
}

// apply takes a proxy's request in. Only the first request of a stream and type
// may be an implicit wildcard or tell what the proxy holds. Errors wrap
// errRefused and leave the subscription unusable.
func (s *subscription) apply(r *discovery.DeltaDiscoveryRequest, first bool) (change, error) {
	kind, ok := kinds[r.TypeUrl]
	if !ok {
		return change{}, fmt.Errorf("%w: type %.128q isn't served", errRefused, r.TypeUrl)
	}
	var c change
	if first {
		if len(r.InitialResourceVersions) > maxHeld {
			return c, fmt.Errorf("%w: %d initial versions, at most %d", errRefused, len(r.InitialResourceVersions), maxHeld)
		}
		for name, version := range r.InitialResourceVersions {
			if err := checkName(name); err != nil {
				return c, err
			}
			if len(version) > model.MaxVersion {
				return c, fmt.Errorf("%w: a version of %d bytes", errRefused, len(version))
			}
			s.held[name] = version
		}
		if len(r.ResourceNamesSubscribe) == 0 && kind.wildcard {
			s.wildcard = true
			s.waiting[wildcard] = struct{}{}
		}
	}
	for _, name := range r.ResourceNamesUnsubscribe {
		if name == wildcard {
			if s.wildcard {
				c.unsubscribe = append(c.unsubscribe, name)
			}
			s.wildcard = false
			delete(s.waiting, name)
			continue
		}
		if _, ok := s.names[name]; !ok {
			continue
		}
		s.bytes -= len(name)
		delete(s.names, name)
		delete(s.waiting, name)
		delete(s.vain, name)
		if !s.wildcard {
			delete(s.held, name)
		}
		c.unsubscribe = append(c.unsubscribe, name)
	}
	subscribe := r.ResourceNamesSubscribe
	if first {
		// An Envoy that comes back asks for all that it ever asked for, in no order. What
		// it has goes before what it asked for in vain.
		subscribe = slices.Clone(subscribe)
		slices.SortStableFunc(subscribe, func(a, b string) int {
			_, hasA := s.held[a]
			_, hasB := s.held[b]
			switch {
			case hasA == hasB:
				return 0
			case hasA:
				return -1
			}
			return 1
		})
	}
	for _, name := range subscribe {
		if name == wildcard {
			if !kind.wildcard {
				return c, fmt.Errorf("%w: %s has no wildcard", errRefused, kind.short)
			}
			s.wildcard = true
		} else {
			if err := checkName(name); err != nil {
				return c, err
			}
			if _, has := s.names[name]; !has {
				gone, ok := s.makeRoom(len(name))
				c.unsubscribe = append(c.unsubscribe, gone...)
				if !ok {
					c.dropped = append(c.dropped, name)
					continue
				}
				s.bytes += len(name)
			}
			s.names[name] = struct{}{}
			delete(s.vain, name)
		}
		s.waiting[name] = struct{}{}
		c.subscribe = append(c.subscribe, name)
	}
	return c, nil
}

// makeRoom forgets names that don't exist until there is room for another one, of length
// bytes. It returns them, and whether there is.
func (s *subscription) makeRoom(length int) (gone []string, ok bool) {
	full := func() bool { return len(s.names) >= maxNames || s.bytes+length > maxNameBytes }
	for name := range s.vain {
		if !full() {
			break
		}
		s.bytes -= len(name)
		delete(s.vain, name)
		delete(s.names, name)
		gone = append(gone, name)
	}
	return gone, !full()
}

// resume is the first request of a type on a new stream to the operator: all
// that the proxy wants, and what it has.
func (s *subscription) resume(typeURL string) *discovery.DeltaDiscoveryRequest {
	r := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, InitialResourceVersions: s.told()}
	if len(s.names) == 0 {
		return r // the wildcard in its implicit form, if the type has one
	}
	if s.wildcard {
		r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, wildcard)
	}
	r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, slices.Sorted(maps.Keys(s.names))...)
	return r
}

// told are the versions that the proxy has, as far as they may be told: the operator sends
// what is left out once more. That is nothing of names that pods can dial.
func (s *subscription) told() map[string]string {
	told, room := make(map[string]string, len(s.held)), maxToldBytes
	for name, version := range s.held {
		if size := len(name) + len(version) + 16; size <= room { // with tags and lengths
			told[name] = version
			room -= size
		}
	}
	return told
}

// idle reports that there is nothing to ask the operator for.
func (s *subscription) idle() bool { return !s.wildcard && len(s.names) == 0 }

// answered takes names off the waiting list; any answer is one to the wildcard.
func (s *subscription) answered(resources []*discovery.Resource, removed []string) {
	delete(s.waiting, wildcard)
	for _, r := range resources {
		delete(s.waiting, r.Name)
		delete(s.vain, r.Name)
	}
	for _, name := range removed {
		if _, ok := s.waiting[name]; ok {
			delete(s.waiting, name)
			s.refused++
		}
		// Also what was let go: nothing is lost by forgetting it first.
		if _, ok := s.names[name]; ok {
			s.vain[name] = struct{}{}
		}
	}
}

// acknowledged notes what the proxy has now.
func (s *subscription) acknowledged(resources []*discovery.Resource, removed []string) {
	for _, name := range removed {
		delete(s.held, name)
	}
	for _, r := range resources {
		if _, named := s.names[r.Name]; named || s.wildcard {
			s.held[r.Name] = r.Version
		}
	}
}
