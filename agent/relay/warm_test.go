package relay

import (
	"fmt"
	"slices"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// A second generation gets the clusters that the first found on demand before it
// asks for them, keeps them over the agent's restart, and holds nothing up that
// doesn't exist any more.
func TestWarm(t *testing.T) {
	dir := t.TempDir()
	f := setUp(t, func(o *Options) { o.LastGoodDir = dir })
	first, second := Key{Tenant: teamA}, Key{Tenant: teamA, Generation: 1}
	const kept, gone = "vip|10.0.0.1:80", "vip|10.0.0.2:80"
	old := f.proxyOf(first)
	old.subscribe(TypeCluster, wildcard, kept, gone)
	up := f.op.stream()
	up.await(t, TypeCluster, gone)
	up.send(t, "1", resource(TypeCluster, "deliver", "1"))
	up.send(t, "2", resource(TypeCluster, kept, "1"))
	up.send(t, "3", resource(TypeCluster, gone, "1"))
	for range 3 {
		old.next()
	}

	canary := f.proxyOf(second)
	canary.subscribe(TypeCluster)
	canaryUp := f.op.stream()
	canaryUp.await(t, TypeCluster, "")
	canaryUp.send(t, "1", resource(TypeCluster, "deliver", "1"))
	wantNames(t, canary.next(), "deliver@1")
	eventually(t, "both are lacking, and no static one", func() bool {
		return slices.Equal(f.relay.Warm(second, first), []string{kept, gone})
	})
	canaryUp.await(t, TypeCluster, kept)
	canaryUp.send(t, "2", resource(TypeCluster, kept, "1"))
	wantNames(t, canary.next(), kept+"@1")
	eventually(t, "one is lacking", func() bool { return slices.Equal(f.relay.Warm(second, first), []string{gone}) })
	if err := canaryUp.st.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: TypeCluster, Nonce: "3", RemovedResources: []string{gone}}); err != nil {
		t.Fatal(err)
	}
	canary.next()
	eventually(t, "nothing is lacking", func() bool { return len(f.relay.Warm(second, first)) == 0 })
	// What it got ahead stays current.
	canaryUp.send(t, "4", resource(TypeCluster, kept, "2"))
	wantNames(t, canary.next(), kept+"@2")

	f.relay.Shutdown()
	f.relay = f.start(func(o *Options) { o.LastGoodDir = dir })
	again := f.proxyOf(second)
	// It never asked for kept by its name.
	again.send(&discovery.DeltaDiscoveryRequest{Node: envoyNode, TypeUrl: TypeCluster,
		InitialResourceVersions: map[string]string{"deliver": "1", kept: "2"}})
	againUp := f.op.stream()
	r := receive(t, "request", againUp.requests)
	if !slices.Equal(r.ResourceNamesSubscribe, []string{wildcard, kept}) || r.InitialResourceVersions[kept] != "2" {
		t.Errorf("after the restart the operator is asked for %q, has %v", r.ResourceNamesSubscribe, r.InitialResourceVersions)
	}
	if lacking := f.relay.Warm(Key{Tenant: teamB}, second); lacking != nil {
		t.Errorf("a proxy that isn't served lacks %q", lacking)
	}
}

// What is remembered of a proxy for another one is no more than it asks for: names
// that it lets go, or that made room for others, are forgotten.
func TestWarmForgets(t *testing.T) {
	f := setUp(t, func(o *Options) { o.NamesPerSecond = 1e6 })
	key := Key{Tenant: teamA}
	p := f.proxyOf(key)
	known := func() int {
		e := f.relay.endpoint(key)
		e.mu.Lock()
		defer e.mu.Unlock()
		return len(e.found)
	}
	up := (*operatorStream)(nil)
	vain := func(from, to int) (names []string) {
		t.Helper()
		for i := from; i < to; i++ {
			names = append(names, fmt.Sprintf("vip|%d", i))
		}
		p.subscribe(TypeCluster, names...)
		if up == nil {
			up = f.op.stream()
		}
		up.await(t, TypeCluster, names[0])
		if err := up.st.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: TypeCluster, Nonce: fmt.Sprint(from), RemovedResources: names}); err != nil {
			t.Fatal(err)
		}
		p.next()
		return names
	}
	names := vain(0, 100)
	eventually(t, "they are known", func() bool { return known() == 100 })
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResourceNamesUnsubscribe: names})
	eventually(t, "they are forgotten", func() bool { return known() == 0 })
	for from := 1000; from < 2*maxNames; from += 1000 {
		vain(from, from+1000)
	}
	eventually(t, "those that made room are forgotten", func() bool { return known() == maxNames })
}
