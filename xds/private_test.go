package xds

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// What is a tenant's own: its listeners, with chains that name its pods and accounts,
// and the routes that its namespace made for its clients.

// stranger is team-b with listeners and routes of its own.
func (m *mesh) stranger() {
	m.t.Helper()
	w := workload("hidden-pod", "hidden-account", "10.1.0.200")
	w.Namespace, w.Identity.Namespace, w.Tenant = "team-b", "team-b", teamB
	m.must(m.store.SetProxy(model.Proxy{Node: "node-1", Tenant: teamB, Workloads: []model.Workload{w}}))
	m.must(m.store.SetRoutings(apiKey, append(sharedRoutings(), model.Routing{Port: 80, Consumer: "team-b", Rules: []model.Rule{
		prefixed("/hidden-path", model.Action{Backends: []model.Backend{{To: toService("hidden-backend", 80), Weight: 1}}}),
	}})))
}

var apiKey = model.ServiceKey{Namespace: "team-a", Name: "api"}

// sharedRoutings are of all clients.
func sharedRoutings() []model.Routing {
	return []model.Routing{{Port: 80, Rules: []model.Rule{prefixed("/", model.Action{Backends: []model.Backend{{To: toService("api", 80), Weight: 1}}})}}}
}

// raw is a response but for its nonce, byte for byte.
func raw(t *testing.T, r *discoveryv3.DeltaDiscoveryResponse) []byte {
	t.Helper()
	r = proto.Clone(r).(*discoveryv3.DeltaDiscoveryResponse)
	r.Nonce = ""
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// guesses are how another tenant's resources could be called.
func guesses(tenant string) (out []resourceKey) {
	for _, name := range slices.Concat(listenerNames, []string{HTTPName(netip.MustParseAddrPort("10.96.0.10:80"))}) {
		for _, format := range []string{"%[2]s/%[1]s", "%[1]s/%[2]s", "%[1]s@%[2]s", "%[1]s|%[2]s", "node-1/%[2]s/%[1]s", "{node-1 %[2]s}/%[1]s", "xdstp://%[2]s/%[1]s", "%[1]s?tenant=%[2]s"} {
			for _, typeURL := range sendOrder {
				out = append(out, resourceKey{typeURL, fmt.Sprintf(format, name, tenant)})
			}
		}
	}
	for _, name := range []string{"chain/%s/hidden-account", "spiffe://cluster.local/ns/%s/sa/hidden-account", "pod/%s/hidden-account", "be|4|%s/hidden"} {
		for _, typeURL := range sendOrder {
			out = append(out, resourceKey{typeURL, fmt.Sprintf(name, tenant)})
		}
	}
	return out
}

// answers is what a stream of team-a gets for guesses, one by one, and what it has
// of the names that are everybody's.
func (m *mesh) answers(tenant string) (guessed [][]byte, has map[resourceKey]*discoveryv3.Resource) {
	m.t.Helper()
	c := m.dial(teamA)
	for _, g := range guesses(tenant) {
		c.subscribe(g.typeURL, g.name)
		r := c.next()
		c.ack(r)
		guessed = append(guessed, bytes.ReplaceAll(raw(m.t, r), []byte(tenant), []byte("TENANT")))
	}
	c.handled()
	c.cancel()
	f := m.follow(teamA)
	f.subscribe(TypeListener, "*")
	f.subscribe(TypeCluster, vipName)
	f.until("it has the service and its listeners", func() bool {
		return f.leadsTo(vipName) == "l7|10.96.0.10:80" && f.has[resourceKey{TypeListener, listenerInbound}] != nil && f.has[resourceKey{TypeEndpoints, "be|4|team-a/api:80"}] != nil
	})
	f.drain()
	f.cancel()
	return guessed, f.has
}

// A name of another tenant's answers byte for byte like one that nobody has, and what
// a tenant is told doesn't depend on what another has of its own.
func TestOthersNamesDontExist(t *testing.T) {
	with, without := newMesh(t, ServerOptions{}), newMesh(t, ServerOptions{})
	with.stranger()
	without.must(without.store.SetRoutings(apiKey, sharedRoutings()))
	theirs, has := with.answers("team-b")
	nobodys, _ := with.answers("team-z")
	alone, hasAlone := without.answers("team-b")
	for i, g := range guesses("team-b") {
		if !bytes.Equal(theirs[i], nobodys[i]) {
			t.Errorf("%s %q is answered with\n%q, a name that nobody has with\n%q", shortType(g.typeURL), g.name, theirs[i], nobodys[i])
		}
		if !bytes.Equal(theirs[i], alone[i]) {
			t.Errorf("%s %q is answered with\n%q, without that tenant with\n%q", shortType(g.typeURL), g.name, theirs[i], alone[i])
		}
	}
	if !maps.EqualFunc(has, hasAlone, func(a, b *discoveryv3.Resource) bool { return proto.Equal(a, b) }) {
		t.Error("what team-a has depends on team-b")
	}
	for key, r := range has {
		if bytes.Contains(r.Resource.Value, []byte("hidden")) || bytes.Contains(r.Resource.Value, []byte("team-b")) {
			t.Errorf("%s %s tells of team-b", shortType(key.typeURL), key.name)
		}
	}
	// The other tenant does have it.
	b := with.follow(teamB)
	b.subscribe(TypeListener, "*")
	b.subscribe(TypeCluster, vipName)
	b.until("its own", func() bool {
		l, r := b.has[resourceKey{TypeListener, listenerInbound}], b.has[resourceKey{TypeRoutes, "l7|10.96.0.10:80"}]
		return l != nil && bytes.Contains(l.Resource.Value, []byte("hidden-account")) && r != nil && bytes.Contains(r.Resource.Value, []byte("/hidden-path"))
	})
	// Its changes aren't told either.
	a := with.follow(teamA)
	a.subscribe(TypeListener, "*")
	a.subscribe(TypeCluster, vipName)
	a.until("it has the service", func() bool { return a.leadsTo(vipName) == "l7|10.96.0.10:80" })
	a.drain()
	a.order = nil
	with.must(with.store.SetRoutings(apiKey, sharedRoutings()))
	with.must(with.store.SetProxy(model.Proxy{Node: "node-1", Tenant: teamB}))
	b.until("it heard of it", func() bool {
		return !bytes.Contains(b.has[resourceKey{TypeRoutes, "l7|10.96.0.10:80"}].Resource.Value, []byte("hidden")) &&
			!bytes.Contains(b.has[resourceKey{TypeListener, listenerInbound}].Resource.Value, []byte("hidden"))
	})
	a.drain()
	if len(a.order) > 0 {
		t.Errorf("team-a got %q", a.order)
	}
}

// twins are services, backends, routes and hosts of two namespaces, all called the
// same, and routes by which team-b's clients are led elsewhere from team-a's service.
func twins(t *testing.T, store *Store, port uint16, endpoint map[string]model.Endpoint) {
	t.Helper()
	for i, ns := range []string{"team-a", "team-b"} {
		shop := model.Service{Namespace: ns, Name: "shop", VIPs: addrs(fmt.Sprintf("10.96.2.%d", i+1)), Ports: []model.ServicePort{{Name: "http", Port: port, Endpoints: []model.Endpoint{endpoint[ns]}}}}
		backend := shop
		backend.Name, backend.VIPs = "backend", addrs(fmt.Sprintf("10.96.3.%d", i+1))
		for _, s := range []model.Service{shop, backend} {
			if err := store.SetService(s); err != nil {
				t.Fatal(err)
			}
		}
		at := func(namespace string) model.Rule {
			r := prefixed("/", model.Action{Host: "shop.example.com", Backends: []model.Backend{{Weight: 1, To: model.ServicePortKey{ServiceKey: model.ServiceKey{Namespace: namespace, Name: "backend"}, Port: port}}}})
			r.Action.Origin.Namespace = ns
			return r
		}
		routings := []model.Routing{{Port: port, Rules: []model.Rule{at(ns)}}}
		if ns == "team-a" {
			routings = append(routings, model.Routing{Port: port, Consumer: "team-b", Rules: []model.Rule{at("team-b")}})
		}
		if err := store.SetRoutings(model.ServiceKey{Namespace: ns, Name: "shop"}, routings); err != nil {
			t.Fatal(err)
		}
	}
}

// Two tenants whose services, backends, routes and hosts are called the same never
// meet, and what one does changes nothing of the other's.
func TestEqualNames(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	endpoint := map[string]model.Endpoint{
		"team-a": {Addr: netip.MustParseAddrPort("10.1.0.51:80"), Identity: identity("api")},
		"team-b": {Addr: netip.MustParseAddrPort("10.1.0.52:80"), Identity: model.Identity{TrustDomain: "cluster.local", Namespace: "team-b", ServiceAccount: "api"}},
	}
	twins(t, m.store, 80, endpoint)
	const vipA, vipB = "10.96.2.1:80", "10.96.2.2:80"
	backend := map[string]string{"team-a": "be|4|team-a/backend:80", "team-b": "be|4|team-b/backend:80"}
	followers := map[string]*follower{}
	for _, tenant := range []model.Tenant{teamA, teamB} {
		f := m.follow(tenant)
		followers[tenant.Namespace] = f
		f.subscribe(TypeCluster, "vip|"+vipA, "vip|"+vipB)
		f.until("it has both services", func() bool {
			return f.leadsTo("vip|"+vipA) == "l7|"+vipA && f.leadsTo("vip|"+vipB) == "l7|"+vipB && f.has[resourceKey{TypeEndpoints, backend["team-b"]}] != nil
		})
	}
	// Where the routes of a VIP lead, for the clients of a tenant.
	leads := func(client, vip string) (to []string) {
		r := followers[client].has[resourceKey{TypeRoutes, "l7|" + vip}].Resource.Value
		for ns, cluster := range backend {
			if bytes.Contains(r, []byte(cluster)) {
				to = append(to, ns)
			}
		}
		return to
	}
	for _, c := range []struct{ client, vip, want string }{
		{"team-a", vipA, "team-a"}, {"team-a", vipB, "team-b"}, {"team-b", vipB, "team-b"}, {"team-b", vipA, "team-b"},
	} {
		if got := leads(c.client, c.vip); !slices.Equal(got, []string{c.want}) {
			t.Errorf("clients of %s at %s are led to %q; want %s", c.client, c.vip, got, c.want)
		}
	}
	for client, f := range followers {
		for ns, cluster := range backend {
			r := f.has[resourceKey{TypeEndpoints, cluster}]
			if r == nil {
				continue // team-b's clients don't need team-a's
			}
			for other, ep := range endpoint {
				if got := bytes.Contains(r.Resource.Value, []byte(ep.Addr.String())); got != (other == ns) {
					t.Errorf("%s: %s has the endpoint of %s: %t", client, cluster, other, got)
				}
			}
		}
	}
	// All that is team-b's goes or changes. Of that, team-a hears about the service
	// that it uses, and nothing about its own.
	a := followers["team-a"]
	a.drain()
	a.order = nil
	m.store.DeleteService("team-b", "backend")
	m.must(m.store.SetRoutings(model.ServiceKey{Namespace: "team-b", Name: "shop"}, nil))
	m.store.DeleteService("team-b", "shop")
	a.until("the endpoints of team-b's service are gone", func() bool {
		return len(a.assignment("vip|"+vipB).GetEndpoints()) == 0
	})
	a.drain()
	for _, entry := range a.order {
		if !strings.Contains(entry, vipB) && !strings.Contains(entry, backend["team-b"]) {
			t.Errorf("team-a got %q", entry)
		}
	}
	if got := leads("team-a", vipA); !slices.Equal(got, []string{"team-a"}) {
		t.Errorf("clients of team-a are led to %q", got)
	}
}

func TestEqualNamesInEnvoy(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			store, e, rejections := routedEnvoy(t, version)
			twins(t, store, PortOutbound, map[string]model.Endpoint{
				"team-a": {Addr: netip.MustParseAddrPort("10.1.0.3:8080"), Identity: identity("api")},
				"team-b": {Addr: netip.MustParseAddrPort("10.9.0.9:8080")},
			})
			apps := map[string]string{"10.96.2.1": "10.1.0.3:8080", "10.96.2.2": "10.9.0.9:8080"}
			for _, http2 := range []bool{false, true} {
				pod := newHTTPPod(t, "10.1.0.2", http2)
				for range 20 {
					for vip, app := range apps {
						r, a, err := pod.get("http://"+vip+":15001/", "Host: shop.example.com")
						if err != nil || r.StatusCode != 200 || a.Name != app || a.Host != "shop.example.com" {
							t.Fatalf("%s: %+v, %+v, %v; want %s", vip, r, a, err, app)
						}
					}
				}
			}
			if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
				t.Errorf("Envoy refused something: %+v %v", rs, refused)
			}
		})
	}
}
