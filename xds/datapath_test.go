package xds

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"golang.org/x/net/http2"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Without steering, a connection must be made to the port of a listener, so that is
// the port of the services here. One Envoy is at both ends of each tunnel.

// serveEach hands each connection to serve, which closes it.
func serveEach(t *testing.T, addr string, serve func(net.Conn)) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
}

// serveApp greets each connection with the address that it comes from, before the
// client has said anything, and echoes what it says.
func serveApp(t *testing.T, addr string) {
	t.Helper()
	serveEach(t, addr, func(c net.Conn) {
		defer c.Close()
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		fmt.Fprintf(c, "%s sees %s\n", addr, host)
		io.Copy(c, c)
	})
}

func dialFrom(source, to string) (net.Conn, error) {
	d := net.Dialer{Timeout: testTime, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(source), 0))}
	c, err := d.Dial("tcp", to)
	if err == nil {
		c.SetDeadline(time.Now().Add(testTime))
	}
	return c, err
}

// talk dials as a pod does and returns the greeting.
func talk(source, to string) (string, error) {
	c, err := dialFrom(source, to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	greeting, err := r.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("read greeting: %w", err)
	}
	fmt.Fprintln(c, "and back")
	if echo, err := r.ReadString('\n'); err != nil || echo != "and back\n" {
		return "", fmt.Errorf("got %q, %v as an echo", echo, err)
	}
	return strings.TrimSpace(greeting), nil
}

func endpointService(name, vip string, endpoints ...model.Endpoint) model.Service {
	return model.Service{
		Namespace: "team-a", Name: name, VIPs: addrs(vip),
		Ports: []model.ServicePort{{Port: PortOutbound, Endpoints: endpoints}},
	}
}

func TestTraffic(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) { testTraffic(t, version) })
	}
}

func testTraffic(t *testing.T, version string) {
	enterNetns(t)
	store, server, rejections := envoyStore(t)
	ca := newAuthority(t)
	at := func(addr string, id model.Identity) model.Endpoint {
		return model.Endpoint{Addr: netip.MustParseAddrPort(addr), Identity: id}
	}
	services := []model.Service{
		endpointService("api", "10.96.1.1", at("10.1.0.3:8080", identity("api"))),
		endpointService("api6", "fd00:96::1", at("[fd00:1::3]:8080", identity("api"))),
		endpointService("plain", "10.96.1.2", at("10.9.0.9:8080", model.Identity{})),
		endpointService("impostor", "10.96.1.3", at("10.1.0.3:8080", identity("web"))),
		endpointService("empty", "10.96.1.4"),
		endpointService("self", "10.96.1.5", at("10.1.0.2:8080", identity("web"))),
	}
	proxy := testProxy
	proxy.Workloads = append(slices.Clone(proxy.Workloads), workload("ghost-0", "ghost", "10.1.0.5")) // it has no certificate
	if err := store.SetProxy(proxy); err != nil {
		t.Fatal(err)
	}
	for _, s := range services {
		if err := store.SetService(s); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []string{"10.1.0.3:8080", "[fd00:1::3]:8080", "10.9.0.9:8080", "10.1.0.2:8080"} {
		serveApp(t, a)
	}
	e := startEnvoy(t, version, server, ca)
	if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-ghost-0"); err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct{ name, source, to, want string }{
		{"a service over a tunnel", "10.1.0.2", "10.96.1.1:15001", "10.1.0.3:8080 sees 10.1.0.2"},
		{"the same once more", "10.1.0.2", "10.96.1.1:15001", "10.1.0.3:8080 sees 10.1.0.2"},
		{"another pod of the account", "10.1.0.130", "10.96.1.1:15001", "10.1.0.3:8080 sees 10.1.0.130"},
		{"another account", "10.1.0.3", "10.96.1.5:15001", "10.1.0.2:8080 sees 10.1.0.3"},
		{"IPv6", "fd00:1::2", "[fd00:96::1]:15001", "[fd00:1::3]:8080 sees fd00:1::2"},
		{"an endpoint outside of the mesh", "10.1.0.2", "10.96.1.2:15001", "10.9.0.9:8080 sees 10.1.0.2"},
		{"an endpoint that proves another identity", "10.1.0.2", "10.96.1.3:15001", ""},
		{"a service without endpoints", "10.1.0.2", "10.96.1.4:15001", ""},
		{"no service", "10.1.0.2", "10.96.1.99:15001", ""},
		{"a pod that isn't known", "10.1.0.2", "10.1.0.200:15001", ""},
		{"a source that isn't known", "10.1.0.99", "10.96.1.1:15001", ""},
		{"an identity without a certificate", "10.1.0.5", "10.96.1.1:15001", ""},
		{"the first, after all of these", "10.1.0.2", "10.96.1.1:15001", "10.1.0.3:8080 sees 10.1.0.2"},
	} {
		got, err := talk(c.source, c.to)
		if got != c.want || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: got %q, %v; want %q", c.name, got, err, c.want)
		}
	}
	// Who called whom, as their certificates say.
	for source, id := range map[string]string{"10.1.0.2": "web", "10.1.0.3": "api"} {
		peer, source := `"peer":"`+identity(id).String()+`"`, `"source":"`+source+`"`
		eventually(t, "a line of the log has "+peer+" and "+source, func() bool {
			log, err := os.ReadFile(e.log.Name())
			return err == nil && slices.ContainsFunc(strings.Split(string(log), "\n"), func(line string) bool {
				return strings.Contains(line, peer) && strings.Contains(line, source)
			})
		})
	}

	testOutside(t, store, e, proxy)

	// A service that gets an endpoint after it has been asked for is reached.
	if err := store.SetService(endpointService("empty", "10.96.1.4", at("10.1.0.3:8080", identity("api")))); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the endpoint is reached", func() bool {
		got, _ := talk("10.1.0.2", "10.96.1.4:15001")
		return got == "10.1.0.3:8080 sees 10.1.0.2"
	})
	testInbound(t, ca)
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
}

