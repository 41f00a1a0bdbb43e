package xds

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

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
	store, e, rejections := routedEnvoy(t, version)
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
		return e.count("control_plane.connected_state|cluster.xds.upstream_rq_total") > connects
	})
	ctx, cancel := context.WithTimeout(t.Context(), testTime)
	defer cancel()
	if err := e.server.WaitServed(ctx, testProxy.Key(), "uid-web-0"); err != nil {
		t.Fatal(err)
	}
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

// Routes that Envoy doesn't take leave the service at L4, as it was, and hold nothing
// else of the proxy back.
func TestEnvoyRefusesFirstRoutes(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			store, e, rejections := routedEnvoy(t, version)
			bad := prefixed("(", model.Action{Backends: to("web")})
			bad.Match.Path.Kind = model.PathRegex
			get := func() string {
				t.Helper()
				r, a, err := newHTTPPod(t, "10.1.0.2", false).get("http://10.96.1.1:15001/x")
				if err != nil || r.StatusCode != http.StatusOK || a.Name != "10.1.0.3:8080" {
					t.Fatalf("got %+v, %+v, %v", r, a, err)
				}
				return a.Header.Get("X-Routed")
			}
			get()
			route(t, store, "", bad)
			eventually(t, "Envoy refuses the routes", func() bool { return len(rejections()) > 0 })
			if got := rejections()[0]; got.Type != TypeRoutes || got.Source.Name != "web" {
				t.Errorf("told %+v", got)
			}
			p := testProxy
			p.Workloads = append(slices.Clone(p.Workloads), workload("web-2", "web", "10.1.0.4"))
			if err := store.SetProxy(p); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), testTime)
			defer cancel()
			if err := e.server.WaitServed(ctx, testProxy.Key(), "uid-web-2"); err != nil {
				t.Fatal(err)
			}
			get()
			if has, leads := e.reads(webChain); has || leads {
				t.Error("there is a chain without routes")
			}
			route(t, store, "", prefixed("/", model.Action{Backends: to("web"), RequestHeaders: model.HeaderChange{Set: []model.Header{{Name: "x-routed", Value: "yes"}}}}))
			eventually(t, "it is routed", func() bool { return get() == "yes" })
			eventually(t, "there is a chain", func() bool { _, leads := e.reads(webChain); return leads })
		})
	}
}

// readService is a service at 10.96.3.n:80 whose requests are read.
func (m *mesh) readService(n int) netip.AddrPort {
	m.t.Helper()
	vip := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 3, byte(n)}), 80)
	s := model.Service{Namespace: "team-a", Name: fmt.Sprint("read-", n), VIPs: []netip.Addr{vip.Addr()}, Ports: []model.ServicePort{{Port: 80}}}
	m.must(m.store.SetService(s))
	m.must(m.store.SetRoutings(model.ServiceKey{Namespace: s.Namespace, Name: s.Name}, []model.Routing{{Port: 80}}))
	return vip
}

// dials asks for addresses as the first connections to them do.
func (f *follower) dials(vips ...netip.AddrPort) {
	f.t.Helper()
	for _, vip := range vips {
		f.subscribe(TypeCluster, VIPName(vip))
		f.until("requests to "+vip.String()+" are read", func() bool { return f.leadsTo(VIPName(vip)) == HTTPName(vip) })
	}
	f.drain()
}

// chains are those for HTTP in the listener outbound, and those that something leads to,
// as account and address.
func (f *follower) chains() (all, led []string) {
	f.t.Helper()
	l := &listenerv3.Listener{}
	if err := f.has[resourceKey{TypeListener, listenerOutbound}].Resource.UnmarshalTo(l); err != nil {
		f.t.Fatal(err)
	}
	matcher := fmt.Sprint(l.FilterChainMatcher)
	for _, c := range l.FilterChains {
		if name, ok := strings.CutPrefix(c.Name, "http/"); ok {
			all = append(all, name)
			if strings.Contains(matcher, c.Name) {
				led = append(led, name)
			}
		}
	}
	slices.Sort(all)
	slices.Sort(led)
	return all, led
}

