package debug

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Bounds of connections. Each has one request.
const (
	connLimit       = 64
	connsPerSource  = 8
	ratePerSource   = 5
	burstPerSource  = 20
	sourceLimit     = 4096
	forgetSourceAge = time.Minute
)

// bounded closes connections beyond what one source, or all together, may have.
type bounded struct {
	net.Listener
	now func() time.Time

	mu      sync.Mutex
	conns   int
	sources map[netip.Prefix]*source
}

type source struct {
	conns int
	rate  *rate.Limiter
	last  time.Time
}

func newBounded(l net.Listener) *bounded {
	return &bounded{Listener: l, now: time.Now, sources: map[netip.Prefix]*source{}}
}

// Accept returns the next connection that is within bounds.
func (b *bounded) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		key := sourceOf(c.RemoteAddr())
		if !b.enter(key) {
			c.Close()
			continue
		}
		return &boundedConn{Conn: c, leave: sync.OnceFunc(func() { b.leave(key) })}, nil
	}
}

// sourceOf is an address, in IPv6 the network of which one host can have all.
func sourceOf(a net.Addr) netip.Prefix {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap()
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	p, _ := ip.WithZone("").Prefix(bits)
	return p
}

func (b *bounded) enter(key netip.Prefix) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	s := b.sources[key]
	if s == nil {
		if len(b.sources) >= sourceLimit && !b.forget(now) {
			return false
		}
		s = &source{rate: rate.NewLimiter(ratePerSource, burstPerSource)}
		b.sources[key] = s
	}
	s.last = now
	if !s.rate.AllowN(now, 1) || s.conns >= connsPerSource || b.conns >= connLimit {
		return false
	}
	s.conns++
	b.conns++
	return true
}

// forget drops sources that have been away for so long that their rate is as
// if they were new, and reports whether there were any.
func (b *bounded) forget(now time.Time) bool {
	some := false
	for key, s := range b.sources {
		if s.conns == 0 && now.Sub(s.last) > forgetSourceAge {
			delete(b.sources, key)
			some = true
		}
	}
	return some
}

func (b *bounded) leave(key netip.Prefix) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns--
	if s := b.sources[key]; s != nil {
		s.conns--
	}
}

type boundedConn struct {
	net.Conn
	leave func()
}

func (c *boundedConn) Close() error {
	c.leave()
	return c.Conn.Close()
}
