package xds

import (
	"net/netip"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Place is where the clients of a proxy are. The zero value is nowhere: all
// endpoints are alike.
type Place struct{ Zone, Node string }

// at is as much of p as the endpoints of a port tell apart, so that most resources
// are the same for all proxies.
func (p Place) at(port model.ServicePort) Place {
	zones, nodes := hints(port.Endpoints)
	if !zones {
		p.Zone = ""
	}
	if !nodes {
		p.Node = ""
	}
	return p
}

// hints reports which hints count: as with kube-proxy, those that all endpoints
// have.
func hints(eps []model.Endpoint) (zones, nodes bool) {
	zones, nodes = len(eps) > 0, len(eps) > 0
	for _, e := range eps {
		zones = zones && len(e.ForZones) > 0
		nodes = nodes && len(e.ForNodes) > 0
	}
	return zones, nodes
}

// tiers are endpoints in the order in which clients at a place prefer them: those
// that their node is to use, then their zone's, then all others, which take over
// when the former are gone or ejected. Hints come from a service's
// trafficDistribution.
func tiers(eps []model.Endpoint, from Place) [][]model.Endpoint {
	zones, nodes := hints(eps)
	var near [3][]model.Endpoint
	for _, e := range eps {
		switch {
		case nodes && from.Node != "" && slices.Contains(e.ForNodes, from.Node):
			near[0] = append(near[0], e)
		case zones && from.Zone != "" && slices.Contains(e.ForZones, from.Zone):
			near[1] = append(near[1], e)
		default:
			near[2] = append(near[2], e)
		}
	}
	return slices.DeleteFunc(near[:], func(t []model.Endpoint) bool { return len(t) == 0 })
}

func priority(n int, eps []model.Endpoint, health corev3.HealthStatus) *endpointv3.LocalityLbEndpoints {
	l := &endpointv3.LocalityLbEndpoints{Priority: uint32(n)}
	for _, e := range eps {
		lb := lbEndpoint(e)
		lb.HealthStatus = health
		l.LbEndpoints = append(l.LbEndpoints, lb)
	}
	return l
}

// portOf is the service's port behind one of its addresses.
func portOf(s model.Service, vip netip.AddrPort) model.ServicePort {
	return portNumbered(s, vip.Port())
}

func portNumbered(s model.Service, port uint16) model.ServicePort {
	for _, p := range s.Ports {
		if p.Port == port {
			return p
		}
	}
	return model.ServicePort{}
}
