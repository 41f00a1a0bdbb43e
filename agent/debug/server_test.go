package debug

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
)

// apiServer knows two tokens for node1 and what their owners may.
type apiServer struct {
	mu      sync.Mutex
	asked   []authorizationv1.ResourceAttributes
	away    bool
	deaf    bool // it doesn't know of audiences
	reviews int
}

func (a *apiServer) Create(_ context.Context, o client.Object, _ ...client.CreateOption) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reviews++
	if a.away {
		return errors.New("the API server is away, and here is a secret")
	}
	switch r := o.(type) {
	case *authenticationv1.TokenReview:
		user, audience, _ := strings.Cut(r.Spec.Token, "@")
		if a.deaf {
			r.Status = authenticationv1.TokenReviewStatus{Authenticated: true, User: authenticationv1.UserInfo{Username: user}}
		} else if slices.Contains(r.Spec.Audiences, audience) {
			r.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{audience}, User: authenticationv1.UserInfo{
				Username: user, UID: "uid-" + user, Groups: []string{"owners"}, Extra: map[string]authenticationv1.ExtraValue{"k": {"v"}}}}
		}
	case *authorizationv1.SubjectAccessReview:
		if path := r.Spec.NonResourceAttributes; path != nil {
			r.Status.Allowed = r.Spec.User == "scraper" && path.Path == "/metrics" && path.Verb == "get" && r.Spec.ResourceAttributes == nil
			return nil
		}
		a.asked = append(a.asked, *r.Spec.ResourceAttributes)
		r.Status.Allowed = r.Spec.User == "alice" && r.Spec.UID == "uid-alice" && r.Spec.Groups[0] == "owners" && r.Spec.Extra["k"][0] == "v" &&
			r.Spec.ResourceAttributes.Namespace == "team-a"
	}
	return nil
}

// bench is a server with a client that trusts its authority.
type bench struct {
	api     apiServer
	log     strings.Builder
	address string
	// authority is the operator's, roots are the node's.
	authority atomic.Pointer[identity.Authority]
	roots     atomic.Pointer[x509.CertPool]
	client    *http.Client
	server    *Server
	ask       func(context.Context, Request) ([]byte, error)
}

func newAuthority(t *testing.T) (*identity.Authority, *x509.CertPool) {
	t.Helper()
	authority, err := identity.NewAuthority("cluster.local", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	for _, der := range authority.Roots() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		roots.AddCert(c)
	}
	return authority, roots
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{ask: func(_ context.Context, q Request) ([]byte, error) {
		return fmt.Appendf(nil, "%s of %s", q.What, q.Tenant), nil
	}}
	authority, roots := newAuthority(t)
	b.authority.Store(authority)
	b.roots.Store(roots)
	s := New(Options{
		Node: "node1", Address: "unused", Reviews: &b.api, Log: slog.New(slog.NewTextHandler(&b.log, nil)),
		Ask:     func(ctx context.Context, q Request) ([]byte, error) { return b.ask(ctx, q) },
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "bulkhead_tenant_ready 1") }),
		Roots:   b.roots.Load,
		Sign: func(_ context.Context, csr []byte) ([][]byte, error) {
			return b.authority.Load().SignServer(csr, []string{identity.AgentServerName("node1"), identity.MetricsServerName}, time.Hour, time.Now())
		},
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.address = l.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.cert.keep(ctx, s.log) })
	wg.Go(func() {
		if err := s.serve(ctx, l); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	b.server = s
	b.client = &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "node1.agent.bulkhead"}}}
	t.Cleanup(b.client.CloseIdleConnections)
	for deadline := time.Now().Add(time.Minute); ; {
		if _, err := s.cert.get(); err == nil {
			return b
		}
		if time.Now().After(deadline) {
			t.Fatal("no certificate")
		}
		time.Sleep(time.Millisecond)
	}
}

func (b *bench) get(t *testing.T, method, token, path string) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "https://"+b.address+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	answer, err := b.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(body)
}

