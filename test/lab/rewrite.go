package lab

import (
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
