package netfilter

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// inside calls f with the nftables of a tenant's namespace.
func inside(t *testing.T, of steer.Tenant, f func(c *nftables.Conn)) {
	t.Helper()
	check(t, inTenant(of.Netns, func(ns int) error {
		c, err := open(ns)
		if err == nil {
			f(c)
		}
		return err
	}))
}

// rooms are the sets that connections have room in, or have ended in, and how many are
// in each.
func rooms(t *testing.T, of steer.Tenant) map[string]int {
	t.Helper()
	all := map[string]int{}
	inside(t, of, func(c *nftables.Conn) {
		sets, err := c.GetSets(inner)
		check(t, err)
		for _, s := range sets {
			if strings.HasPrefix(s.Name, roomForAll) || strings.HasPrefix(s.Name, setsEnded) {
				elements, err := c.GetSetElements(s)
				check(t, err)
				all[s.Name] = len(elements)
			}
		}
	})
	return all
}

// A bound is changed and taken back in place, is found by the next process, and leaves
// nothing.
func TestRoomChanges(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{OwnPriority: 1 << 16})
		check(t, err)
		one := tenant(t, 1)
		for _, step := range []struct {
			concurrent uint32
			egress     bool
			want       []string
		}{
			{8, false, []string{"ended_by_peer_1024", "ended_by_tenant_1024", "room_6", "room_pods_2"}},
			{100, true, []string{"ended_by_peer_1600", "ended_by_tenant_1600", "room_75", "room_pods_25"}},
			{1_000_000, true, []string{"ended_by_peer_262144", "ended_by_tenant_262144", "room_750000", "room_pods_250000"}},
			{1, true, []string{"ended_by_peer_1024", "ended_by_tenant_1024", "room_1"}}, {0, true, nil}, {0, false, nil},
		} {
			one.Connections.Concurrent, one.BoundEgress = step.concurrent, step.egress
			check(t, d.UpdateTenant(one))
			// As a former version did.
			inside(t, one, func(c *nftables.Conn) {
				check(t, c.AddSet(connectionSet("ended_by_peer", maxFlows), nil))
				check(t, c.Flush())
			})
			check(t, d.Close())
			if d, err = Open(Options{OwnPriority: 1 << 16}); err != nil {
				t.Fatal(err)
			}
			check(t, d.UpdateTenant(one))
			if have := slices.Sorted(maps.Keys(rooms(t, one))); !slices.Equal(have, step.want) {
				t.Errorf("a bound of %d has the sets %v, want %v", step.concurrent, have, step.want)
			}
			if l, err := d.ConnectionLimits(1); err != nil || l.Concurrent != step.concurrent {
				t.Errorf("the bound of %d is %+v, %v", step.concurrent, l, err)
			}
			hooked := false
			inside(t, one, func(c *nftables.Conn) {
				chains, err := c.ListChainsOfTableFamily(inner.Family)
				check(t, err)
				hooked = slices.ContainsFunc(chains, func(c *nftables.Chain) bool { return c.Name == "output" })
			})
			if hooked != (step.concurrent > 0 || step.egress) {
				t.Errorf("with a bound of %d, and of egress %v, what is sent passes rules: %v", step.concurrent, step.egress, hooked)
			}
		}
	})
}

// handles are those of a chain's rules in a tenant's namespace: a rule that is written
// anew has another.
func handles(t *testing.T, of steer.Tenant, chain string) (all []uint64) {
	t.Helper()
	inside(t, of, func(c *nftables.Conn) {
		rules, err := c.GetRules(inner, &nftables.Chain{Name: chain, Table: inner})
		check(t, err)
		for _, r := range rules {
			all = append(all, r.Handle)
		}
	})
	return all
}

