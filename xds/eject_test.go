package xds

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// An endpoint of the mesh whose tunnel fails gets no HTTP requests for a while. With
// plain TCP Envoy can't tell (decision 30): if that changes, this test says so.
func TestMeshEndpointsAreEjected(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			store, e, rejections := routedEnvoy(t, version)
			mesh := func(addr string) model.Endpoint {
				return model.Endpoint{Addr: netip.MustParseAddrPort(addr), Identity: identity("api")}
			}
			// At 10.1.0.250 nobody ends a tunnel.
			if err := store.SetService(endpointService("half", "10.96.1.9", mesh("10.1.0.3:8080"), mesh("10.1.0.250:8080"))); err != nil {
				t.Fatal(err)
			}
			route(t, store, "", prefixed("/", model.Action{Backends: to("half")}))
			ejected := func(cluster, addr string) bool {
				return strings.Contains(e.get("/clusters"), cluster+"::envoy://hbone/"+addr+"::health_flags::/failed_outlier_check")
			}
			const http, tcp = "be|4|team-a/half:15001", "vip|10.96.1.9:15001"
			pod := newHTTPPod(t, "10.1.0.2", false)
			get := func(query string) int {
				t.Helper()
				r, _, err := pod.get("http://10.96.1.1:15001/" + query)
				if err != nil {
					t.Fatal(err)
				}
				return r.StatusCode
			}
			eventually(t, "the routes are in force", func() bool {
				_, _, err := newHTTPPod(t, "10.1.0.2", false).get("http://10.96.1.1:15001/")
				return err == nil && strings.Contains(fmt.Sprint(e.clusters()), http)
			})
			eventually(t, "the dead endpoint is ejected", func() bool {
				get("")
				return ejected(http, "10.1.0.250:8080")
			})
			for range 50 {
				if got := get(""); got != 200 {
					t.Errorf("got %d with the dead endpoint ejected", got)
				}
			}
			// What an application answers is its own business.
			for end := time.Now().Add(ejectInterval + time.Second); time.Now().Before(end); {
				if got := get("?status=503"); got != 503 {
					t.Fatalf("got %d for a 503", got)
				}
			}
			if ejected(http, "10.1.0.3:8080") {
				t.Error("an endpoint is ejected for its answers")
			}

			answered := 0
			for range 100 {
				p := newHTTPPod(t, "10.1.0.2", false)
				if _, a, err := p.get("http://10.96.1.9:15001/"); err == nil && a.Name != "" {
					answered++
				}
				p.CloseIdleConnections()
			}
			if answered == 100 || ejected(tcp, "10.1.0.250:8080") {
				t.Errorf("%d of 100 TCP connections got an answer: Envoy ejects for TCP too, so decision 30 is out of date", answered)
			}
			if answered < 20 {
				t.Errorf("%d of 100 TCP connections got an answer: the dead endpoint gets more than its share", answered)
			}
			if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
				t.Errorf("Envoy refused something: %+v %v", rs, refused)
			}
		})
	}
}