func (f *follower) wantChains(when string, want ...string) {
	f.t.Helper()
	if got, _ := f.chains(); !slices.Equal(got, want) {
		f.t.Errorf("%s, it has the chains %q; want %q", when, got, want)
	}
}

// Each process has chains for the addresses that it reads itself, and no others. It keeps
// them over its stream, whoever serves it, and the next process begins without.
func TestChainsOfOneProcess(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	vip := m.readService(1)
	want := []string{"team-a/api/10.96.3.1:80", "team-a/web/10.96.3.1:80"}
	old, early, other := m.begin(teamA, "0", nil), m.begin(teamA, "1", nil), m.begin(teamB, "0", nil)
	old.dials(vip)
	old.wantChains("after a connection", want...)
	early.drain()
	early.wantChains("without a connection of its own")
	other.drain()
	other.wantChains("of another tenant")
	next := m.begin(teamA, "1", nil)
	next.wantChains("when it begins")
	next.dials(vip)
	next.wantChains("after a connection of its own", want...)

	// The former generation goes. Then the stream ends, to another operator's replica.
	old.cancel()
	next.cancel()
	m.forgottenBut(teamB)
	replica := newMesh(t, ServerOptions{})
	replica.readService(1)
	next = replica.begin(teamA, "1", next.has)
	if next.place("lds "+listenerOutbound) >= 0 {
		t.Errorf("it got %q for nothing", next.order)
	}
	replica.must(replica.store.SetProxy(oneMore("web-2", "web", "10.1.0.4")))
	next.until("the change arrives", func() bool { return next.place("lds "+listenerOutbound) >= 0 })
	next.wantChains("at another replica", want...)

	// The address is told to a process that has only its chains, its listener and its
	// routes: one that began with what its agent had kept.
	kept := map[resourceKey]*discoveryv3.Resource{}
	for key, r := range next.has {
		if key.typeURL == TypeListener || key.typeURL == TypeRoutes {
			kept[key] = r
		}
	}
	next.cancel()
	next = replica.begin(teamA, "0", kept)
	replica.must(replica.store.SetRoutings(model.ServiceKey{Namespace: "team-a", Name: "read-1"}, nil))
	next.until("the address isn't HTTP", func() bool { _, led := next.chains(); return len(led) == 0 })
	next.wantChains("when the address isn't HTTP", want...)
	replica.readService(1)
	next.until("the address is HTTP again", func() bool { _, led := next.chains(); return slices.Equal(led, want) })

	// A process tells what it likes: it has no chains where it can't have connections.
	lies := maps.Clone(next.has)
	forged := &discoveryv3.Resource{Version: "1" + marksBegin}
	for _, vip := range []string{"10.2.0.1:80", "10.96.9.9:80", "10.96.3.1:80"} {
		vip := netip.MustParseAddrPort(vip)
		forged.Version += chainMark("team-a/web", vip) + chainMark("team-b/web", vip)
		if vip.Addr() != netip.MustParseAddr("10.96.9.9") {
			lies[resourceKey{TypeListener, HTTPName(vip)}] = &discoveryv3.Resource{Version: "1"}
		}
	}
	forged.Version += "x"
	lies[resourceKey{TypeListener, listenerOutbound}] = forged
	lies[resourceKey{TypeListener, HTTPName(vip)}] = &discoveryv3.Resource{Version: "1"}
	delete(lies, resourceKey{TypeRoutes, HTTPName(vip)})
	next.cancel()
	replica.forgotten()
	liar := replica.begin(teamA, "0", lies)
	liar.wantChains("when it lied", want[1])
	liar.cancel()
	replica.forgotten()
}

