package xds

import (
	"cmp"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httporiginalsrcv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/original_src/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	earlymutationv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	customheaderv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/original_ip_detection/custom_header/v3"
	typematcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	exprv1alpha1 "google.golang.org/genproto/googleapis/api/expr/v1alpha1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// HTTP/2 windows of tunnels. A stream is one connection of an application, and
// its window bounds what one direction of it can have under way or waiting for a
// slow reader. The connection's window holds that of all streams, so that slow
// readers can't stop the others that share the tunnel.
const (
	streamWindow     = 1 << 20
	maxStreams       = 64
	connectionWindow = streamWindow * maxStreams
)

func http2Options() *corev3.Http2ProtocolOptions {
	return &corev3.Http2ProtocolOptions{
		AllowConnect:                true,
		MaxConcurrentStreams:        wrapperspb.UInt32(maxStreams),
		InitialStreamWindowSize:     wrapperspb.UInt32(streamWindow),
		InitialConnectionWindowSize: wrapperspb.UInt32(connectionWindow),
		ConnectionKeepalive: &corev3.KeepaliveSettings{
			Interval: durationpb.New(keepaliveInterval), Timeout: durationpb.New(keepaliveTimeout),
		},
	}
}

// inbound ends tunnels for the proxy's pods: one chain per identity, chosen by
// the pod that was dialled; an address that isn't known is closed.
func (p *packer) inbound(n model.Network, identities []served, log bool) *listenerv3.Listener {
	l := p.listenerAt(listenerInbound, PortInbound)
	var rules []rule
	for _, s := range identities {
		name := "in/" + identityPath(s.identity)
		l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{
			Name:            name,
			TransportSocket: p.downstreamTLS(s.identity.String()),
			Filters: []*listenerv3.Filter{p.connectManager(listenerInbound, localAttempts, cmp.Or(n.TunnelAge, tunnelAge), p.logs(log, listenerInbound, inboundLog), p.ownAddress(),
				p.authorize("spiffe://"+n.TrustDomain+"/"))},
		})
		rules = append(rules, rule{s.prefixes, p.toChain(name)})
	}
	if len(l.FilterChains) == 0 {
		// Envoy wants a chain, but nothing leads to it: there is no pod yet.
		l.FilterChains = []*listenerv3.FilterChain{{Name: noIdentity, Filters: []*listenerv3.Filter{
			p.tcpProxy(&tcpproxyv3.TcpProxy{ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: noIdentity}}, nil),
		}}}
	}
	l.FilterChainMatcher = p.byDestination(rules, nil)
	return l
}

// unwrap ends tunnels that this very proxy made for a pod outside of the mesh:
// there is one way out for pod addresses, whoever lives there.
func (p *packer) unwrap() *listenerv3.Listener {
	return internalListener(listenerUnwrap, []*listenerv3.ListenerFilter{p.originalDestination()},
		p.connectManager(listenerUnwrap, outsideAttempts, 0, nil, nil))
}

// headerSource tells unwrap the client's address: a tunnel is shared by clients. It
// is on CONNECTs to other proxies too, which see that address as the tunnel's own;
// no other listener reads it.
const headerSource = "x-bulkhead-source"

func sourceHeader() []*corev3.HeaderValueOption {
	return []*corev3.HeaderValueOption{{
		Header:       &corev3.HeaderValue{Key: headerSource, Value: clientAddress},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}}
}

// connectManager takes CONNECTs and delivers them to their authority, from the
// client's address, with as many attempts. A connection that is older than age, if there
// is one, gets no new streams: Envoy doesn't look at a peer's certificate again.
func (p *packer) connectManager(name string, attempts uint32, age time.Duration, logs []*accesslogv3.AccessLog, early []*corev3.TypedExtensionConfig, filters ...*hcmv3.HttpFilter) *listenerv3.Filter {
	upgrade := &routev3.RouteAction_UpgradeConfig{UpgradeType: "CONNECT", ConnectConfig: &routev3.RouteAction_UpgradeConfig_ConnectConfig{}}
	var common *corev3.HttpProtocolOptions
	if age > 0 {
		common = &corev3.HttpProtocolOptions{MaxConnectionDuration: durationpb.New(age)}
	}
	manager := &hcmv3.HttpConnectionManager{
		StatPrefix:                name,
		CommonHttpProtocolOptions: common,
		CodecType:                 hcmv3.HttpConnectionManager_HTTP2,
		HttpFilters: append(filters,
			p.httpFilter("envoy.filters.http.original_src", &httporiginalsrcv3.OriginalSrc{}),
			p.httpFilter("envoy.filters.http.router", &routerv3.Router{})),
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
			VirtualHosts: []*routev3.VirtualHost{{Name: name, Domains: []string{"*"}, RequestBodyBufferLimit: p.keepForRetry(), Routes: []*routev3.Route{{
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_ConnectMatcher_{ConnectMatcher: &routev3.RouteMatch_ConnectMatcher{}}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{
					ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: clusterDeliverHTTP},
					Timeout:          durationpb.New(0),
					RetryPolicy:      p.retryConnect(attempts),
					UpgradeConfigs:   []*routev3.RouteAction_UpgradeConfig{upgrade},
				}},
			}}}},
		}},
		EarlyHeaderMutationExtensions: early,
		Http2ProtocolOptions:          http2Options(),
		UpgradeConfigs:                []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "CONNECT"}},
		RequestHeadersTimeout:         durationpb.New(connectTimeout),
		MaxRequestHeadersKb:           wrapperspb.UInt32(8),
		// Applications keep connections idle for longer than Envoy's five minutes.
		StreamIdleTimeout: durationpb.New(0),
		AccessLog:         logs,

		OriginalIpDetectionExtensions: p.believeConnection(),
	}
	if name == listenerUnwrap {
		manager.OriginalIpDetectionExtensions = []*corev3.TypedExtensionConfig{
			p.ext("envoy.http.original_ip_detection.custom_header", &customheaderv3.CustomHeaderConfig{HeaderName: headerSource}),
		}
	}
	return p.filter("envoy.filters.network.http_connection_manager", manager)
}

