package xds

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	networkinputsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// A process that has an address's listener for HTTP and its routes reads requests to it
// where connections come in: a chain for each account and address, of the same
// connection manager with the same routes. The way through the cluster of the address
// and the internal listener, which costs a fifth of a request's CPU, is for connections
// that come before the chains are there, and for those that there is no place for.
//
// Chains are of one process, not of all of its proxy: another one asks for the address
// itself, at its first connection. Envoy ends the connections of a chain that goes. So
// a chain stays when its address ceases to be HTTP, with routes to the service itself,
// and only nothing leads to it any more. Its place is given back with the process, with
// the account's last pod, and, if another is in want of it, when nobody has had the
// address for UnknownFor.
//
// A server that the process comes to later has to know which chains it has, and the
// process tells it: the version of the listener outbound has a mark for each.

// maxHTTPChains bounds the chains of one process: each that is added makes all of the
// listener go there once more, and the marks of more wouldn't fit into a version.
const maxHTTPChains = 120

// straight are the chains for HTTP of one process. Store.mu guards it.
type straight struct {
	// accounts have a chain for an address. They are named by identityPath.
	accounts map[netip.AddrPort]map[string]struct{}
	// unknown are addresses with chains that nobody has, as far as known: since when.
	unknown map[netip.AddrPort]time.Time
	// outbound is the listener with these chains, made from base, unless it is stale.
	base, outbound *resource
	stale          bool
}

func (h *straight) chains() (n int) {
	for _, accounts := range h.accounts {
		n += len(accounts)
	}
	return n
}

// httpChain is a chain of an account for an address.
type httpChain struct {
	vip netip.AddrPort
	// routed says that new connections are led to it.
	routed bool
}

