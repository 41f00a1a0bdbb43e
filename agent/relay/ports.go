package relay

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// PortStep is between the ports of one generation of a tenant and those of the
// next. Both run in one network namespace, and where the kernel finds listeners
// by their port, as for TPROXY, it couldn't tell them apart by anything else. The
// operator needn't know: what it sends, and what is kept as last good, has the
// first generation's ports.
const PortStep = 100

// ofGeneration returns listeners with a generation's ports. What isn't a listener
// with a port stays as it is, for Envoy to judge.
func ofGeneration(generation int, resources []*discovery.Resource) []*discovery.Resource {
	moved := make([]*discovery.Resource, 0, len(resources))
	for _, r := range resources {
		var l listenerv3.Listener
		if proto.Unmarshal(r.GetResource().GetValue(), &l) == nil {
			if port, ok := l.GetAddress().GetSocketAddress().GetPortSpecifier().(*corev3.SocketAddress_PortValue); ok {
				port.PortValue += uint32(PortStep * generation)
				if value, err := (proto.MarshalOptions{Deterministic: true}).Marshal(&l); err == nil {
					r = &discovery.Resource{Name: r.Name, Version: r.Version, Resource: &anypb.Any{TypeUrl: r.Resource.TypeUrl, Value: value}}
				}
			}
		}
		moved = append(moved, r)
	}
	return moved
}
