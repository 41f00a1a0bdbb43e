package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/bulkhead-mesh/bulkhead/steer"
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
	// Outbound and Inbound are between a pod or its peer and the pod's tenant.
	Outbound Way = iota + 1
	Inbound
	// Upstream is what a tenant makes as the pod, Delivered what it makes to it.
	Upstream
	Delivered
	// DirectOutbound and DirectInbound are in the clear.
	DirectOutbound
	DirectInbound
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
	Time   time.Time
	Kind   EventKind
	Way    Way
	Tenant uint16
	// PodUID is empty where the pod isn't known.
	PodUID    string
	Pod, Peer netip.AddrPort
	// BytesSent are by the pod. Both are 0 but for Closed; of connections of
	// tenants they are what TCP carried (give or take its two flags), of direct
	// ones the packets' lengths from the IP header on.
	BytesSent, BytesReceived uint64
	// Reason of a denial is the name of a field of Drops, or "Refused".
	Reason string
}

// EventReader reads events until it is closed.
type EventReader struct {
	// C has the events in order; it is closed by Close. Events are lost and
	// counted while it is full.
	C <-chan Event

	reader *ringbuf.Reader
	lost   atomic.Uint64
	done   chan struct{}
	close  sync.Once
	err    error
	owner  *Datapath
}

// Events begins to read connection events, from the oldest that the kernel still
// has; buffer is how many wait in the channel, at least 1. There is one reader at
// a time; the caller closes it, before the Datapath. Opened and Closed of
// connections through tenants need a cgroup of version 2 (Tenant.CgroupV2);
// direct ones are told in any case. Denied are those whose first packet was
// dropped, at most 100 a second for each pod and CPU. Where there are
// more, or the kernel's buffer of 1 MiB is full, they are lost:
// Counters.EventsLost.
func (d *Datapath) Events(buffer int) (*EventReader, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.reading {
		return nil, errors.New("read events: another reader is open")
	}
	reader, err := ringbuf.NewReader(d.maps[datapathMapEvents])
	if err != nil {
		return nil, fmt.Errorf("read events: %w", err)
	}
	d.reading = true
	c := make(chan Event, max(buffer, 1))
	r := &EventReader{C: c, reader: reader, done: make(chan struct{}), owner: d}
	go r.run(c)
	return r, nil
}

// Lost is how many events found no room in the channel.
func (r *EventReader) Lost() uint64 { return r.lost.Load() }

// Close ends the reading and closes C. It can be called again.
func (r *EventReader) Close() error {
	r.close.Do(func() {
		r.err = r.reader.Close()
		<-r.done
		r.owner.mu.Lock()
		r.owner.reading = false
		r.owner.mu.Unlock()
	})
	return r.err
}

func (r *EventReader) run(c chan<- Event) {
	defer close(r.done)
	defer close(c)
	var record ringbuf.Record
	for {
		err := r.reader.ReadInto(&record)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			r.owner.log.Warn("Can't read connection events any more", "error", err)
			return
		}
		e, err := parseEvent(record.RawSample)
		if err != nil {
			r.lost.Add(1) // of another version, from before the programs were replaced
			continue
		}
		select {
		case c <- e:
		default:
			r.lost.Add(1)
		}
	}
}

func parseEvent(raw []byte) (Event, error) {
	var e datapathEvent
	if len(raw) != int(unsafe.Sizeof(e)) {
		return Event{}, fmt.Errorf("event has %d bytes, want %d", len(raw), unsafe.Sizeof(e))
	}
	if err := binary.Read(bytes.NewReader(raw), binary.NativeEndian, &e); err != nil {
		return Event{}, err
	}
	now, err := monotonic()
	if err != nil {
		return Event{}, err
	}
	event := Event{
		Time: time.Now().Add(-time.Duration(max(now, e.Time) - e.Time)),
		Kind: EventKind(e.Kind), Way: Way(e.Way), Tenant: uint16(e.Tenant), PodUID: uidString(e.Uid),
		Pod:       netip.AddrPortFrom(netip.AddrFrom16(e.Pod.Bytes).Unmap(), e.PodPort),
		Peer:      netip.AddrPortFrom(netip.AddrFrom16(e.Peer.Bytes).Unmap(), e.PeerPort),
		BytesSent: e.BytesSent, BytesReceived: e.BytesReceived,
	}
	if event.Kind == Denied {
		event.Reason = reason(e.Reason)
	}
	return event, nil
}

// reasons are the fields of the programs' struct drops.
var reasons = func() (names []string) {
	t := reflect.TypeFor[steer.Drops]()
	for i := range t.NumField() {
		names = append(names, t.Field(i).Name)
	}
	return names
}()

const refusedReason = 0xfffffffe

func reason(n uint32) string {
	if n == refusedReason {
		return "Refused"
	}
	return nameOf(reasons, int(n))
}
