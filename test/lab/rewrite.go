package lab

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// rewriting is the server of configuration with Options.Rewrite behind it.
type rewriting struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	server *xds.Server
	node   *Node
}

func (r *rewriting) DeltaAggregatedResources(g discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	tenant, _, err := xds.ParseStreamMetadata(g.Context())
	if err != nil {
		return err
	}
	return r.server.DeltaAggregatedResources(&rewritten{AggregatedDiscoveryService_DeltaAggregatedResourcesServer: g, node: r.node, tenant: tenant})
}

type rewritten struct {
	discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	node   *Node
	tenant model.Tenant
}

func (s *rewritten) Send(r *discoveryv3.DeltaDiscoveryResponse) error {
	// The store keeps its resources for all streams.
	r = proto.CloneOf(r)
	for _, resource := range r.Resources {
		s.node.l.o.Rewrite(s.node.Name, s.tenant, resource)
	}
	return s.AggregatedDiscoveryService_DeltaAggregatedResourcesServer.Send(r)
}

// NoAddress is what Envoy's reason has when it refuses what SpoilEndpoints made.
const NoAddress = "no-address"

// SpoilEndpoints gives a resource's endpoints, if it has any, an address that Envoy
// refuses.
func SpoilEndpoints(r *discoveryv3.Resource) error {
	var a endpointv3.ClusterLoadAssignment
	if r.Resource.UnmarshalTo(&a) != nil {
		return nil // of another type
	}
	for _, locality := range a.Endpoints {
		for _, e := range locality.LbEndpoints {
			e.GetEndpoint().Address = &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
				Address: NoAddress, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 1}}}}
		}
	}
	return r.Resource.MarshalFrom(&a)
}
