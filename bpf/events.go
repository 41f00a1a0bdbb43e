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
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Events begins to read connection events, from the oldest that the kernel still
// has; buffer is how many wait in the channel, at least 1: while it is full, they are
// lost (EventReader.Lost). There is one reader at a time; the caller closes it, or
// Close does. Opened and Closed of connections through tenants need a cgroup of
// version 2 (Tenant.CgroupV2), and are at most 10,000 events a second for each tenant, and
// 1,000 at once; direct ones are told in any case, at most 1,000 events a second for each
// pod and CPU. Denied are those whose first packet was dropped, at most 100 a second for
// each pod and CPU. Where there are more, or the kernel's buffer of 1 MiB is full, they
// are lost: Counters.EventsLost.
func (d *Datapath) Events(buffer int) (*steer.EventReader, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.events != nil {
		return nil, errors.New("read events: another reader is open")
	}
	reader, err := ringbuf.NewReader(d.maps[datapathMapEvents])
	if err != nil {
		return nil, fmt.Errorf("read events: %w", err)
	}
	c, done := make(chan steer.Event, max(buffer, 1)), make(chan struct{})
	var r *steer.EventReader
	r = steer.NewEventReader(c, func() error {
		err := reader.Close()
		<-done
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.events == r {
			d.events = nil
		}
		return err
	})
	d.events = r
	go func() {
		defer close(done)
		defer close(c)
		d.readEvents(reader, r, c)
	}()
	return r, nil
}

// closeEvents ends the reader that there may be.
func (d *Datapath) closeEvents() error {
	d.mu.Lock()
	r := d.events
	d.mu.Unlock()
	if r == nil {
		return nil
	}
	return r.Close()
}

func (d *Datapath) readEvents(reader *ringbuf.Reader, r *steer.EventReader, c chan<- steer.Event) {
	var record ringbuf.Record
	for {
		err := reader.ReadInto(&record)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			d.log.Warn("Can't read connection events any more", "error", err)
			return
		}
		e, err := parseEvent(record.RawSample)
		if err != nil {
			r.Lose(1) // of another version, from before the programs were replaced
			continue
		}
		select {
		case c <- e:
		default:
			r.Lose(1)
		}
	}
}

func parseEvent(raw []byte) (steer.Event, error) {
	var e datapathEvent
	if len(raw) != int(unsafe.Sizeof(e)) {
		return steer.Event{}, fmt.Errorf("event has %d bytes, want %d", len(raw), unsafe.Sizeof(e))
	}
	if err := binary.Read(bytes.NewReader(raw), binary.NativeEndian, &e); err != nil {
		return steer.Event{}, err
	}
	now, err := monotonic()
	if err != nil {
		return steer.Event{}, err
	}
	event := steer.Event{
		Time: time.Now().Add(-time.Duration(max(now, e.Time) - e.Time)),
		Kind: steer.EventKind(e.Kind), Way: steer.Way(e.Way), Tenant: uint16(e.Tenant), PodUID: uidString(e.Uid),
		Pod:       netip.AddrPortFrom(netip.AddrFrom16(e.Pod.Bytes).Unmap(), e.PodPort),
		Peer:      netip.AddrPortFrom(netip.AddrFrom16(e.Peer.Bytes).Unmap(), e.PeerPort),
		BytesSent: e.BytesSent, BytesReceived: e.BytesReceived,
	}
	if event.Kind == steer.Denied {
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
	if int64(n) < int64(len(reasons)) {
		return reasons[n]
	}
	return strconv.Itoa(int(n))
}
