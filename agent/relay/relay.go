package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/keepalive"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Key names one Envoy process of the node.
type Key struct {
	Tenant     model.Tenant
	Generation int
}

// Options of a Relay. Operator and Secrets are required.
type Options struct {
	// Operator is the connection that all streams share. The caller closes it.
	Operator grpc.ClientConnInterface
	// Secrets of the node's workloads.
	Secrets Secrets
	// Log; default slog.Default().
	Log *slog.Logger
	// LastGoodDir is where the last good resources are kept, without secrets.
	// Default "": in memory only.
	LastGoodDir string
	// Patience is how long the operator may take to answer before last good
	// resources are served. Default 1 s.
	Patience time.Duration
	// Backoff between streams to the operator.
	Backoff Backoff
	// NamesPerSecond that one proxy may newly ask for; a burst of four seconds'
	// worth is free. Default 2000.
	NamesPerSecond float64
	// RequestsPerSecond that are read of one proxy, acknowledgements among them; a
	// burst of four seconds' worth is free. Default 2000.
	RequestsPerSecond float64
	// Changed is called, if set, after a proxy connected, left, accepted or
	// rejected configuration. It must not block.
	Changed func(model.Tenant)
}

// Relay serves the tenant proxies of a node. Its methods may be called from any
// goroutine.
type Relay struct {
	opts Options
	log  *slog.Logger
	ads  discovery.AggregatedDiscoveryServiceClient
	good *lastGood

	mu        sync.Mutex
	endpoints map[Key]*endpoint
	closed    bool
}

// State is what the relay knows of one proxy.
type State struct {
	// Connected: the proxy has a stream.
	Connected bool
	// Listeners that it acknowledged. None means that it serves nothing.
	Listeners int
	// Rejections are what it refused and hasn't got a better version of, sorted and at
	// most maxRejections.
	Rejections []Rejection
}

// Rejection is a resource that a proxy refused.
type Rejection struct {
	Type string // short: LDS, CDS and so on
	Name string
	// Message is Envoy's, printable and cut.
	Message string
}

// InVain reports whether this isn't about a resource: the proxy asked for names that
// don't exist, as pods had it do.
func (r Rejection) InVain() bool { return r.Name == wildcard }

func (r Rejection) String() string { return r.Type + " " + r.Name + ": " + r.Message }

// maxRejections are kept of one proxy: who refuses everything says nothing more.
const maxRejections = 16

// Socket is where one proxy connects.
type Socket struct {
	// Path to bind; its directory must exist.
	Path string
	// UID of the proxy: nobody else but root may connect.
	UID uint32
	// Version of Envoy: last good resources are kept by it.
	Version string
}

// endpoint is one proxy's socket.
type endpoint struct {
	key      Key
	socket   Socket
	listener net.Listener
	server   *grpc.Server
	done     chan struct{}
	limiter  *rate.Limiter
	requests *rate.Limiter
	streams  *rate.Limiter
	log      slog.Handler // of this proxy's streams
	// turn is held by the stream that is served: one at a time.
	turn chan struct{}

	mu sync.Mutex
	// endStream ends the newest stream.
	endStream context.CancelFunc
	// current is the stream that State is about: the newest.
	current  downstream
	state    State
	rejected map[rejectionKey]Rejection
	// roots is the version of identity.RootCA that the current stream acknowledged;
	// rootsWanted says that it has asked for it.
	roots       string
	rootsWanted bool
	// found are the clusters that the current stream's proxy has by name: whether
	// they exist. ahead is what it is to get before it asks.
	found map[string]bool
	ahead []string
	// warming: somebody waits for what is ahead.
	warming bool
	// warm tells the stream that there is something in ahead.
	warm chan struct{}
}

type rejectionKey struct{ typeURL, name string }

// New returns a relay that serves nobody yet. The caller closes it.
func New(o Options) *Relay {
	o.Log = cmp.Or(o.Log, slog.Default())
	o.Patience = cmp.Or(o.Patience, time.Second)
	o.Backoff.Min = cmp.Or(o.Backoff.Min, 200*time.Millisecond)
	o.Backoff.Max = cmp.Or(o.Backoff.Max, 10*time.Second)
	o.NamesPerSecond = cmp.Or(o.NamesPerSecond, 2000)
	o.RequestsPerSecond = cmp.Or(o.RequestsPerSecond, 2000)
	return &Relay{
		opts: o, log: o.Log, ads: discovery.NewAggregatedDiscoveryServiceClient(o.Operator),
		good: newLastGood(o.LastGoodDir, o.Log), endpoints: map[Key]*endpoint{},
	}
}

