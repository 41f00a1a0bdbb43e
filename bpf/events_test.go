package bpf

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// events reads events until the test's end.
func (m *mesh) events(buffer int) *eventReader {
	m.t.Helper()
	r, err := m.d.Events(buffer)
	check(m.t, err)
	m.t.Cleanup(func() { r.Close() })
	return &eventReader{r}
}

type eventReader struct{ *steer.EventReader }

// await waits for an event that fits; others are passed over.
func (r *eventReader) await(t *testing.T, what string, fits func(steer.Event) bool) steer.Event {
	t.Helper()
	deadline := time.After(patience)
	var others []steer.Event
	for {
		select {
		case e := <-r.C:
			if fits(e) {
				return e
			}
			others = append(others, e)
		case <-deadline:
			t.Errorf("no event: %s; others: %+v", what, others)
			return steer.Event{}
		}
	}
}

func TestEventsOfTenants(t *testing.T) {
	m := newMesh(t)
	cgroup := makeCgroup(t)
	m.proxy1.stop()
	m.one.CgroupV2 = cgroup
	check(t, m.d.UpdateTenant(m.one.Tenant))
	m.proxy1 = startProxyIn(t, m.one.namespace, "proxy1", cgroup)
	check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
	r := m.events(1000)
	if _, err := m.d.Events(1); err == nil {
		t.Error("a second reader is accepted")
	}
	eachFamily(t, func(t *testing.T, family int) {
		a, remote := m.a.of(family), remoteAddresses.of(family)
		for _, flow := range []struct {
			way      steer.Way
			from     *namespace
			to, peer netip.AddrPort
			podPort  uint16
		}{
			{steer.WayOutbound, m.a.namespace, at(remote, 80), at(remote, 80), 0},
			{steer.WayInbound, m.remote, at(a, 8080), at(remote, 0), 8080},
			{steer.WayInbound, m.remote, at(a, 15008), at(remote, 0), 15008},
		} {
			start := time.Now()
			c, greeting, err := dial(t, flow.from, netip.AddrPort{}, flow.to)
			if err != nil || greeting != "proxy1" {
				t.Fatalf("%q, %v", greeting, err)
			}
			check(t, echo(c, 10_000))
			port := c.LocalAddr().(*net.TCPAddr).AddrPort().Port()
			want := steer.Event{Kind: steer.Opened, Way: flow.way, Tenant: 1, PodUID: "a", Pod: at(a, flow.podPort), Peer: flow.peer}
			if flow.podPort == 0 {
				want.Pod = at(a, port)
			} else {
				want.Peer = at(remote, port)
			}
			same := func(kind steer.EventKind) func(steer.Event) bool {
				return func(e steer.Event) bool {
					want.Kind, want.Time = kind, e.Time
					want.BytesSent, want.BytesReceived = e.BytesSent, e.BytesReceived
					return e == want
				}
			}
			e := r.await(t, fmt.Sprintf("%v opened", flow.way), same(steer.Opened))
			if e.BytesSent > 1 || e.BytesReceived > 1 || e.Time.Before(start.Add(-time.Second)) || e.Time.After(time.Now().Add(time.Second)) {
				t.Errorf("opened: %+v", e)
			}
			check(t, c.(*net.TCPConn).CloseWrite())
			c.Read(make([]byte, 1))
			c.Close()
			e = r.await(t, fmt.Sprintf("%v closed", flow.way), same(steer.Closed))
			// The greeting goes one way, too; SYN and FIN count as a byte.
			sent, received := e.BytesSent, e.BytesReceived
			if flow.way == steer.WayInbound {
				sent, received = received, sent
			}
			if sent < 10_000 || sent > 10_002 || received < 10_007 || received > 10_009 {
				t.Errorf("%v closed: %d bytes sent, %d received", flow.way, sent, received)
			}
		}
	})
	t.Run("that it makes", func(t *testing.T) {
		serve(t, m.remote, 80)
		serve(t, m.a.namespace, 8081)
		eachFamily(t, func(t *testing.T, family int) {
			a, b, c, remote := m.a.of(family), m.b.of(family), m.c.of(family), remoteAddresses.of(family)
			for _, flow := range []struct {
				from netip.Addr
				to   netip.AddrPort
				way  steer.Way
				uid  string
			}{
				{a, at(remote, 80), steer.WayUpstream, "a"},
				{a, at(b, 80), steer.WayUpstream, "a"},
				{a, at(b, 15008), steer.WayUpstream, "a"},
				{a, at(c, 15008), steer.WayUpstream, "a"},
				{remote, at(a, 8081), steer.WayDelivered, "a"},
				{b, at(a, 8081), steer.WayDelivered, "a"},
				{c, at(a, 8081), steer.WayDelivered, "a"},
			} {
				_, err := fmt.Fprintf(m.proxy1.stdin, "%s %s\n", at(flow.from, 0), flow.to)
				check(t, err)
				r.await(t, fmt.Sprintf("%v from %s to %s", flow.way, flow.from, flow.to), func(e steer.Event) bool {
					if flow.way == steer.WayDelivered {
						return e.Kind == steer.Opened && e.Way == flow.way && e.Tenant == 1 && e.PodUID == flow.uid && e.Pod == flow.to && e.Peer.Addr() == flow.from
					}
					return e.Kind == steer.Opened && e.Way == flow.way && e.Tenant == 1 && e.PodUID == flow.uid && e.Pod.Addr() == flow.from && e.Peer == flow.to
				})
			}
		})
	})
	t.Run("of a pod that has moved", func(t *testing.T) {
		var held []heldFlow
		m.hold(&held, "outbound", m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80), "proxy1")
		m.a.Tenant = 2
		check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
		m.endFlows(held, "a")
		r.await(t, "closed at its former tenant", func(e steer.Event) bool {
			return e.Kind == steer.Closed && e.Tenant == 1 && e.PodUID == "a" && e.Way == steer.WayOutbound
		})
	})
	check(t, r.Close())
	check(t, r.Close())
	for range r.C {
	}
	m.events(1)
}

