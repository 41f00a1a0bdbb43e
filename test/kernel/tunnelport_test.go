package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A pod that dials the port of tunnels is refused at once, wherever to, and the tunnels
// to there go on.
func TestTunnelPortIsRefused(t *testing.T) { eachRedirection(t, testTunnelPortIsRefused) }

func testTunnelPortIsRefused(t *testing.T, l *lab.Lab) {
	eachFamily(t, func(t *testing.T, family int) {
		for name, to := range map[string]netip.Addr{
			"same node, same tenant": l.A2.Of(family), "same node, other tenant": l.B1.Of(family), "other node": l.A3.Of(family),
			"service": l.A1.VIP.Of(family), "outside": l.Outside.Of(family),
		} {
			t.Run(name, func(t *testing.T) {
				before, repeated := l.Node1.Tenant("team-a").Drops["unsteered"], repeatedSYNs(t, l)
				var c net.Conn
				var err error
				l.A1.Do(t, func() { c, err = net.DialTimeout("tcp", lab.At(to, 15008).String(), lab.Patience) })
				if err == nil {
					c.Close()
				}
				if !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%v, want it refused", err)
				}
				lab.Eventually(t, "the count", func() error {
					if drops := l.Node1.Tenant("team-a").Drops; !counts(drops["unsteered"]-before, 1, repeatedSYNs(t, l)-repeated) {
						return fmt.Errorf("%d before: %v", before, drops)
					}
					return nil
				})
			})
		}
		for _, f := range flows(l) {
			if f.from == l.A1 {
				f.check(t, family)
			}
		}
	})
}
