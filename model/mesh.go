package model

import (
	"net/netip"
	"time"
)

// Network is what every proxy has to know of the cluster's addresses.
type Network struct {
	TrustDomain string
	// PodCIDRs hold the pods of all nodes: a destination in one of them that is no
	// service address is a pod and gets a cluster of its own on demand.
	PodCIDRs []netip.Prefix
	// ServiceCIDRs hold the cluster IPs of services.
	ServiceCIDRs []netip.Prefix
	// TunnelAge is when a server takes no new connection through a tunnel any more;
	// those in it go on. So no certificate is trusted for longer than it lives by
	// half. 0 is 30 minutes.
	TunnelAge time.Duration
}

// Workload is a pod with at least one address. Several workloads share an
// Identity when they share a service account.
type Workload struct {
	UID       string
	Namespace string
	Name      string
	Node      string
	// Identity is zero for pods outside of the mesh.
	Identity Identity
	// Tenant is zero for pods outside of the mesh.
	Tenant Tenant
	IPs    []netip.Addr
}

// Service is a Kubernetes Service as its clients see it.
type Service struct {
	Namespace string
	Name      string
	// VIPs are its cluster IPs; none for headless services, whose clients connect
	// to pods, but which routes may name as backends.
	VIPs  []netip.Addr
	Ports []ServicePort
}

// ServicePort is one TCP port of a service with the endpoints behind it.
type ServicePort struct {
	Name string
	Port uint16
	// Protocol that the service says it speaks.
	Protocol Protocol
	// Endpoints of both address families; a VIP uses those of its own.
	Endpoints []Endpoint
}

// Endpoint is one address behind a service's port.
type Endpoint struct {
	Addr netip.AddrPort
	// Identity that a server there must prove; zero for endpoints outside of the
	// mesh, which are reached in plain text.
	Identity Identity
	// Draining endpoints are terminating but still serve: they keep what they
	// have and get new connections only if no other endpoint is left.
	Draining bool
	// ForZones and ForNodes are the zones and nodes whose clients it is meant for;
	// none if it is for all alike.
	ForZones, ForNodes []string
}

// Proxy is one tenant's proxy on one node and what it serves there.
type Proxy struct {
	Node   string
	Tenant Tenant
	// Workloads of this tenant on this node, each with the addresses by which its
	// connections are told from others.
	Workloads []Workload
	// Zone of the node; "" if it has none.
	Zone string
	// RejectOutside closes connections to addresses outside of the cluster.
	RejectOutside bool
	// AccessLog writes one line a connection to the proxy's log.
	AccessLog bool
}

// ProxyKey names a Proxy.
type ProxyKey struct {
	Node   string
	Tenant Tenant
}

// MaxVersion is how many bytes the version of a resource may have that a proxy is given.
// That of its outbound listener tells which chains the proxy has, so an agent takes back
// whatever any operator may have given.
const MaxVersion = 1024

// Key returns the proxy's name.
func (p Proxy) Key() ProxyKey { return ProxyKey{p.Node, p.Tenant} }