func TestEventsInTheClear(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8080)
	check(t, m.d.SetExclusions([]steer.Exclusion{{}, {Inbound: true}}))
	r := m.events(1000)
	eachFamily(t, func(t *testing.T, family int) {
		for _, flow := range []struct {
			way  steer.Way
			from *namespace
			to   netip.AddrPort
		}{
			{steer.WayDirectOutbound, m.a.namespace, at(remoteAddresses.of(family), 80)},
			{steer.WayDirectInbound, m.remote, at(m.a.of(family), 8080)},
		} {
			c, _, err := dial(t, flow.from, netip.AddrPort{}, flow.to)
			check(t, err)
			check(t, echo(c, 10_000))
			fits := func(kind steer.EventKind) func(steer.Event) bool {
				return func(e steer.Event) bool {
					return e.Kind == kind && e.Way == flow.way && e.Tenant == 1 && e.PodUID == "a" && e.Pod.Addr() == m.a.of(family) && e.Peer.Addr() == remoteAddresses.of(family) &&
						(e.Pod == flow.to || e.Peer == flow.to)
				}
			}
			r.await(t, "opened", fits(steer.Opened))
			check(t, c.(*net.TCPConn).CloseWrite())
			c.Read(make([]byte, 1))
			if e := r.await(t, "closed", fits(steer.Closed)); e.BytesSent < 10_000 || e.BytesReceived < 10_000 || e.BytesSent > 20_000 || e.BytesReceived > 20_000 {
				t.Errorf("%+v", e)
			}
		}
	})
	t.Run("reset", func(t *testing.T) {
		_, _, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 81))
		if err == nil {
			t.Error("connected")
		}
		r.await(t, "closed", func(e steer.Event) bool { return e.Kind == steer.Closed && e.Peer == at(remoteAddresses.v4, 81) })
	})
}

