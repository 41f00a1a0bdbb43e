package bpf

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// counting puts tenant 1's proxy into a cgroup, where its connections are counted.
func (m *mesh) counting(l steer.ConnectionLimits) {
	m.t.Helper()
	cgroup := makeCgroup(m.t)
	m.proxy1.stop()
	m.one.CgroupV2, m.one.Connections = cgroup, l
	check(m.t, m.d.UpdateTenant(m.one.Tenant))
	m.proxy1 = startProxyIn(m.t, m.one.namespace, "proxy1", cgroup)
	check(m.t, m.d.SetListeners(1, 0, m.proxy1.pid))
}

// shed reports whether a connection isn't answered: not refused either.
func shed(t *testing.T, n *namespace, to netip.AddrPort) bool {
	t.Helper()
	var c net.Conn
	var err error
	n.do(t, func() { c, err = net.DialTimeout("tcp", to.String(), 300*time.Millisecond) })
	if err == nil {
		c.Close()
		return false
	}
	if timeout := net.Error(nil); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("a connection to %s ends with %v", to, err)
	}
	return true
}

func (m *mesh) waitConnections(index uint16, want int64) {
	m.t.Helper()
	var have int64
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		var err error
		have, err = m.d.Connections(index)
		check(m.t, err)
		if have == want {
			return
		}
	}
	m.t.Errorf("tenant %d has %d connections, want %d", index, have, want)
}

// A tenant has as many connections as it may, from its pods and to them; who comes
// then waits, others don't notice, and the room of those that end is free at once.
func TestConcurrentConnections(t *testing.T) {
	m := newMesh(t)
	const most = 6
	m.counting(steer.ConnectionLimits{Concurrent: most})
	remote := remoteAddresses
	var held []net.Conn
	hold := func(n *namespace, to netip.AddrPort) {
		t.Helper()
		c, greeting, err := dial(t, n, netip.AddrPort{}, to)
		if err != nil || greeting != "proxy1" {
			t.Fatalf("connection %d: %q, %v", len(held)+1, greeting, err)
		}
		held = append(held, c)
	}
	hold(m.a.namespace, at(remote.v4, 80))
	hold(m.c.namespace, at(remote.v6, 80))
	hold(m.remote, at(m.a.v4, 8080))
	hold(m.remote, at(m.a.v6, 15008))
	hold(m.remote, at(m.c.v4, 8080))
	hold(m.a.namespace, at(remote.v6, 81))
	m.waitConnections(1, most)
	r := m.events(100)
	repeated := repeatedSYNs(t, m.a.namespace, m.c.namespace, m.remote)
	for _, to := range []struct {
		from *namespace
		to   netip.AddrPort
		way  steer.Way
	}{
		{m.a.namespace, at(remote.v4, 80), steer.WayOutbound}, {m.c.namespace, at(remote.v6, 80), steer.WayOutbound},
		{m.remote, at(m.a.v4, 8080), steer.WayInbound}, {m.remote, at(m.c.v6, 15008), steer.WayInbound},
	} {
		if !shed(t, to.from, to.to) {
			t.Errorf("a connection too many, to %s", to.to)
		}
		r.await(t, "too many", func(e steer.Event) bool {
			return e.Kind == steer.Denied && e.Reason == "TooMany" && e.Way == to.way && e.Tenant == 1
		})
	}
	// A SYN may have been sent again.
	repeated = repeatedSYNs(t, m.a.namespace, m.c.namespace, m.remote) - repeated
	already := m.counters(1).Dropped
	if already.TooMany < 4 || already.TooMany > uint64(4+repeated) || already.TooFast != 0 {
		t.Errorf("shed %+v, and %d SYNs were repeated", already, repeated)
	}
	m.greets("another tenant", m.b.namespace, at(remote.v4, 80), "proxy2")
	for _, c := range held {
		check(t, echo(c, 1000))
	}

	// It began a moment early, and gets through when another one ends.
	waiting := make(chan error, 1)
	go func() {
		var c net.Conn
		var err error
		m.a.run(func() { c, err = net.DialTimeout("tcp", at(remote.v4, 80).String(), 4*patience) })
		if err == nil {
			_, err = line(c)
			c.Close()
		}
		waiting <- err
	}()
	for deadline := time.Now().Add(patience); m.counters(1).Dropped.TooMany <= already.TooMany; {
		if time.Now().After(deadline) {
			t.Fatal("the one more isn't shed")
		}
	}
	held[0].Close()
	check(t, <-waiting)
	// Ends of all kinds are counted: by the client, by a reset, with the process.
	held[1].(*net.TCPConn).SetLinger(0)
	held[1].Close()
	m.waitConnections(1, most-2)
	m.proxy1.stop()
	m.waitConnections(1, 0)

	// Without the limit nobody is kept out, and who has begun is counted.
	m.proxy1 = startProxyIn(t, m.one.namespace, "proxy1", m.one.CgroupV2)
	check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
	m.one.Connections = steer.ConnectionLimits{}
	check(t, m.d.UpdateTenant(m.one.Tenant))
	held = nil
	for range most + 2 {
		hold(m.a.namespace, at(remote.v4, 80))
	}
	m.waitConnections(1, most+2)
	if l, err := m.d.ConnectionLimits(1); err != nil || l != (steer.ConnectionLimits{}) {
		t.Errorf("limits %+v, %v", l, err)
	}
}

