package xds

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	networkinputsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// With ServerOptions.StraightHTTP a proxy that has an address's listener for HTTP reads requests to it where
// connections come in: a chain for each account and address, of the same connection
// manager with the same routes. The way through the cluster of the address and the
// internal listener, which costs a fifth of a request's CPU, is for connections that
// come before the chains are there, and for addresses beyond maxStraight.
//
// Envoy ends the connections of a chain that goes. So a chain stays when its address
// ceases to be HTTP, with routes to the service itself, and only nothing leads to it
// any more; it stays for as long as any process of the proxy has a stream.

// maxStraight bounds the chains of one listener: what is added makes all of it go to
// the proxy once more.
const maxStraight = 256

// httpAddress is an address that a proxy has chains for.
type httpAddress struct {
	vip netip.AddrPort
	// routed says that new connections are led to them.
	routed bool
}

// straight adds an account's chains to outbound, and returns what leads to them: from
// each address by its ports, and from other ports otherwise.
func (p *packer) straight(l *listenerv3.Listener, s served, addresses []httpAddress, otherwise *matcherv3.Matcher_OnMatch) (rules []rule) {
	path, id := identityPath(s.identity), s.identity.String()
	ports := map[netip.Addr]map[string]*matcherv3.Matcher_OnMatch{}
	for _, a := range addresses {
		name := "http/" + path + "/" + a.vip.String()
		l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{Name: name, Filters: []*listenerv3.Filter{
			p.setFilterState(sourceState(clientAddress), identityState(id)),
			p.httpManager(a.vip),
		}})
		if !a.routed {
			continue
		}
		if ports[a.vip.Addr()] == nil {
			ports[a.vip.Addr()] = map[string]*matcherv3.Matcher_OnMatch{}
		}
		ports[a.vip.Addr()][fmt.Sprint(a.vip.Port())] = p.toChain(name)
	}
	for _, addr := range slices.SortedFunc(maps.Keys(ports), netip.Addr.Compare) {
		rules = append(rules, rule{[]netip.Prefix{netip.PrefixFrom(addr, addr.BitLen())}, &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Matcher{
			Matcher: &matcherv3.Matcher{
				MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{
					Input:    &xdscorev3.TypedExtensionConfig{Name: "port", TypedConfig: p.any(&networkinputsv3.DestinationPortInput{})},
					TreeType: &matcherv3.Matcher_MatcherTree_ExactMatchMap{ExactMatchMap: &matcherv3.Matcher_MatcherTree_MatchMap{Map: ports[addr]}},
				}},
				OnNoMatch: otherwise,
			},
		}}})
	}
	return rules
}

// httpAddresses are those that p has chains for, sorted.
func (s *Store) httpAddresses(p *proxyState) (out []httpAddress) {
	for _, vip := range slices.SortedFunc(maps.Keys(p.straight), compareAddrPorts) {
		_, _, routed := s.routing(vip, p.proxy.Tenant.Namespace)
		out = append(out, httpAddress{vip, routed})
	}
	return out
}

func compareAddrPorts(a, b netip.AddrPort) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Port(), b.Port()))
}

// hasHTTP is called when a stream's proxy has listeners for HTTP by these names: it
// gets chains for those that there is room for. A stream that begins tells of those
// that its proxy has, before anything is sent, so that none of its chains goes.
func (s *Store) hasHTTP(st *stream, listeners ...string) {
	if !st.server.opts.StraightHTTP {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.proxies[st.key]
	if p == nil || !has(p.streams, st) {
		return
	}
	accounts := map[model.Identity]struct{}{}
	for _, w := range p.proxy.Workloads {
		accounts[w.Identity] = struct{}{}
	}
	slices.Sort(listeners)
	for _, name := range listeners {
		vip, ok := parseHTTPName(name)
		if !ok || has(p.straight, vip) || !inside(s.network.ServiceCIDRs, vip.Addr()) || (len(p.straight)+1)*len(accounts) > maxStraight {
			continue
		}
		p.straight[vip] = struct{}{}
		p.invalidate()
	}
}

func inside(ranges []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(a) })
}

// invalidateStraight marks the listeners of those who have chains for an address that
// may be routed now, or not any more: in a namespace, or of all for "".
func (s *Store) invalidateStraight(vip netip.AddrPort, consumer string) {
	e := s.shared[resourceKey{TypeEndpoints, VIPName(vip)}]
	if e == nil {
		return
	}
	for st := range e.holders {
		if p := s.proxies[st.key]; p != nil && has(p.straight, vip) && (consumer == "" || st.key.Tenant.Namespace == consumer) {
			p.invalidate()
		}
	}
}
