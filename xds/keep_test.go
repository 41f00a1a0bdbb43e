package xds

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// knowing is a mesh whose operator knows forms up to newest.
func knowing(t *testing.T, newest Form) *mesh {
	t.Helper()
	m := newMesh(t, ServerOptions{})
	m.store.knows(newest)
	return m
}

func (s *Store) knows(newest Form) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.newest = newest
}

// wantForm checks that all listeners of a process are in a form, content and version.
func (f *follower) wantForm(when string, want Form, proxy model.Proxy) {
	f.t.Helper()
	ls, err := listenersOf(want, testNetwork, proxy)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, l := range ls {
		got, r := &listenerv3.Listener{}, f.has[resourceKey{TypeListener, l.Name}]
		if err := r.Resource.UnmarshalTo(got); err != nil {
			f.t.Fatal(err)
		}
		if l.Name == listenerOutbound { // those for HTTP are looked at by wantChains
			continue
		}
		if !proto.Equal(got, l) {
			f.t.Errorf("%s, the listener %s isn't in form %d", when, l.Name, want)
		}
	}
	for key, r := range f.has {
		if key.typeURL == TypeListener && formOf(r.Version, NewestForm) != want {
			f.t.Errorf("%s, %s is at %.30s; want form %d", when, key.name, r.Version, want)
		}
	}
}

// hasForms are those of which a proxy's listeners are kept.
func (m *mesh) hasForms(key model.ProxyKey) []Form {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	return slices.Sorted(maps.Keys(m.store.proxies[key].sets))
}

// A process has its listeners in one form for as long as it lives, whoever serves it; one
// that begins gets the newest that its operator knows.
func TestProcessesKeepTheirForm(t *testing.T) {
	former := knowing(t, OldestForm)
	vip := former.readService(1)
	old := former.begin(teamA, "0", nil)
	old.dials(vip)
	chains := []string{"team-a/api/10.96.3.1:80", "team-a/web/10.96.3.1:80"}
	old.wantChains("of the former operator", chains...)
	old.wantForm("of the former operator", OldestForm, testProxy)
	old.cancel()
	former.forgotten()

	// The next operator has nothing to tell to it, and another form for its canary.
	m := knowing(t, NewestForm)
	m.readService(1)
	old = m.begin(teamA, "0", old.has)
	if i := slices.IndexFunc(old.order, func(entry string) bool { return entry[:3] == "lds" }); i >= 0 {
		t.Errorf("it got %q for nothing", old.order)
	}
	if got := m.hasForms(testProxy.Key()); !slices.Equal(got, []Form{OldestForm}) {
		t.Errorf("listeners of forms %v are kept for a process of the oldest", got)
	}
	canary := m.begin(teamA, "1", nil)
	canary.dials(vip)
	canary.wantChains("of the canary", chains...)
	canary.wantForm("of the canary", NewestForm, testProxy)

	// A listener that it hasn't had is in the newest form.
	old.dials(m.readService(2))
	if r := old.has[resourceKey{TypeListener, HTTPName(netip.MustParseAddrPort("10.96.3.2:80"))}]; formOf(r.GetVersion(), NewestForm) != NewestForm {
		t.Errorf("a new listener is at %q", r.GetVersion())
	}
	delete(old.has, resourceKey{TypeListener, HTTPName(netip.MustParseAddrPort("10.96.3.2:80"))})
	chainsOf := map[*follower][]string{canary: chains, old: append([]string{"team-a/api/10.96.3.1:80", "team-a/api/10.96.3.2:80"}, "team-a/web/10.96.3.1:80", "team-a/web/10.96.3.2:80")}

	// What changes comes to each in its own, and both serve a pod that joins.
	proxy := oneMore("web-2", "web", "10.1.0.4")
	m.must(m.store.SetProxy(proxy))
	for _, f := range []*follower{old, canary} {
		f.order = nil
		f.until("the pod is in both listeners", func() bool {
			return f.place("lds "+listenerOutbound) >= 0 && f.place("lds "+listenerInbound) >= 0
		})
		f.drain()
		f.wantChains("with a pod more", chainsOf[f]...)
	}
	old.wantForm("with a pod more", OldestForm, proxy)
	canary.wantForm("with a pod more", NewestForm, proxy)
	ctx, cancel := context.WithTimeout(t.Context(), testTime)
	defer cancel()
	m.must(m.server.WaitServed(ctx, testProxy.Key(), "uid-web-2"))
	if got := m.hasForms(testProxy.Key()); !slices.Equal(got, []Form{OldestForm, NewestForm}) {
		t.Errorf("listeners of forms %v are kept for two processes", got)
	}
	for f := OldestForm; f <= NewestForm; f++ {
		want := 0
		if f == OldestForm || f == NewestForm {
			want = 1
		}
		if got := testutil.ToFloat64(m.server.metrics.forms[f-OldestForm]); got != float64(want) {
			t.Errorf("%v streams of form %d are told; want %d", got, f, want)
		}
	}

	// With the process goes its form.
	old.cancel()
	eventually(t, "the old form isn't kept", func() bool { return slices.Equal(m.hasForms(testProxy.Key()), []Form{NewestForm}) })

	// An operator that doesn't know the canary's form gives the newest that it knows; and a
	// process can't have what no operator knows.
	canary.cancel()
	m.forgotten()
	former.must(former.store.SetProxy(proxy))
	back := former.begin(teamA, "1", canary.has)
	back.until("the canary is in the former form", func() bool {
		return formOf(back.has[resourceKey{TypeListener, listenerInbound}].Version, NewestForm) == OldestForm
	})
	back.drain()
	back.wantChains("at the former operator", chains...)
	lies := map[resourceKey]*discoveryv3.Resource{}
	for _, name := range listenerNames {
		lies[resourceKey{TypeListener, name}] = &discoveryv3.Resource{Version: "99-" + name}
	}
	liar := m.begin(teamA, "0", lies)
	liar.until("it gets listeners all the same", func() bool { return liar.place("lds "+listenerInbound) >= 0 })
	liar.drain()
	liar.wantForm("when it lied", NewestForm, proxy)
}

