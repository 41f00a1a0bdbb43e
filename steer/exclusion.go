package steer

import (
	"fmt"
	"net/netip"
)

// Exclusion leaves connections out of the mesh: they pass in the clear, between
// the pod and its peer. It concerns new ones; one that has begun stays where it
// is. Of two exclusions it is enough that one fits. Tunnels to the pod (port
// 15008) are never excluded: they end at its tenant.
type Exclusion struct {
	// Inbound is for connections that are made to the pod, otherwise it is for
	// those that it makes.
	Inbound bool
	// Port is that of the destination; 0 is every port.
	Port uint16
	// Peer is the pod's peer; the zero Prefix is everyone.
	Peer netip.Prefix
}

// String is such as "outbound 10.0.0.0/8:443", "inbound *:8080" or "outbound *".
func (e Exclusion) String() string {
	direction, peer, port := "outbound", "*", ""
	if e.Inbound {
		direction = "inbound"
	}
	if e.Peer.IsValid() {
		peer = e.Peer.String()
	}
	if e.Port != 0 {
		port = fmt.Sprintf(":%d", e.Port)
	}
	return direction + " " + peer + port
}

// Validate says what is wrong with an exclusion.
func (e Exclusion) Validate() error {
	if e.Peer == (netip.Prefix{}) {
		return nil
	}
	if !e.Peer.IsValid() || e.Peer != e.Peer.Masked() || e.Peer.Addr().Is4In6() {
		return fmt.Errorf("exclusion of peer %q: want an IPv4 or IPv6 network", e.Peer)
	}
	return nil
}
