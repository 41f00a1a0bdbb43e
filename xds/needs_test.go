package xds

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// follower does what Envoy does with what it gets: it acknowledges, asks for the
// endpoints of clusters and the routes of listeners, and forgets what is removed.
type follower struct {
	*client
	has map[resourceKey]*discoveryv3.Resource
	// order is what came and went ("-").
	order []string
	// late keeps back that endpoints aren't wanted any more.
	late bool
	// refuses are what it doesn't take.
	refuses map[resourceKey]bool
}

func (m *mesh) follow(tenant model.Tenant) *follower {
	m.t.Helper()
	f := &follower{client: m.dial(tenant), has: map[resourceKey]*discoveryv3.Resource{}}
	f.subscribe(TypeCluster, clusterDeliver)
	f.subscribe(TypeListener, listenerUnwrap)
	f.until("it is connected", func() bool { return len(f.has) == 2 })
	return f
}

// begin follows as a process that has so much already, and wants all that is for it.
func (m *mesh) begin(tenant model.Tenant, generation string, has map[resourceKey]*discoveryv3.Resource) *follower {
	m.t.Helper()
	f := m.connect(tenant, generation, has)
	f.resume(sendOrder...)
	return f
}

// connect opens the stream of such a process, and resume tells what it has and wants of
// types, listeners among them.
func (m *mesh) connect(tenant model.Tenant, generation string, has map[resourceKey]*discoveryv3.Resource) *follower {
	m.t.Helper()
	f := &follower{client: m.open(tenant, generation), has: map[resourceKey]*discoveryv3.Resource{}, refuses: map[resourceKey]bool{}}
	maps.Copy(f.has, has)
	go f.read()
	return f
}

func (f *follower) resume(types ...string) {
	f.t.Helper()
	for _, typeURL := range types {
		r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, InitialResourceVersions: map[string]string{}}
		if hasWildcard(typeURL) {
			r.ResourceNamesSubscribe = []string{"*"}
		}
		for key, x := range f.has {
			if key.typeURL != typeURL {
				continue
			}
			r.InitialResourceVersions[key.name] = x.Version
			if _, vip := parseVIPName(key.name); vip || !hasWildcard(typeURL) {
				r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, key.name)
			}
		}
		if len(r.ResourceNamesSubscribe) > 0 {
			f.send(r)
		}
	}
	f.until("it has its listeners", func() bool { return f.has[resourceKey{TypeListener, listenerUnwrap}] != nil })
	f.drain()
}

func (f *follower) until(what string, ok func() bool) {
	f.t.Helper()
	deadline := time.After(testTime)
	for !ok() {
		select {
		case r := <-f.responses:
			f.take(r)
		case err := <-f.ended:
			f.t.Fatalf("the stream ended: %v", err)
		case <-deadline:
			f.t.Fatalf("it never came true that %s; it got %q", what, f.order)
		}
	}
}

func (f *follower) take(r *discoveryv3.DeltaDiscoveryResponse) {
	f.t.Helper()
	if len(r.Resources) == 1 && f.refuses[resourceKey{r.TypeUrl, r.Resources[0].Name}] {
		f.order = append(f.order, "!"+shortType(r.TypeUrl)+" "+r.Resources[0].Name)
		f.nack(r, "refused by the test")
		return
	}
	f.ack(r)
	for _, x := range r.Resources {
		key := resourceKey{r.TypeUrl, x.Name}
		f.order = append(f.order, shortType(r.TypeUrl)+" "+x.Name)
		known := f.has[key] != nil
		f.has[key] = x
		switch {
		case known || !validShared(r.TypeUrl, x.Name):
		case r.TypeUrl == TypeCluster:
			f.subscribe(TypeEndpoints, x.Name)
		case r.TypeUrl == TypeListener:
			f.subscribe(TypeRoutes, x.Name)
		}
	}
	for _, name := range r.RemovedResources {
		f.order = append(f.order, "-"+shortType(r.TypeUrl)+" "+name)
		delete(f.has, resourceKey{r.TypeUrl, name})
		if r.TypeUrl == TypeCluster {
			delete(f.has, resourceKey{TypeEndpoints, name})
			if !f.late {
				f.unsubscribe(TypeEndpoints, name)
			}
		}
	}
}

