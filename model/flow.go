package model

import "net/netip"

// Flow is a TCP connection of a pod, with the addresses that are seen on the
// pod's veth: either end may have opened it.
type Flow struct {
	Pod, Peer netip.AddrPort
}

// FlowReader returns the connections that a pod has where it was until now: in
// the network namespace of the tenant with that index, or in the pod's own if from
// is 0. It is called with the steering locked and must not use it.
type FlowReader func(from uint16) ([]Flow, error)
