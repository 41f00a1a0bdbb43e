package steer

import "maps"

// Counters are what has happened to one tenant since UpdateTenant made it. A new
// connection is a SYN that was led somewhere; one that is sent again can count once more.
type Counters struct {
	// Steered are new connections per generation.
	Steered [Generations]uint64
	PerListener
	// Refused are new connections that found no listener.
	Refused uint64
	// Excluded and Bypassed are new connections that passed in the clear, by an
	// Exclusion or by Pod.Bypass.
	Excluded, Bypassed uint64
	// EventsLost are connection events that found no room.
	EventsLost uint64
	// Cut are connections that its pods have lost when they joined, moved or left, for there
	// were model.MaxKept of the tenant: since this process began.
	Cut uint64
	// Dropped are packets.
	Dropped Drops
}

// FirstByteBuckets is how many GenerationCounters.FirstByte has.
const FirstByteBuckets = 16

// GenerationCounters are how the connections of one generation fared, tunnels left
// out, since its tenant is watched.
type GenerationCounters struct {
	Connections uint64
	// Unanswered are those that the generation ended before a byte came back, Resets
	// those that it reset later. Those whose client ended them first count as neither.
	Unanswered, Resets uint64
	// FirstByte counts them by the time from the SYN to the first byte that came back:
	// below 2^17 ns, 2^18 ns, and so on; the last is the rest.
	FirstByte [FirstByteBuckets]uint64
}

// PerListener are new connections per listener of a tenant.
type PerListener struct{ Outbound, Inbound, Plain, NodePlain uint64 }

// Add counts n connections of a listener.
func (p *PerListener) Add(l Listener, n uint64) {
	switch l {
	case Outbound:
		p.Outbound += n
	case Inbound:
		p.Inbound += n
	case Plain:
		p.Plain += n
	case NodePlain:
		p.NodePlain += n
	}
}

// ByListener names the listeners that got any.
func (p PerListener) ByListener() map[string]uint64 {
	return named(map[string]uint64{"outbound": p.Outbound, "inbound": p.Inbound, "plain": p.Plain, "nodePlain": p.NodePlain})
}

func named(all map[string]uint64) map[string]uint64 {
	maps.DeleteFunc(all, func(_ string, n uint64) bool { return n == 0 })
	return all
}

// Drops are dropped packets by reason.
type Drops struct {
	// Spoofed: a pod used a source that isn't its address.
	Spoofed uint64
	// Fragment: a fragment of a TCP packet.
	Fragment uint64
	// Malformed: headers that can't be read to their end; with eBPF also a SYN with FIN
	// or RST.
	Malformed uint64
	// NoTenant: the pod's tenant isn't known or has no network namespace.
	NoTenant uint64
	// NotThePod: to a pod's veth, but not to its address.
	NotThePod uint64
	// Deliver: from the deliver address to others than the tenant's own pods.
	Deliver uint64
	// Foreign: the tenant sent what is neither from nor to its own pods.
	Foreign uint64
	// Protocol: the tenant sent other things than TCP, or a pod a packet in another one,
	// which a tunnel of a node would unwrap.
	Protocol uint64
	// Unsteered: TCP of no pod of the tenant reached its namespace, or a pod sent it to
	// the tunnels' port, where its SYN is refused.
	Unsteered uint64
	// Midstream: in the middle of a connection that isn't known, of a pod whose
	// new ones pass in the clear.
	Midstream uint64
	// FlowsFull: a connection that would pass in the clear where there is no room to
	// write it down: the map is full or, with eBPF, the pod has 8,192 such ones or all pods
	// of its tenant 16,384.
	FlowsFull uint64
	// PlainText: a new connection from outside of the mesh to a pod that is Strict.
	PlainText uint64
	// TooMany: a new connection of a tenant that has as many as it may
	// (ConnectionLimits). One that is tried again counts again.
	TooMany uint64
	// TooFast: a new connection of a tenant that opens them faster than it may.
	TooFast uint64
	// DirectTooFast: a new flow beside the proxy, of a tenant whose pods begin them faster
	// than they may.
	DirectTooFast uint64
	// PortsTaken: a new connection of a tenant as one of its pods or to it, with the
	// addresses and ports of one that stayed elsewhere. It is refused.
	PortsTaken uint64
}

// ByReason names the reasons of which there were any.
func (d Drops) ByReason() map[string]uint64 {
	return named(map[string]uint64{
		"spoofed": d.Spoofed, "fragment": d.Fragment, "malformed": d.Malformed, "noTenant": d.NoTenant,
		"notThePod": d.NotThePod, "deliver": d.Deliver, "foreign": d.Foreign, "protocol": d.Protocol,
		"unsteered": d.Unsteered, "midstream": d.Midstream, "flowsFull": d.FlowsFull, "plainText": d.PlainText,
		"tooMany": d.TooMany, "tooFast": d.TooFast, "directTooFast": d.DirectTooFast,
		"portsTaken": d.PortsTaken,
	})
}

// PodCounters are what has happened to one pod since UpdatePod made it known. Bytes
// are of TCP on its veth, from the IP header on; packets that the kernel
// handles in one piece count with one header.
type PodCounters struct {
	// New connections per listener of its tenant.
	PerListener
	// Direct are those in the clear that are written down: of exclusions, the bypass,
	// and while it leaves.
	Direct uint64
	// Accepted are those of its tenant that got through their handshake. Only eBPF
	// counts them, where Tenant.CgroupV2 is; with it a listener's are SYNs, too.
	Accepted uint64
	// BytesSent are by the pod.
	BytesSent, BytesReceived uint64
	// Dropped are packets at its veth, and plain text that it doesn't take.
	Dropped Drops
}