// Last good can have given a process listeners of two forms: it is told of for both, and
// keeps each.
func TestProcessOfTwoForms(t *testing.T) {
	m := knowing(t, NewestForm)
	of := map[string]Form{}
	had := map[resourceKey]*discoveryv3.Resource{}
	for _, name := range listenerNames {
		of[name] = OldestForm
		if name == listenerOutbound {
			of[name] = NewestForm
		}
		r := &resource{wire: &discoveryv3.Resource{Version: name}}
		of[name].mark(r)
		had[resourceKey{TypeListener, name}] = r.wire
	}
	p := m.begin(teamA, "0", had)
	for name, want := range of {
		p.until("it has "+name, func() bool { return p.place("lds "+name) >= 0 })
		if got := formOf(p.has[resourceKey{TypeListener, name}].Version, NewestForm); got != want {
			t.Errorf("%s is in form %d; want %d", name, got, want)
		}
	}
	for _, f := range []Form{OldestForm, NewestForm} {
		if got := testutil.ToFloat64(m.server.metrics.forms[f-OldestForm]); got != 1 {
			t.Errorf("%v streams of form %d are told; want 1", got, f)
		}
	}
}

// A connection that lasts outlives the operator and its forms, in a process that goes on,
// whatever changes for it. Envoy drains for a second here.
func TestConnectionsOutliveForms(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) { testOutlive(t, version) })
	}
}

func testOutlive(t *testing.T, version string) {
	enterNetns(t)
	store, server, rejections := envoyStore(t)
	store.knows(OldestForm)
	for _, err := range []error{
		store.SetService(endpointService("api", "10.96.1.1", model.Endpoint{Addr: netip.MustParseAddrPort("10.1.0.3:8080"), Identity: identity("api")})),
		store.SetWorkload(plainWorkload("plain", "10.1.0.9")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, addr := range []string{"10.1.0.3", "10.1.0.9", "192.0.2.9"} {
		serveApp(t, net.JoinHostPort(addr, fmt.Sprint(appPort)))
	}
	e := startEnvoyEdited(t, version, 1, server, newAuthority(t), editing(toApps), "--drain-time-s", "1")
	waitServed(t, store, "uid-web-0")

	held := map[string]*bufio.ReadWriter{}
	for name, c := range map[string]struct{ from, to string }{
		"over a tunnel":      {"10.1.0.2", fmt.Sprint("10.96.1.1:", PortOutbound)},
		"to a pod outside":   {"10.1.0.2", fmt.Sprint("10.1.0.9:", PortOutbound)},
		"in plain text":      {"10.7.7.7", fmt.Sprint("10.1.0.3:", PortPlain)},
		"from a node":        {"10.7.7.7", fmt.Sprint("10.1.0.3:", PortNodePlain)},
		"out of the cluster": {"10.1.0.2", fmt.Sprint("192.0.2.9:", PortOutbound)},
	} {
		conn, err := dialFrom(c.from, c.to)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		rw := bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))
		if greeting, err := rw.ReadString('\n'); err != nil {
			t.Fatalf("%s: %q, %v", name, greeting, err)
		}
		held[name] = rw
	}
	lives := func(when string) {
		t.Helper()
		for name, rw := range held {
			fmt.Fprintln(rw, "still there")
			rw.Flush()
			if got, err := rw.ReadString('\n'); err != nil || got != "still there\n" {
				t.Errorf("%s, the connection %s is over: %q, %v", when, name, got, err)
			}
		}
	}

	store.knows(NewestForm)
	server.Disconnect(func(StreamIdentity) bool { return true })
	proxy := oneMore("web-2", "web", "10.1.0.4")
	if err := store.SetProxy(proxy); err != nil {
		t.Fatal(err)
	}
	waitServed(t, store, "uid-web-2")
	lives("with a new operator")
	if n := e.count("listener_manager.total_filter_chains_draining"); n != 0 {
		t.Errorf("%d chains are draining", n)
	}
	if n := e.count("listener_manager.listener_in_place_updated"); n == 0 {
		t.Error("no listener has changed")
	}

	// What the topology changes drains as it always did; the others outlive that.
	proxy.RejectOutside = true
	if err := store.SetProxy(proxy); err != nil {
		t.Fatal(err)
	}
	if b, err := held["out of the cluster"].ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("what isn't let out any more doesn't end: %q, %v", b, err)
	}
	delete(held, "out of the cluster")
	lives("when Envoy has drained a chain")
	// The pod that joined is served as others are.
	if got, err := talk("10.1.0.4", fmt.Sprint("10.96.1.1:", PortOutbound)); err != nil || got != "10.1.0.3:8080 sees 10.1.0.4" {
		t.Errorf("the new pod: %q, %v", got, err)
	}
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
}
