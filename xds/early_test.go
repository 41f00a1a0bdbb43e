package xds

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"golang.org/x/net/http2"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// toAppsWithin is toApps, whose applications may take so long to be connected.
func toAppsWithin(d time.Duration) func(*clusterv3.Cluster) {
	return func(c *clusterv3.Cluster) {
		toApps(c)
		if c.Name == clusterDeliverHTTP {
			c.ConnectTimeout = durationpb.New(d)
		}
	}
}

// peerOf is a tunnel to the application's pod of the peer that has the certificate.
func peerOf(t *testing.T, cert tls.Certificate) *http2.ClientConn {
	t.Helper()
	raw, err := dialFrom("10.7.7.7", fmt.Sprint("10.1.0.3:", PortInbound))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	h, err := (&http2.Transport{}).NewClientConn(tls.Client(raw, &tls.Config{
		NextProtos: []string{"h2"}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert},
	}))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func connectTo(body io.ReadCloser) *http.Request {
	host := fmt.Sprint("10.1.0.3:", appPort)
	return &http.Request{Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: host}, Host: host, Body: body}
}

// Who says more before the answer than is kept for another attempt has one. What is kept
// shows in nothing else that is the same each time: Envoy's heap, with the windows of streams
// in it, differs by as much between runs.
func TestMuchEarlyDataIsTriedOnce(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			_, server, _ := envoyStore(t)
			ca := newAuthority(t)
			startEnvoyEdited(t, version, 1, server, ca, editing(toAppsWithin(2*time.Second)))
			if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-api-0"); err != nil {
				t.Fatal(err)
			}
			wall, h := firewall{t}, peerOf(t, ca.certificate(identity("web").String()))
			for _, c := range []struct{ said, attempts int }{{earlyLimit / 2, localAttempts}, {4 * earlyLimit, 1}} {
				wall.put("drop")
				body, w := io.Pipe()
				go w.Write(make([]byte, c.said))
				r, err := h.RoundTrip(connectTo(body))
				if err != nil || r.StatusCode != http.StatusServiceUnavailable {
					t.Fatalf("%d bytes early: got %+v, %v", c.said, r, err)
				}
				if n := wall.attempts(); n != c.attempts {
					t.Errorf("%d bytes early: %d attempts; want %d", c.said, n, c.attempts)
				}
				w.Close()
				r.Body.Close()
			}
		})
	}
}

// More early data than is kept for another attempt arrives all the same.
func TestMuchEarlyDataArrives(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			_, server, _ := envoyStore(t)
			ca := newAuthority(t)
			e := startEnvoyEdited(t, version, 1, server, ca, editing(toAppsWithin(testTime)))
			if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-api-0"); err != nil {
				t.Fatal(err)
			}
			serveApp(t, fmt.Sprint("10.1.0.3:", appPort))
			wall := firewall{t}
			wall.put("drop")
			said := bytes.Repeat([]byte("early "), earlyLimit)
			body, w := io.Pipe()
			defer w.Close()
			go w.Write(said)
			answered := make(chan *http.Response, 1)
			h := peerOf(t, ca.certificate(identity("web").String()))
			go func() {
				r, err := h.RoundTrip(connectTo(body))
				if err != nil {
					t.Error(err)
				}
				answered <- r
			}()
			eventually(t, "it is said", func() bool { return e.count(`http\.inbound\.downstream_cx_rx_bytes_total`) >= len(said) })
			wall.put("accept") // the kernel asks again
			r := <-answered
			if r == nil || r.StatusCode != http.StatusOK {
				t.Fatalf("got %+v", r)
			}
			defer r.Body.Close()
			answers := bufio.NewReader(r.Body)
			if greeting, err := answers.ReadString('\n'); err != nil {
				t.Fatalf("got %q, %v", greeting, err)
			}
			echo := make([]byte, len(said))
			if _, err := io.ReadFull(answers, echo); err != nil || !bytes.Equal(echo, said) {
				t.Errorf("what was said didn't come back: %v", err)
			}
		})
	}
}
