package netfilter

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// The kernel tells of connections that end, and what they carried.
func TestEnded(t *testing.T) {
	inNode(t, func(t *testing.T) {
		lo, err := netlink.LinkByName("lo")
		check(t, err)
		check(t, netlink.LinkSetUp(lo))
		s, err := openEnded(0)
		check(t, err)
		defer s.conn.Close()
		for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
			l, err := net.Listen("tcp", address)
			check(t, err)
			c, err := net.Dial("tcp", l.Addr().String())
			check(t, err)
			in, err := l.Accept()
			check(t, err)
			_, err = c.Write(make([]byte, 1000))
			check(t, err)
			_, err = in.Read(make([]byte, 1000))
			check(t, err)
			c.Close()
			in.Close()
			l.Close()
			want := map[string]uint64{c.LocalAddr().String(): 1000, in.LocalAddr().String(): 0}
			buffer := make([]byte, messageBytes)
			for len(want) > 0 {
				check(t, s.wait())
				messages, err := s.receive(buffer)
				check(t, err)
				for _, m := range messages {
					e, ok := parseEnded(m)
					if sent, is := want[e.local.String()]; ok && is {
						if e.sent < sent || e.sent > sent+2 || e.sent-sent > 2 {
							t.Errorf("%+v, want %d bytes sent", e, sent)
						}
						delete(want, e.local.String())
					}
				}
			}
		}
	})
}

// connectIn opens connections from an address to itself in a network namespace, and
// closes them.
func connectIn(t *testing.T, path, address string, connections int) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			ns, err := os.Open(path)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(lo); err != nil {
				return err
			}
			l, err := net.Listen("tcp", address+":0")
			if err != nil {
				return err
			}
			defer l.Close()
			for range connections {
				c, err := net.DialTCP("tcp", &net.TCPAddr{IP: net.ParseIP(address)}, l.Addr().(*net.TCPAddr))
				if err != nil {
					return err
				}
				in, err := l.Accept()
				if err != nil {
					return err
				}
				if err := errors.Join(c.Close(), in.Close()); err != nil {
					return err
				}
			}
			return nil
		}()
	}()
	check(t, <-done)
}

// Nobody takes events: those of the tenant that has too many are lost and counted, of
// no other one, and who reads late is told of the other's.
func TestEventsLost(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one, two := tenant(t, 1), tenant(t, 2)
		check(t, errors.Join(d.UpdateTenant(one), d.UpdateTenant(two)))
		check(t, errors.Join(d.UpdatePod(pod(t, "a", 1, "127.0.0.2")), d.UpdatePod(pod(t, "b", 2, "127.0.0.3"))))
		r, err := d.Events(1)
		check(t, err)
		defer r.Close()
		if _, err := d.Events(1); err == nil {
			t.Error("a second reader is accepted")
		}
		connectIn(t, one.Netns, "127.0.0.2", 3000)
		connectIn(t, two.Netns, "127.0.0.3", 1)
		eventually(t, "event that is lost, and counted by the reader, too", func() bool {
			all, err := d.Counters()
			check(t, err)
			if all[2].EventsLost != 0 {
				t.Fatalf("%d events of another tenant are lost", all[2].EventsLost)
			}
			// The other tenant's waits, too.
			waits := !d.events.tenants[2].mu.TryLock()
			if !waits {
				d.events.tenants[2].mu.Unlock()
			}
			return all[1].EventsLost > 0 && r.Lost() == all[1].EventsLost && waits
		})
		// It waits behind at most one of the other tenant's.
		for n := 1; ; n++ {
			select {
			case e := <-r.C:
				if e.Tenant != 2 {
					continue
				}
				if n > 8 || e.Kind != steer.Closed || e.PodUID != "b" {
					t.Errorf("after %d events: %+v", n, e)
				}
			case <-time.After(time.Minute):
				t.Error("the other tenant's event didn't come")
			}
			break
		}
		check(t, d.DeleteTenant(1))
		check(t, d.Close())
		for range r.C {
		}
		again, err := d.Events(1)
		check(t, err)
		check(t, again.Close())
	})
}

// A tenant whose events can't be read is served all the same, and is read when it can be.
func TestEventsUnread(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		r, err := d.Events(1)
		check(t, err)
		defer r.Close()
		one := tenant(t, 1)
		var other *eventSocket
		check(t, inTenant(one.Netns, func(ns int) (err error) {
			other, err = openLog(ns)
			return err
		}))
		check(t, d.UpdateTenant(one))
		want(t, d, nil, []uint16{1})
		all, err := d.Counters()
		check(t, err)
		if all[1].EventsLost != 1 || r.Lost() != 1 || d.events.tenants[1] != nil {
			t.Errorf("%d events are counted as lost, %d by the reader, read by %v", all[1].EventsLost, r.Lost(), d.events.tenants[1])
		}
		check(t, other.conn.Close())
		check(t, d.UpdateTenant(one))
		if d.events.tenants[1] == nil || r.Lost() != 1 {
			t.Errorf("events are read by %v, %d are lost", d.events.tenants[1], r.Lost())
		}
	})
}

