package controllers

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/time/rate"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

// Bounds of each of the ports for metrics and health, which every pod of the cluster can
// reach. A request has a connection of its own.
const (
	openLimit     = 64
	openPerSource = 4
	// Times a second that one source may ask for metrics, and how many at once; how it is
	// with health costs nothing to say.
	metricsRate  = 5
	metricsBurst = 20
	// openSources is of how many sources that is remembered.
	openSources = 4096
	// openHeaders are read with 4 KiB more, which net/http adds.
	openHeaders    = 4 << 10
	openHeaderTime = 5 * time.Second
	openAnswerTime = 10 * time.Second
)

// openPorts adds the servers for metrics and health to the manager, which starts them
// first. The address "0" is nowhere.
func openPorts(mgr manager.Manager, health, metricsAddress string, ready healthz.Checker) error {
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "bulkhead", Subsystem: "operator", Name: "connections_refused_total",
		Help: "Connections to the ports for metrics and health that were closed because there were too many.",
	}, []string{"port"})
	if err := metrics.Registry.Register(refused); err != nil {
		return fmt.Errorf("register metrics: %w", err)
	}
	for _, p := range []struct {
		name, address string
		handler       http.Handler
		rate          rate.Limit
	}{
		{"health", health, healthHandler(ready), rate.Inf},
		{"metrics", metricsAddress, metricsHandler(metrics.Registry), metricsRate},
	} {
		if p.address == "0" {
			continue
		}
		l, err := net.Listen("tcp", p.address)
		if err != nil {
			return fmt.Errorf("listen for %s: %w", p.name, err)
		}
		// Whoever is still being answered when the operator ends doesn't hold it up.
		patience := time.Second
		err = mgr.Add(&manager.Server{Name: p.name, Server: openServer(p.handler), Listener: newOpenListener(l, p.rate, refused.WithLabelValues(p.name)), ShutdownTimeout: &patience})
		if err != nil {
			return errors.Join(fmt.Errorf("add to manager: %w", err), l.Close())
		}
	}
	return nil
}

func healthHandler(ready healthz.Checker) http.Handler {
	mux := http.NewServeMux()
	for path, checks := range map[string]map[string]healthz.Checker{"/healthz": {"ping": healthz.Ping}, "/readyz": {"mesh": ready}} {
		h := http.StripPrefix(path, &healthz.Handler{Checks: checks})
		mux.Handle(path, h)
		mux.Handle(path+"/", h)
	}
	return mux
}

func metricsHandler(g prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{ErrorHandling: promhttp.HTTPErrorOnError}))
	return mux
}

// openServer answers who may be anybody.
func openServer(h http.Handler) *http.Server {
	s := &http.Server{
		Handler: h, MaxHeaderBytes: openHeaders,
		ReadHeaderTimeout: openHeaderTime, ReadTimeout: openHeaderTime, WriteTimeout: openAnswerTime,
		// Strangers' faults, at their pace.
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	s.SetKeepAlivesEnabled(false)
	return s
}

// openListener bounds the connections of a port. It is safe for concurrent use.
type openListener struct {
	net.Listener
	rate    rate.Limit // of each source
	refused prometheus.Counter
	now     func() time.Time

	mu    sync.Mutex
	conns []*openConn // the oldest first
	paces map[netip.Addr]*rate.Limiter
}

type openConn struct {
	net.Conn
	of     *openListener
	source netip.Addr
}

func newOpenListener(l net.Listener, r rate.Limit, refused prometheus.Counter) *openListener {
	return &openListener{Listener: l, rate: r, refused: refused, now: time.Now, paces: map[netip.Addr]*rate.Limiter{}}
}

// Accept returns the next connection that is within bounds.
func (l *openListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		in, out := l.enter(c)
		if out != nil {
			out.Conn.Close()
		}
		if in != nil {
			return in, nil
		}
		c.Close()
	}
}

// enter takes a connection in, nil if its source makes them too fast. With too many of a
// source the oldest of them goes, with too many of all the oldest of the source that has
// most: a probe takes milliseconds, and who holds connections can't keep it out, not even
// from the node's own address, as which a Service's port may let pods appear.
func (l *openListener) enter(c net.Conn) (in, out *openConn) {
	in = &openConn{Conn: c, of: l}
	if tcp, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		in.source = tcp.AddrPort().Addr().Unmap()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.inTime(in.source) {
		l.refused.Inc()
		return nil, nil
	}
	held := map[netip.Addr]int{}
	for _, o := range l.conns {
		held[o.source]++
	}
	own := held[in.source] >= openPerSource
	if own || len(l.conns) >= openLimit {
		for _, o := range l.conns {
			if (!own || o.source == in.source) && (out == nil || held[o.source] > held[out.source]) {
				out = o
			}
		}
		l.refused.Inc()
		l.forget(out)
	}
	l.conns = append(l.conns, in)
	return in, out
}

// inTime reports whether a source may connect now; l.mu is held.
func (l *openListener) inTime(source netip.Addr) bool {
	if l.rate == rate.Inf {
		return true
	}
	p := l.paces[source]
	if p == nil {
		if len(l.paces) >= openSources {
			clear(l.paces) // nobody has so many addresses but who made that many connections
		}
		p = rate.NewLimiter(l.rate, metricsBurst)
		l.paces[source] = p
	}
	return p.AllowN(l.now(), 1)
}

// forget counts a connection no more; l.mu is held.
func (l *openListener) forget(c *openConn) {
	for i, o := range l.conns {
		if o == c {
			l.conns = append(l.conns[:i], l.conns[i+1:]...)
			return
		}
	}
}

// Close implements net.Conn.
func (c *openConn) Close() error {
	c.of.mu.Lock()
	c.of.forget(c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}
