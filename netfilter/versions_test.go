package netfilter

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
)

// hadBeforeCorrections reports whether a version that knows no corrections has a chain in a
// tenant's namespace: such chains it writes anew, and leaves all others as they are.
func hadBeforeCorrections(name string) bool {
	return strings.HasPrefix(name, "took_") || slices.Contains([]string{"prerouting", "output", "steer", "outbound", "inbound", "plain", "nodeplain",
		"strict", "unsteered", "pace_out", "pace_in", "full_room_out", "full_room_in", "room_out", "room_in", "ends_in", "ends_out"}, strings.TrimRight(name, "46"))
}

// A node may go back to a version, or forward: whichever comes can remove the sets of a
// bound, which no chain that it doesn't know may name.
func TestRoomBetweenVersions(t *testing.T) {
	inNode(t, func(t *testing.T) {
		one := tenant(t, 1)
		one.Connections.Concurrent = 8
		update := func() {
			t.Helper()
			d, err := Open(Options{})
			check(t, err)
			check(t, d.UpdateTenant(one))
			check(t, d.Close())
		}
		chains := func(c *nftables.Conn) []*nftables.Chain {
			all, err := c.ListChainsOfTableFamily(inner.Family)
			check(t, err)
			return all
		}
		update()
		inside(t, one, func(c *nftables.Conn) {
			for _, ch := range chains(c) {
				if hadBeforeCorrections(ch.Name) {
					c.FlushChain(ch)
				}
			}
			check(t, c.Flush())
			for _, set := range append(innerState{concurrent: 8}.allRooms(), endedOf(8)...) {
				c.DelSet(set)
				if err := c.Flush(); err != nil {
					t.Errorf("a former version can't remove %s: %v", set.Name, err)
				}
			}
		})
		update()
		inside(t, one, func(c *nftables.Conn) {
			later := c.AddChain(&nftables.Chain{Name: "later", Table: inner})
			hook := c.AddChain(&nftables.Chain{Name: "later_hook", Table: inner, Type: nftables.ChainTypeFilter,
				Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityMangle})
			c.AddRule(&nftables.Rule{Table: inner, Chain: later, Exprs: join(families[0].is(), families[0].connection(true), isIn("room_6", regKey), accept())})
			c.AddRule(&nftables.Rule{Table: inner, Chain: hook, Exprs: jump(later.Name)})
			check(t, c.Flush())
		})
		one.Connections.Concurrent = 100
		update()
		want := []string{"ended_by_peer_1600", "ended_by_tenant_1600", "room_75", "room_pods_25"}
		if have := slices.Sorted(maps.Keys(rooms(t, one))); !slices.Equal(have, want) {
			t.Errorf("after a later version there are %v, want %v", have, want)
		}
		inside(t, one, func(c *nftables.Conn) {
			for _, ch := range chains(c) {
				if strings.HasPrefix(ch.Name, "later") {
					t.Errorf("chain %s of a later version stays", ch.Name)
				}
			}
		})
	})
}
