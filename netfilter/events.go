package netfilter

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// eventsPerSecond is how many events of a tenant are read in a second: what a tenant
// can take of the agent's time.
const eventsPerSecond = 10_000

// eventReading is the reader that is open: for each tenant and for the node something
// that reads, which waits for room in c. A channel serves those that wait in turn, so
// that no tenant can take another's place: what one has too much finds no room in its
// own sockets.
type eventReading struct {
	reader *steer.EventReader
	c      chan steer.Event
	ctx    context.Context
	pods   *atomic.Pointer[directory]
	ending sync.WaitGroup

	// Guarded by Datapath.mu.
	tenants map[uint16]*eventSource
	node    *eventSource
	closing bool
}

// Events begins to read connection events; buffer is how many wait in the channel, at
// least 1. There is one reader at a time; the caller closes it, or Close does. Opened
// is told when the first packet is there, again if that is sent again, and of what a
// tenant makes when it is answered. Closed comes with bytes but for direct
// connections, of which it is told at the first end's FIN or RST. Way and so who is
// the pod of two is certain of what opened since, and of tunnels.
//
// Denied are at most 100 a second for each veth, direct ones 1,000, those in a tenant's
// namespace 10,000 for the tenant. What is beyond that, or comes while nobody takes from
// C and the kernel's 256 KiB for a tenant are full, is lost: Counters.EventsLost.
func (d *Datapath) Events(buffer int) (*steer.EventReader, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.events != nil {
		return nil, errors.New("read events: another reader is open")
	}
	if _, err := d.snapshotNow(); err != nil {
		return nil, fmt.Errorf("read events: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &eventReading{c: make(chan steer.Event, max(buffer, 1)), ctx: ctx, pods: &d.pods, tenants: map[uint16]*eventSource{}}
	r.reader = steer.NewEventReader(r.c, func() error {
		d.mu.Lock()
		r.closing = true
		cancel()
		err := r.closeSources(d.lost)
		d.mu.Unlock()
		r.ending.Wait()
		close(r.c)
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.events == r {
			d.events = nil
		}
		return err
	})
	if err := r.open(0, 0); err != nil {
		cancel()
		return nil, fmt.Errorf("read events: %w", err)
	}
	d.events = r
	for index, t := range d.tenants {
		d.readTenantEvents(index, t.netns)
	}
	return r.reader, nil
}

// sources are all that read; the node's is nil if it couldn't be opened.
func (r *eventReading) sources() []*eventSource {
	return append(slices.Collect(maps.Values(r.tenants)), r.node)
}

func (r *eventReading) closeSources(lost map[uint16]uint64) (err error) {
	for _, s := range r.sources() {
		err = errors.Join(err, s.close(lost))
	}
	return err
}

// closeEvents ends the reader that there may be.
func (d *Datapath) closeEvents() error {
	d.mu.Lock()
	r := d.events
	d.mu.Unlock()
	if r == nil {
		return nil
	}
	return r.reader.Close()
}

// readTenantEvents has the open reader read of a tenant, too. Neither traffic nor other
// tenants wait for one of which it can't: some of its events aren't told, until its next
// update.
func (d *Datapath) readTenantEvents(index uint16, path string) {
	if d.events == nil || d.events.closing {
		return
	}
	if err := d.openTenantEvents(index, path); err != nil {
		d.log.Warn("A tenant's connection events aren't read", "tenant", index, "error", err)
		d.lost[index]++
		d.events.reader.Lose(1)
	}
}

func (d *Datapath) openTenantEvents(index uint16, path string) error {
	return inTenant(path, func(netns int) error {
		var stat unix.Stat_t
		if err := unix.Fstat(netns, &stat); err != nil {
			return err
		}
		if s := d.events.tenants[index]; s != nil {
			if s.inode == stat.Ino {
				return nil
			}
			d.endTenantEvents(index)
		}
		if err := d.events.open(index, netns); err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		d.events.tenants[index].inode = stat.Ino
		return nil
	})
}

// endTenantEvents lets go of a tenant's namespace, which else would stay.
func (d *Datapath) endTenantEvents(index uint16) {
	if d.events == nil || d.events.tenants[index] == nil {
		return
	}
	if err := d.events.tenants[index].close(d.lost); err != nil {
		d.log.Warn("Can't end reading a tenant's connection events", "tenant", index, "error", err)
	}
	delete(d.events.tenants, index)
}

// addLost counts what was lost, and what wasn't told for a veth's pace.
func (d *Datapath) addLost(all map[uint16]steer.Counters) error {
	untold, err := d.counted(setUntold)
	if err != nil {
		return err
	}
	add := func(index uint16, n uint64) {
		if n > 0 {
			c := all[index]
			c.EventsLost += n
			all[index] = c
		}
	}
	if _, err := d.snapshotNow(); err != nil {
		return err
	}
	pods := d.pods.Load()
	for k, n := range untold {
		add(pods.at(k[0]).tenant, n)
	}
	if r := d.events; r != nil && !r.closing {
		for _, s := range r.sources() {
			s.count(d.lost)
		}
	}
	for index, n := range d.lost {
		add(index, n)
	}
	return nil
}

// keepUntold counts what wasn't told of pods' veths as lost by the tenants of the snapshot.
// Call it before they are another tenant's, or nobody's.
func (d *Datapath) keepUntold(s *snapshot, veths []uint32) error {
	if len(veths) == 0 {
		return nil
	}
	untold, err := d.counted(setUntold)
	if err != nil {
		return err
	}
	if err := d.forgetCounted(veths, setUntold); err != nil {
		return err
	}
	for _, veth := range veths {
		d.lost[s.tenantOf(veth)] += untold[[2]uint32{veth}]
	}
	return nil
}

// eventSource reads what a network namespace tells.
type eventSource struct {
	of     *eventReading
	tenant uint16 // 0: the node
	inode  uint64
	pace   *rate.Limiter
	// logged is what the rules tell; ended of sockets, nil for the node.
	logged, ended *eventSocket

	// mu is held from reading to telling: a connection opens before it closes.
	mu     sync.Mutex
	opened openedConnections
}

// open begins to read of a network namespace: a tenant's, or with 0 the node's.
func (r *eventReading) open(tenant uint16, netns int) (err error) {
	s := &eventSource{of: r, tenant: tenant, pace: rate.NewLimiter(eventsPerSecond, eventsPerSecond/10), opened: openedConnections{seed: maphash.MakeSeed()}}
	if s.logged, err = openLog(netns); err != nil {
		return err
	}
	read := []func(){s.readLogged}
	if tenant != 0 {
		if s.ended, err = openEnded(netns); err != nil {
			return errors.Join(err, s.logged.conn.Close())
		}
		read = append(read, s.readEnded)
		r.tenants[tenant] = s
	} else {
		r.node = s
	}
	for _, f := range read {
		r.ending.Go(f)
	}
	return nil
}

// close ends reading, and counts what was lost.
func (s *eventSource) close(lost map[uint16]uint64) error {
	if s == nil {
		return nil
	}
	s.count(lost)
	err := s.logged.conn.Close()
	if s.ended != nil {
		err = errors.Join(err, s.ended.conn.Close())
	}
	return err
}

func (s *eventSource) count(lost map[uint16]uint64) {
	n := s.logged.lost()
	if s.ended != nil {
		n += s.ended.lost()
	}
	lost[s.tenant] += n
	s.of.reader.Lose(n)
}

// messageBytes holds any message that is asked for.
const messageBytes = 4096

func (s *eventSource) readLogged() {
	buffer := make([]byte, messageBytes)
	// It is closed when the reader is, or with its tenant.
	for s.logged.wait() == nil {
		s.mu.Lock()
		s.tellLogged(buffer)
		s.mu.Unlock()
	}
}

// tellLogged tells of all that is there.
func (s *eventSource) tellLogged(buffer []byte) {
	for {
		messages, err := s.logged.receive(buffer)
		if err != nil || len(messages) == 0 {
			return
		}
		for _, m := range messages {
			if p, ok := parseLog(m); ok {
				s.tell(s.eventOf(p))
			}
		}
	}
}

func (s *eventSource) readEnded() {
	logged, ended := make([]byte, messageBytes), make([]byte, messageBytes)
	for s.ended.wait() == nil {
		s.mu.Lock()
		messages, err := s.ended.receive(ended)
		// What opened those was logged before.
		s.tellLogged(logged)
		for _, m := range messages {
			if e, ok := parseEnded(m); ok {
				s.tellEnded(e)
			}
		}
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// tell waits for its pace and for room.
func (s *eventSource) tell(e steer.Event) {
	if s.pace.Wait(s.of.ctx) != nil {
		return
	}
	select {
	case s.of.c <- e:
	case <-s.of.ctx.Done():
	}
}

func (s *eventSource) tellEnded(e endedSocket) {
	way := unknownOpener
	switch {
	case e.local.Port() == portInbound:
		way = openedByPeer
	case e.remote.Port() == portInbound:
		way = openedHere
	}
	if was := s.opened.take(e.local, e.remote); was != unknownOpener {
		way = was
	}
	event, atLocal := s.place(e.local, e.remote, way)
	if event.PodUID == "" {
		return
	}
	event.Kind = steer.Closed
	// By the pod: what the tenant's socket sent as the pod, or received from it.
	if event.BytesSent, event.BytesReceived = e.received, e.sent; atLocal {
		event.BytesSent, event.BytesReceived = e.sent, e.received
	}
	s.tell(event)
}

func (s *eventSource) eventOf(p loggedPacket) (e steer.Event) {
	kind, reason := kindOf(p.prefix)
	if s.tenant != 0 {
		by := openedByPeer
		if p.prefix == prefixAnswered {
			by = openedHere
		}
		if kind == steer.Opened {
			s.opened.add(p.to, p.from, by)
		}
		e, _ = s.place(p.to, p.from, by)
	} else {
		pods := s.of.pods.Load()
		who := pods.at(p.veth)
		e = steer.Event{Time: time.Now(), Tenant: who.tenant, PodUID: who.uid, Pod: p.from, Peer: p.to, Way: steer.WayOutbound}
		if who.uid == "" {
			e.Way = steer.WayUpstream
		}
		by, direct := openedHere, steer.WayDirectOutbound
		if p.egress {
			e.Pod, e.Peer, e.Way = p.to, p.from, steer.WayInbound
			by, direct = openedByPeer, steer.WayDirectInbound
		}
		switch p.prefix {
		case prefixDirectOpened:
			s.opened.add(e.Pod, e.Peer, by)
			e.Way = direct
		case prefixDirectClosed:
			e.Way = [...]steer.Way{unknownOpener: 0, openedHere: steer.WayDirectOutbound, openedByPeer: steer.WayDirectInbound}[s.opened.take(e.Pod, e.Peer)]
		}
	}
	e.Kind, e.Reason = kind, reason
	return e
}

// place says whose a connection of a tenant is, that has these ends in there, and
// whether the pod's end is the local one.
func (s *eventSource) place(local, remote netip.AddrPort, by opener) (e steer.Event, atLocal bool) {
	pods := s.of.pods.Load()
	// The pod is the peer of what it dialled and of what is delivered to it; of the
	// others it is the address that the tenant uses.
	service := local.Port()
	if by == openedHere {
		service = remote.Port()
	}
	peer, atRemote := pods.addresses[remote.Addr()]
	as, isPod := pods.addresses[local.Addr()]
	atLocal = service == portInbound || !atRemote || peer.tenant != s.tenant && isPod
	e = steer.Event{Time: time.Now(), Tenant: s.tenant, PodUID: peer.uid, Pod: remote, Peer: local}
	ways := [...]steer.Way{openedHere: steer.WayDelivered, openedByPeer: steer.WayOutbound}
	if atLocal {
		e.PodUID, e.Pod, e.Peer = as.uid, local, remote
		ways = [...]steer.Way{openedHere: steer.WayUpstream, openedByPeer: steer.WayInbound}
	}
	e.Way = ways[by]
	return e, atLocal
}

// opener is who opened a connection: the end that is asked about, or the other.
type opener uint8

const (
	unknownOpener opener = iota
	openedHere
	openedByPeer
)

// maxOpened bounds, for each tenant, of how many connections it is known who opened
// them: when they close, no more of it is to be had. The oldest are forgotten.
const maxOpened = 8192

// openedConnections remembers who opened connections, by a hash of both ends.
type openedConnections struct {
	seed   maphash.Seed
	by     map[uint64]opener
	oldest []uint64 // a ring
	next   int
}

func (o *openedConnections) key(here, there netip.AddrPort) uint64 {
	return maphash.Comparable(o.seed, [2]netip.AddrPort{here, there})
}

func (o *openedConnections) add(here, there netip.AddrPort, by opener) {
	if o.by == nil {
		o.by = map[uint64]opener{}
	}
	k := o.key(here, there)
	if _, again := o.by[k]; !again {
		if len(o.oldest) < maxOpened {
			o.oldest = append(o.oldest, k)
		} else {
			delete(o.by, o.oldest[o.next])
			o.oldest[o.next], o.next = k, (o.next+1)%maxOpened
		}
	}
	o.by[k] = by
}

// take returns who opened a connection, and forgets it.
func (o *openedConnections) take(here, there netip.AddrPort) opener {
	k := o.key(here, there)
	by := o.by[k]
	delete(o.by, k)
	return by
}

// podAt is a pod, or of a tenant's veth its tenant alone.
type podAt struct {
	uid    string
	tenant uint16
}

// directory is whose addresses and veths are. It doesn't change.
type directory struct {
	addresses map[netip.Addr]podAt
	veths     map[uint32]podAt
}

func (d *directory) at(veth uint32) podAt { return d.veths[veth] }

func directoryOf(s *snapshot) *directory {
	d := &directory{addresses: map[netip.Addr]podAt{}, veths: map[uint32]podAt{}}
	number := binaryutil.NativeEndian.Uint32
	for k, e := range s.sets[setTenantOf] {
		d.veths[number([]byte(k))] = podAt{tenant: uint16(number(e.value))}
	}
	for k, e := range s.sets[setPods] {
		d.veths[number([]byte(k))] = podAt{e.comment, uint16(number(e.value))}
	}
	for _, f := range families {
		for k, e := range s.sets[setAddresses+f.version] {
			if a, ok := netip.AddrFromSlice([]byte(k)); ok {
				d.addresses[a] = d.veths[number(e.value)]
			}
		}
	}
	return d
}
