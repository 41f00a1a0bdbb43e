package steer

import (
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// EventKind is what happened to a connection.
type EventKind uint8

// A connection began, ended, or wasn't allowed to begin.
const (
	Opened EventKind = iota + 1
	Closed
	Denied
)

// Way is how a connection passes the mesh.
type Way uint8

const (
	// WayOutbound and WayInbound are between a pod or its peer and the pod's tenant.
	WayOutbound Way = iota + 1
	WayInbound
	// WayUpstream is what a tenant makes as the pod, WayDelivered what it makes to it.
	WayUpstream
	WayDelivered
	// WayDirectOutbound and WayDirectInbound are in the clear.
	WayDirectOutbound
	WayDirectInbound
)

func (k EventKind) String() string {
	return nameOf([]string{"", "opened", "closed", "denied"}, int(k))
}

func (w Way) String() string {
	return nameOf([]string{"unknown", "outbound", "inbound", "upstream", "delivered", "direct-outbound", "direct-inbound"}, int(w))
}

func nameOf(names []string, n int) string {
	if n < len(names) {
		return names[n]
	}
	return strconv.Itoa(n)
}

// Event is what happened to one connection of a pod. Of a denied one that came
// from a tenant, Pod is the address that it claimed.
type Event struct {
	Time time.Time
	Kind EventKind
	// Way is 0, "unknown", where nothing tells who opened the connection.
	Way    Way
	Tenant uint16
	// PodUID is empty where the pod isn't known.
	PodUID    string
	Pod, Peer netip.AddrPort
	// BytesSent are by the pod. Both are 0 but for Closed; of connections of
	// tenants they are what TCP carried (give or take its two flags), of direct
	// ones, with eBPF alone, the packets' lengths from the IP header on.
	BytesSent, BytesReceived uint64
	// Reason of a denial is the name of a field of Drops, or "Refused".
	Reason string
}

// EventReader reads the events of a datapath until it is closed.
type EventReader struct {
	// C has the events in order. It is closed by Close, and when the datapath is.
	C <-chan Event

	stop func() error
	lost atomic.Uint64
	once sync.Once
	err  error
}

// NewEventReader returns a reader of c. Close calls stop once, which is to end what
// writes to c, and then to close c.
func NewEventReader(c <-chan Event, stop func() error) *EventReader {
	return &EventReader{C: c, stop: stop}
}

// Lost is how many events were lost on their way from the kernel to C.
func (r *EventReader) Lost() uint64 { return r.lost.Load() }

// Lose counts n events that were lost.
func (r *EventReader) Lose(n uint64) { r.lost.Add(n) }

// Close ends the reading and closes C. It can be called again, and concurrently.
func (r *EventReader) Close() error {
	r.once.Do(func() { r.err = r.stop() })
	return r.err
}