// straight adds an account's chains to outbound, and returns what leads to them: from
// each address by its ports, and from other ports otherwise.
func (p *packer) straight(l *listenerv3.Listener, s served, chains []httpChain, otherwise *matcherv3.Matcher_OnMatch) (rules []rule) {
	path, id := identityPath(s.identity), s.identity.String()
	ports := map[netip.Addr]map[string]*matcherv3.Matcher_OnMatch{}
	for _, c := range chains {
		name := "http/" + path + "/" + c.vip.String()
		l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{Name: name, Filters: []*listenerv3.Filter{
			p.setFilterState(sourceState(clientAddress), identityState(id)),
			p.httpManager(c.vip),
		}})
		if !c.routed {
			continue
		}
		if ports[c.vip.Addr()] == nil {
			ports[c.vip.Addr()] = map[string]*matcherv3.Matcher_OnMatch{}
		}
		ports[c.vip.Addr()][fmt.Sprint(c.vip.Port())] = p.toChain(name)
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

// outbound is the listener outbound of a process: its proxy's, with the chains of its
// own. Its seq is the proxy's: chains for HTTP make no pod be served.
func (s *Store) outbound(st *stream, p *proxyState) *resource {
	f := st.form(listenerOutbound)
	base := s.listeners(p, f).listeners[listenerOutbound]
	h := &st.straight
	if base == nil || h.base == base && !h.stale {
		return cmp.Or(h.outbound, base)
	}
	h.base, h.stale = base, false
	identities, _ := servedIdentities(s.network, p.proxy)
	s.arrange(st, identities)
	if len(h.accounts) == 0 {
		h.outbound = base
		return base
	}
	by := map[string][]httpChain{}
	var marks []string
	for _, vip := range slices.SortedFunc(maps.Keys(h.accounts), compareAddrPorts) {
		_, _, routed := s.routing(vip, st.key.Tenant.Namespace)
		for account := range h.accounts[vip] {
			by[account] = append(by[account], httpChain{vip, routed})
			marks = append(marks, chainMark(account, vip))
		}
	}
	s.builds++
	l, err := outboundWith(f, s.network, p.proxy, by)
	var r *resource
	if err == nil {
		r, err = encode(listenerOutbound, proxySource(st.key), l)
	}
	if err != nil {
		s.refuse(TypeListener, listenerOutbound, err)
		return cmp.Or(h.outbound, base)
	}
	slices.Sort(marks)
	f.mark(r)
	r.wire.Version += marksBegin + strings.Join(marks, "")
	r.seq, h.outbound = base.seq, r
	return r
}

// arrange takes away the chains of accounts that the proxy doesn't serve any more, and
// gives chains to those that lack them for an address that the process can read, as
// long as there are places.
func (s *Store) arrange(st *stream, identities []served) {
	h := &st.straight
	for vip, accounts := range h.accounts {
		maps.DeleteFunc(accounts, func(account string, _ struct{}) bool {
			return !slices.ContainsFunc(identities, func(s served) bool { return identityPath(s.identity) == account })
		})
		_, known := s.vips[vip]
		switch since := h.unknown[vip]; {
		case len(accounts) == 0:
			s.dropChains(st, vip)
		case known:
			delete(h.unknown, vip)
		case since.IsZero():
			h.unknown[vip] = time.Now()
		}
	}
	if len(identities) == 0 || st.outOfChains() {
		return // and no need to look at all that it has
	}
	candidates := slices.DeleteFunc(st.readable(), func(vip netip.AddrPort) bool { return !s.straightAt(st, vip) })
	slices.SortFunc(candidates, compareAddrPorts)
	for _, vip := range candidates {
		for _, id := range identities {
			if has(h.accounts[vip], identityPath(id.identity)) {
				continue
			}
			if h.chains() >= st.server.opts.MaxHTTPChains && !s.giveBack(st) {
				return
			}
			s.addChain(st, identityPath(id.identity), vip)
		}
	}
}

// straightAt reports whether an address may have chains: connections to it are led to
// them.
func (s *Store) straightAt(st *stream, vip netip.AddrPort) bool {
	_, _, routed := s.routing(vip, st.key.Tenant.Namespace)
	return routed && s.servicesAt(vip)
}

// outOfChains reports whether there is no place for a chain, and none that can be given back.
func (st *stream) outOfChains() bool {
	h := &st.straight
	if h.chains() < st.server.opts.MaxHTTPChains {
		return false
	}
	for _, since := range h.unknown {
		if time.Since(since) >= st.server.opts.UnknownFor {
			return false
		}
	}
	return true
}

// giveBack makes places of the address that nobody has had for longest, if that is long
// enough.
func (s *Store) giveBack(st *stream) bool {
	h := &st.straight
	var oldest netip.AddrPort
	for vip, since := range h.unknown {
		if time.Since(since) >= st.server.opts.UnknownFor && (!oldest.IsValid() || since.Before(h.unknown[oldest])) {
			oldest = vip
		}
	}
	if oldest.IsValid() {
		s.dropChains(st, oldest)
	}
	return oldest.IsValid()
}

func (s *Store) addChain(st *stream, account string, vip netip.AddrPort) {
	h := &st.straight
	if h.accounts == nil {
		h.accounts, h.unknown = map[netip.AddrPort]map[string]struct{}{}, map[netip.AddrPort]time.Time{}
	}
	if h.accounts[vip] == nil {
		h.accounts[vip] = map[string]struct{}{}
	}
	h.accounts[vip][account] = struct{}{}
	if s.reading[vip] == nil {
		s.reading[vip] = map[*stream]struct{}{}
	}
	s.reading[vip][st] = struct{}{}
}

// dropChains takes away all chains of an address.
func (s *Store) dropChains(st *stream, vip netip.AddrPort) {
	delete(st.straight.accounts, vip)
	delete(st.straight.unknown, vip)
	if delete(s.reading[vip], st); len(s.reading[vip]) == 0 {
		delete(s.reading, vip)
	}
}

// servicesAt reports whether addresses of services are there: only connections to them
// are looked up.
func (s *Store) servicesAt(vip netip.AddrPort) bool {
	return slices.ContainsFunc(s.network.ServiceCIDRs, func(r netip.Prefix) bool { return r.Contains(vip.Addr()) })
}

func compareAddrPorts(a, b netip.AddrPort) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Port(), b.Port()))
}

