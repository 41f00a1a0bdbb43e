package xds

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// answer is what an application says of a request.
type httpAnswer struct {
	Name, Source, Proto, Method, Path, Host string
	Header                                  http.Header
}

// serveHTTP is an application that speaks HTTP/1 and HTTP/2 in plain text. It
// answers with the request, echoes after an upgrade, and takes orders from the
// query: status, wait, read the body, and of the first so many of the same, failing or resetting.
func serveHTTP(t *testing.T, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	// Not Go's 250 streams: one beyond is refused, and so sent again by itself.
	streams := &http.HTTP2Config{MaxConcurrentStreams: 4096}
	s := &http.Server{Protocols: protocols, HTTP2: streams, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "websocket" {
			c, rw, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			defer c.Close()
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			io.Copy(c, rw)
			return
		}
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		a := httpAnswer{addr, host, r.Proto, r.Method, r.URL.RequestURI(), r.Host, r.Header}
		requests.Lock()
		requests.seen[addr] = append(requests.seen[addr], a)
		requests.Unlock()
		if wait, err := time.ParseDuration(r.URL.Query().Get("wait")); err == nil {
			select {
			case <-time.After(wait):
			case <-r.Context().Done():
				return
			}
		}
		if r.URL.Query().Has("read") {
			io.Copy(io.Discard, r.Body)
		}
		w.Header().Set("X-App", addr)
		nth := func(n string) bool {
			most, err := strconv.Atoi(r.URL.Query().Get(n))
			return err == nil && attempts(addr, a.Path) <= most
		}
		switch {
		case nth("resetting"):
			panic(http.ErrAbortHandler)
		case nth("failing"):
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		if status := r.URL.Query().Get("status"); status != "" {
			var code int
			fmt.Sscan(status, &code)
			w.WriteHeader(code)
		}
		json.NewEncoder(w).Encode(a)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
}

// requests are all that applications got, by their addresses.
var requests = struct {
	sync.Mutex
	seen map[string][]httpAnswer
}{seen: map[string][]httpAnswer{}}

func seen(addr string) []httpAnswer {
	requests.Lock()
	defer requests.Unlock()
	return slices.Clone(requests.seen[addr])
}

// attempts is how often an application has got a request to the same path and query.
func attempts(addr, path string) (n int) {
	for _, a := range seen(addr) {
		if a.Path == path {
			n++
		}
	}
	return n
}

// httpPod makes requests as a pod does.
type httpPod struct {
	*http.Client
	dials int
}

func newHTTPPod(t *testing.T, source string, http2 bool) *httpPod {
	p := &httpPod{}
	inside := netnsOf(t)
	protocols := &http.Protocols{}
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	transport := &http.Transport{Protocols: protocols, DialContext: func(_ context.Context, _, to string) (net.Conn, error) {
		p.dials++
		var c net.Conn
		err := inside(func() (err error) {
			if c, err = dialFrom(source, to); err == nil {
				c.SetDeadline(time.Time{})
			}
			return err
		})
		return c, err
	}}
	t.Cleanup(transport.CloseIdleConnections)
	p.Client = &http.Client{Transport: transport, Timeout: testTime, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return p
}

// get makes a request with headers "Name: value".
func (p *httpPod) get(url string, headers ...string) (*http.Response, httpAnswer, error) {
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return nil, httpAnswer{}, err
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		if name == "Host" {
			r.Host = value
		}
		r.Header.Add(name, value)
	}
	response, err := p.Do(r)
	if err != nil {
		return nil, httpAnswer{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	var a httpAnswer
	if response.Header.Get("X-App") != "" {
		err = json.Unmarshal(body, &a)
	}
	return response, a, err
}

func toPort(name string) model.ServicePortKey { return toService(name, PortOutbound) }

func to(name string) []model.Backend { return []model.Backend{{To: toPort(name), Weight: 1}} }

func prefixed(path string, a model.Action) model.Rule {
	a.Origin = model.Origin{Kind: "HTTPRoute", Namespace: "team-a", Name: "r", Rule: path}
	return model.Rule{Match: model.RequestMatch{Path: model.PathMatch{Kind: model.PathPrefix, Value: path}}, Action: &a}
}

var webKey = model.ServiceKey{Namespace: "team-a", Name: "web"}

// routedEnvoy is an Envoy with three applications behind services, of which the
// one of web can be routed.
func routedEnvoy(t *testing.T, version string) (*Store, *envoy, func() []Rejection) {
	t.Helper()
	return routedEnvoyWith(t, version, 1, maxHTTPChains)
}

func routedEnvoyWith(t *testing.T, version string, workers, chains int) (*Store, *envoy, func() []Rejection) {
	t.Helper()
	enterNetns(t)
	store, server, rejections := envoyStore(t)
	server.opts.MaxHTTPChains = chains
	at := func(addr string, id model.Identity) model.Endpoint {
		return model.Endpoint{Addr: netip.MustParseAddrPort(addr), Identity: id}
	}
	for _, s := range []model.Service{
		endpointService("web", "10.96.1.1", at("10.1.0.3:8080", identity("api"))),
		endpointService("v2", "10.96.1.2", at("10.1.0.130:8080", identity("web"))),
		endpointService("plain", "10.96.1.3", at("10.9.0.9:8080", model.Identity{})),
		endpointService("empty", "10.96.1.4"),
	} {
		if err := store.SetService(s); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []string{"10.1.0.3:8080", "10.1.0.130:8080", "10.9.0.9:8080"} {
		serveHTTP(t, a)
	}
	e := startEnvoyWith(t, version, workers, server, newAuthority(t))
	if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-web-0"); err != nil {
		t.Fatal(err)
	}
	return store, e, rejections
}

func route(t *testing.T, s *Store, consumer string, rules ...model.Rule) {
	t.Helper()
	var r []model.Routing
	if len(rules) > 0 {
		r = []model.Routing{{Port: PortOutbound, Consumer: consumer, Rules: rules}}
	}
	if err := s.SetRoutings(webKey, r); err != nil {
		t.Fatal(err)
	}
}

// A destination becomes HTTP and ceases to be, and no connection notices: those that
// exist stay as they are, new ones follow.
func TestHTTPOnAndOff(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			store, e, rejections := routedEnvoy(t, version)
			const url = "http://10.96.1.1:15001/x"
			marked := model.Action{Backends: to("web"), RequestHeaders: model.HeaderChange{Set: []model.Header{{Name: "x-routed", Value: "yes"}}}}
			routed := func(p *httpPod) bool {
				t.Helper()
				r, a, err := p.get(url)
				if err != nil || r.StatusCode != 200 || a.Source != "10.1.0.2" || a.Name != "10.1.0.3:8080" {
					t.Fatalf("got %+v, %+v, %v", r, a, err)
				}
				return a.Header.Get("X-Routed") == "yes"
			}
			// fresh connections show what is in force now.
			inForce := func(want bool) {
				t.Helper()
				eventually(t, fmt.Sprintf("routed: %t", want), func() bool { return routed(newHTTPPod(t, "10.1.0.2", false)) == want })
			}
			before := newHTTPPod(t, "10.1.0.2", false)
			if routed(before) {
				t.Error("routed without routes")
			}
			if got := e.listeners(); got["l7|10.96.1.1:15001"] != nil {
				t.Error("there is a listener for HTTP before anyone asked for it")
			}
			route(t, store, "", prefixed("/", marked))
			inForce(true)
			if routed(before) {
				t.Error("the connection from before is routed")
			}
			during := newHTTPPod(t, "10.1.0.2", false)
			if !routed(during) {
				t.Error("a new connection isn't routed")
			}
			socket := upgrade(t, "10.1.0.2", "10.96.1.1:15001")
			route(t, store, "")
			inForce(false)
			for range 3 {
				routed(during)
				routed(before)
				echo(t, socket)
			}
			// Something else than routes asks for HTTP: requests go to the service itself.
			if err := store.SetRoutings(webKey, []model.Routing{{Port: PortOutbound}}); err != nil {
				t.Fatal(err)
			}
			read := func(p *httpPod) bool { // a proxy that reads requests says how they came
				t.Helper()
				r, a, err := p.get(url)
				if err != nil || r.StatusCode != 200 || a.Source != "10.1.0.2" || a.Name != "10.1.0.3:8080" {
					t.Fatalf("got %+v, %+v, %v", r, a, err)
				}
				return a.Header.Get("X-Forwarded-Proto") != ""
			}
			eventually(t, "requests are read", func() bool { return read(newHTTPPod(t, "10.1.0.2", false)) })
			if read(before) {
				t.Error("the connection from before is read")
			}
			echo(t, socket)
			// Another change, while it is off for some.
			route(t, store, "", prefixed("/", marked))
			inForce(true)
			if !routed(during) {
				t.Error("the connection that was routed before isn't again")
			}
			routed(before)
			echo(t, socket)
			if before.dials != 1 || during.dials != 1 {
				t.Errorf("%d and %d connections where one each was held", before.dials, during.dials)
			}
			if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
				t.Errorf("Envoy refused something: %+v %v", rs, refused)
			}
		})
	}
}