// The pace holds for the pods of a tenant together, and leaves others alone.
func TestNewConnectionsPerSecond(t *testing.T) {
	m := newMesh(t)
	const rate, measured, unhurried = 50, 3 * time.Second, 500 * time.Millisecond
	m.counting(steer.ConnectionLimits{NewPerSecond: rate})
	var opened [3]atomic.Int64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	begin := time.Now()
	for i, pod := range []*testPod{m.a, m.c, m.b} {
		for range 40 {
			wg.Go(func() {
				check := pod.run(func() {
					for {
						select {
						case <-stop:
							return
						case <-time.After(10 * time.Millisecond): // the load is bounded
						}
						c, err := net.DialTimeout("tcp", at(remoteAddresses.v4, 80).String(), unhurried/2)
						if err == nil {
							opened[i].Add(1)
							c.(*net.TCPConn).SetLinger(0)
							c.Close()
						}
					}
				})
				if check != nil {
					t.Error(check)
				}
			})
		}
	}
	go func() {
		for range m.proxy1.accepted {
		}
	}()
	go func() {
		for range m.proxy2.accepted {
		}
	}()
	// From one SYN that was too fast to another, with less than a second between any two,
	// as many connections open as the pace says: no more is to be had, and none is lost,
	// however busy the machine is. What one look sees lies between it and the last.
	type look struct {
		at                time.Time
		tooFast, accepted uint64
	}
	accepted := func() uint64 { return m.pod1("a").Accepted + m.pod1("c").Accepted }
	var looks []look
	for n := 0; n < 3 || looks[n-2].at.Sub(looks[1].at) < measured; n = len(looks) {
		time.Sleep(20 * time.Millisecond) // for SYNs that are too fast; the loop waits for enough of them
		now := look{time.Now(), m.counters(1).Dropped.TooFast, accepted()}
		switch {
		case n > 0 && now.at.Sub(looks[n-1].at) >= unhurried:
			looks = []look{now}
		case n == 0 || now.tooFast > looks[n-1].tooFast:
			looks = append(looks, now)
		}
		if now.at.Sub(begin) > 6*patience {
			close(stop)
			wg.Wait()
			t.Fatalf("for %s SYNs weren't too fast without a break; %d in all, %d connections", measured, now.tooFast, now.accepted)
		}
	}
	close(stop)
	wg.Wait()
	n := len(looks)
	got, least := looks[n-1].accepted-looks[0].accepted, rate*looks[n-2].at.Sub(looks[1].at).Seconds()*0.9
	if float64(got) < least {
		t.Errorf("%d connections in %s, want %.0f", got, looks[n-2].at.Sub(looks[1].at), least)
	}
	// A second's worth is there at the beginning.
	elapsed := time.Since(begin).Seconds()
	if all, most := accepted(), rate*(elapsed+1)+1; float64(all) > most {
		t.Errorf("%d connections in %.1f s, want at most %.0f", all, elapsed, most)
	}
	if opened[0].Load() == 0 || opened[1].Load() == 0 || opened[2].Load() == 0 {
		t.Errorf("the pods of the tenant opened %d and %d, another tenant's %d", opened[0].Load(), opened[1].Load(), opened[2].Load())
	}
	if d, other := m.counters(1).Dropped, m.counters(2).Dropped; d.TooFast == 0 || d.TooMany != 0 || other.TooFast != 0 {
		t.Errorf("shed %+v, of another tenant %+v", d, other)
	}
	// It recovers by itself.
	time.Sleep(time.Second) // a second without connections is what is tried
	for range rate / 2 {
		m.greets("after a rest", m.a.namespace, at(remoteAddresses.v4, 80), "proxy1")
	}
	// And another process finds it as it is.
	check(t, m.d.Close())
	m.d = m.open()
	if l, err := m.d.ConnectionLimits(1); err != nil || l.NewPerSecond != rate {
		t.Errorf("limits after a restart: %+v, %v", l, err)
	}
	m.one.Connections = steer.ConnectionLimits{NewPerSecond: 2_000_000}
	if err := m.d.UpdateTenant(m.one.Tenant); err == nil {
		t.Error("2,000,000 connections a second are accepted")
	}
}