func TestEventsOfDenials(t *testing.T) {
	m := newMesh(t)
	r := m.events(1000)
	eachFamily(t, func(t *testing.T, family int) {
		remote, b := remoteAddresses.of(family), m.b.of(family)
		for _, c := range []struct {
			name   string
			from   *namespace
			addr   netip.Addr
			to     netip.AddrPort
			drops  func() uint64
			reason string
			way    steer.Way
			uid    string
			pod    netip.Addr
		}{
			{"spoofed", m.a.namespace, b, at(remote, 80), func() uint64 { return m.pod1("a").Dropped.Spoofed }, "Spoofed", steer.WayOutbound, "a", b},
			{"foreign", m.one.namespace, b, at(remote, 80), func() uint64 { return m.counters(1).Dropped.Foreign }, "Foreign", steer.WayUpstream, "", b},
		} {
			before := c.drops()
			syn(t, c.from, c.addr, c.to, func() bool { return c.drops() > before })
			e := r.await(t, c.name, func(e steer.Event) bool {
				return e.Kind == steer.Denied && e.Reason == c.reason && e.Way == c.way && e.PodUID == c.uid && e.Tenant == 1 && e.Pod.Addr() == c.pod && e.Peer == c.to
			})
			if e.Pod.Port() == 0 {
				t.Errorf("%+v", e)
			}
		}
	})
	t.Run("refused", func(t *testing.T) {
		check(t, m.d.ClearListeners(1, 0))
		// Another denial of the pod may be less than 10 ms ago.
		for lost, again := m.counters(1).EventsLost, true; again; {
			dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.v4, 80))
			now := m.counters(1).EventsLost
			lost, again = now, now > lost
		}
		r.await(t, "refused", func(e steer.Event) bool {
			return e.Kind == steer.Denied && e.Reason == "Refused" && e.PodUID == "a" && e.Peer == at(remoteAddresses.v4, 80) && e.Pod.Addr() == m.a.v4
		})
	})
}

// A veth that hammers is told of at its pace: what is beyond that is counted as lost, and
// another veth's is told.
func TestEventPace(t *testing.T) {
	const perSecond = 100
	m := newMesh(t)
	r := m.events(64)
	spoofs := func(p *testPod, times int) {
		t.Helper()
		as := m.b.v4
		if p == m.b {
			as = m.a.v4
		}
		sendPackets(t, p, times, slices.Concat([]byte{0x45, 8: 64, 9: unix.IPPROTO_TCP, 11: 0}, as.AsSlice(), remoteAddresses.v4.AsSlice(), []byte{1: 1, 3: 80, 12: 5 << 4, 13: 2, 19: 0}))
	}
	eventPace{perSecond: perSecond, enough: 3 * perSecond, others: 1, cause: spoofs, are: func(e steer.Event) bool {
		return e.Kind == steer.Denied && e.Reason == "Spoofed"
	}}.check(t, m, r)
}

// A pod makes an event of each packet where its connections pass in the clear: by SYNs and
// resets. They are told at its pace, and leave the kernel's buffer to others.
func TestDirectEventPace(t *testing.T) {
	const perSecond, port = 1000, 5304
	m := newMesh(t)
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: port}}))
	r := m.events(256)
	// A connection is two events: it opens and ends.
	churn := func(p *testPod, events int) {
		t.Helper()
		packet := func(flags byte) []byte {
			return slices.Concat([]byte{0x45, 8: 64, 9: unix.IPPROTO_TCP, 11: 0}, p.v4.AsSlice(), remoteAddresses.v4.AsSlice(), segment(20000, port, flags))
		}
		sendPackets(t, p, events/2, packet(tcpSYN), packet(4))
	}
	eventPace{perSecond: perSecond, atOnce: perSecond, enough: perSecond, others: 2, cause: churn, are: func(e steer.Event) bool {
		return e.Way == steer.WayDirectOutbound && e.Kind != steer.Denied
	}}.check(t, m, r)
}

