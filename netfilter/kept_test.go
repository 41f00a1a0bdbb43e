package netfilter

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// showing is as many connections of a pod as it likes to show.
func showing(p steer.Pod, n int) model.FlowReader {
	return func(uint16) (shown []model.Flow, err error) {
		for i := range n {
			shown = append(shown, model.Flow{Pod: netip.AddrPortFrom(p.IPs[0], uint16(1+i%60000)), Peer: netip.AddrPortFrom(nobody, uint16(1+i/60000))})
		}
		return shown, nil
	}
}

// However many pods of a tenant join with however many connections, others' join with
// theirs.
func TestJoinsOfATenantAreBounded(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		tenants := []steer.Tenant{tenant(t, 1), tenant(t, 2)}
		updateAll := func() {
			t.Helper()
			check(t, errors.Join(d.UpdateTenant(tenants[0]), d.UpdateTenant(tenants[1])))
		}
		updateAll()
		a, b, c := pod(t, "a", 1, "10.0.0.1"), pod(t, "b", 1, "10.0.0.2"), pod(t, "c", 1, "10.0.0.3")
		other, more, last := pod(t, "o", 2, "10.0.0.4"), pod(t, "m", 2, "10.0.0.5"), pod(t, "l", 2, "10.0.0.6")
		kept := func(when string, p steer.Pod, want int) {
			t.Helper()
			if n := len(writtenDown(t, d, p.IPs[0])); n != want {
				t.Errorf("%s: %d connections of pod %s are written down, want %d", when, n, p.UID, want)
			}
		}
		cut := func(when string, tenant uint16, want uint64) {
			t.Helper()
			all, err := d.Counters()
			check(t, err)
			if n := all[tenant].Cut; n != want {
				t.Errorf("%s: %d connections of tenant %d are counted as cut, want %d", when, n, tenant, want)
			}
		}
		check(t, d.MovePod(a, showing(a, 40_000)))
		check(t, d.MovePod(b, showing(b, 40_000)))
		kept("joined", a, 40_000)
		kept("joined second", b, model.MaxKept-40_000)
		cut("joined", 1, 2*40_000-model.MaxKept)

		// What is written down counts for the next agent, and while a pod that leaves isn't
		// done with the tenant.
		check(t, d.Close())
		d, err = Open(Options{})
		check(t, err)
		updateAll()
		check(t, d.ReleasePod("a", showing(a, 0)))
		check(t, d.MovePod(c, showing(c, 70_000)))
		kept("adopted", c, 0)
		cut("adopted", 1, 70_000)

		check(t, d.MovePod(other, showing(other, 60_000)))
		kept("of another tenant", other, 60_000)
		cut("of another tenant", 2, 0)

		// Room is there again when they are gone.
		check(t, errors.Join(d.DeletePod("a"), d.DeletePod("c")))
		check(t, d.MovePod(c, showing(c, 100)))
		kept("released", c, 100)

		// A pod that stays halfway is its tenant's, too, and loses nothing that it had kept.
		calls, broken := 0, errors.New("broken")
		err = d.MovePod(more, func(from uint16) ([]model.Flow, error) {
			if calls++; calls == 2 {
				return nil, broken
			}
			return showing(more, 70_000)(from)
		})
		if !errors.Is(err, broken) {
			t.Fatalf("%v, want %v", err, broken)
		}
		kept("halfway", more, model.MaxKept-60_000)
		// One that doesn't come is forgotten when it has none any more.
		never := pod(t, "n", 2, "10.0.0.7")
		if err := d.MovePod(never, func(uint16) ([]model.Flow, error) { return nil, broken }); !errors.Is(err, broken) {
			t.Fatalf("%v, want %v", err, broken)
		}
		check(t, d.SweepFlows(0))
		if _, ok := d.joining[never.IPs[0]]; ok || len(d.joining) != len(more.IPs) {
			t.Errorf("on their way are %v, want %v", d.joining, more.IPs)
		}
		check(t, d.MovePod(last, showing(last, 10)))
		kept("behind one that is halfway", last, 0)
		check(t, d.MovePod(more, showing(more, 70_000)))
		kept("all the way", more, model.MaxKept-60_000)
		check(t, d.Close())
	})
}
