package xds

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Connections to an address that nobody has dialled yet, all at once, share a tunnel:
// one for each source, identity and worker, as later ones do.
func TestFirstConnectionsShareATunnel(t *testing.T) {
	for _, version := range dist.Versions() {
		for _, workers := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s/workers=%d", version, workers), func(t *testing.T) { testFirstConnections(t, version, workers) })
		}
	}
}

func testFirstConnections(t *testing.T, version string, workers int) {
	enterNetns(t)
	store, server, rejections := envoyStore(t)
	e := startEnvoyWith(t, version, workers, server, newAuthority(t))
	const far = "10.1.0.77"
	servePeer(t, e.ca, identity("web").String(), far)
	if err := store.SetService(endpointService("far", "10.96.1.1", model.Endpoint{Addr: netip.MustParseAddrPort(far + ":8080"), Identity: identity("web")})); err != nil {
		t.Fatal(err)
	}
	waitServed(t, store, "uid-web-0")

	// As many as one tunnel takes. All wait for the service's cluster, and then begin
	// together.
	const each = 64
	var wg sync.WaitGroup
	tunnels := make([][each]int64, len(senders))
	for i, s := range senders {
		for j := range each {
			p := newHTTPPod(t, s.source, false)
			wg.Go(func() { tunnels[i][j] = s.ask(t, p, "/first", true).Tunnel })
		}
	}
	wg.Wait()
	users := map[int64]string{}
	for i, s := range senders {
		own := map[int64]bool{}
		for _, tunnel := range tunnels[i] {
			own[tunnel] = true
			if user, ok := users[tunnel]; ok && user != s.source {
				t.Errorf("%s and %s share a tunnel", user, s.source)
			}
			users[tunnel] = s.source
		}
		if len(own) > workers {
			t.Errorf("%d connections of %s at once made %d tunnels; want one for each of %d workers", each, s.source, len(own), workers)
		}
	}
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
}
