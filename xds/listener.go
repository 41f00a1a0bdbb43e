package xds

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	filterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// listenBacklog is bounded by net.core.somaxconn (4096 by default); Envoy
	// can't read that without /proc and would take 128.
	listenBacklog = 4096
	// bufferLimit is how much a connection may buffer in one direction before its
	// peer is made to wait. Envoy's default is 1 MiB.
	bufferLimit = 256 << 10
)

// Listeners are the listeners of one proxy's new process, in the order outbound,
// inbound, plain, nodeplain, hbone, unwrap. There are always all of them. Workloads
// that can't be served are left out, and so are addresses that several identities
// claim: connections from and to them are closed. The error joins an
// *ObjectError for each; with a nil result it is about the whole.
func Listeners(n model.Network, proxy model.Proxy) ([]*listenerv3.Listener, error) {
	return listenersOf(NewestForm, n, proxy)
}

// listenersOf are Listeners in a form.
func listenersOf(f Form, n model.Network, proxy model.Proxy) ([]*listenerv3.Listener, error) {
	identities, refused := servedIdentities(n, proxy)
	p := &packer{form: f}
	log := proxy.AccessLog
	ls := []*listenerv3.Listener{
		p.outbound(n, identities, nil, proxy.RejectOutside, log),
		p.inbound(n, identities, log),
		p.plain(listenerPlain, PortPlain, clusterDeliver, log, p.originalSource()),
		p.plain(listenerNodePlain, PortNodePlain, clusterDeliverNode, log),
		p.hbone(log),
		p.unwrap(),
	}
	if err := p.err(); err != nil {
		return nil, &ObjectError{proxySource(proxy.Key()), err}
	}
	return ls, refused
}

// outboundWith is the listener outbound with chains for HTTP, by their accounts.
func outboundWith(f Form, n model.Network, proxy model.Proxy, http map[string][]httpChain) (*listenerv3.Listener, error) {
	identities, _ := servedIdentities(n, proxy) // Listeners tells of those that are refused
	p := &packer{form: f}
	l := p.outbound(n, identities, http, proxy.RejectOutside, proxy.AccessLog)
	return l, p.err()
}

// served is an identity with the addresses of its pods.
type served struct {
	identity model.Identity
	prefixes []netip.Prefix
}

// servedIdentities groups a proxy's addresses by identity, both sorted.
func servedIdentities(n model.Network, proxy model.Proxy) ([]served, error) {
	var errs []error
	owners := map[netip.Addr]model.Workload{}
	contested := map[netip.Addr]bool{}
	for _, w := range slices.SortedFunc(slices.Values(proxy.Workloads), func(a, b model.Workload) int { return cmp.Compare(a.UID, b.UID) }) {
		if err := checkServed(n, w); err != nil {
			errs = append(errs, &ObjectError{workloadSource(w), err})
			continue
		}
		for _, a := range w.IPs {
			if o, ok := owners[a]; ok && o.Identity != w.Identity {
				contested[a] = true
				errs = append(errs, &ObjectError{workloadSource(w), fmt.Errorf("address %s is also %s's, which has another identity: neither gets it", a, workloadSource(o))})
			}
			owners[a] = w
		}
	}
	by := map[model.Identity][]netip.Prefix{}
	for a, w := range owners {
		if !contested[a] {
			by[w.Identity] = append(by[w.Identity], netip.PrefixFrom(a, a.BitLen()))
		}
	}
	var out []served
	for _, id := range slices.SortedFunc(maps.Keys(by), func(a, b model.Identity) int { return cmp.Compare(identityPath(a), identityPath(b)) }) {
		slices.SortFunc(by[id], netip.Prefix.Compare)
		out = append(out, served{id, by[id]})
	}
	return out, errors.Join(errs...)
}

func checkServed(n model.Network, w model.Workload) error {
	if err := checkWorkload(w); err != nil {
		return err
	}
	if w.Identity.IsZero() {
		return errors.New("a pod outside of the mesh has no proxy")
	}
	if n.TrustDomain != "" && w.Identity.TrustDomain != n.TrustDomain {
		return fmt.Errorf("identity %s isn't of the trust domain %s", w.Identity, n.TrustDomain)
	}
	return nil
}

func (p *packer) listenerAt(name string, port uint32) *listenerv3.Listener {
	l := &listenerv3.Listener{
		Name: name, Address: anyAddress(port),
		TcpBacklogSize:                wrapperspb.UInt32(listenBacklog),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		SocketOptions:                 keepaliveOptions(),
	}
	if p.form >= formAgain {
		// Or a worker that is behind takes on all that waits, and is so much further behind
		// with what it has: what waits is to wait in the kernel (decision 63).
		l.MaxConnectionsToAcceptPerSocketEvent = wrapperspb.UInt32(1)
	}
	return l
}

// Envoy updates a listener in place, and drains only the chains that changed, as
// long as nothing but chains and matcher differ. Pods' addresses are in the
// matcher only, so that a pod that comes or goes drains nothing.

