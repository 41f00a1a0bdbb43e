package xds

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	upstreamhttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// tunnelIdle is how long a tunnel without a connection in it stays.
	tunnelIdle = time.Minute
	// tunnelAge is when a tunnel takes no new connections, so that a certificate
	// isn't used long past its rotation. Those in it go on. Servers of ours have an
	// age that follows the certificates' lives (decision 22).
	tunnelAge = 30 * time.Minute
	// userTimeout is how long the kernel waits for a tunnel's peer to acknowledge
	// data, or after an outage pools stay dead for a quarter of an hour.
	userTimeout = 20 * time.Second
	// ejectAfter is how many connections in a row must have failed, or how many
	// requests there must have been within ejectInterval.
	ejectAfter    = 5
	ejectInterval = 5 * time.Second
	// ejectShare, in percent of successes and failures together, is reached when two of
	// three requests fail without an answer.
	ejectShare = 40
	// maxConnections is a cluster's bound of connections, requests, and what waits; see
	// cluster.
	maxConnections = 100_000
)

// A pod's former proxy serves its tunnels for as long as they take connections.
const _ = uint(model.FormerLimit - tunnelAge)

// httpOptions is where a cluster's options for HTTP are.
const httpOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// cluster is what all clusters share. The limits of a tenant are its cgroup's;
// Envoy's own of 1024, and of 3 retries at a time, would be in the way.
func cluster(name string, discovery clusterv3.Cluster_DiscoveryType) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                          name,
		ClusterDiscoveryType:          &clusterv3.Cluster_Type{Type: discovery},
		ConnectTimeout:                durationpb.New(connectTimeout),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections: wrapperspb.UInt32(maxConnections), MaxPendingRequests: wrapperspb.UInt32(maxConnections), MaxRequests: wrapperspb.UInt32(maxConnections),
			MaxRetries: wrapperspb.UInt32(maxConnections),
		}}},
		UpstreamBindConfig: &corev3.BindConfig{SocketOptions: append(keepaliveOptions(),
			// A source address is bound before the destination is known; this leaves the
			// choice of the port to connect, or all destinations share 64,000.
			socketOption("IP_BIND_ADDRESS_NO_PORT", ipprotoIP, ipBindAddressNoPort, 1))},
	}
	if discovery == clusterv3.Cluster_ORIGINAL_DST {
		c.LbPolicy = clusterv3.Cluster_CLUSTER_PROVIDED
	}
	return c
}

// tunnels makes c's upstream connections HTTP/2.
func (p *packer) tunnels(c *clusterv3.Cluster) {
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{
		httpOptions: p.any(&upstreamhttpv3.HttpProtocolOptions{
			CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
				IdleTimeout: durationpb.New(tunnelIdle), MaxConnectionDuration: durationpb.New(tunnelAge),
			},
			UpstreamProtocolOptions: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_{
				ExplicitHttpConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{
					ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: http2Options()},
				},
			},
		}),
	}
}

// overTLS makes c's upstream connections mutual TLS over the network.
func (p *packer) overTLS(c *clusterv3.Cluster, servers ...string) {
	p.tunnels(c)
	c.TransportSocket = p.upstreamTLS(servers...)
	c.UpstreamBindConfig.SocketOptions = append(c.UpstreamBindConfig.SocketOptions,
		socketOption("TCP_USER_TIMEOUT", ipprotoTCP, tcpUserTimeout, userTimeout.Milliseconds()))
}