// The listener may be looked at before the process has told which chains it has: by who
// waits for a pod, as soon as there is a stream.
func TestChainsStayIfLookedAtFirst(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	vip := m.readService(1)
	f := m.begin(teamA, "0", nil)
	f.dials(vip)
	want, _ := f.chains()
	f.cancel()
	m.forgotten()

	f = m.connect(teamA, "0", f.has)
	eventually(t, "there is a stream", func() bool {
		m.store.mu.Lock()
		defer m.store.mu.Unlock()
		return len(m.store.proxies[testProxy.Key()].streams) == 1
	})
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.server.WaitServed(over, testProxy.Key(), "uid-web-0"); err == nil {
		t.Fatal("a process serves a pod that has told of nothing")
	}
	f.resume(TypeListener) // what it tells of routes would have all looked at again
	f.wantChains("once it has told", want...)
	if f.place("lds "+listenerOutbound) >= 0 {
		t.Errorf("it got %q for nothing", f.order)
	}
}

// A process may acknowledge what it likes, as often as it likes: the listener outbound is
// made again only for what will have another chain.
func TestAcknowledgingMakesNoListeners(t *testing.T) {
	m := newMesh(t, ServerOptions{MaxHTTPChains: 3, NamesPerSecond: 1e-9})
	f := m.begin(teamA, "0", nil)
	f.dials(m.readService(1)) // for two accounts
	again := func(what string, types []string, name string) {
		t.Helper()
		f.drain()
		st := m.stream(teamA)
		before, tokens := m.builds(), st.limiter.Tokens()
		for range 3 {
			for _, typeURL := range types {
				f.order = nil
				f.subscribe(typeURL, name)
				f.until("it is sent again", func() bool { return f.place(shortType(typeURL)+" "+name) >= 0 })
			}
		}
		used := tokens - st.limiter.Tokens()
		f.drain()
		if n := m.builds() - before; n > 3 { // drain's own
			t.Errorf("%s: %d resources were made", what, n)
		}
		if all := 3 * len(types); used < float64(all)-0.5 {
			t.Errorf("%s: %v of %d names were counted", what, used, all)
		}
	}
	listener, both := []string{TypeListener}, []string{TypeListener, TypeRoutes}
	for _, name := range []string{"l7|10.1.0.3:80", "l7|10.96.9.9:80"} {
		f.subscribe(TypeListener, name)
		f.until("it has the listener", func() bool { return f.has[resourceKey{TypeListener, name}] != nil })
		again("nobody's", listener, name)
	}
	api := HTTPName(netip.MustParseAddrPort("10.96.0.10:80"))
	f.subscribe(TypeListener, api)
	f.until("it has the routes", func() bool { return f.has[resourceKey{TypeRoutes, api}] != nil })
	again("an address that isn't HTTP", both, api)

	lacking := HTTPName(m.readService(4))
	f.refuses[resourceKey{TypeRoutes, lacking}] = true
	f.subscribe(TypeListener, lacking)
	f.until("it refuses the routes", func() bool { return f.place("!rds "+lacking) >= 0 })
	again("an address without routes", listener, lacking)

	// All places are taken, and one of them isn't to be given back yet.
	f.dials(m.readService(2), m.readService(3))
	m.store.DeleteService("team-a", "read-1")
	again("what has no place", both, HTTPName(netip.MustParseAddrPort("10.96.3.3:80")))
	if all, _ := f.chains(); len(all) != 3 {
		t.Errorf("it has the chains %q; want 3", all)
	}
}

// oneMore is testProxy with one more pod.
func oneMore(name, account, addr string) model.Proxy {
	p := testProxy
	p.Workloads = append(slices.Clone(p.Workloads), workload(name, account, addr))
	return p
}

// forgottenBut waits until only a tenant's streams are left.
func (m *mesh) forgottenBut(tenant model.Tenant) {
	m.t.Helper()
	eventually(m.t, "the streams are over", func() bool {
		m.store.mu.Lock()
		defer m.store.mu.Unlock()
		for key, p := range m.store.proxies {
			if key.Tenant != tenant && len(p.streams) > 0 {
				return false
			}
		}
		return true
	})
}

