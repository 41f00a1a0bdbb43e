package xds

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// sender is a pod that makes requests.
type sender struct {
	source string
	id     model.Identity
}

var senders = []sender{
	{"10.1.0.2", identity("web")},
	{"10.1.0.130", identity("web")},
	{"10.1.0.3", identity("api")},
}

// ask makes a request that says who sends it, and fails the test unless the server saw
// just that.
func (s sender) ask(t *testing.T, p *httpPod, to string, mesh bool) (a peerAnswer) {
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://10.96.1.1:15001"+to, nil)
	if err != nil {
		t.Error(err)
		return a
	}
	r.Header.Set("X-Sender", s.source)
	// What a client says of itself is the application's business, not the proxy's.
	r.Header.Set("X-Forwarded-For", senders[0].source+", "+senders[2].source)
	response, err := p.Do(r)
	if err != nil {
		t.Errorf("%s from %s: %v", to, s.source, err)
		return a
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK || json.Unmarshal(body, &a) != nil {
		t.Errorf("%s from %s: %d %q, %v", to, s.source, response.StatusCode, body, err)
		return a
	}
	if a.Source != s.source || mesh && (a.ID != s.id.String() || a.Sender != s.source) {
		t.Errorf("%s: a request of %s, %s, arrived as %s, %s", to, s.source, s.id, a.Source, a.ID)
	}
	return a
}

// Upstream connections are for one identity at one address, whatever else is the same:
// requests of several pods to one destination never share one.
func TestHTTPPools(t *testing.T) {
	for _, version := range dist.Versions() {
		for _, http2 := range []bool{false, true} {
			for _, chains := range []int{-1, maxHTTPChains} {
				t.Run(fmt.Sprintf("%s/http2=%t/chains=%d", version, http2, chains), func(t *testing.T) { testHTTPPools(t, version, http2, chains) })
			}
		}
	}
}

func testHTTPPools(t *testing.T, version string, http2 bool, chains int) {
	store, e, rejections := routedEnvoyWith(t, version, 1, chains)
	const far = "10.1.0.77"
	server := servePeer(t, e.ca, identity("web").String(), far)
	if err := store.SetService(endpointService("far", "10.96.1.5", model.Endpoint{Addr: netip.MustParseAddrPort(far + ":8080"), Identity: identity("web")})); err != nil {
		t.Fatal(err)
	}
	route(t, store, "", prefixed("/mesh", model.Action{Backends: to("far")}), prefixed("/plain", model.Action{Backends: to("plain")}))
	eventually(t, "it is routed", func() bool {
		r, _, err := newHTTPPod(t, senders[0].source, http2).get("http://10.96.1.1:15001/plain")
		return err == nil && r.StatusCode == http.StatusOK && r.Header.Get("X-App") == "10.9.0.9:8080"
	})
	paths := []string{"/mesh", "/plain"}

	// In turn, over new connections: what one leaves behind is there for the next.
	conns, tunnels := map[string]map[int64]bool{}, map[string]map[int64]bool{}
	for i := range 12 {
		if i == 3 && chains > 0 { // from now on they are read in the listener outbound
			eventually(t, "there are chains for HTTP", func() bool { _, leads := e.reads(webChain); return leads })
		}
		for _, s := range senders {
			p := newHTTPPod(t, s.source, http2)
			a := s.ask(t, p, "/mesh", true)
			if conns[s.source] == nil {
				conns[s.source], tunnels[s.source] = map[int64]bool{}, map[int64]bool{}
			}
			conns[s.source][a.Conn], tunnels[s.source][a.Tunnel] = true, true
			s.ask(t, p, "/plain", false)
			p.CloseIdleConnections()
		}
	}
	// That they were there is shown by that nobody needed another one.
	for source := range conns {
		if len(conns[source]) != 1 || len(tunnels[source]) != 1 {
			t.Errorf("%d connections in %d tunnels for requests of %s one after the other; want one", len(conns[source]), len(tunnels[source]), source)
		}
	}

	// All at once, over connections that stay.
	var wg sync.WaitGroup
	began := server.conns.Load()
	for range 6 {
		for _, s := range senders {
			p := newHTTPPod(t, s.source, http2)
			wg.Go(func() {
				for i := range 100 {
					s.ask(t, p, paths[i%2], i%2 == 0)
				}
			})
		}
	}
	wg.Wait()
	if n := server.conns.Load() - began; n > 6*int64(len(senders)) {
		t.Errorf("%d further connections for 18 clients: none was used again", n)
	}

	// The address goes to a pod of another identity, while connections to the
	// destination are still open.
	held := server.conns.Load()
	first := senders[0]
	last := first.ask(t, newHTTPPod(t, first.source, http2), "/mesh", true)
	moved := testProxy
	moved.Workloads = slices.Clone(moved.Workloads)
	moved.Workloads[0] = workload("api-1", "api", first.source, "fd00:1::2")
	if err := store.SetProxy(moved); err != nil {
		t.Fatal(err)
	}
	waitServed(t, store, "uid-api-1")
	next := sender{first.source, identity("api")}
	for range 12 {
		if a := next.ask(t, newHTTPPod(t, next.source, http2), "/mesh", true); a.Tunnel == last.Tunnel {
			t.Error("the new pod uses the old one's tunnel")
		}
	}
	// And back: the first one's connection was there all the time.
	if err := store.SetProxy(testProxy); err != nil {
		t.Fatal(err)
	}
	waitServed(t, store, "uid-web-0")
	if a := first.ask(t, newHTTPPod(t, first.source, http2), "/mesh", true); a.Conn > held {
		t.Errorf("the first pod's connection %d was gone: the second had none to take; now %d", last.Conn, a.Conn)
	}
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
}

func waitServed(t *testing.T, s *Store, uid string) {
	t.Helper()
	if err := s.waitServed(t.Context(), testProxy.Key(), uid); err != nil {
		t.Fatal(err)
	}
}