// StaticClusters are the clusters that every proxy has.
func StaticClusters() ([]*clusterv3.Cluster, error) {
	p := &packer{}
	original := func(name string, lb *clusterv3.Cluster_OriginalDstLbConfig) *clusterv3.Cluster {
		c := cluster(name, clusterv3.Cluster_ORIGINAL_DST)
		if lb != nil {
			c.LbConfig = &clusterv3.Cluster_OriginalDstLbConfig_{OriginalDstLbConfig: lb}
		}
		return c
	}
	former := original(clusterFormerHBONE, &clusterv3.Cluster_OriginalDstLbConfig{UpstreamPortOverride: wrapperspb.UInt32(PortInbound)})
	p.overTLS(former)
	node := original(clusterDeliverNode, nil)
	node.UpstreamBindConfig.SourceAddress = socketAddress(DeliverIPv4, 0).GetSocketAddress()
	node.UpstreamBindConfig.ExtraSourceAddresses = []*corev3.ExtraSourceAddress{{Address: socketAddress(DeliverIPv6, 0).GetSocketAddress()}}
	cs := []*clusterv3.Cluster{
		p.tunnelCluster(),
		former,
		original(clusterDeliver, nil),
		node,
		original(clusterDeliverHTTP, &clusterv3.Cluster_OriginalDstLbConfig{UseHttpHeader: true, HttpHeaderName: ":authority"}),
		original(clusterPassthrough, nil),
	}
	if err := p.err(); err != nil {
		return nil, &ObjectError{Source{Kind: "Static"}, err}
	}
	return cs, nil
}

// VIPCluster is the cluster of a service's address. It doesn't depend on the
// service, so nothing about a service can make a proxy drop its connections: all
// that changes are endpoints.
func VIPCluster(vip netip.AddrPort) (*clusterv3.Cluster, error) {
	p := &packer{}
	return p.endpointCluster(VIPName(vip)), p.err()
}

// endpointCluster is a cluster whose endpoints are in the mesh or outside of it.
func (p *packer) endpointCluster(name string) *clusterv3.Cluster {
	c := cluster(name, clusterv3.Cluster_EDS)
	c.EdsClusterConfig = &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads(), ServiceName: c.Name}
	c.LbPolicy = clusterv3.Cluster_LEAST_REQUEST
	// Never send to an endpoint that is draining because few others are left:
	// VIPEndpoints decides when that is right.
	c.CommonLbConfig = &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 0}}
	// An endpoint whose connections fail gets none for a while. A tunnel to a pod of the
	// mesh begins behind an internal listener, which always takes the connection: only
	// HTTP shows here that it failed, as one failure after one success.
	c.OutlierDetection = &clusterv3.OutlierDetection{
		SplitExternalLocalOriginErrors: true,
		ConsecutiveLocalOriginFailure:  wrapperspb.UInt32(ejectAfter), EnforcingConsecutiveLocalOriginFailure: wrapperspb.UInt32(100),
		FailurePercentageThreshold: wrapperspb.UInt32(ejectShare), EnforcingFailurePercentageLocalOrigin: wrapperspb.UInt32(100),
		FailurePercentageRequestVolume: wrapperspb.UInt32(2 * ejectAfter), FailurePercentageMinimumHosts: wrapperspb.UInt32(2),
		EnforcingLocalOriginSuccessRate: wrapperspb.UInt32(0), EnforcingConsecutive_5Xx: wrapperspb.UInt32(0),
		EnforcingConsecutiveGatewayFailure: wrapperspb.UInt32(0), EnforcingSuccessRate: wrapperspb.UInt32(0), EnforcingFailurePercentage: wrapperspb.UInt32(0),
		Interval: durationpb.New(ejectInterval), BaseEjectionTime: durationpb.New(10 * time.Second), MaxEjectionTime: durationpb.New(time.Minute),
		MaxEjectionPercent: wrapperspb.UInt32(50),
	}
	c.TransportSocketMatches = []*clusterv3.Cluster_TransportSocketMatch{
		{Name: "plain", Match: structOf("plain", structpb.NewBoolValue(true)), TransportSocket: p.rawSocket()},
		{Name: "tunnel", Match: &structpb.Struct{}, TransportSocket: p.internalSocket()},
	}
	return c
}

func structOf(key string, value *structpb.Value) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{key: value}}
}

// VIPEndpoints are the endpoints behind a service's address, of its family, as
// clients at a place have them; none for the zero Service.
func VIPEndpoints(vip netip.AddrPort, s model.Service, from Place) (*endpointv3.ClusterLoadAssignment, error) {
	return endpointsOf(VIPName(vip), vip.Addr().Is6(), portOf(s, vip), from), nil
}