// readable are the addresses whose listener for HTTP and routes the process has
// acknowledged. Without the routes, Envoy would hold the whole listener back for them.
func (st *stream) readable() (out []netip.AddrPort) {
	st.mu.Lock()
	defer st.mu.Unlock()
	listeners, routes := st.types[TypeListener], st.types[TypeRoutes]
	if listeners == nil || routes == nil {
		return nil
	}
	for name := range listeners.held {
		if vip, ok := parseHTTPName(name); ok && listeners.has(name) && routes.has(name) {
			out = append(out, vip)
		}
	}
	return out
}

// reads reports whether an address is among those.
func (st *stream) reads(vip netip.AddrPort) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	listeners, routes, name := st.types[TypeListener], st.types[TypeRoutes], HTTPName(vip)
	return listeners != nil && routes != nil && listeners.has(name) && routes.has(name)
}

// has reports whether the process has acknowledged a resource.
func (sub *subscription) has(name string) bool {
	return sub.held[name] != nil && sub.held[name].acked != ""
}

// read is called when a process has acknowledged an address's listener for HTTP or its
// routes, or with the zero address when it has told of all the routes that it has. It may
// acknowledge as often as it likes: all is looked at only if there will be another chain.
func (s *Store) read(st *stream, vip netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &st.straight
	if _, has := h.accounts[vip]; has || st.outOfChains() || vip.IsValid() && !(s.straightAt(st, vip) && st.reads(vip)) {
		return
	}
	h.stale = true
	st.mark(TypeListener, wildcardName, false)
}

// resumeChains takes in the chains that a process has when its stream begins, by what it
// tells of its listeners. It comes before anything can be sent, so that none of them goes.
func (s *Store) resumeChains(st *stream, listeners map[string]string) {
	marks := chainMarks(listeners[listenerOutbound])
	if len(marks) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.proxies[st.key]
	if p == nil || !has(p.streams, st) {
		return
	}
	identities, _ := servedIdentities(s.network, p.proxy)
	for name := range listeners {
		vip, ok := parseHTTPName(name)
		if !ok || !s.servicesAt(vip) {
			continue
		}
		for _, id := range identities {
			if account := identityPath(id.identity); has(marks, chainMark(account, vip)) {
				s.addChain(st, account, vip)
			}
		}
	}
	st.straight.stale = true // who waits for a pod may have had it built without them
}

// A mark is of 48 bits, so that it is of one chain alone.
const (
	marksBegin = "."
	markLength = 8
)

func chainMark(account string, vip netip.AddrPort) string {
	sum := sha256.Sum256([]byte(account + "/" + vip.String()))
	return base64.RawURLEncoding.EncodeToString(sum[:markLength*6/8])
}

// chainMarks are those in a version of outbound, of what may be one of ours.
func chainMarks(version string) map[string]struct{} {
	if len(version) > model.MaxVersion {
		return nil
	}
	_, all, _ := strings.Cut(version, marksBegin)
	marks := map[string]struct{}{}
	for mark := range slices.Chunk([]byte(all), markLength) {
		marks[string(mark)] = struct{}{}
	}
	return marks
}

// invalidateStraight marks the listener outbound of those who have chains for an address
// that may be routed now, or not any more: in a namespace, or of all for "".
func (s *Store) invalidateStraight(vip netip.AddrPort, consumer string) {
	for st := range s.reading[vip] {
		if consumer == "" || st.key.Tenant.Namespace == consumer {
			st.straight.stale = true
			st.mark(TypeListener, wildcardName, false)
		}
	}
}