// Listen serves the proxy on its socket. It replaces one that a former agent
// left, and does nothing if it serves the proxy there already.
func (r *Relay) Listen(key Key, socket Socket) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errors.New("listen for proxy: the relay is closed")
	}
	if e := r.endpoints[key]; e != nil {
		if e.socket == socket && present(socket.Path) {
			return nil
		}
		e.stop()
		delete(r.endpoints, key)
	}
	l, err := listenUnix(socket.Path, socket.UID)
	if err != nil {
		return fmt.Errorf("listen for proxy %s/%d: %w", key.Tenant, key.Generation, err)
	}
	e := &endpoint{
		log: newQuiet(r.log.Handler()),
		key: key, socket: socket, listener: l, done: make(chan struct{}), rejected: map[rejectionKey]Rejection{},
		found: map[string]bool{}, warm: make(chan struct{}, 1),
		limiter:  rate.NewLimiter(rate.Limit(r.opts.NamesPerSecond), int(r.opts.NamesPerSecond*4)),
		requests: rate.NewLimiter(rate.Limit(r.opts.RequestsPerSecond), int(r.opts.RequestsPerSecond*4)),
		streams:  rate.NewLimiter(opensPerSecond, opensAtOnce),
		turn:     make(chan struct{}, 1),
	}
	e.server = grpc.NewServer(
		grpc.ForceServerCodecV2(requestCodec{encoding.GetCodecV2(grpcproto.Name)}),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxConcurrentStreams(2), grpc.MaxHeaderListSize(16<<10),
		grpc.ReadBufferSize(16<<10), grpc.WriteBufferSize(16<<10), grpc.ConnectionTimeout(connectTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	discovery.RegisterAggregatedDiscoveryServiceServer(e.server, &service{relay: r, endpoint: e})
	r.endpoints[key] = e
	go func() {
		defer close(e.done)
		if err := e.server.Serve(l); err != nil {
			r.log.Error("proxy's socket closed", "tenant", key.Tenant.String(), "generation", key.Generation, "error", err)
		}
	}()
	return nil
}

// Close stops serving one proxy and removes its socket.
func (r *Relay) Close(key Key) {
	r.mu.Lock()
	e := r.endpoints[key]
	delete(r.endpoints, key)
	r.mu.Unlock()
	if e != nil {
		e.stop()
		os.Remove(e.socket.Path)
	}
}

// KeepLastGood drops the last good resources of all other tenants.
func (r *Relay) KeepLastGood(tenants []model.Tenant) error { return r.good.keep(tenants) }

// State returns what is known of the proxy; the zero State if it isn't served.
func (r *Relay) State(key Key) State {
	r.mu.Lock()
	e := r.endpoints[key]
	r.mu.Unlock()
	if e == nil {
		return State{}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.state
	s.Rejections = slices.SortedFunc(maps.Values(e.rejected), func(a, b Rejection) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name))
	})
	return s
}

// Trusts reports whether all proxies have acknowledged this version of the roots.
// One that hasn't asked for any verifies nothing yet; one that isn't connected may
// have others still.
func (r *Relay) Trusts(version string) bool {
	r.mu.Lock()
	all := slices.Collect(maps.Values(r.endpoints))
	r.mu.Unlock()
	for _, e := range all {
		e.mu.Lock()
		trusts := e.current != nil && (!e.rootsWanted || e.roots == version)
		e.mu.Unlock()
		if !trusts {
			return false
		}
	}
	return true
}

// Shutdown stops serving, writes last good resources out and leaves the sockets'
// files, which a next relay replaces: proxies keep what they have.
func (r *Relay) Shutdown() {
	r.mu.Lock()
	r.closed = true
	all := slices.Collect(maps.Values(r.endpoints))
	r.endpoints = map[Key]*endpoint{}
	r.mu.Unlock()
	for _, e := range all {
		e.stop()
	}
	r.good.close()
}

func (e *endpoint) stop() {
	e.server.Stop()
	<-e.done
}