// Who isn't known gets nothing, who is gets his own.
func TestAccess(t *testing.T) {
	b := newBench(t)
	asked := 0
	b.ask = func(_ context.Context, q Request) ([]byte, error) { asked++; return []byte(q.What), nil }
	const mine, other = "alice@node1.agent.bulkhead", "alice@node2.agent.bulkhead"
	for _, c := range []struct {
		name, method, token, path string
		want                      int
	}{
		{"owner", "GET", mine, "/tenants/team-a/config", 200},
		{"owner of a part of it", "GET", mine, "/tenants/team-a.sa.web/stats?generation=1&filter=x", 200},
		{"owner sets", "PUT", mine, "/tenants/team-a/loglevel?level=debug", 200},
		{"another's", "GET", mine, "/tenants/team-b/config", 403},
		{"everybody's", "GET", mine, "/tenants/_node/config", 403},
		{"one that isn't there, of another", "GET", mine, "/tenants/team-z/config", 403},
		{"no token", "GET", "", "/tenants/team-a/config", 401},
		{"token for another node", "GET", other, "/tenants/team-a/config", 401},
		{"token for the API server", "GET", "alice@https://kubernetes.default.svc", "/tenants/team-a/config", 401},
		{"too long", "GET", strings.Repeat("a", maxToken) + mine, "/tenants/team-a/config", 401},
		{"bad tenant", "GET", mine, "/tenants/Team/config", 400},
		{"bad what", "GET", mine, "/tenants/team-a/quitquitquit", 400},
		{"bad generation", "GET", mine, "/tenants/team-a/config?generation=2", 400},
		{"long filter", "GET", mine, "/tenants/team-a/stats?filter=" + strings.Repeat("a", maxFilter+1), 400},
		{"set by a GET", "GET", mine, "/tenants/team-a/loglevel?level=debug", 400},
		{"set what can't be", "PUT", mine, "/tenants/team-a/config", 400},
	} {
		before := asked
		code, body := b.get(t, c.method, c.token, c.path)
		if code != c.want || (asked > before) != (c.want == 200) {
			t.Errorf("%s: %d %q, want %d; proxies were asked %d times", c.name, code, body, c.want, asked-before)
		}
		if strings.Contains(body+b.log.String(), "@node") {
			t.Errorf("%s: a token is shown", c.name)
		}
	}
	want := []authorizationv1.ResourceAttributes{
		{Group: "mesh.bulkhead.dev", Version: "v1alpha1", Resource: "tenantproxies", Subresource: "debug", Namespace: "team-a", Name: "team-a", Verb: "get"},
		{Group: "mesh.bulkhead.dev", Version: "v1alpha1", Resource: "tenantproxies", Subresource: "debug", Namespace: "team-a", Name: "team-a.sa.web", Verb: "get"},
		{Group: "mesh.bulkhead.dev", Version: "v1alpha1", Resource: "tenantproxies", Subresource: "debug", Namespace: "team-a", Name: "team-a", Verb: "update"},
	}
	if !slices.Equal(b.api.asked[:3], want) {
		t.Errorf("asked %+v", b.api.asked[:3])
	}
	for _, line := range []string{"msg=\"look into a proxy\" user=alice", "tenant=team-a generation=serving what=loglevel logger=\"\" level=debug", "msg=\"look into a proxy refused\" user=alice"} {
		if !strings.Contains(b.log.String(), line) {
			t.Errorf("the log lacks %s:\n%s", line, &b.log)
		}
	}
	b.api.deaf = true
	if code, body := b.get(t, "GET", mine, "/tenants/team-a/config"); code != 401 {
		t.Errorf("a token that nobody checked the audience of: %d %s", code, body)
	}
	b.api.away = true
	if code, body := b.get(t, "GET", mine, "/tenants/team-a/config"); code != 503 || strings.Contains(body, "secret") {
		t.Errorf("without the API server: %d %s", code, body)
	}
}

