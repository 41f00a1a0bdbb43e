package model

import (
	"net/netip"
	"time"
)

// FormerLimit is for how long at most a tenant opens connections for a pod that has
// left it: a tunnel that goes on takes new ones for half an hour.
const FormerLimit = 31 * time.Minute

// MaxKept is how many connections of one tenant's pods may be written down for another to
// stay where it was when a pod moves, those that pods bring when they join in the clear
// among them: a quarter of what a node has room for. Who wants to stay in somebody's way
// could else show as many sockets as it likes.
const MaxKept = 65536

// Flow is a TCP connection of a pod, with the addresses that are seen on the
// pod's veth: either end may have opened it.
type Flow struct {
	Pod, Peer netip.AddrPort
	Side      Side
}

// Side is where on the way through its tenant a connection is. Ports are chosen in two
// network namespaces, so that one of each side may have the same.
type Side uint8

const (
	// PodSide is between the pod and its tenant.
	PodSide Side = iota + 1
	// WireSide is between the tenant, as the pod, and others; what passes in the clear is
	// there, too.
	WireSide
)

// TunnelPort is where tunnels between proxies end.
const TunnelPort = 15008

// IsTunnel says that it is one between proxies, which others share.
func (f Flow) IsTunnel() bool { return f.Pod.Port() == TunnelPort || f.Peer.Port() == TunnelPort }

// Placement is which tenants have a pod's connections on its node, by index.
type Placement struct {
	// Tenant gets the new ones; 0 is none.
	Tenant uint16
	// Formers go on to open what those that they have need.
	Formers []uint16
}

// FlowReader returns the connections that a pod has where it was until now: in
// the network namespace of the tenant with that index, or in the pod's own if from
// is 0. It is called with the steering locked and must not use it.
type FlowReader func(from uint16) ([]Flow, error)
