package xds

import (
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	filterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	httporiginalsrcv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/original_src/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	httpfilterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	customheaderv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/original_ip_detection/custom_header/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A request that is copied loses the connection that it came on, and with it the
// identity that its tunnel needs. So copies go through an internal listener of
// their own, and carry there in headers what they lost. The headers are written
// over whatever a client sent, and taken off again before the copy goes on.

// mirrorName is the name of the listener for copies, and of the cluster that leads
// into it. A proxy gets them with the first routes that copy.
const mirrorName = "mirror"

const (
	headerMirrorIdentity = "x-bulkhead-mirror-identity"
	headerMirrorSource   = "x-bulkhead-mirror-source"
	headerMirrorCluster  = "x-bulkhead-mirror-cluster"
)

// mirrorHeaders are set on a copy for a cluster.
func mirrorHeaders(cluster string) (out []*mutationv3.HeaderMutation) {
	for _, h := range []*corev3.HeaderValue{
		{Key: headerMirrorIdentity, Value: "%FILTER_STATE(" + keyIdentity + ":PLAIN)%"},
		{Key: headerMirrorSource, Value: clientAddress},
		{Key: headerMirrorCluster, Value: cluster},
	} {
		out = append(out, &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_Append{
			Append: &corev3.HeaderValueOption{Header: h, AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD},
		}})
	}
	return out
}

func mirrorCluster() (*clusterv3.Cluster, error) {
	p := &packer{}
	c := cluster(mirrorName, clusterv3.Cluster_STATIC)
	c.TransportSocket = p.internalSocket()
	p.speakHTTP(c, 0)
	staticEndpoint(c, internalAddress(mirrorName, mirrorName))
	return c, p.err()
}

func mirrorListener(f Form) (*listenerv3.Listener, error) {
	p := &packer{form: f}
	state := []*filterstatev3.FilterStateValue{sourceState(clientAddress), identityState("%REQ(" + headerMirrorIdentity + ")%")}
	l := internalListener(mirrorName, nil, p.filter("envoy.filters.network.http_connection_manager", &hcmv3.HttpConnectionManager{
		StatPrefix: mirrorName,
		CodecType:  hcmv3.HttpConnectionManager_AUTO,
		OriginalIpDetectionExtensions: []*corev3.TypedExtensionConfig{
			p.ext("envoy.http.original_ip_detection.custom_header", &customheaderv3.CustomHeaderConfig{HeaderName: headerMirrorSource}),
		},
		HttpFilters: []*hcmv3.HttpFilter{
			p.httpFilter("envoy.filters.http.original_src", &httporiginalsrcv3.OriginalSrc{}),
			p.httpFilter("envoy.filters.http.set_filter_state", &httpfilterstatev3.Config{OnRequestHeaders: state}),
			p.httpFilter("envoy.filters.http.router", &routerv3.Router{SuppressEnvoyHeaders: true, DynamicStats: wrapperspb.Bool(false)}),
		},
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
			VirtualHosts: []*routev3.VirtualHost{{Name: mirrorName, Domains: []string{"*"}, Routes: []*routev3.Route{{
				Match:                  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				RequestHeadersToRemove: []string{headerMirrorIdentity, headerMirrorSource, headerMirrorCluster},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{
					ClusterSpecifier: &routev3.RouteAction_ClusterHeader{ClusterHeader: headerMirrorCluster}, Timeout: durationpb.New(0),
				}},
			}}}},
		}},
		Http2ProtocolOptions: applicationHTTP2(),
		GenerateRequestId:    wrapperspb.Bool(false),
		SkipXffAppend:        true,
		StreamIdleTimeout:    durationpb.New(0),
	}))
	return l, p.err()
}
