package xds

import (
	"math"
	"net/netip"
	"time"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	filterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	originalsrcv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_src/v3"
	listenerfilterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/set_filter_state/v3"
	setfilterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	xffv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/original_ip_detection/xff/v3"
	networkinputsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	// odcdsTimeout is how long a first connection waits for its cluster; without
	// one it hangs.
	odcdsTimeout = 5 * time.Second
	// connectTimeout includes the fetch of a client certificate.
	connectTimeout = 5 * time.Second

	keepaliveInterval = 30 * time.Second
	keepaliveTimeout  = 5 * time.Second
)

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

func socketAddress(addr string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: addr, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

// anyAddress listens on all addresses of both families with one socket.
func anyAddress(port uint32) *corev3.Address {
	a := socketAddress("::", port)
	a.GetSocketAddress().Ipv4Compat = true
	return a
}

func internalAddress(listener, endpoint string) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
		AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: listener},
		EndpointId:           endpoint,
	}}}
}

// Socket options by number: Envoy's field for each is newer than 1.39 or missing.
const (
	solSocket, soKeepalive                            = 1, 9
	ipprotoIP, ipBindAddressNoPort                    = 0, 24
	ipprotoTCP, tcpUserTimeout                        = 6, 18
	tcpKeepidle, tcpKeepintvl, tcpKeepcnt             = 4, 5, 6
	keepidleSeconds, keepintvlSeconds, keepaliveCount = 120, 15, 4
)

func socketOption(description string, level, name, value int64) *corev3.SocketOption {
	return &corev3.SocketOption{
		Description: description, Level: level, Name: name,
		Value: &corev3.SocketOption_IntValue{IntValue: value}, State: corev3.SocketOption_STATE_PREBIND,
	}
}

// keepaliveOptions find out that a peer is gone without a word: idle connections
// are never closed, for the applications at both ends don't expect it.
func keepaliveOptions() []*corev3.SocketOption {
	return []*corev3.SocketOption{
		socketOption("SO_KEEPALIVE", solSocket, soKeepalive, 1),
		socketOption("TCP_KEEPIDLE", ipprotoTCP, tcpKeepidle, keepidleSeconds),
		socketOption("TCP_KEEPINTVL", ipprotoTCP, tcpKeepintvl, keepintvlSeconds),
		socketOption("TCP_KEEPCNT", ipprotoTCP, tcpKeepcnt, keepaliveCount),
	}
}

// filterState sets key from a format string; an empty result leaves it as it was.
func filterState(key, factory, format string, share filterstatev3.FilterStateValue_SharedWithUpstream) *filterstatev3.FilterStateValue {
	return &filterstatev3.FilterStateValue{
		Key:        &filterstatev3.FilterStateValue_ObjectKey{ObjectKey: key},
		FactoryKey: factory,
		Value: &filterstatev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{
			Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
				Specifier: &corev3.DataSource_InlineString{InlineString: format},
			}},
		}},
		SharedWithUpstream: share,
		SkipIfEmpty:        true,
	}
}

// keyIdentity is where a connection's identity is kept.
const keyIdentity = "envoy.tls.certificate_mappers.on_demand_secret"

// identityState makes the connection's upstream present id's certificate.
// envoy.hashable_string puts it into the key of every connection pool;
// envoy.string, the default, would lend one identity's connections to another.
func identityState(id string) *filterstatev3.FilterStateValue {
	return filterState(keyIdentity, "envoy.hashable_string", id, filterstatev3.FilterStateValue_TRANSITIVE)
}

// clusterState picks the connection's cluster, by on-demand name.
func clusterState(format string) *filterstatev3.FilterStateValue {
	return filterState("envoy.tcp_proxy.cluster", "", format, filterstatev3.FilterStateValue_NONE)
}

// destinationState tells ORIGINAL_DST clusters where the connection was going:
// sk_lookup leaves nothing that SO_ORIGINAL_DST could restore.
func destinationState() *filterstatev3.FilterStateValue {
	return filterState("envoy.network.transport_socket.original_dst_address", "", "%DOWNSTREAM_LOCAL_ADDRESS%", filterstatev3.FilterStateValue_NONE)
}

// What is shared with upstreams and can be hashed is in the keys of their pools, one
// after the other in the order in which a hash table has it: with two values there
// are two pools, and tunnels, for the same thing, with four there are 24. So there is
// one, the identity. The client's address is shared as a text, which isn't in a key:
// there it is because the filters original_src bind connections to it.

// keySource is where a connection's source is kept on the way through internal
// listeners, and keyRemote where they find it.
const (
	keySource = "bulkhead.source"
	keyRemote = "envoy.filters.listener.original_dst.remote_ip"
)

// sourceState carries the client's address through internal listeners.
func sourceState(address string) *filterstatev3.FilterStateValue {
	return filterState(keySource, "envoy.string", address, filterstatev3.FilterStateValue_TRANSITIVE)
}

// clientAddress is the client's, of a connection or a request.
const clientAddress = "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"

// believeConnection has a connection manager take the client's address from the
// connection. Without it, what the client wrote into X-Forwarded-For would be its
// address, for pools and for the socket that is bound to it. (use_remote_address does
// the same, but replaces X-Forwarded-Proto.)
func (p *packer) believeConnection() []*corev3.TypedExtensionConfig {
	return []*corev3.TypedExtensionConfig{p.ext("envoy.http.original_ip_detection.xff", &xffv3.XffConfig{
		// More hops than a header can name.
		XffNumTrustedHops: math.MaxUint32,
	})}
}