// Who dials a tenant's pods takes nothing of the pace at which they dial, nor the
// last quarter of the room for their connections.
func TestOutsidersLeaveRoom(t *testing.T) {
	m := newMesh(t)
	const most = 8
	m.counting(steer.ConnectionLimits{NewPerSecond: 2, Concurrent: most})
	out, in := at(remoteAddresses.v4, 80), at(m.a.v4, 8080)
	// On a busy machine nobody is fast at first, and what isn't answered in time needn't be
	// shed: that is counted.
	tooFast := func(n *namespace, to netip.AddrPort) bool {
		before := m.counters(1).Dropped.TooFast
		shed(t, n, to)
		return m.counters(1).Dropped.TooFast > before
	}
	for tries := 0; !tooFast(m.remote, in); tries++ {
		if tries == 50 {
			t.Fatalf("nothing was too fast: %+v", m.counters(1).Dropped)
		}
	}
	for range 2 {
		if tooFast(m.a.namespace, out) {
			t.Error("the pod has no pace of its own")
		}
	}
	for tries := 0; !tooFast(m.a.namespace, out); tries++ {
		if tries == 50 {
			t.Fatal("the pod opens them faster than it may")
		}
	}
	m.waitConnections(1, 0)

	m.one.Connections.NewPerSecond = 0
	check(t, m.d.UpdateTenant(m.one.Tenant))
	before := m.counters(1).Dropped
	var held []heldFlow
	for range most * 3 / 4 {
		m.hold(&held, "from outside", m.remote, netip.AddrPort{}, in, "proxy1")
	}
	m.waitConnections(1, most*3/4)
	if !shed(t, m.remote, in) || m.counters(1).Dropped.TooMany == before.TooMany {
		t.Error("outsiders get the last quarter")
	}
	for range most / 4 {
		m.hold(&held, "from a pod", m.a.namespace, netip.AddrPort{}, out, "proxy1")
	}
	m.waitConnections(1, most)
	if !shed(t, m.a.namespace, out) {
		t.Error("the pod has more than it may")
	}
}

