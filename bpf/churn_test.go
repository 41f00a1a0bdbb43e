package bpf

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// A pod joins, changes tenant and leaves all the time, while it has connections
// that go on and others that open and close: none sees an error, not even one whose
// SYN was on its way, and nothing is left in the end.
func TestMoveUnderLoad(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8080)
	ctx, stop := context.WithCancel(t.Context())
	var group sync.WaitGroup
	talk := func(name string, from *namespace, to netip.AddrPort, exchanges int) {
		group.Go(func() {
			for ctx.Err() == nil {
				var c net.Conn
				var err error
				e := from.run(func() { c, err = net.DialTimeout("tcp", to.String(), patience) })
				if e != nil || err != nil {
					t.Errorf("%s: %v, %v", name, e, err)
					return
				}
				c.SetDeadline(time.Now().Add(patience))
				if _, err := line(c); err != nil {
					t.Errorf("%s: greeting: %v", name, err)
				}
				for i := 0; ctx.Err() == nil && i < exchanges; i++ {
					if err := echo(c, 500); err != nil {
						t.Errorf("%s: exchange %d: %v", name, i, err)
						break
					}
				}
				c.Close()
			}
		})
	}
	for _, family := range []int{4, 6} {
		for name, exchanges := range map[string]int{"short": 3, "long": 1 << 30} {
			talk(fmt.Sprintf("%s outbound, IPv%d", name, family), m.a.namespace, at(remoteAddresses.of(family), 80), exchanges)
			talk(fmt.Sprintf("%s inbound, IPv%d", name, family), m.remote, at(m.a.of(family), 8080), exchanges)
		}
	}
	random := rand.New(rand.NewPCG(5, 5))
	moves := map[string]int{}
	for range 150 {
		switch place := random.IntN(3); place {
		case 0:
			moves["released"]++
			check(t, m.d.ReleasePod("a", m.reader(m.a)))
		default:
			moves["moved"]++
			m.a.Tenant = uint16(place)
			check(t, m.d.MovePod(m.a.Pod, m.reader(m.a)))
		}
		check(t, m.d.SweepFlows(time.Hour))
		// Some exchanges in each place.
		before := m.pod1("a").BytesSent
		for deadline := time.Now().Add(patience); m.pod1("a").BytesSent < before+20_000 && time.Now().Before(deadline) && !t.Failed(); {
			time.Sleep(time.Millisecond)
		}
	}
	stop()
	group.Wait()
	if c := m.pod1("a"); c.Direct == 0 || c.Outbound == 0 || c.Plain == 0 || moves["released"] == 0 {
		t.Errorf("%v, %+v", moves, c)
	}
	if n := m.pod1("a").Dropped; n != (steer.Drops{}) {
		t.Logf("dropped: %+v", n)
	}
	check(t, m.d.DeletePod("a"))
	if n := size(t, m.d.maps[datapathMapFlows]); n != 0 {
		t.Errorf("%d connections are still written down", n)
	}
}