// upgrade opens a WebSocket, as far as a proxy can tell.
func upgrade(t *testing.T, source, to string) *bufio.ReadWriter {
	t.Helper()
	c, err := dialFrom(source, to)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Time{})
	t.Cleanup(func() { c.Close() })
	rw := bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c))
	fmt.Fprintf(c, "GET /ws HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
	r, err := http.ReadResponse(rw.Reader, nil)
	if err != nil || r.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upgrade: %+v, %v", r, err)
	}
	return rw
}

func echo(t *testing.T, rw *bufio.ReadWriter) {
	t.Helper()
	fmt.Fprintln(rw, "still there")
	rw.Flush()
	if got, err := rw.ReadString('\n'); err != nil || got != "still there\n" {
		t.Fatalf("echo: %q, %v", got, err)
	}
}

func TestHTTPRoutes(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) { testHTTPRoutes(t, version) })
	}
}

func testHTTPRoutes(t *testing.T, version string) {
	store, e, rejections := routedEnvoy(t, version)
	set := func(name, value string) model.HeaderChange {
		return model.HeaderChange{Set: []model.Header{{Name: name, Value: value}}}
	}
	header := prefixed("/", model.Action{Backends: to("v2")})
	header.Match.Headers = []model.ValueMatch{{Name: "x-version", Value: "v[2-9]", Regex: true}}
	query := prefixed("/", model.Action{Backends: to("v2")})
	query.Match.Query = []model.ValueMatch{{Name: "version", Value: "2"}}
	method := prefixed("/", model.Action{Backends: to("v2")})
	method.Match.Method = "DELETE"
	exact := prefixed("/exact", model.Action{Backends: to("v2")})
	exact.Match.Path.Kind = model.PathExact
	expression := prefixed("/regex/[0-9]+", model.Action{Backends: to("v2")})
	expression.Match.Path.Kind = model.PathRegex
	rules := []model.Rule{
		exact, expression,
		prefixed("/strip/prefix", model.Action{Backends: to("web"), Path: &model.PathChange{Prefix: true, Value: "/"}}),
		prefixed("/replace", model.Action{Backends: to("web"), Path: &model.PathChange{Prefix: true, Value: "/with/"}}),
		prefixed("/full", model.Action{Backends: to("web"), Path: &model.PathChange{Value: `/a\1/b`}, Host: "inner.example.com"}),
		prefixed("/headers", model.Action{Backends: []model.Backend{{To: toPort("web"), Weight: 1, RequestHeaders: set("x-backend", "b"), ResponseHeaders: set("x-seen", "100%")}},
			RequestHeaders: model.HeaderChange{Set: []model.Header{{Name: "x-set", Value: "s"}}, Add: []model.Header{{Name: "x-add", Value: "a"}}, Remove: []string{"x-gone"}}}),
		prefixed("/moved", model.Action{Redirect: &model.Redirect{Code: 308, Scheme: "https", Host: "example.com", Path: &model.PathChange{Prefix: true, Value: "/here"}}}),
		prefixed("/other", model.Action{Redirect: &model.Redirect{Code: 303, Port: 8083}}),
		prefixed("/temporary", model.Action{Redirect: &model.Redirect{Code: 307, Path: &model.PathChange{Value: "/else"}}}),
		prefixed("/invalid", model.Action{Backends: []model.Backend{{Weight: 1}}}),
		prefixed("/nothing", model.Action{}),
		prefixed("/empty", model.Action{Backends: to("empty")}),
		prefixed("/plain", model.Action{Backends: to("plain")}),
		prefixed("/slow", model.Action{Backends: to("web"), Timeout: 50 * time.Millisecond}),
		prefixed("/patient", model.Action{Backends: to("web"), Timeout: testTime}),
		prefixed("/try", model.Action{Backends: to("web"), TryTimeout: 50 * time.Millisecond, Retry: &model.Retry{Attempts: 1, Codes: []uint32{503}}}),
		prefixed("/patient-try", model.Action{Backends: to("web"), TryTimeout: testTime, Retry: &model.Retry{Attempts: 1, Codes: []uint32{503}}}),
		prefixed("/mirror", model.Action{Backends: to("web"), Mirrors: []model.Mirror{{To: toPort("v2"), Numerator: 100, Denominator: 100}}}),
		prefixed("/mirror-outside", model.Action{Backends: to("web"), Mirrors: []model.Mirror{{To: toPort("plain"), Numerator: 100, Denominator: 100}}}),
		prefixed("/half", model.Action{Backends: []model.Backend{{To: toPort("web"), Weight: 1}, {To: toPort("v2"), Weight: 1}, {To: toPort("plain")}}}),
		header, query, method,
		prefixed("/web", model.Action{Backends: to("web")}),
	}
	route(t, store, "", rules...)
	const web, v2, plain = "10.1.0.3:8080", "10.1.0.130:8080", "10.9.0.9:8080"
	// A copy arrives as its client's, without what it carried for that.
	copied := func(http2 bool, path, to string) {
		t.Helper()
		source := map[bool]string{false: "10.1.0.2", true: "10.1.0.130"}[http2]
		was := len(seen(to))
		forged := []string{"X-Bulkhead-Mirror-Identity: " + identity("api").String(), "X-Bulkhead-Mirror-Source: 10.1.0.3", "X-Forwarded-For: 10.1.0.3"}
		if _, _, err := newHTTPPod(t, source, http2).get("http://10.96.1.1:15001"+path, forged...); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the copy arrives", func() bool { return len(seen(to)) > was })
		c := seen(to)[was]
		if c.Path != path || c.Source != source || c.Host != "10.96.1.1:15001" || c.Header.Get("X-Bulkhead-Mirror-Source")+c.Header.Get("X-Bulkhead-Mirror-Cluster")+c.Header.Get("X-Bulkhead-Mirror-Identity") != "" {
			t.Errorf("the copy is %+v", c)
		}
	}
	for _, http2 := range []bool{false, true} {
		copied(http2, "/mirror/x", v2)
		copied(http2, "/mirror-outside/x", plain)
		pod := newHTTPPod(t, "10.1.0.2", http2)
		for _, c := range []struct {
			name, path string
			headers    []string
			status     int
			app        string
			check      func(r *http.Response, a httpAnswer) bool
		}{
			{"exact", "/exact?q=1", nil, 200, v2, nil},
			{"exact, longer", "/exact/", nil, 404, "", nil},
			{"regex", "/regex/12", nil, 200, v2, nil},
			{"regex is whole", "/regex/12x", nil, 404, "", nil},
			{"prefix", "/web/x", nil, 200, web, func(_ *http.Response, a httpAnswer) bool { return a.Path == "/web/x" }},
			{"prefix by segments", "/webx", nil, 404, "", nil},
			{"a path that isn't what it seems", "/exact/../web", nil, 200, web, nil},
			{"who it is forwarded for", "/web", []string{"X-Forwarded-For: 10.1.0.130", "X-Forwarded-Proto: https"}, 200, web, func(_ *http.Response, a httpAnswer) bool {
				return slices.Equal(a.Header["X-Forwarded-For"], []string{"10.1.0.130"}) && slices.Equal(a.Header["X-Forwarded-Proto"], []string{"https"})
			}},
			{"host isn't looked at", "/web", []string{"Host: elsewhere.example.com"}, 200, web, func(_ *http.Response, a httpAnswer) bool { return a.Host == "elsewhere.example.com" }},
			{"header", "/web", []string{"X-Version: v3"}, 200, v2, nil},
			{"header is whole", "/web", []string{"X-Version: v33"}, 200, web, nil},
			{"query", "/web?version=2", nil, 200, v2, nil},
			{"strip prefix", "/strip/prefix/a?b=c", nil, 200, web, func(_ *http.Response, a httpAnswer) bool { return a.Path == "/a?b=c" }},
			{"strip all", "/strip/prefix", nil, 200, web, func(_ *http.Response, a httpAnswer) bool { return a.Path == "/" }},
			{"replace prefix", "/replace/a", nil, 200, web, func(_ *http.Response, a httpAnswer) bool { return a.Path == "/with/a" }},
			{"replace all", "/full/a?b=c", nil, 200, web, func(_ *http.Response, a httpAnswer) bool {
				return strings.HasPrefix(a.Path, `/a`) && strings.HasSuffix(a.Path, `1/b?b=c`) && a.Host == "inner.example.com"
			}},
			{"headers", "/headers", []string{"X-Add: before", "X-Set: before", "X-Gone: before"}, 200, web, func(r *http.Response, a httpAnswer) bool {
				return slices.Equal(a.Header["X-Add"], []string{"before", "a"}) && slices.Equal(a.Header["X-Set"], []string{"s"}) && a.Header["X-Gone"] == nil &&
					a.Header.Get("X-Backend") == "b" && r.Header.Get("X-Seen") == "100%"
			}},
			{"redirect", "/moved/a?b=c", []string{"Host: web"}, 308, "", func(r *http.Response, _ httpAnswer) bool {
				return r.Header.Get("Location") == "https://example.com:443/here/a?b=c" || r.Header.Get("Location") == "https://example.com/here/a?b=c"
			}},
			{"redirect's port", "/other", []string{"Host: web"}, 303, "", func(r *http.Response, _ httpAnswer) bool { return r.Header.Get("Location") == "http://web:8083/other" }},
			{"redirect for a time", "/temporary/a?b=c", []string{"Host: web"}, 307, "", func(r *http.Response, _ httpAnswer) bool { return r.Header.Get("Location") == "http://web/else?b=c" }},
			{"a backend that is wrong", "/invalid", nil, 500, "", nil},
			{"no backend", "/nothing", nil, 500, "", nil},
			{"no endpoint", "/empty", nil, 503, "", nil},
			{"a backend outside of the mesh", "/plain", nil, 200, plain, nil},
			{"timeout", "/slow?wait=1h", nil, 504, "", nil},
			{"timeout that isn't reached", "/patient?wait=60ms", nil, 200, web, nil},
			{"timeout of each try", "/try?wait=1h", nil, 504, "", nil},
			{"another code", "/patient-try?status=502", nil, 502, web, nil},
		} {
			r, a, err := pod.get("http://10.96.1.1:15001"+c.path, c.headers...)
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
				continue
			}
			if r.StatusCode != c.status || a.Name != c.app || c.check != nil && !c.check(r, a) || c.app != "" && a.Source != "10.1.0.2" {
				t.Errorf("HTTP/2 %t, %s: got %d, %v, %+v; want %d from %q", http2, c.name, r.StatusCode, r.Header, a, c.status, c.app)
			}
			if want := map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[http2]; c.app != "" && a.Proto != want {
				t.Errorf("%s: the application sees %s; want %s", c.name, a.Proto, want)
			}
			// The application sees the request as its client made it.
			for name := range a.Header {
				if strings.HasPrefix(name, "X-Envoy") || name == "X-Request-Id" || name == "X-Forwarded-For" && c.headers == nil {
					t.Errorf("%s: the request has a header %s", c.name, name)
				}
			}
			if r.Header.Get("Server") != "" && c.app != "" {
				t.Errorf("%s: the response says that it comes from %s", c.name, r.Header.Get("Server"))
			}
		}
		share := map[string]int{}
		for range 100 {
			_, a, err := pod.get("http://10.96.1.1:15001/half")
			if err != nil {
				t.Fatal(err)
			}
			share[a.Name]++
		}
		if share[web] < 25 || share[v2] < 25 || share[web]+share[v2] != 100 {
			t.Errorf("two equal weights and a zero: %v", share)
		}
	}
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
	// All of it was as web: nobody lends another's identity to a copy.
	eventually(t, "the log has what was copied", func() bool {
		log, err := os.ReadFile(e.log.Name())
		if strings.Contains(string(log), `"peer":"`+identity("api").String()) {
			t.Fatal("a request went as api, whose pod made none")
		}
		return err == nil && strings.Contains(string(log), `"authority":"10.1.0.130:8080"`) && strings.Contains(string(log), `"peer":"`+identity("web").String())
	})
	// Another namespace's routes aren't this one's business; those of its own are.
	route(t, store, "team-b", prefixed("/", model.Action{Backends: to("v2")}))
	eventually(t, "plain text", func() bool {
		r, a, err := newHTTPPod(t, "10.1.0.2", false).get("http://10.96.1.1:15001/none")
		return err == nil && r.StatusCode == 200 && a.Name == web
	})
	route(t, store, "team-a", prefixed("/", model.Action{Backends: to("v2")}))
	eventually(t, "the consumer's routes", func() bool {
		r, a, err := newHTTPPod(t, "10.1.0.2", false).get("http://10.96.1.1:15001/none")
		return err == nil && r.StatusCode == 200 && a.Name == v2
	})
}