// endpointsOf are a port's endpoints of one address family.
func endpointsOf(name string, ipv6 bool, port model.ServicePort, from Place) *endpointv3.ClusterLoadAssignment {
	cla := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	eps := slices.DeleteFunc(slices.Clone(port.Endpoints), func(e model.Endpoint) bool { return e.Addr.Addr().Is6() != ipv6 })
	slices.SortFunc(eps, func(a, b model.Endpoint) int {
		// Of two that claim one address, the one that must prove an identity counts.
		return cmp.Or(a.Addr.Compare(b.Addr), -cmp.Compare(a.Identity.String(), b.Identity.String()))
	})
	eps = slices.CompactFunc(eps, func(a, b model.Endpoint) bool { return a.Addr == b.Addr })
	// Draining endpoints serve only if no other is left, as with kube-proxy.
	last := !slices.ContainsFunc(eps, func(e model.Endpoint) bool { return !e.Draining })
	var serving, leaving []model.Endpoint
	for _, e := range eps {
		if e.Draining && !last {
			leaving = append(leaving, e)
		} else {
			serving = append(serving, e)
		}
	}
	for _, tier := range tiers(serving, from) {
		cla.Endpoints = append(cla.Endpoints, priority(len(cla.Endpoints), tier, corev3.HealthStatus_UNKNOWN))
	}
	if len(leaving) > 0 {
		// Apart from the others, or a priority would pass for half dead in a rollout.
		cla.Endpoints = append(cla.Endpoints, priority(len(cla.Endpoints), leaving, corev3.HealthStatus_DRAINING))
	}
	return cla
}

func lbEndpoint(e model.Endpoint) *endpointv3.LbEndpoint {
	addr := e.Addr.String()
	if e.Identity.IsZero() {
		return &endpointv3.LbEndpoint{
			HostIdentifier: endpoint(socketAddress(e.Addr.Addr().String(), uint32(e.Addr.Port()))),
			Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
				metadataMatch: structOf("plain", structpb.NewBoolValue(true)),
			}},
		}
	}
	return &endpointv3.LbEndpoint{
		HostIdentifier: endpoint(internalAddress(listenerHBONE, addr)),
		Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			metadataDestination: structOf("local", structpb.NewStringValue(addr)),
			metadataBulkhead:    structOf("san", structpb.NewStringValue(e.Identity.String())),
		}},
	}
}

func endpoint(a *corev3.Address) *endpointv3.LbEndpoint_Endpoint {
	return &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: a}}
}

func staticEndpoint(c *clusterv3.Cluster, a *corev3.Address) {
	c.LoadAssignment = &endpointv3.ClusterLoadAssignment{
		ClusterName: c.Name,
		Endpoints:   []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: endpoint(a)}}}},
	}
}

// PodCluster is the cluster of one address of a pod. A pod of the mesh is reached
// through a tunnel that ends at that very pod; one outside of it in plain text.
func PodCluster(addr netip.Addr, w model.Workload) (*clusterv3.Cluster, error) {
	p := &packer{}
	c := cluster(PodName(addr), clusterv3.Cluster_STATIC)
	if w.Identity.IsZero() {
		p.tunnels(c)
		c.TransportSocket = p.internalSocket()
		staticEndpoint(c, internalAddress(listenerUnwrap, c.Name))
	} else {
		p.overTLS(c, w.Identity.String())
		staticEndpoint(c, socketAddress(addr.String(), PortInbound))
	}
	if err := p.err(); err != nil {
		return nil, &ObjectError{workloadSource(w), err}
	}
	return c, nil
}

// UnknownPodCluster is the cluster of an address that no pod is known to have:
// it refuses. Plain text isn't an answer, for the pod may be of the mesh and just
// not seen yet.
func UnknownPodCluster(addr netip.Addr) (*clusterv3.Cluster, error) {
	if !validAddr(addr) {
		return nil, fmt.Errorf("%q isn't a pod's address", addr)
	}
	c := cluster(PodName(addr), clusterv3.Cluster_STATIC)
	c.LoadAssignment = &endpointv3.ClusterLoadAssignment{ClusterName: c.Name}
	return c, nil
}
