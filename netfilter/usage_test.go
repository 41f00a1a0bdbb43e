package netfilter

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// A set that will be full is told of before, and one that is by name.
func TestUsage(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, d.UpdateTenant(tenant(t, 1)))
		check(t, d.UpdatePod(pod(t, "a", 1, "10.0.0.1")))
		have := 1
		fill := func(n int) {
			t.Helper()
			c, err := open(0)
			check(t, err)
			var list []nftables.SetElement
			for ; have < n; have++ {
				list = append(list, nftables.SetElement{Key: native(uint32(1000 + have)), Val: native(0), Comment: "filler"})
			}
			for part := range slices.Chunk(list, chunk) {
				check(t, c.SetAddElements(d.sets[setPods], part))
			}
			check(t, c.Flush())
		}
		full := func() error {
			t.Helper()
			all, err := d.Usage()
			check(t, err)
			return steer.NearlyFull(all)
		}
		if err := full(); err != nil {
			t.Error(err)
		}
		fill(maxVeths * 9 / 10)
		if err := full(); err != nil {
			t.Error(err)
		}
		fill(maxVeths*9/10 + 1)
		if err := full(); !errors.Is(err, steer.ErrNearlyFull) || !strings.Contains(err.Error(), "nftables set pods has 3687 of 4096 entries") || strings.Contains(err.Error(), "\n") {
			t.Errorf("it says %v", err)
		}
		fill(maxVeths)
		late := pod(t, "b", 1, "10.0.0.2")
		if err := d.UpdatePod(late); err == nil || !strings.Contains(err.Error(), "is full") {
			t.Errorf("a pod beyond what there is room for: %v", err)
		}
		want(t, d, []string{"a", "filler"}, []uint16{1})
	})
}

// A set of a single tenant is told of, too.
func TestUsageOfTenant(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		one.Connections.DirectPerSecond = 1
		check(t, d.UpdateTenant(one))
		c, err := open(0)
		check(t, err)
		var list []nftables.SetElement
		for i := range maxAnswered*9/10 + 1 {
			list = append(list, nftables.SetElement{Key: flowElement(uint16(i), 53), Timeout: answeredKept})
		}
		for part := range slices.Chunk(list, chunk) {
			check(t, c.SetAddElements(flowsOf(1, 1).answered, part))
		}
		check(t, c.Flush())
		all, err := d.Usage()
		check(t, err)
		if err := steer.NearlyFull(all); !errors.Is(err, steer.ErrNearlyFull) || !strings.Contains(err.Error(), "nftables set answered_1 has 14746 of 16384 entries") {
			t.Errorf("it says %v", err)
		}
	})
}
