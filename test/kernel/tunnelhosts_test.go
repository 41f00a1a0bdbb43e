package kernel

import (
	"fmt"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// The agent tells how many endpoints a proxy has a place for, and of connections that it
// closed for want of one: one tenant's may be all that those who share a proxy have.
func TestTunnelHosts(t *testing.T) {
	l := lab.New(t)
	n := l.Node1
	n.Kill()
	n.Args = []string{"--meter-period", "500ms"}
	n.Start()
	n.WaitReady()
	const hosts, refused = `bulkhead_tenant_tunnel_hosts{generation="0",namespace="team-a",tenant="team-a"}`,
		`bulkhead_tenant_tunnel_hosts_refused_total{generation="0",namespace="team-a",tenant="team-a"}`
	told := func(want float64) {
		t.Helper()
		lab.Eventually(t, fmt.Sprintf("%v places for endpoints are taken", want), func() error {
			metrics := scrape(t, n)
			closed, ok := metrics[refused]
			if got, has := metrics[hosts]; !has || got != want || !ok || closed != 0 {
				return fmt.Errorf("%v are taken (told: %t), %v connections were closed (told: %t)", got, has, closed, ok)
			}
			return nil
		})
	}
	told(0)
	for i, to := range []*lab.Host{l.B2, l.A3, l.B2} {
		if r := l.A1.Call(t, "tcp", lab.At(to.VIP.V4, app.GreetPort).String()); !r.OK {
			t.Fatalf("connection %d: %+v", i, r)
		}
		told(float64(min(i+1, 2)))
	}
}
