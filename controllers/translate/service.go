package translate

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Directory tells who is behind an address or a pod's UID.
type Directory interface {
	// ByAddr is the standing and identity of the live pod that holds an address.
	ByAddr(netip.Addr) (Standing, model.Identity)
	// ByUID is the standing and identity of a pod; Absent if it isn't known.
	ByUID(uid string) (Standing, model.Identity)
}

// Ref is something that a service's translation depends on: a pod's UID or an
// address.
type Ref struct {
	UID  string
	Addr netip.Addr
}

// Service translates a Service with its EndpointSlices, and returns the pods and
// addresses that it asked for: when they change, it has to be done again.
//
// Endpoints are TCP only. One whose pod isn't known yet is left out: it may be of
// the mesh, and then plain text would be wrong.
func Service(s *corev1.Service, endpointSlices []discoveryv1.EndpointSlice, d Directory) (model.Service, []Ref) {
	svc := model.Service{Namespace: s.Namespace, Name: s.Name}
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return svc, nil
	}
	var vips []netip.Addr
	for _, ip := range s.Spec.ClusterIPs {
		if a, err := netip.ParseAddr(ip); err == nil {
			vips = append(vips, a)
		}
	}
	svc.VIPs = ValidAddrs(vips)
	refs := map[Ref]struct{}{}
	endpointSlices = slices.Clone(endpointSlices)
	slices.SortFunc(endpointSlices, func(a, b discoveryv1.EndpointSlice) int { return strings.Compare(a.Name, b.Name) })
	for _, p := range s.Spec.Ports {
		if p.Protocol != corev1.ProtocolTCP && p.Protocol != "" {
			continue
		}
		if p.Port < 1 || p.Port > 65535 {
			continue
		}
		svc.Ports = append(svc.Ports, model.ServicePort{Name: p.Name, Port: uint16(p.Port), Protocol: protocol(p), Endpoints: endpoints(p.Name, endpointSlices, d, refs)})
	}
	slices.SortFunc(svc.Ports, func(a, b model.ServicePort) int { return int(a.Port) - int(b.Port) })
	out := make([]Ref, 0, len(refs))
	for r := range refs {
		out = append(out, r)
	}
	return svc, out
}

// endpoints behind a service port, which slices name by its name.
func endpoints(port string, endpointSlices []discoveryv1.EndpointSlice, d Directory, refs map[Ref]struct{}) []model.Endpoint {
	found := map[netip.AddrPort]model.Endpoint{}
	for _, es := range endpointSlices {
		if es.AddressType != discoveryv1.AddressTypeIPv4 && es.AddressType != discoveryv1.AddressTypeIPv6 {
			continue
		}
		number := slicePort(es, port)
		if number == 0 {
			continue
		}
		for _, e := range es.Endpoints {
			use, draining := usable(e.Conditions)
			if !use {
				continue
			}
			for _, text := range e.Addresses {
				a, err := netip.ParseAddr(text)
				if err != nil || len(ValidAddrs([]netip.Addr{a})) == 0 {
					continue
				}
				a = a.Unmap()
				identity, known := who(a, e.TargetRef, es.Namespace, d, refs)
				if !known {
					continue
				}
				ep := model.Endpoint{Addr: netip.AddrPortFrom(a, number), Identity: identity, Draining: draining}
				if e.Hints != nil {
					for _, z := range e.Hints.ForZones {
						ep.ForZones = append(ep.ForZones, z.Name)
					}
					for _, n := range e.Hints.ForNodes {
						ep.ForNodes = append(ep.ForNodes, n.Name)
					}
				}
				// Slices may repeat an endpoint while they are rewritten; ready anywhere is ready.
				if had, ok := found[ep.Addr]; !ok || had.Draining {
					found[ep.Addr] = ep
				}
			}
		}
	}
	var out []model.Endpoint
	for _, e := range found {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b model.Endpoint) int { return a.Addr.Compare(b.Addr) })
	return out
}

func slicePort(es discoveryv1.EndpointSlice, name string) uint16 {
	for _, p := range es.Ports {
		if p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP || p.Port == nil || *p.Port < 1 || *p.Port > 65535 {
			continue
		}
		if have := p.Name; have == nil && name == "" || have != nil && *have == name {
			return uint16(*p.Port)
		}
	}
	return 0
}

// usable reports whether an endpoint serves, and whether it is on its way out.
func usable(c discoveryv1.EndpointConditions) (use, draining bool) {
	if c.Ready == nil || *c.Ready {
		return true, false
	}
	draining = c.Serving != nil && *c.Serving && c.Terminating != nil && *c.Terminating
	return draining, draining
}

// who must prove its identity at an endpoint. The pod that holds the address
// counts before the pod that the slice names: anyone who may write a slice can
// write a name into it.
func who(a netip.Addr, target *corev1.ObjectReference, namespace string, d Directory, refs map[Ref]struct{}) (identity model.Identity, known bool) {
	refs[Ref{Addr: a}] = struct{}{}
	holder, identity := d.ByAddr(a)
	if holder == Member {
		return identity, true
	}
	if target == nil || target.Kind != "Pod" || target.UID == "" || (target.Namespace != "" && target.Namespace != namespace) {
		return model.Identity{}, true
	}
	refs[Ref{UID: string(target.UID)}] = struct{}{}
	named, identity := d.ByUID(string(target.UID))
	if named == Member {
		return identity, true
	}
	return model.Identity{}, holder != Absent || named != Absent
}