// outbound takes what the proxy's pods dial. The source address says who dials,
// the destination how to get there; a source that isn't known is closed.
func (p *packer) outbound(n model.Network, identities []served, http map[string][]httpChain, reject, log bool) *listenerv3.Listener {
	l := p.listenerAt(listenerOutbound, PortOutbound)
	l.ListenerFilters = []*listenerv3.ListenerFilter{p.originalSource()}
	logs := func() []*accesslogv3.AccessLog { return p.failureLogs(log, listenerOutbound) }
	outside := &listenerv3.FilterChain{Name: chainPass, Filters: []*listenerv3.Filter{
		p.setFilterState(destinationState()),
		p.tcpTo(clusterPassthrough, outsideAttempts, logs()),
	}}
	if reject {
		outside = &listenerv3.FilterChain{Name: chainReject, Filters: []*listenerv3.Filter{p.tcpProxy(&tcpproxyv3.TcpProxy{ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: clusterNone}}, logs())}}
	}
	var rules []rule
	for _, s := range identities {
		path, id := identityPath(s.identity), s.identity.String()
		// A service's address: its endpoints lead to the listener hbone, or to plain
		// pods. Nothing has been sent when a connection to a plain one fails, so the
		// next may have it.
		l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{Name: "via/" + path, Filters: []*listenerv3.Filter{
			p.setFilterState(sourceState(clientAddress), identityState(id), clusterState(vipPrefix+"%DOWNSTREAM_LOCAL_ADDRESS%")),
			p.tcpOnDemand(&tcpproxyv3.TcpProxy{MaxConnectAttempts: wrapperspb.UInt32(2)}, logs()),
		}})
		// A pod's address: one tunnel, straight to it.
		l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{Name: "pod/" + path, Filters: []*listenerv3.Filter{
			p.setFilterState(identityState(id), clusterState(podPrefix+"%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%")),
			p.tcpOnDemand(func() *tcpproxyv3.TcpProxy {
				t := tunnel()
				t.TunnelingConfig.HeadersToAdd = sourceHeader()
				return t
			}(), logs()),
		}})
		via := p.toChain("via/" + path)
		rules = append(rules, rule{s.prefixes, &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Matcher{
			Matcher: p.byDestination(append([]rule{
				{n.ServiceCIDRs, via},
				{n.PodCIDRs, p.toChain("pod/" + path)},
			}, p.straight(l, s, http[path], via)...), p.toChain(outside.Name)),
		}}})
	}
	l.FilterChains = append(l.FilterChains, outside)
	l.FilterChainMatcher = p.bySource(rules, nil)
	return l
}

// chainPass takes what goes out of the cluster, or to its nodes.
const (
	chainPass = "pass"
	// chainReject closes that, and writes it to the log. What went on when it takes
	// the place of the other is drained.
	chainReject = "reject"
	clusterNone = "rejected" // there is no such cluster
)

// tunnel is a CONNECT to the address that was dialled. There is no second
// attempt: a refused CONNECT isn't to be tried elsewhere.
func tunnel() *tcpproxyv3.TcpProxy {
	return &tcpproxyv3.TcpProxy{
		MaxConnectAttempts: wrapperspb.UInt32(1),
		TunnelingConfig:    &tcpproxyv3.TcpProxy_TunnelingConfig{Hostname: "%DOWNSTREAM_LOCAL_ADDRESS%"},
	}
}

// plain takes plain text for the proxy's pods. The kernel sends nothing here that
// isn't for one of them.
func (p *packer) plain(name string, port uint32, cluster string, log bool, filters ...*listenerv3.ListenerFilter) *listenerv3.Listener {
	l := p.listenerAt(name, port)
	l.ListenerFilters = filters
	l.FilterChains = []*listenerv3.FilterChain{{Name: name, Filters: []*listenerv3.Filter{
		p.setFilterState(destinationState()),
		p.tcpTo(cluster, localAttempts, p.logs(log, name, tcpLog)),
	}}}
	return l
}

func internalListener(name string, listenerFilters []*listenerv3.ListenerFilter, filters ...*listenerv3.Filter) *listenerv3.Listener {
	return &listenerv3.Listener{
		Name:                          name,
		ListenerSpecifier:             &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		ListenerFilters:               listenerFilters,
		FilterChains:                  []*listenerv3.FilterChain{{Name: name, Filters: filters}},
	}
}

// hbone tunnels a connection to the endpoint that the load balancer chose: its
// address, the client's, the client's identity and the server's come with the
// connection. (tunneling_config of the outbound chain can't name the endpoint: it
// is formatted before the choice.)
func (p *packer) hbone(log bool) *listenerv3.Listener {
	const key = "envoy.network.upstream_subject_alt_names"
	return internalListener(listenerHBONE,
		append(p.originalAddresses(), p.originalSource()),
		p.setFilterState(
			tunnelHost(),
			// An endpoint that says nothing of its identity has none, rather than any.
			filterState(key, "", noIdentity, filterstatev3.FilterStateValue_NONE),
			filterState(key, "", "%DYNAMIC_METADATA(bulkhead:san)%", filterstatev3.FilterStateValue_NONE),
		),
		p.awaitTunnelHost(),
		p.tcpProxy(func() *tcpproxyv3.TcpProxy {
			t := tunnel()
			t.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: clusterHBONE}
			return t
		}(), p.failureLogs(log, listenerHBONE)))
}
