package xds

import (
	"net/netip"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// replace puts m in the place of what the store made, as if it had made that.
func (s *Store) replace(t *testing.T, name string, source Source, m *clusterv3.Cluster) {
	t.Helper()
	r, err := encode(name, source, m)
	if err != nil {
		t.Fatalf("validation finds it, so Envoy need not: %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.shared[resourceKey{TypeCluster, name}]
	if e == nil {
		t.Fatalf("nobody holds %s", name)
	}
	s.invalidate(TypeCluster, name)
	e.built[variant{}] = &built{version: e.version, current: r}
}

// What validation can't find and Envoy refuses when it builds it is told with the
// object that it came from, and costs nobody a connection: what was there before
// serves, and all else goes on to change.
func TestEnvoyRefusesOneResource(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			store, server, rejections := envoyStore(t)
			at := func(addr string) model.Endpoint {
				return model.Endpoint{Addr: netip.MustParseAddrPort(addr), Identity: identity("api")}
			}
			for _, s := range []model.Service{endpointService("one", "10.96.1.1", at("10.1.0.3:8080")), endpointService("two", "10.96.1.2", at("10.1.0.3:8080"))} {
				if err := store.SetService(s); err != nil {
					t.Fatal(err)
				}
			}
			serveApp(t, "10.1.0.3:8080")
			serveApp(t, "10.1.0.3:8081")
			startEnvoy(t, version, server, newAuthority(t))
			if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-web-0"); err != nil {
				t.Fatal(err)
			}
			greeted := func(to, want string) {
				t.Helper()
				if got, err := talk("10.1.0.2", to); got != want+" sees 10.1.0.2" {
					t.Fatalf("got %q, %v from %s; want %s", got, err, to, want)
				}
			}
			greeted("10.96.1.1:15001", "10.1.0.3:8080")
			greeted("10.96.1.2:15001", "10.1.0.3:8080")
			held, err := dialFrom("10.1.0.2", "10.96.1.1:15001")
			if err != nil {
				t.Fatal(err)
			}
			defer held.Close()

			vip := netip.MustParseAddrPort("10.96.1.1:15001")
			bad, err := VIPCluster(vip)
			if err != nil {
				t.Fatal(err)
			}
			bad.ClusterDiscoveryType, bad.EdsClusterConfig = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}, nil
			staticEndpoint(bad, socketAddress("no-address", 80))
			source := Source{"Service", "team-a", "one"}
			store.replace(t, VIPName(vip), source, bad)
			eventually(t, "Envoy refuses it", func() bool { return len(rejections()) > 0 })
			if got := rejections()[0]; got.Proxy != testProxy.Key() || got.Type != TypeCluster || got.Resource != VIPName(vip) || got.Source != source || got.Message == "" {
				t.Errorf("told %+v", got)
			}
			greeted("10.96.1.1:15001", "10.1.0.3:8080")
			if _, err := held.Write([]byte("x")); err != nil {
				t.Errorf("a connection of the refused cluster: %v", err)
			}

			// Both services and the listeners change while it is refused.
			for _, s := range []model.Service{endpointService("one", "10.96.1.1", at("10.1.0.3:8081")), endpointService("two", "10.96.1.2", at("10.1.0.3:8081"))} {
				if err := store.SetService(s); err != nil {
					t.Fatal(err)
				}
			}
			p := testProxy
			p.Workloads = append(p.Workloads[:len(p.Workloads):len(p.Workloads)], workload("new-0", "web", "10.1.0.9"))
			if err := store.SetProxy(p); err != nil {
				t.Fatal(err)
			}
			if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-new-0"); err != nil {
				t.Error(err)
			}
			for _, to := range []string{"10.96.1.1:15001", "10.96.1.2:15001"} {
				eventually(t, to+" has its new endpoint", func() bool { got, _ := talk("10.1.0.9", to); return got == "10.1.0.3:8081 sees 10.1.0.9" })
			}
			good, err := VIPCluster(vip)
			if err != nil {
				t.Fatal(err)
			}
			store.replace(t, VIPName(vip), source, good)
			greeted("10.96.1.1:15001", "10.1.0.3:8081")
			if rs := rejections(); len(rs) != 1 {
				t.Errorf("told %+v", rs)
			}
		})
	}
}