func present(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func (r *Relay) endpoint(key Key) *endpoint {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.endpoints[key]
}

// wait holds a proxy back that asks for n names faster than it may.
func (r *Relay) wait(ctx context.Context, key Key, n int) error {
	e := r.endpoint(key)
	if e == nil {
		return errors.New("proxy isn't served any more")
	}
	for n > 0 {
		k := min(n, e.limiter.Burst())
		if err := e.limiter.WaitN(ctx, k); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// rootsWanted notes that a stream asks for the roots, and acknowledgedRoots which
// version it has.
func (r *Relay) rootsWanted(key Key, st downstream, wanted bool) {
	if e := r.endpoint(key); e != nil {
		e.mu.Lock()
		if e.current == st {
			e.rootsWanted = wanted
		}
		e.mu.Unlock()
	}
}

func (r *Relay) acknowledgedRoots(key Key, st downstream, version string) {
	e := r.endpoint(key)
	if e == nil {
		return
	}
	e.mu.Lock()
	tell := e.current == st && e.roots != version
	if tell {
		e.roots = version
	}
	e.mu.Unlock()
	if tell {
		r.changed(key.Tenant)
	}
}

func (r *Relay) changed(t model.Tenant) {
	if r.opts.Changed != nil {
		r.opts.Changed(t)
	}
}

func (r *Relay) accepted(key Key, st downstream, typeURL string, held int, names []string) {
	e := r.endpoint(key)
	if e == nil {
		return
	}
	e.mu.Lock()
	tell := false
	for _, n := range names {
		if k := (rejectionKey{typeURL, n}); e.rejected[k] != (Rejection{}) {
			delete(e.rejected, k)
			tell = true
		}
	}
	if typeURL == TypeListener && e.current == st {
		tell = tell || e.state.Listeners != held
		e.state.Listeners = held
	}
	e.mu.Unlock()
	if tell {
		r.changed(key.Tenant)
	}
}

// refusedNames tells that a proxy asks for names in vain, by orders of magnitude:
// each new one is no news.
func (r *Relay) refusedNames(key Key, typeURL string, n int) {
	e := r.endpoint(key)
	if e == nil || n < 100 {
		return
	}
	order := 100
	for n >= 10*order {
		order *= 10
	}
	k := rejectionKey{typeURL, wildcard}
	told := Rejection{kinds[typeURL].short, wildcard, fmt.Sprintf("%d or more names were refused: pods dial addresses that nobody has", order)}
	e.mu.Lock()
	news := e.rejected[k] != told
	e.rejected[k] = told
	e.mu.Unlock()
	if news {
		r.log.Warn("proxy asks for names in vain", "tenant", key.Tenant.String(), "generation", key.Generation, "type", told.Type, "names", order)
		r.changed(key.Tenant)
	}
}

func (r *Relay) rejected(key Key, typeURL string, names []string, reason string) {
	e := r.endpoint(key)
	if e == nil {
		return
	}
	e.mu.Lock()
	for _, n := range names {
		k := rejectionKey{typeURL, n}
		if _, had := e.rejected[k]; had || len(e.rejected) < maxRejections {
			e.rejected[k] = Rejection{kinds[typeURL].short, n, printable(reason, 256)}
		}
	}
	e.mu.Unlock()
	r.changed(key.Tenant)
}

// service is the ADS server of one socket.
type service struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	relay    *Relay
	endpoint *endpoint
}

// DeltaAggregatedResources serves one stream of the socket's proxy, and ends the one
// before: an Envoy has one, and each takes memory.
func (s *service) DeltaAggregatedResources(st downstream) error {
	e, key := s.endpoint, s.endpoint.key
	ctx, cancel := context.WithCancel(st.Context())
	defer cancel()
	if err := e.takeTurn(ctx, cancel); err != nil {
		return err
	}
	defer func() { <-e.turn }()
	e.mu.Lock()
	e.current, e.state, e.rejected = st, State{Connected: true}, map[rejectionKey]Rejection{}
	e.roots, e.rootsWanted = "", false
	e.found, e.ahead = map[string]bool{}, nil
	e.mu.Unlock()
	s.relay.changed(key.Tenant)
	defer func() {
		e.mu.Lock()
		e.current, e.state, e.found = nil, State{}, map[string]bool{}
		e.mu.Unlock()
		s.relay.changed(key.Tenant)
	}()
	return newStream(s.relay, e, st).run(ctx)
}

// takeTurn returns once the stream of ctx may be served, or with an error if another
// one came meanwhile.
func (e *endpoint) takeTurn(ctx context.Context, cancel context.CancelFunc) error {
	ended := grpcstatus.Error(codes.Unavailable, "the proxy has another stream, or the agent stops")
	if e.streams.Wait(ctx) != nil {
		return ended
	}
	e.mu.Lock()
	if e.endStream != nil {
		e.endStream()
	}
	e.endStream = cancel
	e.mu.Unlock()
	select {
	case e.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ended
	}
}