// What has been taken of a pace is known to the next agent's rules, which are new but
// for those of the pace, unless the pace or how it is held has changed.
func TestPaceOutlivesAgents(t *testing.T) {
	inNode(t, func(t *testing.T) {
		one := tenant(t, 1)
		one.Connections.NewPerSecond = 5
		var d *Datapath
		start := func() {
			t.Helper()
			if d != nil {
				check(t, d.Close())
			}
			var err error
			d, err = Open(Options{})
			check(t, err)
			check(t, d.UpdateTenant(one))
		}
		start()
		of := func() [][]uint64 { return [][]uint64{handles(t, one, paceOut), handles(t, one, paceIn)} }
		before, others := of(), handles(t, one, "steer4")
		same := func(when string, want bool) {
			t.Helper()
			now := of()
			for i := range now {
				if len(now[i]) != 1 || slices.Equal(now[i], before[i]) != want {
					t.Errorf("%s: the pace's rules were %v, are %v", when, before, now)
					break
				}
			}
			before = now
		}
		start()
		same("another agent", true)
		if now := handles(t, one, "steer4"); len(now) == 0 || slices.Equal(now, others) {
			t.Errorf("the other rules were %v, are %v, want new ones", others, now)
		}
		check(t, d.SetWeight(1, 20))
		same("another weight", true)
		one.Connections.NewPerSecond = 6
		start()
		same("another pace", false)
		for when, rules := range map[string][]rule{
			"a former version's rules": {join(rule{&expr.Limit{Type: expr.LimitTypePkts, Rate: 6, Unit: expr.LimitTimeSecond, Burst: 5, Over: true}}, onlyMark(tooFast))},
			"no rules":                 nil,
		} {
			inside(t, one, func(c *nftables.Conn) {
				of := &nftables.Chain{Name: paceIn, Table: inner}
				c.FlushChain(of)
				for _, r := range rules {
					c.AddRule(&nftables.Rule{Table: inner, Chain: of, Exprs: r})
				}
				check(t, c.Flush())
			})
			start()
			same(when, false)
		}
		check(t, d.Close())
	})
}

// Room that nobody has is given back, that of a handshake is left alone, and looking
// after it doesn't begin the pace anew.
func TestStaleRoom(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		one.Connections = steer.ConnectionLimits{Concurrent: 8, NewPerSecond: 5}
		check(t, d.UpdateTenant(one))
		forAll, forPods := innerState{concurrent: 8}.rooms()
		at := func(port byte) []byte {
			a := slices.Concat(make([]byte, 10), []byte{0xff, 0xff, 10, 0, 0, 1})
			return key(a, portKey(uint16(port)), a, portKey(80))
		}
		inside(t, one, func(c *nftables.Conn) {
			for port := range byte(5) {
				check(t, c.SetAddElements(forAll, []nftables.SetElement{{Key: at(port), Timeout: flowIdle}}))
			}
			check(t, c.SetAddElements(forPods[0], []nftables.SetElement{{Key: at(10), Timeout: resetLinger}}))
			check(t, c.SetAddElements(forAll, []nftables.SetElement{{Key: at(11), Timeout: handshake}}))
			check(t, c.Flush())
			// As if rules had written it.
			now, err := generation(c.NetNS)
			check(t, err)
			d.tenants[1].generation = now
		})
		before := handles(t, one, paceOut)
		if n, err := d.Connections(1); err != nil || n != 0 {
			t.Errorf("%d connections, %v", n, err)
		}
		again, err := d.CheckConnections(1, one.Netns)
		check(t, err)
		if again != checkOften {
			t.Errorf("the next look at a full room is due in %s", again)
		}
		eventually(t, "end of what nobody has", func() bool { have := rooms(t, one); return have["room_6"] <= 1 && have["room_pods_2"] == 0 })
		if again, err = d.CheckConnections(1, one.Netns); err != nil || again != checkSeldom {
			t.Errorf("the next look at an empty room is due in %s, %v", again, err)
		}
		check(t, d.SetWeight(1, 20))
		if after := handles(t, one, paceOut); len(before) != 1 || !slices.Equal(after, before) {
			t.Errorf("the pace's rules were %v, are %v", before, after)
		}
		if _, err := d.Connections(2); !errors.Is(err, steer.ErrUnknownTenant) {
			t.Errorf("connections of a tenant that isn't known: %v", err)
		}
	})
}