// Metrics name all tenants: an owner of one may not have them.
func TestMetricsAccess(t *testing.T) {
	b := newBench(t)
	b.client.Transport.(*http.Transport).TLSClientConfig.ServerName = identity.MetricsServerName
	for _, c := range []struct {
		name, token string
		want        int
	}{
		{"scraper", "scraper@metrics.bulkhead", 200},
		{"owner of a tenant", "alice@metrics.bulkhead", 403},
		{"token for the node's tenants", "scraper@node1.agent.bulkhead", 401},
		{"token for the API server", "scraper@https://kubernetes.default.svc", 401},
		{"no token", "", 401},
	} {
		code, body := b.get(t, "GET", c.token, "/metrics")
		if code != c.want || strings.Contains(body, "bulkhead_tenant") != (c.want == 200) {
			t.Errorf("%s: %d %q, want %d", c.name, code, body, c.want)
		}
	}
	if code, _ := b.get(t, "GET", "scraper@metrics.bulkhead", "/tenants/team-a/config"); code != 401 {
		t.Errorf("a token for metrics shows a proxy's configuration: %d", code)
	}
	b.api.away = true
	if code, body := b.get(t, "GET", "scraper@metrics.bulkhead", "/metrics"); code != 503 || strings.Contains(body, "secret") {
		t.Errorf("without the API server: %d %s", code, body)
	}
}

// Whoever is refused can't fill the log, and those that it doesn't name are counted.
func TestRefusalsAreToldAtAPace(t *testing.T) {
	b := newBench(t)
	const refused = 500
	for range refused {
		w := httptest.NewRecorder()
		b.server.handler().ServeHTTP(w, httptest.NewRequest("GET", metricsPath, nil))
		if w.Code != http.StatusUnauthorized {
			t.Fatalf("answered with %d", w.Code)
		}
	}
	if n := strings.Count(b.log.String(), "metrics refused"); n < refusalsAtOnce || n > 2*refusalsAtOnce {
		t.Errorf("%d lines of %d refusals", n, refused)
	}
	b.server.refusals.SetBurst(refused)
	b.server.refusals.SetLimit(rate.Inf)
	if code, _ := b.get(t, "GET", "alice@metrics.bulkhead", metricsPath); code != http.StatusForbidden {
		t.Errorf("answered with %d", code)
	}
	lines := strings.Split(strings.TrimSpace(b.log.String()), "\n")
	last := lines[len(lines)-1]
	if !strings.Contains(last, "user=alice") || !strings.Contains(last, fmt.Sprintf("unsaid=%d", refused-len(lines)+1)) {
		t.Errorf("after %d lines of %d refusals comes %s", len(lines)-1, refused, last)
	}
}

// Made up tokens, from however many addresses, are reviewed at a pace, which doesn't keep
// out who was let in before.
func TestReviewsArePaced(t *testing.T) {
	b := newBench(t)
	ask := func(address, token string) int {
		r := httptest.NewRequest("GET", metricsPath, nil)
		r.RemoteAddr = address
		r.Header.Set("Authorization", "Bearer "+token)
		w := httptest.NewRecorder()
		b.server.handler().ServeHTTP(w, r)
		return w.Code
	}
	const prometheus, scraper = "10.0.0.1:1", "scraper@metrics.bulkhead"
	if code := ask(prometheus, scraper); code != http.StatusOK {
		t.Fatalf("before: %d", code)
	}
	before, begun := b.api.reviews, time.Now()
	codes := map[int]int{}
	for n := range 1000 {
		codes[ask(fmt.Sprintf("10.1.%d.%d:1", n>>8, n&255), fmt.Sprint("made up ", n))]++
	}
	if most := strangersAtOnce + 1 + int(time.Since(begun).Seconds()*strangersPerSecond); b.api.reviews-before > most || codes[http.StatusTooManyRequests] < 1000-most {
		t.Errorf("%d reviews of 1000 made up tokens, answers %v, want %d at most", b.api.reviews-before, codes, most)
	}
	if code := ask(prometheus, scraper); code != http.StatusOK {
		t.Errorf("who was let in before is told %d", code)
	}
	for n := range 2 * knownLimit {
		b.server.pace.letIn(fmt.Sprintf("10.2.%d.%d:1", n>>8, n&255), time.Now())
	}
	if n := len(b.server.pace.until); n > knownLimit {
		t.Errorf("%d addresses are remembered", n)
	}
}