// testOutside rejects what is neither a service nor a pod. (Passed through, it would
// come back to the listener here; test/e2e has that.)
func testOutside(t *testing.T, store *Store, e *envoy, proxy model.Proxy) {
	t.Helper()
	before := len(e.clusters())
	reject := proxy
	reject.RejectOutside = true
	if err := store.SetProxy(reject); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the listener rejects", func() bool {
		return slices.ContainsFunc(e.listeners()[listenerOutbound].GetFilterChains(), func(c *listenerv3.FilterChain) bool { return c.Name == chainReject })
	})
	eventually(t, "the log tells of a rejected connection", func() bool {
		got, err := talk("10.1.0.2", "192.0.2.9:15001")
		log, readErr := os.ReadFile(e.log.Name())
		if errors.Is(err, os.ErrDeadlineExceeded) || got != "" || readErr != nil {
			t.Fatalf("%q, %v, %v", got, err, readErr)
		}
		return strings.Contains(string(log), `"chain":"reject"`) && strings.Contains(string(log), `"destination":"192.0.2.9:15001"`)
	})
	if got, err := talk("10.1.0.2", "10.96.1.1:15001"); got != "10.1.0.3:8080 sees 10.1.0.2" {
		t.Errorf("a service: %q, %v", got, err)
	}
	if after := len(e.clusters()); after != before {
		t.Errorf("%d clusters after an address outside was dialled, %d before", after, before)
	}
	if err := store.SetProxy(proxy); err != nil {
		t.Fatal(err)
	}
}

// testInbound is what any host of the network could try at a pod's tunnel end.
func testInbound(t *testing.T, ca *authority) {
	t.Helper()
	web := ca.certificate(identity("web").String())
	other := ca.certificate(model.Identity{TrustDomain: "cluster.local.evil", Namespace: "team-a", ServiceAccount: "web"}.String())
	forged := http.Header{"X-Bulkhead-Own4": {"10.1.0.2:"}, "X-Bulkhead-Own6": {"10.1.0.2:"}}
	for _, c := range []struct {
		name      string
		cert      *tls.Certificate
		to        string
		authority string
		header    http.Header
		want      int // 0: no connection
	}{
		{"a peer of the mesh", &web, "10.1.0.3", "10.1.0.3:8080", nil, 200},
		{"IPv6", &web, "fd00:1::3", "[fd00:1::3]:8080", nil, 200},
		{"no certificate", nil, "10.1.0.3", "10.1.0.3:8080", nil, 0},
		{"another authority", ref(newAuthority(t).certificate(identity("web").String())), "10.1.0.3", "10.1.0.3:8080", nil, 0},
		{"another trust domain", &other, "10.1.0.3", "10.1.0.3:8080", nil, 403},
		{"another's address, by a header", &web, "10.1.0.3", "10.1.0.3:8080", http.Header{"X-Forwarded-For": {"10.1.0.2"}}, 200},
		{"another pod of the proxy", &web, "10.1.0.3", "10.1.0.2:8080", nil, 403},
		{"another pod, forged headers", &web, "10.1.0.3", "10.1.0.2:8080", forged, 403},
		{"a longer address", &web, "10.1.0.3", "10.1.0.30:8080", nil, 403},
		{"a name", &web, "10.1.0.3", "localhost:8080", nil, 403},
		{"the other spelling", &web, "fd00:1::3", "[fd00:1:0::3]:8080", nil, 403},
		{"no pod", &web, "10.1.0.77", "10.1.0.77:8080", nil, 0},
	} {
		if got, err := connect(ca, c.cert, c.to, c.authority, c.header); got != c.want {
			t.Errorf("%s: got %d, %v; want %d", c.name, got, err, c.want)
		}
	}
}

func ref[T any](v T) *T { return &v }

// connect sends a CONNECT for authority to the tunnel end at an address, and reads
// the greeting of the application behind it.
func connect(ca *authority, cert *tls.Certificate, to, authority string, header http.Header) (int, error) {
	raw, err := dialFrom("10.7.7.7", net.JoinHostPort(to, fmt.Sprint(PortInbound)))
	if strings.Contains(to, ":") {
		raw, err = dialFrom("fd07::7", net.JoinHostPort(to, fmt.Sprint(PortInbound)))
	}
	if err != nil {
		return 0, err
	}
	defer raw.Close()
	config := &tls.Config{NextProtos: []string{"h2"}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	c := tls.Client(raw, config)
	if err := c.Handshake(); err != nil {
		return 0, err
	}
	h, err := (&http2.Transport{}).NewClientConn(c)
	if err != nil {
		return 0, err
	}
	body, w := io.Pipe()
	defer w.Close()
	r, err := h.RoundTrip(&http.Request{Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority, Header: header, Body: body})
	if err != nil {
		return 0, err
	}
	defer r.Body.Close()
	if r.StatusCode == http.StatusOK {
		source, _, _ := net.SplitHostPort(raw.LocalAddr().String())
		if greeting, err := bufio.NewReader(r.Body).ReadString('\n'); err != nil || greeting != authority+" sees "+source+"\n" {
			return 0, fmt.Errorf("got %q, %v from the application", greeting, err)
		}
	}
	return r.StatusCode, nil
}