// leadsTo is the internal listener, or the first address, behind the VIP.
func (f *follower) leadsTo(name string) string {
	f.t.Helper()
	cla := f.assignment(name)
	if len(cla.GetEndpoints()) == 0 {
		return ""
	}
	return cla.Endpoints[0].LbEndpoints[0].GetEndpoint().GetAddress().GetEnvoyInternalAddress().GetServerListenerName()
}

// assignment is the endpoints under a name; nil if there is no such resource.
func (f *follower) assignment(name string) *endpointv3.ClusterLoadAssignment {
	f.t.Helper()
	r := f.has[resourceKey{TypeEndpoints, name}]
	if r == nil {
		return nil
	}
	cla := &endpointv3.ClusterLoadAssignment{}
	if err := proto.Unmarshal(r.Resource.Value, cla); err != nil {
		f.t.Fatal(err)
	}
	return cla
}

func (f *follower) place(entry string) int { return slices.Index(f.order, entry) }

// What a proxy gets for a service that is HTTP comes in an order in which nothing
// refers to what isn't there, also when it changes, and goes when it isn't needed.
func TestNeeds(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	other := model.Service{Namespace: "team-a", Name: "other", Ports: []model.ServicePort{{Port: 81, Endpoints: []model.Endpoint{{Addr: netip.MustParseAddrPort("10.1.0.3:81"), Identity: identity("api")}}}}}
	m.must(m.store.SetService(other))
	api := model.ServiceKey{Namespace: "team-a", Name: "api"}
	const vip, l7, beAPI, beOther = "vip|10.96.0.10:80", "l7|10.96.0.10:80", "be|4|team-a/api:80", "be|4|team-a/other:81"
	routing := func(consumer, name string, port uint16) model.Routing {
		return model.Routing{Port: 80, Consumer: consumer, Rules: []model.Rule{prefixed("/", model.Action{Backends: []model.Backend{{To: toService(name, port), Weight: 1}}})}}
	}

	f := m.follow(teamA)
	f.subscribe(TypeCluster, vip)
	f.until("it has the service", func() bool { return f.leadsTo(vip) == listenerHBONE })
	if f.has[resourceKey{TypeListener, l7}] != nil || f.place("rds "+l7) >= 0 {
		t.Errorf("it got %q before the service was HTTP", f.order)
	}

	f.order = nil
	m.must(m.store.SetRoutings(api, []model.Routing{routing("", "other", 81)}))
	f.until("the service is HTTP", func() bool { return f.leadsTo(vip) == l7 })
	want := []string{"cds " + beOther, "eds " + beOther, "rds " + l7, "eds " + vip}
	if !slices.IsSortedFunc(want, func(a, b string) int { return f.place(a) - f.place(b) }) || f.place(want[0]) < 0 || f.place("lds "+l7) < 0 || f.place("lds "+l7) > f.place("rds "+l7) {
		t.Errorf("it came as %q; want %q in this order, and the listener before its routes", f.order, want)
	}

	// Another backend comes before the routes to it, and the old one goes after.
	f.order = nil
	m.must(m.store.SetRoutings(api, []model.Routing{routing("", "api", 80)}))
	f.until("the old backend is gone", func() bool { return f.has[resourceKey{TypeCluster, beOther}] == nil })
	if !(f.place("eds "+beAPI) < f.place("rds "+l7) && f.place("rds "+l7) < f.place("-cds "+beOther) && f.place("eds "+beAPI) >= 0) {
		t.Errorf("the change came as %q", f.order)
	}
	// And back, so that a name which was removed comes again.
	m.must(m.store.SetRoutings(api, []model.Routing{routing("", "other", 81)}))
	f.until("the backend is there again", func() bool {
		return f.has[resourceKey{TypeEndpoints, beOther}] != nil && f.has[resourceKey{TypeCluster, beAPI}] == nil
	})

	// A backend's endpoints change for who routes to it.
	f.order = nil
	m.must(m.store.SetService(model.Service{Namespace: "team-a", Name: "other", Ports: []model.ServicePort{{Port: 81}}}))
	f.until("the endpoints are gone", func() bool { return f.place("eds "+beOther) >= 0 })

	// A consumer's routes are for its namespace; nobody else hears of them.
	b := m.follow(teamB)
	b.subscribe(TypeCluster, vip)
	b.until("it has the service", func() bool { return b.leadsTo(vip) == l7 })
	f.drain()
	f.order, b.order = nil, nil
	m.must(m.store.SetRoutings(api, []model.Routing{routing("", "other", 81), routing("team-b", "api", 80)}))
	b.until("it has routes of its own", func() bool { return b.has[resourceKey{TypeCluster, beOther}] == nil })
	f.drain()
	if len(f.order) > 0 {
		t.Errorf("another namespace's routes came to this one: %q", f.order)
	}

	// What is no longer HTTP keeps its listener, for the connections in it.
	m.must(m.store.SetRoutings(api, nil))
	for _, x := range []*follower{f, b} {
		x.until("the service isn't HTTP", func() bool {
			return x.leadsTo(vip) == listenerHBONE && x.has[resourceKey{TypeCluster, beAPI}] != nil && x.has[resourceKey{TypeCluster, beOther}] == nil
		})
		if x.has[resourceKey{TypeListener, l7}] == nil || x.has[resourceKey{TypeRoutes, l7}] == nil {
			t.Errorf("the listener is gone: %q", x.order)
		}
	}
	for _, name := range []string{"be|4|team-a/api:080", "be|5|team-a/api:80", "be|4|team-a:80", "l7|10.96.0.10", "be|4|" + strings.Repeat("x", 200) + "/a:1"} {
		if validShared(TypeCluster, name) || validShared(TypeRoutes, name) {
			t.Errorf("%q is a name", name)
		}
	}
}

