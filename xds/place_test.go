package xds

import (
	"fmt"
	"net/netip"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// hinted are endpoints 1, 2, … for the zones; "-" is draining, "" without a hint.
func hinted(zones ...string) model.Service {
	s := testService
	s.Ports = []model.ServicePort{{Name: "http", Port: 80}}
	for i, z := range zones {
		e := model.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 0, byte(i + 1)}), 8080), Identity: identity("api")}
		if len(z) > 0 && z[0] == '-' {
			e.Draining, z = true, z[1:]
		}
		if z != "" {
			e.ForZones = []string{z}
		}
		s.Ports[0].Endpoints = append(s.Ports[0].Endpoints, e)
	}
	return s
}

// picture is the last byte of each endpoint by priority, d for draining.
func picture(cla *endpointv3.ClusterLoadAssignment) (out string) {
	for i, l := range cla.Endpoints {
		if l.Priority != uint32(i) {
			return "priorities out of order"
		}
		if i > 0 {
			out += "|"
		}
		for _, e := range l.LbEndpoints {
			out += netip.MustParseAddrPort(e.GetEndpoint().Address.GetEnvoyInternalAddress().EndpointId).Addr().String()[len("10.1.0."):]
			if e.HealthStatus == corev3.HealthStatus_DRAINING {
				out += "d"
			}
		}
	}
	return out
}

func TestEndpointsNearFirst(t *testing.T) {
	vip := netip.MustParseAddrPort("10.96.0.10:80")
	nodes := hinted("a", "a", "b")
	for i := range nodes.Ports[0].Endpoints {
		nodes.Ports[0].Endpoints[i].ForNodes = []string{fmt.Sprintf("node-%d", i+1)}
	}
	for _, c := range []struct {
		name    string
		service model.Service
		from    Place
		want    string
	}{
		{"nowhere", hinted("a", "b"), Place{}, "12"},
		{"their zone", hinted("b", "a", "b", "a"), Place{Zone: "a"}, "24|13"},
		{"no endpoint for the zone", hinted("b", "b"), Place{Zone: "a"}, "12"},
		{"one without a hint", hinted("a", "", "b"), Place{Zone: "a"}, "123"},
		{"no hints", hinted("", ""), Place{Zone: "a", Node: "node-1"}, "12"},
		{"one leaves", hinted("a", "-a", "b"), Place{Zone: "a"}, "1|3|2d"},
		{"the zone's last leaves", hinted("-a", "b"), Place{Zone: "a"}, "2|1d"},
		{"the last leaves", hinted("-a", "-b"), Place{Zone: "a"}, "1|2"},
		{"their node, then their zone", nodes, Place{Zone: "a", Node: "node-2"}, "2|1|3"},
		{"no endpoint on the node", nodes, Place{Zone: "b", Node: "node-9"}, "3|12"},
	} {
		cla, err := VIPEndpoints(vip, c.service, c.from)
		if err != nil {
			t.Fatal(err)
		}
		if got := picture(cla); got != c.want {
			t.Errorf("%s: %s; want %s", c.name, got, c.want)
		}
		validateAll(t, cla.ProtoReflect())
	}
}

// Each zone has its own order, built once; without hints there is one for all.
func TestEndpointsByPlace(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	a, b := testProxy, model.Proxy{Node: "node-1", Tenant: teamB, Zone: "b"}
	a.Zone = "a"
	m.must(m.store.SetProxy(a))
	m.must(m.store.SetProxy(b))
	got := func(c *client) string {
		t.Helper()
		cla := &endpointv3.ClusterLoadAssignment{}
		m.must(c.want(TypeEndpoints, vipName).Resources[0].Resource.UnmarshalTo(cla))
		return picture(cla)
	}
	both := func(clients []*client, what string, want ...string) {
		t.Helper()
		for i, c := range clients {
			if got := got(c); got != want[i] {
				t.Errorf("%s: client %d has %s; want %s", what, i, got, want[i])
			}
		}
	}
	clients := []*client{m.dial(teamA), m.dial(teamB)}
	m.must(m.store.SetService(hinted("a", "b")))
	for _, c := range clients {
		c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeEndpoints, ResourceNamesSubscribe: []string{vipName}})
	}
	both(clients, "hinted", "1|2", "2|1")
	before := m.builds()
	m.must(m.store.SetService(hinted("", "")))
	both(clients, "without hints", "12", "12")
	if n := m.builds() - before; n != 1 {
		t.Errorf("one for both was built %d times", n)
	}
	m.must(m.store.SetService(hinted("a", "b")))
	both(clients, "hinted again", "1|2", "2|1")
	a.Zone = "b" // the node's label was wrong
	m.must(m.store.SetProxy(a))
	both(clients[:1], "moved", "2|1")
	clients[1].settled()
}