// One answer a tenant, and a few of all.
func TestAnswersAreBounded(t *testing.T) {
	b := newBench(t)
	entered, leave := make(chan struct{}), make(chan struct{})
	b.ask = func(context.Context, Request) ([]byte, error) { entered <- struct{}{}; <-leave; return nil, nil }
	var wg sync.WaitGroup
	for i := range answersLimit {
		wg.Go(func() {
			if code, body := b.get(t, "GET", "alice@node1.agent.bulkhead", fmt.Sprintf("/tenants/team-a.sa.a%d/config", i)); code != 200 {
				t.Errorf("%d %s", code, body)
			}
		})
		<-entered
		if i == 0 {
			if code, _ := b.get(t, "GET", "alice@node1.agent.bulkhead", "/tenants/team-a.sa.a0/config"); code != 429 {
				t.Errorf("a second answer for one tenant: %d", code)
			}
		}
	}
	if code, _ := b.get(t, "GET", "alice@node1.agent.bulkhead", "/tenants/team-a.sa.b/config"); code != 429 {
		t.Errorf("more answers than %d: %d", answersLimit, code)
	}
	close(leave)
	wg.Wait()
}

// Who doesn't say anything, or too often, loses the connection.
func TestConnectionsAreBounded(t *testing.T) {
	b := newBench(t)
	var conns []net.Conn
	open := func() net.Conn {
		c, err := net.Dial("tcp", b.address)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		t.Cleanup(func() { c.Close() })
		return c
	}
	begin := time.Now()
	for range connsPerSource {
		open()
	}
	extra := open()
	extra.SetReadDeadline(time.Now().Add(3 * time.Second))
	if _, err := extra.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !strings.Contains(fmt.Sprint(err), "reset") {
		t.Errorf("connection %d: %v", connsPerSource+1, err)
	}
	for _, c := range conns[:connsPerSource] {
		c.SetReadDeadline(time.Now().Add(2 * headerTime))
		if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("silent for %s: %v", time.Since(begin), err)
		}
	}
	refused := 0
	// They are many as soon as they come faster than they may, which they needn't at once.
	for i := 0; i < 2*burstPerSource || refused == 0 && i < 100*burstPerSource; i++ {
		r, _ := http.NewRequestWithContext(t.Context(), "GET", "https://"+b.address+"/", nil)
		answer, err := b.client.Do(r)
		if err != nil {
			refused++
			continue
		}
		answer.Body.Close()
	}
	if refused == 0 {
		t.Error("no connection was refused for coming too often")
	}
	if b.api.reviews > 0 {
		t.Errorf("%d reviews for nobody", b.api.reviews)
	}
}

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"a: 1\n\tb ä": "a: 1\n\tb ä", "\x1b[2Jx\r\x00": "?[2Jx??", "\u009bx": "??x", "\xff": "?", "": "",
	} {
		if got, _ := text([]byte(in), nil); string(got) != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}

func TestAnswerCodes(t *testing.T) {
	b := newBench(t)
	for _, c := range []struct {
		err  error
		want int
	}{{isolation.ErrNoProcess, 404}, {isolation.ErrTooLarge, 413}, {errors.New("x"), 502}} {
		b.ask = func(context.Context, Request) ([]byte, error) { return nil, fmt.Errorf("ask: %w", c.err) }
		if code, _ := b.get(t, "GET", "alice@node1.agent.bulkhead", "/tenants/team-a/config"); code != c.want {
			t.Errorf("%v: %d", c.err, code)
		}
	}
}

// Whom owners trust may change: the certificate follows, in whatever order the
// operator's authority and the node's bundle do.
func TestCertificateFollowsTheRoots(t *testing.T) {
	b := newBench(t)
	trusted := func() bool {
		r, _ := http.NewRequestWithContext(t.Context(), "GET", "https://"+b.address+"/tenants/team-a/config", nil)
		answer, err := b.client.Do(r)
		if err == nil {
			answer.Body.Close()
		}
		return err == nil
	}
	authority, roots := newAuthority(t)
	b.client.Transport.(*http.Transport).TLSClientConfig.RootCAs = roots
	if trusted() {
		t.Error("trusted before the change")
	}
	b.roots.Store(roots)
	b.server.RootsChanged() // and the operator has the old authority yet
	time.AfterFunc(100*time.Millisecond, func() { b.authority.Store(authority) })
	for deadline := time.Now().Add(time.Minute); !trusted(); time.Sleep(300 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the certificate is still another authority's")
		}
	}
}
