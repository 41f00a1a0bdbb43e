package controllers

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/time/rate"
)

// openPort serves h as a port that everybody reaches is.
func openPort(t *testing.T, r rate.Limit, h http.Handler) (*openListener, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := newOpenListener(l, r, prometheus.NewCounter(prometheus.CounterOpts{Name: "refused"}))
	s := openServer(h)
	for _, d := range []*time.Duration{&s.ReadHeaderTimeout, &s.ReadTimeout, &s.WriteTimeout} {
		*d /= 5
	}
	go s.Serve(o)
	t.Cleanup(func() { s.Close() })
	return o, l.Addr().String()
}

func dialOpen(t *testing.T, source, address string) net.Conn {
	t.Helper()
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// get is one request from an address, on a connection of its own.
func get(t *testing.T, source, address, path string) (code int, body string, err error) {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}).DialContext}
	answer, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Get("http://" + address + path)
	if err != nil {
		return 0, "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return answer.StatusCode, string(text), err
}

func (l *openListener) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns)
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// Who is slow, or holds all the connections that there are, keeps no probe out: not if
// they are as many addresses, nor from the prober's own.
func TestStrangersDontKeepProbesOut(t *testing.T) {
	ready := errNotLoaded
	l, address := openPort(t, rate.Inf, healthHandler(func(*http.Request) error { return ready }))
	probe := func(source string) {
		t.Helper()
		for _, p := range []struct {
			path string
			code int
		}{{"/healthz", 200}, {"/readyz", 500}, {"/healthz/ping", 200}, {"/metrics", 404}} {
			if code, _, err := get(t, source, address, p.path); err != nil || code != p.code {
				t.Errorf("%s from %s: %d, %v, want %d", p.path, source, code, err, p.code)
			}
		}
	}
	var held []net.Conn
	for n := range 3 * openLimit {
		c := dialOpen(t, fmt.Sprintf("127.0.1.%d", n+1), address)
		fmt.Fprint(c, "GET /healthz HTTP/1.1\r\nHost: x\r\n") // and no more
		held = append(held, c)
	}
	eventually(t, "not all places are taken", func() bool { return l.open() == openLimit })
	probe("127.0.0.1")
	for range 2 * openPerSource {
		held = append(held, dialOpen(t, "127.0.0.1", address))
	}
	probe("127.0.0.1")
	if n := l.open(); n > openLimit {
		t.Errorf("%d connections", n)
	}
	ready = nil
	if code, body, err := get(t, "127.0.0.1", address, "/readyz"); err != nil || code != 200 || body != "ok" {
		t.Errorf("ready: %d %q, %v", code, body, err)
	}
	var m dto.Metric
	if err := l.refused.Write(&m); err != nil || m.GetCounter().GetValue() < 2*openLimit {
		t.Errorf("%v closed connections are told, %v", m.GetCounter().GetValue(), err)
	}
	eventually(t, "who says nothing more stays", func() bool { return l.open() == 0 })
	for _, c := range held {
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, c); isTimeout(err) {
			t.Fatal("a connection that isn't counted is open")
		}
	}
}

func isTimeout(err error) bool {
	timeout := net.Error(nil)
	return errors.As(err, &timeout) && timeout.Timeout()
}

// One address may have so many connections; the newest is the one that is served. What it
// sends has a size.
func TestOpenPortsBoundASource(t *testing.T) {
	l, address := openPort(t, rate.Inf, healthHandler(func(*http.Request) error { return nil }))
	for n := range 2 * openPerSource {
		dialOpen(t, "127.0.0.2", address)
		eventually(t, "it isn't taken", func() bool { return l.open() == min(n+1, openPerSource) })
	}
	large := dialOpen(t, "127.0.0.3", address)
	fmt.Fprintf(large, "GET /healthz HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("x", 16<<10))
	large.SetReadDeadline(time.Now().Add(10 * time.Second))
	if answer, err := io.ReadAll(large); !strings.Contains(string(answer), " 431 ") {
		t.Errorf("a large header: %q, %v", answer, err)
	}
}

// Metrics take a while to gather: an address has a pace, and who doesn't read them goes.
func TestMetricsArePaced(t *testing.T) {
	registry := prometheus.NewRegistry()
	series := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "bulkhead_test"}, []string{"long"})
	registry.MustRegister(series)
	for n := range 2000 {
		series.WithLabelValues(strings.Repeat("x", 10<<10) + fmt.Sprint(n)).Set(1) // more than sockets hold
	}
	h := metricsHandler(registry)
	done := make(chan struct{}, 1)
	l, address := openPort(t, metricsRate, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r)
		done <- struct{}{}
	}))
	slow := dialOpen(t, "127.0.0.2", address)
	fmt.Fprint(slow, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
	select {
	case <-done:
	case <-time.After(openAnswerTime):
		t.Fatal("who doesn't read is still being answered")
	}
	eventually(t, "it stays", func() bool { return l.open() == 0 })

	now := time.Now()
	l.now = func() time.Time { return now }
	fast := func() (got []bool) {
		for range 2 * metricsBurst {
			in, out := l.enter(fakeConn{from: &net.TCPAddr{IP: net.ParseIP("10.0.0.1"), Port: 1}})
			got = append(got, in != nil)
			for _, c := range []*openConn{in, out} {
				if c != nil {
					l.mu.Lock()
					l.forget(c)
					l.mu.Unlock()
				}
			}
		}
		return got
	}
	if got := fast(); slices.Index(got, false) != metricsBurst {
		t.Errorf("the first that is refused is %d", slices.Index(got, false))
	}
	now = now.Add(time.Second)
	if got := fast(); slices.Index(got, false) != metricsRate {
		t.Errorf("a second later it is %d", slices.Index(got, false))
	}
	for n := range openSources {
		l.enter(fakeConn{from: &net.TCPAddr{IP: net.IPv4(10, 1, byte(n>>8), byte(n)), Port: 1}})
	}
	if len(l.paces) > openSources || l.open() > openLimit {
		t.Errorf("%d sources are remembered, %d connections", len(l.paces), l.open())
	}
}

// fakeConn comes from an address.
type fakeConn struct {
	net.Conn
	from net.Addr
}

func (c fakeConn) RemoteAddr() net.Addr { return c.from }
