package xds

import (
	"bufio"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// A connection to an endpoint that leaves goes on to its end, new ones go elsewhere
// at once, and an endpoint that doesn't answer is left out.
func TestEndpointsLeave(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) { testEndpointsLeave(t, version) })
	}
}

func testEndpointsLeave(t *testing.T, version string) {
	enterNetns(t)
	store, server, rejections := envoyStore(t)
	at := func(addr string, id model.Identity, draining bool) model.Endpoint {
		return model.Endpoint{Addr: netip.MustParseAddrPort(addr), Identity: id, Draining: draining}
	}
	set := func(s model.Service) {
		t.Helper()
		if err := store.SetService(s); err != nil {
			t.Fatal(err)
		}
	}
	apps := map[string]model.Identity{"10.1.0.3:8080": identity("api"), "10.1.0.3:8081": identity("api"), "10.9.0.9:8080": {}, "10.9.0.9:8081": {}}
	for addr := range apps {
		serveApp(t, addr)
	}
	e := startEnvoy(t, version, server, newAuthority(t))
	if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-web-0"); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct{ name, old, new string }{
		{"in the mesh", "10.1.0.3:8080", "10.1.0.3:8081"},
		{"outside of it", "10.9.0.9:8080", "10.9.0.9:8081"},
	} {
		vip := fmt.Sprintf("10.96.2.%d", i+1)
		set(endpointService("rolls", vip, at(c.old, apps[c.old], false)))
		held, err := dialFrom("10.1.0.2", vip+":15001")
		if err != nil {
			t.Fatal(err)
		}
		defer held.Close()
		r := bufio.NewReader(held)
		if greeting, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(greeting, c.old) {
			t.Fatalf("%s: got %q, %v", c.name, greeting, err)
		}
		goesOn := func(when string) {
			t.Helper()
			fmt.Fprintln(held, when)
			if echo, err := r.ReadString('\n'); err != nil || echo != when+"\n" {
				t.Errorf("%s: the held connection, %s: %q, %v", c.name, when, echo, err)
			}
		}
		for _, step := range []struct {
			name      string
			endpoints []model.Endpoint
		}{
			{"draining", []model.Endpoint{at(c.old, apps[c.old], true), at(c.new, apps[c.new], false)}},
			{"gone", []model.Endpoint{at(c.new, apps[c.new], false)}},
		} {
			set(endpointService("rolls", vip, step.endpoints...))
			eventually(t, c.name+": Envoy knows, "+step.name, func() bool { got, _ := talk("10.1.0.2", vip+":15001"); return strings.HasPrefix(got, c.new) })
			for range 10 {
				if got, err := talk("10.1.0.2", vip+":15001"); !strings.HasPrefix(got, c.new) {
					t.Errorf("%s: a new connection while the old endpoint is %s: %q, %v", c.name, step.name, got, err)
				}
			}
			goesOn(step.name)
		}
	}

	// Nobody listens at the second endpoint.
	set(endpointService("half", "10.96.2.9", at("10.9.0.9:8080", model.Identity{}, false), at("10.9.0.8:8080", model.Identity{}, false)))
	eventually(t, "the dead endpoint is ejected", func() bool {
		_, _ = talk("10.1.0.2", "10.96.2.9:15001") // may try the dead one twice
		return strings.Contains(e.get("/clusters"), "vip|10.96.2.9:15001::10.9.0.8:8080::health_flags::/failed_outlier_check")
	})
	for range 20 {
		if got, err := talk("10.1.0.2", "10.96.2.9:15001"); !strings.HasPrefix(got, "10.9.0.9:8080") {
			t.Errorf("got %q, %v with the dead endpoint ejected", got, err)
		}
	}
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
}