// dialler sets a pod's veth up. What it returns sends a SYN from the pod's end, of any
// address and port.
func dialler(t *testing.T, p steer.Pod) (begin func(from string, port uint16)) {
	t.Helper()
	host, err := netlink.LinkByIndex(p.Ifindex)
	check(t, err)
	inside, err := netlink.LinkByIndex(host.Attrs().ParentIndex)
	check(t, err)
	check(t, errors.Join(netlink.LinkSetUp(host), netlink.LinkSetUp(inside)))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return func(from string, port uint16) {
		t.Helper()
		ip := slices.Concat([]byte{0x45, 3: 40, 8: 64, 9: unix.IPPROTO_TCP, 11: 0}, netip.MustParseAddr(from).AsSlice(), []byte{10, 0, 0, 10})
		syn := append(binary.BigEndian.AppendUint16(nil, port), []byte{1: 1, 10: 5 << 4, 11: 2, 17: 0}...)
		frame := slices.Concat(bytes.Repeat([]byte{0xff}, 6), []byte{2, 0, 0, 0, 0, 1}, binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP), ip, syn)
		check(t, unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: inside.Attrs().Index}))
	}
}

// A veth is told of at its pace: what is beyond that is counted as lost, and another
// veth's is told.
func TestEventPaces(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, errors.Join(d.UpdateTenant(tenant(t, 1)), d.UpdateTenant(tenant(t, 2))))
		a, b := pod(t, "a", 1, "10.0.0.1"), pod(t, "b", 2, "10.0.0.2")
		a.Exclusions, b.Exclusions = []steer.Exclusion{{Port: 1}}, []steer.Exclusion{{Port: 1}}
		check(t, errors.Join(d.UpdatePod(a), d.UpdatePod(b)))
		many, few := dialler(t, a), dialler(t, b)
		r, err := d.Events(256)
		check(t, err)
		defer r.Close()
		for _, c := range []struct {
			kind      steer.EventKind
			perSecond uint64
			// as whom the pods send.
			many, few string
		}{
			{steer.Denied, deniedPerSecond, "10.0.0.9", "10.0.0.9"},
			{steer.Opened, directPerSecond, "10.0.0.1", "10.0.0.2"},
		} {
			all, err := d.Counters()
			check(t, err)
			before := all[1].EventsLost
			var sent, others, lost uint64
			told, begun := map[string]uint64{}, time.Now()
			for lost < c.perSecond && sent < 50*c.perSecond {
				// Not more at once than the node's socket has room for.
				for range 100 {
					sent++
					many(c.many, uint16(sent))
				}
				if others < c.perSecond {
					others++
					few(c.few, uint16(others))
				}
				eventually(t, "news of each connection", func() bool {
					for again := true; again; {
						select {
						case e := <-r.C:
							if e.Kind != c.kind {
								t.Errorf("%+v", e)
							}
							told[e.PodUID]++
						default:
							again = false
						}
					}
					all, err := d.Counters()
					check(t, err)
					lost = all[1].EventsLost - before
					return told["a"]+lost >= sent && told["b"] >= others
				})
			}
			took := time.Since(begun)
			if most := c.perSecond + uint64(took.Seconds()*float64(c.perSecond)) + 1; lost == 0 || told["a"] < c.perSecond || told["a"] > most || told["a"]+lost != sent || told["b"] != others {
				t.Errorf("%v: in %s %v were told and %d lost; want at most %d of %d, and all %d of the other", c.kind, took, told, lost, most, sent, others)
			}
		}
	})
}

// What is read of one namespace takes no more of the agent's time than its pace, and ends
// with the reader.
func TestReadingPace(t *testing.T) {
	inNode(t, func(t *testing.T) {
		const beyond = eventsPerSecond / 5
		ctx, cancel := context.WithCancel(t.Context())
		r := &eventReading{reader: steer.NewEventReader(nil, nil), ctx: ctx, c: make(chan steer.Event, 2*eventsPerSecond)}
		check(t, r.open(0, 0))
		defer r.ending.Wait()
		defer func() { check(t, r.node.close(map[uint16]uint64{})) }()
		begun := time.Now()
		for range r.node.pace.Burst() + beyond {
			r.node.tell(steer.Event{})
		}
		if took, least := time.Since(begun), beyond*time.Second/eventsPerSecond; took < least*9/10 {
			t.Errorf("%d events beyond what comes at once took %s, want %s", beyond, took, least)
		}
		cancel()
		r.node.tell(steer.Event{})
		if told := len(r.c); told != r.node.pace.Burst()+beyond {
			t.Errorf("%d events are told", told)
		}
	})
}

// What a veth has too much to tell stays counted for the tenant that its pod had.
func TestUntoldStays(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, errors.Join(d.UpdateTenant(tenant(t, 1)), d.UpdateTenant(tenant(t, 2))))
		a := pod(t, "a", 1, "10.0.0.1")
		check(t, d.UpdatePod(a))
		begin := dialler(t, a)
		var sent, before uint64
		flood := func() {
			t.Helper()
			for range 3 * deniedPerSecond {
				begin("10.0.0.9", 1)
				sent++
			}
			counters := func() steer.Counters {
				all, err := d.Counters()
				check(t, err)
				return all[1]
			}
			eventually(t, "count of all that is dropped", func() bool { return counters().Dropped.Spoofed == sent })
			// Read afterwards, for one reading isn't of one moment.
			lost := counters().EventsLost
			if lost <= before {
				t.Fatalf("%d events are lost, %d before", lost, before)
			}
			before = lost
		}
		stays := func(what string) {
			t.Helper()
			all, err := d.Counters()
			check(t, err)
			if all[0].EventsLost != 0 || all[1].EventsLost != before || all[2].EventsLost != 0 {
				t.Errorf("%s: %d, %d and %d events are lost, want %d of the first tenant", what, all[0].EventsLost, all[1].EventsLost, all[2].EventsLost, before)
			}
		}
		flood()
		a.Tenant = 2
		check(t, d.UpdatePod(a))
		stays("at another tenant")
		a.Tenant = 1
		check(t, d.UpdatePod(a))
		flood()
		check(t, d.DeletePod("a"))
		stays("without its pod")
	})
}
