package xds

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// client1 is a client of HTTP/1 that is written by hand.
type client1 struct {
	t *testing.T
	net.Conn
	*bufio.Reader
}

func newClient1(t *testing.T, to string) *client1 {
	t.Helper()
	c, err := dialFrom("10.1.0.2", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &client1{t, c, bufio.NewReader(c)}
}

// send writes text with each line ended as HTTP has it.
func (c *client1) send(lines ...string) {
	c.t.Helper()
	for _, l := range lines {
		if _, err := fmt.Fprint(c.Conn, l+"\r\n"); err != nil {
			c.t.Fatal(err)
		}
	}
}

// receive reads an answer and what the application says in it, if it does.
func (c *client1) receive() (*http.Response, httpAnswer) {
	c.t.Helper()
	r, err := http.ReadResponse(c.Reader, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	body, err := io.ReadAll(r.Body)
	var a httpAnswer
	if err == nil && r.Header.Get("X-App") != "" {
		err = json.Unmarshal(body, &a)
	}
	if err != nil {
		c.t.Fatalf("%q: %v", body, err)
	}
	return r, a
}

// ended says that the proxy has closed the connection after its answer.
func (c *client1) ended() {
	c.t.Helper()
	if rest, err := io.ReadAll(c.Reader); err != nil || len(rest) > 0 {
		c.t.Errorf("after the answer came %q, %v", rest, err)
	}
}

// Clients of HTTP/1.0, and those that ask before they send a body, get of a routed
// address what they would of its server: on the way that the first connections go, and
// on the one of those that come later.
func TestHTTP1Clients(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			for _, way := range []struct {
				name   string
				chains int
			}{{"through the internal listener", 0}, {"straight", maxHTTPChains}} {
				t.Run(way.name, func(t *testing.T) { testHTTP1Clients(t, version, way.chains) })
			}
		})
	}
}

func testHTTP1Clients(t *testing.T, version string, chains int) {
	const vip = "10.96.1.1:15001"
	store, e, rejections := routedEnvoyWith(t, version, 1, chains)
	route(t, store, "", prefixed("/", model.Action{Backends: to("web"), Mirrors: []model.Mirror{{To: toPort("v2"), Numerator: 100, Denominator: 100}}}))
	eventually(t, "requests are read", func() bool {
		_, a, err := newHTTPPod(t, "10.1.0.2", false).get("http://" + vip + "/")
		return err == nil && a.Header.Get("X-Forwarded-Proto") != ""
	})
	if chains > 0 {
		eventually(t, "the chain is led to", func() bool { _, leads := e.reads(webChain); return leads })
	}

	copied := len(seen("10.1.0.130:8080"))
	for host, want := range map[string]string{"": vip, "Host: web": "web"} {
		c := newClient1(t, vip)
		c.send("GET /1.0 HTTP/1.0")
		if host != "" {
			c.send(host)
		}
		c.send("")
		r, a := c.receive()
		if r.StatusCode != 200 || r.ProtoMinor != 0 || len(r.TransferEncoding) > 0 || a.Host != want || a.Source != "10.1.0.2" {
			t.Errorf("HTTP/1.0 with %q: %+v, %+v", host, r, a)
		}
		c.ended()
	}
	eventually(t, "copies of both", func() bool {
		var hosts []string
		for _, a := range seen("10.1.0.130:8080")[copied:] {
			if a.Path == "/1.0" {
				hosts = append(hosts, a.Host)
			}
		}
		slices.Sort(hosts)
		return slices.Equal(hosts, []string{vip, "web"})
	})
	kept := newClient1(t, vip)
	for range 2 {
		kept.send("GET /kept HTTP/1.0", "Connection: keep-alive", "")
		if r, _ := kept.receive(); r.StatusCode != 200 || r.Header.Get("Connection") != "keep-alive" {
			t.Fatalf("HTTP/1.0 that keeps its connection: %+v", r)
		}
	}
	// HTTP/1.1 has no default.
	hostless := newClient1(t, vip)
	hostless.send("GET /1.1 HTTP/1.1", "")
	if r, _ := hostless.receive(); r.StatusCode != http.StatusBadRequest {
		t.Errorf("HTTP/1.1 without a host: %+v", r)
	}

	expect := func(path string) *client1 {
		c := newClient1(t, vip)
		c.send("POST "+path+" HTTP/1.1", "Host: web", "Content-Length: 4", "Expect: 100-continue", "")
		return c
	}
	wanted := expect("/wanted?read")
	if r, _ := wanted.receive(); r.StatusCode != http.StatusContinue {
		t.Fatalf("a server that wants the body: %+v", r)
	}
	fmt.Fprint(wanted.Conn, "body")
	if r, a := wanted.receive(); r.StatusCode != 200 || a.Header.Get("Expect") != "100-continue" {
		t.Errorf("with its body: %+v, %+v", r, a)
	}
	if r, _ := expect("/unwanted?status=401").receive(); r.StatusCode != http.StatusUnauthorized {
		t.Errorf("a server that doesn't want the body: %+v", r)
	}
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
}