// A SYN is no connection before its handshake has ended, and one with FIN or RST opens
// nothing: neither takes of the pace, nor is either on the bill.
func TestWhatOpensNothing(t *testing.T) {
	m := newMesh(t)
	m.counting(steer.ConnectionLimits{NewPerSecond: 5})
	to := at(remoteAddresses.v4, 80)
	before := m.counters(1)
	const tries = 50
	for _, flags := range []byte{3, 6} { // SYN with FIN, with RST
		for i := range uint16(tries) {
			forgePacket(t, m.a.namespace, at(m.a.v4, 20000+i), to, flags)
			forgePacket(t, m.remote, to, at(m.a.v4, 8080), flags)
		}
	}
	after := m.counters(1)
	if n := after.Dropped.Malformed - before.Dropped.Malformed; n != 4*tries || after.Dropped.TooFast != before.Dropped.TooFast || after.Steered != before.Steered {
		t.Errorf("%d of %d packets are malformed: %+v", n, 4*tries, after)
	}
	had := m.pod1("a")
	for range 3 {
		m.greets("at its pace", m.a.namespace, to, "proxy1")
	}
	m.greets("to it", m.remote, at(m.a.v4, 8080), "proxy1")
	// Nobody answers what the proxy's kernel says to these.
	m.one.Connections = steer.ConnectionLimits{}
	check(t, m.d.UpdateTenant(m.one.Tenant))
	for i := range uint16(tries) {
		forgeValidPacket(t, m.a.namespace, at(m.a.v4, 30000+i), to, 2, 0)
	}
	has := m.pod1("a")
	if n := has.Outbound - had.Outbound; n < tries {
		t.Fatalf("%d SYNs came to the proxy, of %d: is it at work?", n, tries+3)
	}
	if n := has.Accepted - had.Accepted; n != 4 {
		t.Errorf("%d connections are accepted, of 4", n)
	}
}

// A count that is wrong, whatever made it so, doesn't close a tenant for ever.
func TestConnectionsAreChecked(t *testing.T) {
	m := newMesh(t)
	m.counting(steer.ConnectionLimits{Concurrent: 20})
	to := at(remoteAddresses.v4, 80)
	m.hold(new([]heldFlow), "held", m.a.namespace, netip.AddrPort{}, to, "proxy1")
	m.waitConnections(1, 1)
	checkConnections := func() {
		t.Helper()
		_, err := m.d.CheckConnections(1, m.one.path())
		check(t, err)
	}
	skew := func(by int64) {
		t.Helper()
		var l datapathTenantLoad
		check(t, m.d.maps[datapathMapLoads].Lookup(uint32(1), &l))
		l.Connections += by
		check(t, m.d.maps[datapathMapLoads].Update(uint32(1), l, ebpf.UpdateExist))
	}
	checkConnections()
	checkConnections()
	m.waitConnections(1, 1)
	skew(1000)
	if !shed(t, m.a.namespace, to) {
		t.Fatal("with a wrong count it isn't full")
	}
	checkConnections()
	if n, err := m.d.Connections(1); err != nil || n != 1001 {
		t.Errorf("one look is enough to correct: %d, %v", n, err)
	}
	checkConnections()
	m.waitConnections(1, 1)
	m.greets("corrected", m.a.namespace, to, "proxy1")
	skew(-2000)
	checkConnections()
	for range 19 {
		_, _, err := dial(t, m.a.namespace, netip.AddrPort{}, to)
		check(t, err)
	}
	if n, err := m.d.Connections(1); err != nil || n < 19 {
		t.Errorf("%d connections are counted, %v", n, err)
	}
	if _, err := os.Stat(filepath.Join(m.one.CgroupV2, "cgroup.procs")); err != nil {
		t.Fatal(err)
	}
	if _, err := m.d.CheckConnections(1, "/nowhere"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a namespace that isn't there: %v", err)
	}
}