// originalAddresses restores an internal connection's addresses. The client's has port
// 0. Of the two spellings the one of the wrong family doesn't parse and is skipped.
func (p *packer) originalAddresses() []*listenerv3.ListenerFilter {
	const source = "%FILTER_STATE(" + keySource + ":PLAIN)%"
	return []*listenerv3.ListenerFilter{
		p.listenerFilter("envoy.filters.listener.set_filter_state", &listenerfilterstatev3.Config{OnAccept: []*filterstatev3.FilterStateValue{
			filterState(keyRemote, "", source+":0", filterstatev3.FilterStateValue_NONE),
			filterState(keyRemote, "", "["+source+"]:0", filterstatev3.FilterStateValue_NONE),
		}}),
		p.originalDestination(),
	}
}

func (p *packer) filter(name string, m proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: p.any(m)}}
}

func (p *packer) setFilterState(values ...*filterstatev3.FilterStateValue) *listenerv3.Filter {
	return p.filter("envoy.filters.network.set_filter_state", &setfilterstatev3.Config{OnNewConnection: values})
}

func (p *packer) listenerFilter(name string, m proto.Message) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: name, ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: p.any(m)}}
}

// originalSource makes upstream connections leave from the client's address.
func (p *packer) originalSource() *listenerv3.ListenerFilter {
	return p.listenerFilter("envoy.filters.listener.original_src", &originalsrcv3.OriginalSrc{})
}

// originalDestination restores an internal connection's addresses, as far as they came
// with it.
func (p *packer) originalDestination() *listenerv3.ListenerFilter {
	return p.listenerFilter("envoy.filters.listener.original_dst", &originaldstv3.OriginalDst{})
}

// tcpProxy never closes an idle connection.
func (p *packer) tcpProxy(t *tcpproxyv3.TcpProxy, logs []*accesslogv3.AccessLog) *listenerv3.Filter {
	t.StatPrefix = "tcp"
	t.IdleTimeout = durationpb.New(0)
	t.AccessLog = logs
	return p.filter("envoy.filters.network.tcp_proxy", t)
}

// A connection that a proxy opens as a pod's client, or as the pod, has a port that the
// proxy chose, and may meet one that is another's still: of a former tenant (decision 31).
// The kernel refuses it at once, and the next attempt has another port. Envoy doesn't tell
// what is refused from what doesn't answer, which takes connectTimeout each time. So there
// are more attempts to where only a pod of this node can be, than to elsewhere.
const (
	localAttempts   = 4
	outsideAttempts = 2
)

// attempts is n, or nil in forms that try once.
func (p *packer) attempts(n uint32) *wrapperspb.UInt32Value {
	if p.form < formAgain {
		return nil
	}
	return wrapperspb.UInt32(n)
}

// tcpTo goes to a cluster, which has as many attempts.
func (p *packer) tcpTo(cluster string, attempts uint32, logs []*accesslogv3.AccessLog) *listenerv3.Filter {
	return p.tcpProxy(&tcpproxyv3.TcpProxy{
		ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: cluster}, MaxConnectAttempts: p.attempts(attempts),
	}, logs)
}

// tcpOnDemand goes to the cluster that clusterState named.
func (p *packer) tcpOnDemand(t *tcpproxyv3.TcpProxy, logs []*accesslogv3.AccessLog) *listenerv3.Filter {
	t.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: "never"} // there is no such cluster
	t.OnDemand = &tcpproxyv3.TcpProxy_OnDemand{OdcdsConfig: ads(), Timeout: durationpb.New(odcdsTimeout)}
	return p.tcpProxy(t, logs)
}

// rule sends addresses in ranges to match.
type rule struct {
	ranges []netip.Prefix
	match  *matcherv3.Matcher_OnMatch
}

// toChain picks a filter chain by name.
func (p *packer) toChain(name string) *matcherv3.Matcher_OnMatch {
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Action{Action: &xdscorev3.TypedExtensionConfig{
		Name: name, TypedConfig: p.any(wrapperspb.String(name)),
	}}}
}

// byAddress matches the longest prefix. Rules without ranges are left out, and
// without any rule, otherwise is all that is left; nil closes the connection.
func (p *packer) byAddress(input proto.Message, rules []rule, otherwise *matcherv3.Matcher_OnMatch) *matcherv3.Matcher {
	m := &matcherv3.IPMatcher{}
	for _, r := range rules {
		if len(r.ranges) == 0 {
			continue
		}
		rm := &matcherv3.IPMatcher_IPRangeMatcher{OnMatch: r.match}
		for _, prefix := range r.ranges {
			rm.Ranges = append(rm.Ranges, &xdscorev3.CidrRange{
				AddressPrefix: prefix.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(prefix.Bits())),
			})
		}
		m.RangeMatchers = append(m.RangeMatchers, rm)
	}
	if len(m.RangeMatchers) == 0 {
		return &matcherv3.Matcher{OnNoMatch: otherwise}
	}
	return &matcherv3.Matcher{
		MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{
			Input:    &xdscorev3.TypedExtensionConfig{Name: "address", TypedConfig: p.any(input)},
			TreeType: &matcherv3.Matcher_MatcherTree_CustomMatch{CustomMatch: &xdscorev3.TypedExtensionConfig{Name: "ip", TypedConfig: p.any(m)}},
		}},
		OnNoMatch: otherwise,
	}
}

func (p *packer) bySource(rules []rule, otherwise *matcherv3.Matcher_OnMatch) *matcherv3.Matcher {
	return p.byAddress(&networkinputsv3.SourceIPInput{}, rules, otherwise)
}

func (p *packer) byDestination(rules []rule, otherwise *matcherv3.Matcher_OnMatch) *matcherv3.Matcher {
	return p.byAddress(&networkinputsv3.DestinationIPInput{}, rules, otherwise)
}
