package netfilter

import (
	"errors"
	"maps"
	"slices"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// pacing is what the node's table has for the paces of tenants: chains and sets by name,
// and of a chain that paces the handles of its rules.
func pacing(t *testing.T) (names []string, limits map[string][]uint64) {
	t.Helper()
	c, err := open(0)
	check(t, err)
	ours := func(name string) bool {
		return isFlowSet(name) || slices.ContainsFunc([]uint16{1, 2}, func(tenant uint16) bool { return isDirectChain(name, tenant) })
	}
	chains, err := c.ListChainsOfTableFamily(steering.Family)
	check(t, err)
	limits = map[string][]uint64{}
	for _, ch := range chains {
		if ch.Table.Name != TableName || !ours(ch.Name) {
			continue
		}
		names = append(names, ch.Name)
		rules, err := c.GetRules(steering, ch)
		check(t, err)
		for _, r := range rules {
			if slices.ContainsFunc(r.Exprs, func(e expr.Any) bool { _, is := e.(*expr.Limit); return is }) {
				limits[ch.Name] = append(limits[ch.Name], r.Handle)
			}
		}
	}
	sets, err := c.GetSets(steering)
	check(t, err)
	for _, s := range sets {
		if ours(s.Name) {
			names = append(names, s.Name)
		}
	}
	slices.Sort(names)
	return names, limits
}

// A pace for what pods begin beside their tenant is changed and taken back in place, goes
// on in the next process as it is, and leaves nothing.
func TestDirectPaceChanges(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one, two := tenant(t, 1), tenant(t, 2)
		two.Connections.DirectPerSecond = 7
		check(t, d.UpdateTenant(two))
		of := func(tenant, rate, begun string) (names []string) {
			for _, chain := range []string{"begins4", "begins6", "counts4", "counts6", "excludes4", "excludes6", "answers4", "answers6", "pace"} {
				names = append(names, chain+"_"+tenant+"_"+rate)
			}
			return append(names, "begun_"+tenant+"_"+begun, "heard_"+tenant, "answered_"+tenant)
		}
		others := of("2", "7", "65536")
		flow := nftables.SetElement{Key: flowElement(53, 53), Timeout: begunKept}
		for _, step := range []struct {
			rate uint32
			want []string
		}{
			{50, of("1", "50", "65536")},
			{60, of("1", "60", "65536")},
			{0, nil}, {0, nil}, {2000, of("1", "2000", "131072")}, {1_000_000, of("1", "1000000", "262144")},
		} {
			one.Connections.DirectPerSecond = step.rate
			check(t, d.UpdateTenant(one))
			want := slices.Sorted(slices.Values(slices.Concat(others, step.want)))
			have, limits := pacing(t)
			if !slices.Equal(have, want) {
				t.Errorf("with a pace of %d there are %v, want %v", step.rate, have, want)
			}
			if step.rate > 0 && len(limits) != 2 {
				t.Errorf("with a pace of %d the limits are %v", step.rate, limits)
			}
			if step.rate == 50 {
				begun := flowsOf(1, step.rate).begun
				c, err := open(0)
				check(t, err)
				check(t, c.SetAddElements(begun, []nftables.SetElement{flow}))
				check(t, c.Flush())
			}
			// The next process leaves alone what has been taken.
			check(t, d.Close())
			if d, err = Open(Options{}); err != nil {
				t.Fatal(err)
			}
			check(t, d.UpdateTenant(one))
			if _, err := d.ConnectionLimits(2); err == nil {
				t.Error("a tenant that isn't known yet has limits")
			}
			check(t, d.UpdateTenant(two))
			again, after := pacing(t)
			if !slices.Equal(again, want) || !maps.EqualFunc(limits, after, slices.Equal[[]uint64]) {
				t.Errorf("another process made %v of %v, and the limits %v of %v", again, want, after, limits)
			}
			for of, rate := range map[uint16]uint32{1: step.rate, 2: 7} {
				if l, err := d.ConnectionLimits(of); err != nil || l != (steer.ConnectionLimits{DirectPerSecond: rate}) {
					t.Errorf("tenant %d has %+v, %v, want a pace of %d", of, l, err, rate)
				}
			}
			if step.rate == 60 {
				begun := flowsOf(1, step.rate).begun
				c, err := open(0)
				check(t, err)
				if flows, err := c.GetSetElements(begun); err != nil || len(flows) != 1 {
					t.Errorf("at another pace %d flows are known, %v", len(flows), err)
				}
			}
		}
		// How a former version held it is corrected.
		c, err := open(0)
		check(t, err)
		pace := &nftables.Chain{Name: paceChain(1, one.Connections.DirectPerSecond).name, Table: steering}
		c.FlushChain(pace)
		c.AddRule(&nftables.Rule{Table: steering, Chain: pace, Exprs: rule{&expr.Limit{Type: expr.LimitTypePkts, Rate: 1, Unit: expr.LimitTimeSecond, Over: true}}})
		check(t, c.Flush())
		check(t, d.Close())
		if d, err = Open(Options{}); err != nil {
			t.Fatal(err)
		}
		check(t, errors.Join(d.UpdateTenant(one), d.UpdateTenant(two)))
		if same, err := hasRules(c, steering, []chain{paceChain(1, one.Connections.DirectPerSecond)}); err != nil || !same {
			t.Errorf("what another version paced by is left, %v", err)
		}
		check(t, d.DeleteTenant(1))
		if have, _ := pacing(t); !slices.Equal(have, slices.Sorted(slices.Values(others))) {
			t.Errorf("of a tenant that is gone there are %v left", have)
		}
		check(t, d.DeleteTenant(2))
		if have, _ := pacing(t); len(have) > 0 {
			t.Errorf("left: %v", have)
		}
	})
}