// What is shed takes nothing of the pace: however many came too fast, those after them are
// taken again as soon as the pace says, and not when it would have let all of them through.
func TestShedTakesNoPace(t *testing.T) {
	m := newMesh(t)
	const rate, flood = 50, 100 * 50 // 100 seconds' worth
	m.one.Connections = steer.ConnectionLimits{NewPerSecond: rate, DirectPerSecond: rate}
	check(t, m.d.UpdateTenant(m.one.Tenant))
	check(t, m.d.SetExclusions([]steer.Exclusion{{Port: 5304}}))
	receiving(t, m.remote, 5300, true)
	out, in := at(remoteAddresses.v4, 80), at(m.a.v4, 8080)
	tooFast := func() uint64 { return m.counters(1).Dropped.TooFast }
	directTooFast := func() uint64 { return m.counters(1).Dropped.DirectTooFast }
	direct := func() bool {
		return answered(t, flow(t, m.a.namespace, at(remoteAddresses.v4, 5300)), 50*time.Millisecond)
	}
	for _, c := range []struct {
		name    string
		from    *namespace
		to      netip.AddrPort
		dropped func() uint64
		passes  func() bool
	}{
		{"connections of the pod", m.a.namespace, out, tooFast, func() bool { return !shed(t, m.a.namespace, out) }},
		{"connections to the pod", m.remote, in, tooFast, func() bool { return !shed(t, m.remote, in) }},
		{"connections that are excluded", m.a.namespace, at(remoteAddresses.v4, 5304), directTooFast, direct},
		{"connections to the node", m.a.namespace, at(nodeAddresses.v4, 5302), directTooFast, direct},
	} {
		before, begun := c.dropped(), time.Now()
		rawEach(t, c.from, syscall.IPPROTO_TCP, c.to.Addr(), flood, func(i int) []byte { return segment(uint16(20000+i), c.to.Port(), tcpSYN) })
		took := time.Since(begun)
		if n := c.dropped() - before; n < flood/2 {
			t.Fatalf("of %d %s within %s %d were shed", flood, c.name, took, n)
		}
		begun = time.Now()
		for !c.passes() {
			if time.Since(begun) > 6*patience {
				t.Fatalf("%s after %d %s none passes", time.Since(begun), flood, c.name)
			}
		}
		t.Logf("%d %s in %s, the next one passes after %s", flood, c.name, took, time.Since(begun))
	}
}

// What a tenant's pods are refused takes no room in the node's table of
// connections. What comes from elsewhere has been forwarded before, and has.
func TestShedTakesNoConntrack(t *testing.T) {
	m := newMesh(t)
	m.one.Connections = steer.ConnectionLimits{NewPerSecond: 1}
	check(t, m.d.UpdateTenant(m.one.Tenant))
	nft(t, "table inet bhtct { chain forward { type filter hook forward priority 0; ct state new accept; }; chain prerouting { type filter hook prerouting priority 0; ct state new accept; }; }")
	t.Cleanup(func() { exec.Command("nft", "delete table inet bhtct").Run() })
	entries := func(port uint16) (n int) {
		t.Helper()
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		check(t, err)
		for _, f := range flows {
			if f.Forward.DstPort == port {
				n++
			}
		}
		return n
	}
	// One in a second isn't shed.
	shedSome := func(n *namespace, to netip.AddrPort) {
		t.Helper()
		for count, deadline := 0, time.Now().Add(patience); count < 3; {
			if shed(t, n, to) {
				count++
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d connections to %s are shed", count, to)
			}
		}
	}
	out, in := at(remoteAddresses.v4, 4242), at(m.a.v4, 4243)
	shedSome(m.a.namespace, out)
	if n := entries(out.Port()); n > 0 {
		t.Errorf("%d connections of the pod are in the table", n)
	}
	shedSome(m.remote, in)
	if entries(in.Port()) == 0 {
		t.Error("no connection to the pod is in the table: is it at work?")
	}
}
