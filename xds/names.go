package xds

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Ports on which a tenant's Envoy listens, in the tenant's network namespace and
// on every address of both families.
const (
	PortOutbound  = 15001 // what the tenant's pods dial
	PortPlain     = 15006 // plain text for its pods, from other pods and the world
	PortNodePlain = 15007 // plain text for its pods, from an address of a node
	PortInbound   = 15008 // HBONE for its pods
)

// Addresses from which a tenant's Envoy delivers to its pods what a node address
// sent: the node would take the replies for its own. Every tenant has the same
// ones, in a network namespace of its own.
const (
	DeliverIPv4 = "169.254.96.1"
	DeliverIPv6 = "fd69:8::1"
)

// RootCA is the name of the secret with the mesh's roots. The other secrets are
// named by SPIFFE ID.
const RootCA = "ROOTCA"

// Type URLs of what the server hands out.
const (
	TypeListener  = "type.googleapis.com/envoy.config.listener.v3.Listener"
	TypeCluster   = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	TypeEndpoints = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	TypeRoutes    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
)

// Names of listeners.
const (
	listenerOutbound  = "outbound"
	listenerInbound   = "inbound"
	listenerPlain     = "plain"
	listenerNodePlain = "nodeplain"
	listenerHBONE     = "hbone"  // internal: a tunnel for each connection to a service's endpoint
	listenerUnwrap    = "unwrap" // internal: takes the CONNECT off again, for pods outside of the mesh
)

// Names of the static clusters.
const (
	clusterHBONE = "hbone"
	// clusterFormerHBONE is where the listener hbone of the former version leads. A proxy
	// that runs has that listener still when an operator of this version tells it of its
	// clusters. It goes with the next version.
	clusterFormerHBONE = "hbone-od"
	clusterDeliver     = "deliver"
	clusterDeliverNode = "deliver-node"
	clusterDeliverHTTP = "deliver-http"
	clusterPassthrough = "passthrough"
)

const (
	vipPrefix     = "vip|"
	podPrefix     = "pod|"
	httpPrefix    = "l7|"
	backendPrefix = "be|"
)

// VIPName is the name of the cluster and the endpoints of a service's address.
func VIPName(vip netip.AddrPort) string { return vipPrefix + vip.String() }

// PodName is the name of the cluster of a pod that is dialled directly.
func PodName(addr netip.Addr) string { return podPrefix + addr.String() }

// HTTPName is the name of the listener and the routes of a service's address that
// is spoken to as HTTP.
func HTTPName(vip netip.AddrPort) string { return httpPrefix + vip.String() }

// Backend is a service's port as a backend of routes, in one address family. Its
// String names the cluster and the endpoints.
type Backend struct {
	IPv6 bool
	model.ServicePortKey
}

func (b Backend) String() string {
	if b.IPv6 {
		return backendPrefix + "6|" + b.ServicePortKey.String()
	}
	return backendPrefix + "4|" + b.ServicePortKey.String()
}

func parseHTTPName(name string) (netip.AddrPort, bool) {
	rest, ok := strings.CutPrefix(name, httpPrefix)
	if !ok {
		return netip.AddrPort{}, false
	}
	return parseVIPName(vipPrefix + rest)
}

func parseBackendName(name string) (Backend, bool) {
	rest, ok := strings.CutPrefix(name, backendPrefix)
	family, rest, sep := strings.Cut(rest, "|")
	if !ok || !sep || len(name) > maxName {
		return Backend{}, false
	}
	namespace, rest, _ := strings.Cut(rest, "/")
	service, text, _ := strings.Cut(rest, ":")
	port, err := strconv.ParseUint(text, 10, 16)
	b := Backend{IPv6: family == "6", ServicePortKey: model.ServicePortKey{ServiceKey: model.ServiceKey{Namespace: namespace, Name: service}, Port: uint16(port)}}
	return b, err == nil && port != 0 && namespace != "" && service != "" && b.String() == name
}

// parseVIPName and parsePodName accept the spelling that VIPName and PodName
// make and no other, so that a proxy can't hold one thing under many names.
func parseVIPName(name string) (netip.AddrPort, bool) {
	rest, ok := strings.CutPrefix(name, vipPrefix)
	if !ok || len(rest) > 64 {
		return netip.AddrPort{}, false
	}
	vip, err := netip.ParseAddrPort(rest)
	return vip, err == nil && vip.Port() != 0 && validAddr(vip.Addr()) && VIPName(vip) == name
}

func parsePodName(name string) (netip.Addr, bool) {
	rest, ok := strings.CutPrefix(name, podPrefix)
	if !ok || len(rest) > 64 {
		return netip.Addr{}, false
	}
	addr, err := netip.ParseAddr(rest)
	return addr, err == nil && validAddr(addr) && PodName(addr) == name
}

// validAddr reports whether a is an address that a pod or service can have.
func validAddr(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast()
}

// identityPath names an identity within its trust domain.
func identityPath(i model.Identity) string { return i.Namespace + "/" + i.ServiceAccount }
