package xds

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

const webChain = "http/team-a/web/10.96.1.1:15001"

// reads reports whether Envoy has a chain for HTTP in its listener outbound, and leads
// connections to it.
func (e *envoy) reads(chain string) (has, leads bool) {
	e.t.Helper()
	l := e.listeners()[listenerOutbound]
	has = slices.ContainsFunc(l.GetFilterChains(), func(c *listenerv3.FilterChain) bool { return c.Name == chain })
	return has, strings.Contains(fmt.Sprint(l.GetFilterChainMatcher()), chain)
}

// count is the sum of Envoy's statistics by a regular expression.
func (e *envoy) count(expression string) (sum int) {
	e.t.Helper()
	for line := range strings.Lines(e.get("/stats?filter=" + expression)) {
		_, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		n, err := strconv.Atoi(value)
		if err != nil {
			e.t.Fatalf("statistics: %q", line)
		}
		sum += n
	}
	return sum
}

// Once a proxy has the listener of an address, connections that begin are read where
// they come in. They stay when the address ceases to be HTTP, when the operator begins
// anew while it isn't, and when it is HTTP again.
func TestHTTPStraight(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) { testHTTPStraight(t, version) })
	}
}

func testHTTPStraight(t *testing.T, version string) {
	store, e, rejections := routedEnvoyWith(t, version, 1, true)
	marked := prefixed("/", model.Action{Backends: to("web"), RequestHeaders: model.HeaderChange{Set: []model.Header{{Name: "x-routed", Value: "yes"}}}})
	routed := func(p *httpPod) bool {
		t.Helper()
		r, a, err := p.get("http://10.96.1.1:15001/x")
		if err != nil || r.StatusCode != http.StatusOK || a.Source != "10.1.0.2" || a.Name != "10.1.0.3:8080" {
			t.Fatalf("got %+v, %+v, %v", r, a, err)
		}
		return a.Header.Get("X-Routed") == "yes"
	}
	inForce := func(want bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("routed: %t", want), func() bool { return routed(newHTTPPod(t, "10.1.0.2", false)) == want })
		eventually(t, fmt.Sprintf("led to the chain: %t", want), func() bool {
			has, leads := e.reads(webChain)
			return has && leads == want
		})
	}
	const internal = `listener.envoy_internal_l7.*downstream_cx_total`
	route(t, store, "", marked)
	first := newHTTPPod(t, "10.1.0.2", false) // it may find nothing of HTTP yet
	routed(first)
	inForce(true)
	if e.count(internal) == 0 {
		t.Error("nothing came by the internal listener: its connections aren't counted")
	}

	before := e.count(internal)
	held := map[string]*httpPod{"HTTP/1.1": newHTTPPod(t, "10.1.0.2", false), "HTTP/2": newHTTPPod(t, "10.1.0.2", true)}
	for name, p := range held {
		if !routed(p) {
			t.Errorf("%s isn't routed", name)
		}
	}
	socket := upgrade(t, "10.1.0.2", "10.96.1.1:15001")
	if after := e.count(internal); after != before {
		t.Errorf("%d connections went by the internal listener", after-before)
	}
	stay := func(when string, want bool) {
		t.Helper()
		for name, p := range held {
			if got := routed(p); got != want || p.dials != 1 {
				t.Errorf("%s, %s: routed %t, by connection %d", when, name, got, p.dials)
			}
		}
		routed(first)
		echo(t, socket)
	}
	stay("before", true)

	route(t, store, "")
	inForce(false)
	eventually(t, "the routes lead to the service itself", func() bool { return !routed(held["HTTP/1.1"]) })
	stay("without routes", false)

	// A new operator knows only what the proxy tells of itself.
	updates := e.count("listener_manager.listener_in_place_updated")
	connects := e.count("control_plane.connected_state|cluster.xds.upstream_rq_total")
	e.server.Disconnect(func(StreamIdentity) bool { return true })
	eventually(t, "the proxy is connected again", func() bool {
		return e.count("control_plane.connected_state|cluster.xds.upstream_rq_total") > connects && e.server.WaitServed(t.Context(), testProxy.Key(), "uid-web-0") == nil
	})
	if n := e.count("listener_manager.listener_in_place_updated"); n != updates {
		t.Errorf("%d updates of listeners for nothing", n-updates)
	}
	stay("with a new operator", false)

	route(t, store, "", marked)
	inForce(true)
	stay("with routes again", true)
	before = e.count(internal)
	if !routed(newHTTPPod(t, "10.1.0.2", false)) || e.count(internal) != before {
		t.Error("a new connection isn't read where it comes in")
	}
	if n := e.count("listener_manager.total_filter_chains_draining"); n != 0 {
		t.Errorf("%d chains are draining", n)
	}
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
}

// A proxy gets chains for the addresses that it has listeners for, for no others, and
// no more than are good for the size of the listener.
func TestStraightChains(t *testing.T) {
	m := newMesh(t, ServerOptions{StraightHTTP: true})
	accounts := 2 // of testProxy
	room := maxStraight / accounts
	c := m.dial(teamA)
	has := map[string]string{listenerUnwrap: "0", "l7|10.2.0.1:80": "1", "l7|10.96.9.9": "1"}
	for i := range room + 10 {
		has[HTTPName(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 3, byte(i)}), 80))] = "1"
	}
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeListener, InitialResourceVersions: has, ResourceNamesSubscribe: []string{listenerOutbound}})
	chains := func(r *discoveryv3.DeltaDiscoveryResponse) (names []string) {
		t.Helper()
		l := &listenerv3.Listener{}
		if err := proto.Unmarshal(r.Resources[0].Resource.Value, l); err != nil {
			t.Fatal(err)
		}
		for _, c := range l.FilterChains {
			if strings.HasPrefix(c.Name, "http/") {
				names = append(names, c.Name)
			}
		}
		return names
	}
	got := chains(c.want(TypeListener, listenerOutbound))
	if len(got) != room*accounts {
		t.Errorf("%d chains; want %d", len(got), room*accounts)
	}
	for _, name := range got {
		if !strings.Contains(name, "/10.96.3.") {
			t.Errorf("there is a chain %s", name)
		}
	}
	// Another tenant's proxy has none of it, and the next process of this one neither.
	other := m.dial(teamB)
	other.subscribe(TypeListener, listenerOutbound)
	if got := chains(other.want(TypeListener, listenerOutbound)); len(got) > 0 {
		t.Errorf("another tenant has %q", got)
	}
	c.cancel()
	// Nobody has any who doesn't ask for them.
	usual := newMesh(t, ServerOptions{}).dial(teamA)
	usual.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeListener, InitialResourceVersions: has, ResourceNamesSubscribe: []string{listenerOutbound}})
	if got := chains(usual.want(TypeListener, listenerOutbound)); len(got) > 0 {
		t.Errorf("without StraightHTTP there are %q", got)
	}
	eventually(t, "the stream is over", func() bool {
		m.store.mu.Lock()
		defer m.store.mu.Unlock()
		return len(m.store.proxies[testProxy.Key()].streams) == 0
	})
	next := m.dial(teamA)
	next.subscribe(TypeListener, listenerOutbound)
	if got := chains(next.want(TypeListener, listenerOutbound)); len(got) > 0 {
		t.Errorf("a new process has %q", got)
	}
}
