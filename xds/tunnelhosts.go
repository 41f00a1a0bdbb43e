package xds

import (
	"fmt"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	dfpclusterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dynamic_forward_proxy/v3"
	dnscachev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/dynamic_forward_proxy/v3"
	filterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	snidfpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/sni_dynamic_forward_proxy/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The cluster hbone learns of an endpoint's address with the first connection to it.
// Envoy's main thread makes the host, once, and connections wait for it; so they share
// its pool. (With ORIGINAL_DST each connection makes a host of its own, and a tunnel,
// until the main thread has told the workers of the first: decision 32.) Envoy has that
// as a dynamic forward proxy, whose hosts are the names in a DNS cache. All of these are
// addresses here, which the resolver takes for what they are and asks nobody about.

const (
	// tunnelHosts is the cache's name. Envoy keeps a cache for as long as it runs, and
	// refuses another configuration under its name: a change needs a new name.
	tunnelHosts = "tunnels"
	// maxTunnelHosts is how many endpoints' addresses a process remembers; connections to
	// further ones are closed.
	maxTunnelHosts = 16384
	// tunnelHostRefresh is how often an address is looked at, and let go if there was no
	// new connection to it for tunnelAge: until then the tunnels to it take connections.
	tunnelHostRefresh = 5 * time.Minute
)

// tunnelHostCache is the same in the cluster and in the filter.
func tunnelHostCache() *dnscachev3.DnsCacheConfig {
	return &dnscachev3.DnsCacheConfig{
		Name: tunnelHosts,
		// One question for addresses of either family.
		DnsLookupFamily:   clusterv3.Cluster_ALL,
		DnsRefreshRate:    durationpb.New(tunnelHostRefresh),
		DnsMinRefreshRate: durationpb.New(tunnelHostRefresh),
		DnsFailureRefreshRate: &clusterv3.Cluster_RefreshRate{
			BaseInterval: durationpb.New(time.Second), MaxInterval: durationpb.New(10 * time.Second),
		},
		HostTtl:  durationpb.New(tunnelAge),
		MaxHosts: wrapperspb.UInt32(maxTunnelHosts),
		DnsCacheCircuitBreaker: &dnscachev3.DnsCacheCircuitBreakers{
			MaxPendingRequests: wrapperspb.UInt32(maxConnections), // of connections that wait
		},
	}
}

// tunnelCluster is the cluster hbone. Whom it trusts isn't the cache's business: the
// connection's filter state says which identity the server must have.
func (p *packer) tunnelCluster() *clusterv3.Cluster {
	c := cluster(clusterHBONE, clusterv3.Cluster_STATIC)
	c.ClusterDiscoveryType = &clusterv3.Cluster_ClusterType{ClusterType: &clusterv3.Cluster_CustomClusterType{
		Name: "envoy.clusters.dynamic_forward_proxy",
		TypedConfig: p.any(&dfpclusterv3.ClusterConfig{
			ClusterImplementationSpecifier: &dfpclusterv3.ClusterConfig_DnsCacheConfig{DnsCacheConfig: tunnelHostCache()},
			// Or the host's name would have to be in the server's certificate.
			AllowInsecureClusterOptions: true,
		}),
	}}
	c.LbPolicy = clusterv3.Cluster_CLUSTER_PROVIDED
	p.overTLS(c)
	return c
}

// tunnelHost tells the cluster hbone and the filter before it where a connection to an
// endpoint goes: to the tunnel's port at its address. In brackets an address of either
// family is an address, with a port behind it.
func tunnelHost() *filterstatev3.FilterStateValue {
	return filterState("envoy.upstream.dynamic_host", "",
		fmt.Sprintf("[%%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%%]:%d", PortInbound), filterstatev3.FilterStateValue_NONE)
}

// awaitTunnelHost holds a connection until the cluster hbone has its host: the TCP proxy
// itself takes a host that isn't there yet for none. It stands before that one.
func (p *packer) awaitTunnelHost() *listenerv3.Filter {
	return p.filter("envoy.filters.network.sni_dynamic_forward_proxy", &snidfpv3.FilterConfig{DnsCacheConfig: tunnelHostCache()})
}
