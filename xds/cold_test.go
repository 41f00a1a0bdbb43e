package xds

import (
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// coldServices are addresses that nobody has asked for yet, each with routes to a
// backend of its own.
func coldServices(t *testing.T, s *Store, n int) (vips []string) {
	t.Helper()
	for i := range n {
		name, vip := fmt.Sprint("cold-", i), fmt.Sprintf("10.96.7.%d", i+1)
		backend := fmt.Sprint("backend-", i)
		for _, svc := range []model.Service{
			endpointService(name, vip, model.Endpoint{Addr: netip.MustParseAddrPort("10.1.0.3:8080"), Identity: identity("api")}),
			endpointService(backend, fmt.Sprintf("10.96.8.%d", i+1), model.Endpoint{Addr: netip.MustParseAddrPort("10.1.0.130:8080"), Identity: identity("web")}),
		} {
			if err := s.SetService(svc); err != nil {
				t.Fatal(err)
			}
		}
		key := model.ServiceKey{Namespace: "team-a", Name: name}
		if err := s.SetRoutings(key, []model.Routing{{Port: PortOutbound, Rules: []model.Rule{prefixed("/", model.Action{Backends: to(backend)})}}}); err != nil {
			t.Fatal(err)
		}
		vips = append(vips, vip+":15001")
	}
	return vips
}

// The first requests to an address wait for all that they need, in every worker; none
// of them fails.
func TestHTTPColdStart(t *testing.T) {
	for _, version := range dist.Versions() {
		for _, http2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/http2=%t", version, http2), func(t *testing.T) {
				store, e, rejections := routedEnvoyWith(t, version, 2, maxHTTPChains)
				for _, vip := range coldServices(t, store, 100) {
					var wg sync.WaitGroup
					for range 8 { // by chance, some in each worker
						p := newHTTPPod(t, "10.1.0.2", http2)
						wg.Go(func() {
							r, a, err := p.get("http://" + vip + "/x")
							if err != nil {
								t.Errorf("%s: %v", vip, err)
							} else if r.StatusCode != http.StatusOK || a.Name != "10.1.0.130:8080" || a.Source != "10.1.0.2" {
								t.Errorf("%s: got %d, %+v", vip, r.StatusCode, a)
							}
							p.CloseIdleConnections()
						})
					}
					wg.Wait()
				}
				if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
					t.Errorf("Envoy refused something: %+v %v", rs, refused)
				}
			})
		}
	}
}