// Whoever has taken over a proxy opens and closes connections as fast as it can, while
// nobody reads: the kernel's buffer has room for another tenant's events.
func TestSocketEventPace(t *testing.T) {
	const perSecond, atOnce, perConnection = 10_000, 1000, 4 // opened and closed, at both ends
	// None is told for so long: not every machine opens connections faster than the pace.
	const silent = 100 * time.Millisecond
	m := newMesh(t)
	m.counting(steer.ConnectionLimits{})
	m.proxy2.stop()
	m.two.CgroupV2 = makeCgroup(t)
	check(t, m.d.UpdateTenant(m.two.Tenant))
	m.proxy2 = startProxyIn(t, m.two.namespace, "proxy2", m.two.CgroupV2)
	check(t, m.d.SetListeners(2, 0, m.proxy2.pid))
	deadline := time.Now().Add(patience)
	for lost := uint64(0); lost == 0; {
		if time.Now().After(deadline) {
			t.Fatal("all events of a tenant are told")
		}
		before, begun := m.counters(1).EventsLost, time.Now()
		m.spendEvents(1, atOnce*time.Second/perSecond+silent)
		// A tunnel between two pods of the tenant has both ends in its namespace. In the
		// time fewer may be told than the buffer has room for.
		_, err := fmt.Fprintf(m.proxy1.stdin, "%s %s 3000 400ms\n", at(m.a.v4, 0), at(m.c.v4, 15008))
		check(t, err)
		sent := perConnection * m.proxy1.churned(t)
		m.greets("another tenant", m.b.namespace, at(remoteAddresses.v4, 80), "proxy2")
		r, told, others := m.events(1<<14), uint64(0), 0
		for told+lost < sent || others == 0 {
			select {
			case e := <-r.C:
				switch {
				case e.Tenant == 1 && e.Kind != steer.Denied:
					told++
				case e.Tenant == 2 && e.Kind == steer.Opened && e.Way == steer.WayOutbound && e.PodUID == "b":
					others++
				default:
					t.Errorf("%+v", e)
				}
				continue
			default:
			}
			lost = m.counters(1).EventsLost - before
			if time.Now().After(deadline) {
				t.Fatalf("of %d events %d were told, %d are lost, %d of another tenant's 1 were told", sent, told, lost, others)
			}
		}
		took := time.Since(begun)
		check(t, r.Close())
		if most := uint64(max(took-silent, 0).Seconds()*perSecond) + 1; told > most || told+lost != sent || others != 1 {
			t.Errorf("in %s %d of %d were told, %d are lost; want at most %d; %d of another tenant", took, told, sent, lost, most, others)
		}
		t.Logf("%d events in %s, %d told, %d lost", sent, took, told, lost)
	}
	if c := m.counters(2); c.EventsLost != 0 {
		t.Errorf("%d events of another tenant are lost", c.EventsLost)
	}
}

// spendEvents leaves a tenant's sockets as if they had told so much of what its pace will
// let them.
func (m *mesh) spendEvents(tenant uint32, ahead time.Duration) {
	m.t.Helper()
	loads := m.d.maps[datapathMapLoads]
	var l datapathTenantLoad
	check(m.t, loads.Lookup(tenant, &l))
	now, err := monotonic()
	check(m.t, err)
	l.EventsDue = now + uint64(ahead)
	check(m.t, loads.Update(tenant, l, ebpf.UpdateExist))
}

// churned waits until a proxy has made the connections that it was told to, and returns how
// many they are.
func (p *proxy) churned(t *testing.T) (n uint64) {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case l := <-p.accepted:
			if number, ok := strings.CutPrefix(l, churned+" "); ok {
				n, err := strconv.ParseUint(number, 10, 64)
				check(t, err)
				return n
			}
		case <-deadline:
			t.Fatal("the proxy makes no connections")
		}
	}
}

// eventPace is how many events of a veth are told in a second, and after a rest at once.
type eventPace struct {
	perSecond, atOnce uint64
	// enough are lost, then it has been seen; others are what another veth makes meanwhile.
	enough, others uint64
	// cause makes so many events at a pod's veth.
	cause func(p *testPod, events int)
	are   func(steer.Event) bool
}

func (p eventPace) check(t *testing.T, m *mesh, r *eventReader) {
	t.Helper()
	var sent, lost uint64
	told, begun := map[string]uint64{}, time.Now()
	for lost < p.enough && sent < 50*p.perSecond {
		p.cause(m.a, 100)
		sent += 100
		if told["b"] == 0 {
			p.cause(m.b, int(p.others))
		}
		for deadline := time.Now().Add(patience); told["a"]+lost < sent || told["b"] < p.others; {
			select {
			case e := <-r.C:
				if !p.are(e) {
					t.Errorf("%+v", e)
				}
				told[e.PodUID]++
				continue
			default:
			}
			lost = m.counters(1).EventsLost
			if time.Now().After(deadline) {
				t.Fatalf("of %d events %v were told, %d are lost", sent, told, lost)
			}
		}
	}
	took := time.Since(begun)
	if most := p.atOnce + uint64(took.Seconds()*float64(p.perSecond)) + 1; lost == 0 || told["a"] > most || told["a"]+lost != sent || told["b"] != p.others || m.counters(2).EventsLost != 0 || r.Lost() != 0 {
		t.Errorf("in %s %v were told and %d lost; want at most %d of %d, and all of the other", took, told, lost, most, sent)
	}
}

// sendPackets sends packets again and again, on one CPU: a pace is of a CPU, too.
func sendPackets(t *testing.T, p *testPod, times int, packets ...[]byte) {
	t.Helper()
	p.do(t, func() {
		onOneCPU(t)
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		check(t, err)
		defer unix.Close(fd)
		for range times {
			for _, packet := range packets {
				check(t, unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: remoteAddresses.v4.As4()}))
			}
		}
	})
}