// A chain waits for the routes, as the endpoint does.
func TestChainsWaitForRoutes(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	vip := m.readService(1)
	f := m.begin(teamA, "0", nil)
	routes := resourceKey{TypeRoutes, HTTPName(vip)}
	f.refuses[routes] = true
	f.subscribe(TypeCluster, VIPName(vip))
	f.until("it refuses the routes", func() bool { return f.place("!rds "+HTTPName(vip)) >= 0 })
	f.drain()
	f.wantChains("without routes")
	delete(f.refuses, routes)
	m.must(m.store.SetRoutings(model.ServiceKey{Namespace: "team-a", Name: "read-1"}, []model.Routing{{Port: 80, Rules: []model.Rule{prefixed("/", model.Action{})}}}))
	f.until("it has chains", func() bool { _, led := f.chains(); return len(led) == 2 })
}

// There are so many chains for each process, of accounts and addresses, whichever come
// later. Those that there are stay, also with an operator that begins anew.
func TestChainsAreBounded(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	var early, late []netip.AddrPort
	for i := range maxHTTPChains/2 + 5 {
		if i < 5 {
			late = append(late, m.readService(i))
		} else {
			early = append(early, m.readService(i))
		}
	}
	f := m.begin(teamA, "0", nil)
	f.dials(early...)
	first, led := f.chains()
	if len(first) != maxHTTPChains || len(led) != maxHTTPChains {
		t.Fatalf("%d chains, %d led to; want %d", len(first), len(led), maxHTTPChains)
	}
	if n := len(f.has[resourceKey{TypeListener, listenerOutbound}].Version); n > model.MaxVersion {
		t.Errorf("the version has %d bytes; relays take %d", n, model.MaxVersion)
	}
	f.order = nil
	m.must(m.store.SetProxy(oneMore("also-0", "also", "10.1.0.4"))) // first by name
	f.until("the account arrives", func() bool { return f.place("lds "+listenerOutbound) >= 0 })
	f.drain()
	f.wantChains("with more accounts", first...)
	f.dials(late...) // first by address
	f.wantChains("with more addresses", first...)

	f.cancel()
	m.forgotten()
	f = m.begin(teamA, "0", f.has)
	if f.place("lds "+listenerOutbound) >= 0 {
		t.Errorf("a new operator sent %q for nothing", f.order)
	}
	f.order = nil
	m.must(m.store.SetProxy(testProxy))
	f.until("the account is gone", func() bool { return f.place("lds "+listenerOutbound) >= 0 })
	f.wantChains("with a new operator", first...)

	// An account that goes gives its places back.
	p := testProxy
	p.Workloads = p.Workloads[:1] // web's
	m.must(m.store.SetProxy(p))
	f.until("the others have its places", func() bool { all, _ := f.chains(); return len(all) == len(early)+len(late) })
	f.cancel()
	m.forgotten()
}

// What nobody has had for long gives its places to what is dialled, and not before.
func TestChainsAreGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const wait = 5 * time.Second
		m := newMesh(t, ServerOptions{UnknownFor: wait, MaxHTTPChains: 4})
		f := m.begin(teamA, "0", nil)
		f.dials(m.readService(5), m.readService(6))
		first, _ := f.chains()
		m.store.DeleteService("team-a", "read-5")
		f.dials(m.readService(1))
		f.wantChains("at once", first...)
		time.Sleep(wait)
		m.store.DeleteService("team-a", "read-6")
		f.drain()
		f.dials(m.readService(2))
		f.wantChains("after a while", "team-a/api/10.96.3.1:80", "team-a/api/10.96.3.6:80", "team-a/web/10.96.3.1:80", "team-a/web/10.96.3.6:80")
		m.readService(6) // somebody has it again
		f.drain()
		time.Sleep(2 * wait)
		f.dials(m.readService(3))
		f.wantChains("while all are somebody's", "team-a/api/10.96.3.1:80", "team-a/api/10.96.3.6:80", "team-a/web/10.96.3.1:80", "team-a/web/10.96.3.6:80")
		f.cancel()
		m.forgotten()
	})
}
