package xds

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// arrived are the names of what came, all acknowledged, and the last of it.
func (c *client) arrived() (names []string, last []byte) {
	c.t.Helper()
	synctest.Wait()
	for {
		select {
		case r := <-c.responses:
			names, last = append(names, resourceNames(r)...), r.Resources[0].Resource.Value
			c.ack(r)
		default:
			return names, last
		}
	}
}

// A service that changes all the time is sent at a pace, in the end as it is then. One
// that changes seldom isn't held up by it.
func TestChangesOfOneAreGathered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, ServerOptions{})
		seldom := testService
		seldom.Name, seldom.VIPs = "seldom", []netip.Addr{netip.MustParseAddr("10.96.0.99")}
		m.must(m.store.SetService(seldom))
		seldomName := VIPName(netip.AddrPortFrom(seldom.VIPs[0], seldom.Ports[0].Port))
		c := m.dial(teamA)
		c.subscribe(TypeEndpoints, vipName, seldomName)
		synctest.Wait()
		time.Sleep(time.Second)
		c.arrived()

		const every = 50 * time.Millisecond // 20 times a second
		port, counts := 0, map[bool]int{}
		change := func(changes int) {
			for range changes {
				port++
				m.must(m.store.SetService(withEndpoint(testService, fmt.Sprint("10.1.0.77:", port))))
				time.Sleep(every)
				names, _ := c.arrived()
				counts[port <= freeChanges] += len(names)
			}
		}
		change(40)
		if counts[true] != freeChanges {
			t.Errorf("%d of the first %d changes were sent", counts[true], freeChanges)
		}
		// 1.6 s, four times in each second.
		if n := counts[false]; n < 4 || n > 8 {
			t.Errorf("of the next 32 changes within 1.6 s %d were sent; want 4 to 8", n)
		}

		changed := time.Now()
		m.must(m.store.SetService(withEndpoint(testService, "10.1.0.77:999")))
		m.must(m.store.SetService(withEndpoint(seldom, "10.1.0.77:1")))
		time.Sleep(m.server.opts.Coalesce)
		if names, _ := c.arrived(); len(names) == 0 || names[len(names)-1] != seldomName {
			t.Errorf("%v after its only change %s hasn't come, but %q", time.Since(changed), seldomName, names)
		}
		time.Sleep(m.server.opts.CoalesceOften)
		if names, last := c.arrived(); len(names) != 1 || names[0] != vipName || !bytes.Contains(last, []byte("10.1.0.77:999")) {
			t.Errorf("after it was quiet, %q came, as it is: %v; want %s once as it is", names, bytes.Contains(last, []byte("10.1.0.77:999")), vipName)
		}

		time.Sleep(oftenFor + 2*m.server.opts.CoalesceOften)
		c.arrived()
		m.must(m.store.SetService(testService))
		time.Sleep(m.server.opts.Coalesce)
		if names, _ := c.arrived(); len(names) != 1 {
			t.Errorf("quiet for %v, and then %q came at once; want %s", oftenFor, names, vipName)
		}
	})
}

// Many that change often come in parts, all of them once, and none later than after
// twice the time.
func TestOftenChangedComeInParts(t *testing.T) {
	const apart, gather, names = 10 * time.Millisecond, 250 * time.Millisecond, 201
	start := time.Now()
	var p parts
	for i := range names {
		p.add(TypeEndpoints, fmt.Sprint(i), start)
	}
	came, now, last := map[string]int{}, start, start
	for {
		wait, any := p.due(now, gather)
		if !any {
			break
		}
		if now = now.Add(wait); now.Sub(start) > 2*gather {
			t.Fatalf("%d of %d had come after %v", len(came), names, 2*gather)
		}
		part := p.take(now, apart, gather)
		if len(part) == 0 || len(part) > 9 {
			t.Errorf("%d in one part; want 1 to 9", len(part))
		}
		for _, r := range part {
			came[r.name]++
		}
		if early := p.take(now, apart, gather); len(early) > 0 {
			t.Errorf("%d more came at once", len(early))
		}
		last = now
	}
	for name, n := range came {
		if n != 1 {
			t.Errorf("%s came %d times", name, n)
		}
	}
	if len(came) != names || last.Sub(start) < gather+20*apart {
		t.Errorf("%d of %d came, within %v", len(came), names, last.Sub(start))
	}
}