// Nobody reads: the ring fills, events are lost and counted, connections go on.
func TestEventsLost(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	check(t, m.d.SetExclusions([]steer.Exclusion{{}}))
	fill := func() {
		// A connection is two events of about 130 bytes.
		m.a.do(t, func() {
			to := &unix.SockaddrInet4{Addr: remoteAddresses.v4.As4(), Port: 81}
			for range 5000 {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
				check(t, err)
				if err := unix.Connect(fd, to); err != unix.ECONNREFUSED {
					t.Errorf("connect: %v", err)
				}
				unix.Close(fd)
			}
		})
		check(t, m.d.SweepFlows(0))
	}
	fill()
	if n := m.counters(1).EventsLost; n == 0 {
		t.Error("no event is counted as lost")
	}
	m.greets("full", m.a.namespace, at(remoteAddresses.v4, 80), "app 10.77.0.2")
	m.greets("full", m.remote, at(m.a.v4, 8080), "proxy1")

	// A slow reader holds nothing up either.
	r := m.events(1)
	deadline := time.Now().Add(patience)
	for r.Lost() < 100 && time.Now().Before(deadline) { // so that there is room for others
		time.Sleep(time.Millisecond)
	}
	if r.Lost() < 100 {
		t.Errorf("a full channel lost %d events", r.Lost())
	}
	lost := m.counters(1).EventsLost
	m.greets("read", m.a.namespace, at(remoteAddresses.v4, 80), "app 10.77.0.2")
	if n := m.counters(1).EventsLost; n != lost {
		t.Errorf("%d events lost though the ring is empty", n-lost)
	}
}

func TestPodCounters(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8081)
	eachFamily(t, func(t *testing.T, family int) {
		before, other := m.pod1("a"), m.pod1("b")
		c, _, err := dial(t, m.a.namespace, netip.AddrPort{}, at(remoteAddresses.of(family), 80))
		check(t, err)
		check(t, echo(c, 100_000))
		after := m.pod1("a")
		if sent, received := after.BytesSent-before.BytesSent, after.BytesReceived-before.BytesReceived; sent < 100_000 || sent > 150_000 || received < 100_000 || received > 150_000 {
			t.Errorf("%d bytes sent, %d received, of 100,000 each", sent, received)
		}
		if after.Outbound != before.Outbound+1 || after.Plain != before.Plain || after.Direct != 0 {
			t.Errorf("%+v after %+v", after, before)
		}
		_, _, err = dial(t, m.remote, netip.AddrPort{}, at(m.a.of(family), 80))
		check(t, err)
		if after := m.pod1("a"); after.Plain != before.Plain+1 {
			t.Errorf("%+v after %+v", after, before)
		}
		// The node's own, past the tenant.
		before = m.pod1("a")
		c, _, err = dial(t, nil, netip.AddrPort{}, at(m.a.of(family), 8081))
		check(t, err)
		check(t, echo(c, 10_000))
		if after := m.pod1("a"); after.BytesReceived < before.BytesReceived+10_000 || after.BytesSent < before.BytesSent+10_000 {
			t.Errorf("%+v after %+v", after, before)
		}
		if m.pod1("b") != other {
			t.Errorf("pod b: %+v after %+v", m.pod1("b"), other)
		}
	})
	check(t, m.d.Close())
	m.d = m.open()
	if m.pod1("a").Outbound == 0 {
		t.Error("counters are lost when another process takes over")
	}
	// As if the pod's veth had gone and its index been given to another.
	for _, name := range podLinks {
		check(t, detach(filepath.Join(m.d.podDir("a"), name)))
	}
	next := m.a.Pod
	next.UID = "next"
	check(t, m.d.UpdatePod(next))
	if c := m.pod1("next"); c != (steer.PodCounters{}) {
		t.Errorf("another pod at the same veth begins with %+v", c)
	}
}

// The programs say the reason of a denial by its place.
func TestReasons(t *testing.T) {
	c := reflect.TypeFor[datapathDrops]()
	for i := 1; i < c.NumField(); i++ { // the first says that it is C's
		if got := reason(uint32(i - 1)); got != c.Field(i).Name {
			t.Errorf("reason %d is %s, of the programs %s", i-1, got, c.Field(i).Name)
		}
	}
	if len(reasons) != c.NumField()-1 {
		t.Errorf("%d reasons, of the programs %d", len(reasons), c.NumField()-1)
	}
}
