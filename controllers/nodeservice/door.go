package nodeservice

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

// Bounds of connections none of whose calls had an agent's token yet. Every pod of
// the cluster can open them.
const (
	strangerLimit      = 128
	strangersPerSource = 4
	// strangerCalls may be begun on one: an agent opens the streams of its tenants at
	// once, and comes back with those that are refused.
	strangerCalls = 32
	// strangerPatience is how many are refused before the connection ends: gRPC keeps a
	// little of each until then.
	strangerPatience = 4096
	// strangerTime is longer than a handshake and a review.
	strangerTime  = 25 * time.Second
	handshakeTime = 10 * time.Second
	// maxHeaders of a call: its token and what gRPC adds.
	maxHeaders = maxToken + 4<<10
	// window is what a stream or a connection may send that nobody has read. A dynamic
	// one grows to 16 MiB for each stream, whoever opened it.
	window = 64 << 10
)

// Door bounds what callers cost before the API server has said that they are agents.
// It is safe for concurrent use.
type Door struct {
	// limit of strangers, and how long they may stay.
	limit int
	stay  time.Duration

	mu        sync.Mutex
	visitors  map[string]*visitor       // by remote address and port
	strangers map[netip.Addr][]*visitor // by source, the oldest first
	count     int                       // of strangers
	away      *prometheus.CounterVec    // by what was too much
}

// visitor is a connection.
type visitor struct {
	net.Conn
	door   *Door
	key    string
	source netip.Addr
	// Guarded by Door.mu.
	known bool
	calls int
	timer *time.Timer
}

// NewDoor returns a door for one server.
func NewDoor() *Door {
	return &Door{
		limit: strangerLimit, stay: strangerTime, visitors: map[string]*visitor{}, strangers: map[netip.Addr][]*visitor{},
		away: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "bulkhead", Subsystem: "nodeservice", Name: "strangers_refused_total",
			Help: "What callers were refused none of whose calls had an agent's token yet: connections, calls, or more time.",
		}, []string{"what"}),
	}
}

// Collectors are the door's metrics, to be registered once.
func (d *Door) Collectors() []prometheus.Collector { return []prometheus.Collector{d.away} }

// Listener bounds the connections of l.
func (d *Door) Listener(l net.Listener) net.Listener { return doorListener{l, d} }

// ServerOptions bound what is read of calls.
func (d *Door) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.InTapHandle(d.call), grpc.MaxHeaderListSize(maxHeaders), grpc.ConnectionTimeout(handshakeTime),
		grpc.StaticStreamWindowSize(window), grpc.StaticConnWindowSize(window),
	}
}

// Callers are c's, whose connections are an agent's from then on.
func (d *Door) Callers(c Callers) Callers { return doorCallers{c, d} }

type doorCallers struct {
	Callers
	door *Door
}

// Authenticate implements Callers.
func (c doorCallers) Authenticate(ctx context.Context) (Caller, error) {
	caller, err := c.Callers.Authenticate(ctx)
	if err == nil {
		c.door.letIn(ctx)
	}
	return caller, err
}

type doorListener struct {
	net.Listener
	door *Door
}

// Accept returns the next connection that is within bounds.
func (l doorListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		v, out := l.door.enter(c)
		if out != nil {
			out.Close()
		}
		if v != nil {
			return v, nil
		}
		c.Close()
	}
}

// enter takes a connection in, nil if it is one too many. With too many of all sources
// together, one of who has most is to go for who has none.
func (d *Door) enter(c net.Conn) (in, out *visitor) {
	source := addrOf(c.RemoteAddr())
	d.mu.Lock()
	defer d.mu.Unlock()
	switch own := len(d.strangers[source]); {
	case own >= strangersPerSource:
		d.away.WithLabelValues("connection").Inc()
		return nil, nil
	case d.count >= d.limit:
		d.away.WithLabelValues("connection").Inc()
		if out = d.spare(own + 1); out == nil {
			return nil, nil
		}
		d.forget(out)
	}
	in = &visitor{Conn: c, door: d, key: c.RemoteAddr().String(), source: source}
	in.timer = time.AfterFunc(d.stay, func() {
		d.away.WithLabelValues("time").Inc()
		in.Close()
	})
	d.visitors[in.key] = in
	d.strangers[source] = append(d.strangers[source], in)
	d.count++
	return in, out
}

// spare is the oldest stranger of the source that has most, if those are more than n.
func (d *Door) spare(n int) (out *visitor) {
	for _, list := range d.strangers {
		if len(list) > n {
			out, n = list[0], len(list)
		}
	}
	return out
}

// forget takes a connection out of the accounts; d.mu is held.
func (d *Door) forget(v *visitor) {
	if d.visitors[v.key] != v {
		return
	}
	delete(d.visitors, v.key)
	if !v.known {
		d.noStranger(v)
	}
}

// noStranger counts a connection among the strangers no more; d.mu is held.
func (d *Door) noStranger(v *visitor) {
	v.timer.Stop()
	list := d.strangers[v.source]
	for i := range list {
		if list[i] == v {
			list = append(list[:i:i], list[i+1:]...)
			break
		}
	}
	if d.count--; len(list) == 0 {
		delete(d.strangers, v.source)
	} else {
		d.strangers[v.source] = list
	}
}

// letIn notes that a call's connection is an agent's.
func (d *Door) letIn(ctx context.Context) {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if v := d.visitors[p.Addr.String()]; v != nil && !v.known {
		v.known = true
		d.noStranger(v)
	}
}

// call is a tap.ServerInHandle: it is asked before anything is kept of a call.
func (d *Door) call(ctx context.Context, _ *tap.Info) (context.Context, error) {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ctx, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.visitors[p.Addr.String()]
	if v == nil || v.known {
		return ctx, nil
	}
	if v.calls++; v.calls <= strangerCalls {
		return ctx, nil
	}
	d.away.WithLabelValues("call").Inc()
	if v.calls > strangerPatience {
		go v.Close() // it takes the lock
	}
	return nil, status.Error(codes.Unavailable, "too many calls on a connection before one had an agent's token: try again")
}

// Close implements net.Conn.
func (v *visitor) Close() error {
	v.door.mu.Lock()
	v.door.forget(v)
	v.door.mu.Unlock()
	return v.Conn.Close()
}
