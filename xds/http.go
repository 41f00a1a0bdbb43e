package xds

import (
	"net/netip"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	httporiginalsrcv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/original_src/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	upstreamhttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// A service's address that is spoken to as HTTP keeps its cluster; its endpoint
// becomes an internal listener, in whose connection manager the requests are
// routed. So connections that exist stay with the endpoint that they have when a
// service becomes HTTP or ceases to be. The listener is constant, its routes are a
// resource of their own, and a change of them ends no connection either.
//
// That is how the first connections go. A process that has the listener and its routes
// gets the same connection manager in chains of its listener outbound as well, and those
// that begin from then on save the way through two listeners (see straight.go).

// backendIdle is how long a connection to a backend stays without a request. It is
// below the shortest that common servers close theirs after (5 s), or now and then
// a request would meet a connection that is just being closed.
const backendIdle = 4 * time.Second

// Requests that are sent again at a time are at most this share, in percent, of all that
// are under way to a backend, themselves included, so as many as others: a backend that
// fails gets twice its load at most, however often routes try. minRetries may be always,
// for what a server takes along that goes.
const (
	retryShare = 50
	minRetries = 256
)

// HTTPEndpoints are the endpoints of a service's address that is spoken to as HTTP.
func HTTPEndpoints(vip netip.AddrPort) *endpointv3.ClusterLoadAssignment {
	return &endpointv3.ClusterLoadAssignment{
		ClusterName: VIPName(vip),
		Endpoints: []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{
			HostIdentifier: endpoint(internalAddress(HTTPName(vip), vip.String())),
			Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
				metadataDestination: structOf("local", structpb.NewStringValue(vip.String())),
			}},
		}}}},
	}
}

// HTTPListener is the internal listener of a service's address that is spoken to
// as HTTP. Nothing is added to a request or counted about it that nobody reads.
func HTTPListener(vip netip.AddrPort) (*listenerv3.Listener, error) {
	return httpListenerOf(NewestForm, vip)
}

// httpListenerOf is HTTPListener in a form.
func httpListenerOf(f Form, vip netip.AddrPort) (*listenerv3.Listener, error) {
	p := &packer{form: f}
	l := internalListener(HTTPName(vip), p.originalAddresses(), p.httpManager(vip, p.originalSourceOfRequests()))
	return l, p.err()
}

// originalSourceOfRequests makes upstream connections leave from the client's address, and
// so pools be each source's own. Where the listener does, it isn't needed.
func (p *packer) originalSourceOfRequests() *hcmv3.HttpFilter {
	return p.httpFilter("envoy.filters.http.original_src", &httporiginalsrcv3.OriginalSrc{})
}

// httpManager is the connection manager of an address: the same for all accounts.
func (p *packer) httpManager(vip netip.AddrPort, filters ...*hcmv3.HttpFilter) *listenerv3.Filter {
	return p.filter("envoy.filters.network.http_connection_manager", &hcmv3.HttpConnectionManager{
		StatPrefix: "l7",
		// The first bytes of a client tell HTTP/1 from HTTP/2; nothing waits for them
		// that would have gone on without.
		CodecType: hcmv3.HttpConnectionManager_AUTO,
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			ConfigSource: ads(), RouteConfigName: HTTPName(vip),
		}},
		HttpFilters: append(filters,
			p.httpFilter("envoy.filters.http.router", &routerv3.Router{SuppressEnvoyHeaders: true, DynamicStats: wrapperspb.Bool(false)})),
		OriginalIpDetectionExtensions: p.believeConnection(),
		Http2ProtocolOptions:          applicationHTTP2(),
		// A server has an answer for a client of HTTP/1.0, so it has one here. Every
		// request that goes on needs a host.
		HttpProtocolOptions: &corev3.Http1ProtocolOptions{AcceptHttp_10: true, DefaultHostForHttp_10: vip.String()},
		// Whether a body is wanted is the server's to say.
		Proxy_100Continue:          true,
		UpgradeConfigs:             []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		ServerHeaderTransformation: hcmv3.HttpConnectionManager_PASS_THROUGH,
		GenerateRequestId:          wrapperspb.Bool(false),
		SkipXffAppend:              true,
		NormalizePath:              wrapperspb.Bool(true), // or a route could be passed by
		// Idle connections and requests are the applications' business.
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(0)},
		StreamIdleTimeout:         durationpb.New(0),
	})
}

// applicationHTTP2 are windows as applications know them from each other.
func applicationHTTP2() *corev3.Http2ProtocolOptions {
	return &corev3.Http2ProtocolOptions{
		InitialStreamWindowSize:     wrapperspb.UInt32(bufferLimit),
		InitialConnectionWindowSize: wrapperspb.UInt32(4 * bufferLimit),
	}
}

// BackendCluster is the cluster of a service's port as a backend of routes, with
// endpoints of one address family.
func BackendCluster(b Backend, protocol model.Protocol) (*clusterv3.Cluster, error) {
	p := &packer{}
	c := p.endpointCluster(b.String())
	// In the place of the bound that all clusters have.
	c.CircuitBreakers.Thresholds[0].RetryBudget = &clusterv3.CircuitBreakers_Thresholds_RetryBudget{
		BudgetPercent: &typev3.Percent{Value: retryShare}, MinRetryConcurrency: wrapperspb.UInt32(minRetries),
	}
	p.speakHTTP(c, protocol)
	return c, p.err()
}

// speakHTTP has a cluster speak a protocol to its endpoints, or the client's.
func (p *packer) speakHTTP(c *clusterv3.Cluster, protocol model.Protocol) {
	o := &upstreamhttpv3.HttpProtocolOptions{CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(backendIdle)}}
	explicit := func(e *upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig) {
		o.UpstreamProtocolOptions = &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: e}
	}
	switch protocol {
	case model.ProtocolHTTP1:
		explicit(&upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &corev3.Http1ProtocolOptions{}}})
	case model.ProtocolHTTP2:
		explicit(&upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: applicationHTTP2()}})
	default:
		o.UpstreamProtocolOptions = &upstreamhttpv3.HttpProtocolOptions_UseDownstreamProtocolConfig{UseDownstreamProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_UseDownstreamHttpConfig{
			HttpProtocolOptions: &corev3.Http1ProtocolOptions{}, Http2ProtocolOptions: applicationHTTP2(),
		}}
	}
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptions: p.any(o)}
}

// BackendEndpoints are the endpoints of a backend, as clients at a place have them;
// none for the zero Service.
func BackendEndpoints(b Backend, s model.Service, from Place) *endpointv3.ClusterLoadAssignment {
	return endpointsOf(b.String(), b.IPv6, portNumbered(s, b.Port), from)
}