// A cluster that was removed is needed again before the proxy has said that it let go
// of its endpoints: routes still come after it.
func TestNeedsAgain(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	m.must(m.store.SetService(model.Service{Namespace: "team-a", Name: "other", Ports: []model.ServicePort{{Port: 81}}}))
	api := model.ServiceKey{Namespace: "team-a", Name: "api"}
	const vip, l7, beOther, beAPI = "vip|10.96.0.10:80", "l7|10.96.0.10:80", "be|4|team-a/other:81", "be|4|team-a/api:80"
	lead := func(name string, port uint16) {
		m.must(m.store.SetRoutings(api, []model.Routing{{Port: 80, Rules: []model.Rule{prefixed("/", model.Action{Backends: []model.Backend{{To: toService(name, port), Weight: 1}}})}}}))
	}
	lead("other", 81)
	f := m.follow(teamA)
	f.late = true
	f.subscribe(TypeCluster, vip)
	f.until("the service is HTTP", func() bool { return f.leadsTo(vip) == l7 })
	lead("api", 80)
	f.until("the old backend is gone", func() bool { return f.place("-cds "+beOther) >= 0 })
	f.order = nil
	lead("other", 81)
	f.until("the routes are there", func() bool { return f.place("rds "+l7) >= 0 })
	if f.place("cds "+beOther) < 0 || f.place("eds "+beOther) < f.place("cds "+beOther) || f.place("eds "+beOther) > f.place("rds "+l7) {
		t.Errorf("they came as %q; want cluster, endpoints, routes", f.order)
	}
	f.until("what isn't needed goes", func() bool { return f.place("-cds "+beAPI) >= 0 })
}

// drain handles all that is under way: one fence flushes what is gathered, and another
// is answered after it.
func (f *follower) drain() {
	f.t.Helper()
	flush := resourceKey{TypeEndpoints, fenceName}
	for range 3 { // an answer may bring more about
		f.subscribe(TypeEndpoints, fenceName)
		f.until("what is gathered is flushed", func() bool { return f.has[flush] != nil })
		f.unsubscribe(TypeEndpoints, fenceName)
		delete(f.has, flush)
		f.order = slices.DeleteFunc(f.order, func(entry string) bool { return entry == "eds "+fenceName })
		fence := "fence|" + f.t.Name()
		f.subscribe(TypeCluster, fence)
		f.until("the fence is answered", func() bool {
			i := f.place("-cds " + fence)
			if i >= 0 {
				f.order = slices.Delete(f.order, i, i+1)
			}
			return i >= 0
		})

	}
}