// retryConnect has a CONNECT connected with as many attempts; nil in forms that try once.
// Nothing is waited for in between: it is another port that helps, not time.
func (p *packer) retryConnect(attempts uint32) *routev3.RetryPolicy {
	if p.form < formAgain {
		return nil
	}
	return &routev3.RetryPolicy{
		RetryOn: "connect-failure", NumRetries: wrapperspb.UInt32(attempts - 1),
		RetryBackOff: &routev3.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(time.Millisecond), MaxInterval: durationpb.New(time.Millisecond)},
	}
}

// earlyLimit is how much of what a client says before its CONNECT is answered is kept to be
// said again. Whoever says more is connected once: the proxies of the mesh wait for the answer.
const earlyLimit = 16 << 10

// keepForRetry bounds what a CONNECT keeps for another attempt, which Envoy holds for as long
// as the stream lasts; nil in forms that keep nothing.
func (p *packer) keepForRetry() *wrapperspb.UInt64Value {
	if p.form < formAgain {
		return nil
	}
	return wrapperspb.UInt64(earlyLimit)
}

func (p *packer) httpFilter(name string, m proto.Message) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: p.any(m)}}
}

// The authority of a CONNECT must be the address that the connection itself was
// made to, or the proxy would deliver to any pod of the tenant under the identity
// of another. ownAddress writes that address into two headers, in the spelling of
// each family, over whatever the peer sent; isOwnAddress compares. Both are
// constant, so no chain changes with the pods' addresses.
const (
	headerOwnIPv4 = "x-bulkhead-own4"
	headerOwnIPv6 = "x-bulkhead-own6"
)

func (p *packer) ownAddress() []*corev3.TypedExtensionConfig {
	m := &earlymutationv3.HeaderMutation{}
	for _, h := range []*corev3.HeaderValue{
		{Key: headerOwnIPv4, Value: "%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%:"},
		{Key: headerOwnIPv6, Value: "[%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%]:"},
	} {
		m.Mutations = append(m.Mutations, &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_Append{
			Append: &corev3.HeaderValueOption{Header: h, AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD},
		}})
	}
	return []*corev3.TypedExtensionConfig{p.ext("envoy.http.early_header_mutation.header_mutation", m)}
}

// isOwnAddress is request.host.startsWith(request.headers[own4]) || … own6.
func isOwnAddress() *exprv1alpha1.Expr {
	request := func() *exprv1alpha1.Expr {
		return &exprv1alpha1.Expr{ExprKind: &exprv1alpha1.Expr_IdentExpr{IdentExpr: &exprv1alpha1.Expr_Ident{Name: "request"}}}
	}
	field := func(name string) *exprv1alpha1.Expr {
		return &exprv1alpha1.Expr{ExprKind: &exprv1alpha1.Expr_SelectExpr{SelectExpr: &exprv1alpha1.Expr_Select{Operand: request(), Field: name}}}
	}
	call := func(function string, target *exprv1alpha1.Expr, args ...*exprv1alpha1.Expr) *exprv1alpha1.Expr {
		return &exprv1alpha1.Expr{ExprKind: &exprv1alpha1.Expr_CallExpr{CallExpr: &exprv1alpha1.Expr_Call{Function: function, Target: target, Args: args}}}
	}
	startsWith := func(header string) *exprv1alpha1.Expr {
		name := &exprv1alpha1.Expr{ExprKind: &exprv1alpha1.Expr_ConstExpr{ConstExpr: &exprv1alpha1.Constant{
			ConstantKind: &exprv1alpha1.Constant_StringValue{StringValue: header},
		}}}
		return call("startsWith", field("host"), call("_[_]", nil, field("headers"), name))
	}
	return call("_||_", nil, startsWith(headerOwnIPv4), startsWith(headerOwnIPv6))
}

// authorize decides on the CONNECT, before anything is connected: a refused peer
// doesn't see a byte of what the application says first.
func (p *packer) authorize(peerPrefix string) *hcmv3.HttpFilter {
	return p.httpFilter("envoy.filters.http.rbac", &httprbacv3.RBAC{Rules: &rbacv3.RBAC{
		Action: rbacv3.RBAC_ALLOW,
		Policies: map[string]*rbacv3.Policy{"mesh": {
			Permissions: []*rbacv3.Permission{{Rule: &rbacv3.Permission_Any{Any: true}}},
			Principals: []*rbacv3.Principal{{Identifier: &rbacv3.Principal_Authenticated_{Authenticated: &rbacv3.Principal_Authenticated{
				PrincipalName: &typematcherv3.StringMatcher{MatchPattern: &typematcherv3.StringMatcher_Prefix{Prefix: peerPrefix}},
			}}}},
			Condition: isOwnAddress(),
		}},
	}})
}
