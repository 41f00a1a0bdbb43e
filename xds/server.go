package xds

import (
	"context"
	"errors"
	"hash/fnv"
	"io"
	"log/slog"
	"math"
	"strconv"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Metadata by which an agent says whose stream it opens.
const (
	MetadataTenant     = "bulkhead-tenant"
	MetadataGeneration = "bulkhead-generation"
)

// StreamIdentity is whose stream it is.
type StreamIdentity struct {
	Node       string
	Tenant     model.Tenant
	Generation int // 0, or 1 for a canary
}

// ServerOptions configure a Server.
type ServerOptions struct {
	// Authorize says whose stream it is; required. It is called with the stream's
	// context. A gRPC status is passed on, other errors become
	// Unauthenticated.
	Authorize func(context.Context) (StreamIdentity, error)
	// Reauthorize is how often Authorize is called again for a stream that goes on,
	// for tokens end and are revoked; all streams of a node at one time. A stream
	// that isn't as it was ends, and its agent comes back with its token of then;
	// Unavailable changes nothing. Default 30 min.
	Reauthorize time.Duration
	// MaxNames is how many names of each type a stream may hold. Default 16384.
	MaxNames int
	// MaxUnknown is how many of them nobody has: addresses that were dialled for
	// nothing, or whose pod or service is gone. Default 1024.
	MaxUnknown int
	// UnknownFor is for how long a proxy keeps the cluster of such an address.
	// Default 10 min.
	UnknownFor time.Duration
	// NamesPerSecond is how fast it may get more, beyond a burst of twice MaxNames.
	// Faster ones wait. Default 100.
	NamesPerSecond float64
	// MaxHTTPChains is how many chains a process may have that read requests where
	// connections come in, one for each account and address; further ones are read
	// behind the address' endpoint. Default, and at most, 120; none if negative.
	MaxHTTPChains int
	// Coalesce is for how long changes are gathered into one push. Default 10 ms.
	Coalesce time.Duration
	// CoalesceOften is that for a cluster, routes or endpoints of one name that changed
	// more than 8 times in a row, or more than once a second since. They are sent in
	// parts, within as much time again. Default 250 ms, at least Coalesce.
	CoalesceOften time.Duration
	// ProxyWait is for how long a stream may wait until the store is synced and
	// knows its proxy. Default 5 s.
	ProxyWait time.Duration
	// Logger; default slog.Default().
	Logger *slog.Logger
}

// Server speaks delta ADS to tenant proxies, by way of their agents. It is safe
// for concurrent use.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer

	store   *Store
	opts    ServerOptions
	metrics *metrics

	mu          sync.Mutex
	streams     map[*stream]struct{}
	revocations uint64 // calls of Disconnect
}

// refusalsPerSecond is how many names a stream may ask for in vain.
const refusalsPerSecond = 5000

var errRevoked = status.Error(codes.Unavailable, "authorise again")

// add makes st known to Disconnect. It reports false if Disconnect was called since
// st's authorisation began: that may rest on what is no longer so.
func (s *Server) add(st *stream, revocations uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.revocations != revocations {
		return false
	}
	s.streams[st] = struct{}{}
	return true
}

func (s *Server) remove(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, st)
}

// NewServer returns a server of what is in store. It panics without Authorize.
func NewServer(store *Store, o ServerOptions) *Server {
	if o.Authorize == nil {
		panic("xds: ServerOptions.Authorize is required")
	}
	if o.Reauthorize <= 0 {
		o.Reauthorize = 30 * time.Minute
	}
	if o.MaxNames <= 0 {
		o.MaxNames = 16384
	}
	if o.MaxUnknown <= 0 {
		o.MaxUnknown = 1024
	}
	if o.UnknownFor <= 0 {
		o.UnknownFor = 10 * time.Minute
	}
	if o.NamesPerSecond <= 0 {
		o.NamesPerSecond = 100
	}
	if o.MaxHTTPChains == 0 || o.MaxHTTPChains > maxHTTPChains {
		o.MaxHTTPChains = maxHTTPChains
	}
	if o.Coalesce <= 0 {
		o.Coalesce = 10 * time.Millisecond
	}
	if o.CoalesceOften <= 0 {
		o.CoalesceOften = 250 * time.Millisecond
	}
	o.CoalesceOften = max(o.CoalesceOften, o.Coalesce)
	if o.ProxyWait <= 0 {
		o.ProxyWait = 5 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	s := &Server{store: store, opts: o, streams: map[*stream]struct{}{}}
	s.metrics = newMetrics(store)
	return s
}

// Register adds the service to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(r, s)
}

// GRPCOptions are the limits that a server for agents should have. An agent has
// one connection with a stream for each tenant generation of its node.
func GRPCOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxConcurrentStreams(2048),
		grpc.MaxRecvMsgSize(4 << 20), // a resubscription of some thousand names
		grpc.MaxSendMsgSize(math.MaxInt32),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	}
}

// ParseStreamMetadata reads what the agent says of a stream; what the agent may
// say is for Authorize to know. Errors are InvalidArgument.
func ParseStreamMetadata(ctx context.Context) (model.Tenant, int, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	one := func(key string) string {
		if v := md.Get(key); len(v) == 1 {
			return v[0]
		}
		return ""
	}
	tenant, err := model.ParseTenant(one(MetadataTenant))
	if err != nil {
		return model.Tenant{}, 0, status.Errorf(codes.InvalidArgument, "metadata %s: %v", MetadataTenant, err)
	}
	generation, err := strconv.Atoi(one(MetadataGeneration))
	if err != nil || generation < 0 || generation > 1 {
		return model.Tenant{}, 0, status.Errorf(codes.InvalidArgument, "metadata %s must be 0 or 1", MetadataGeneration)
	}
	return tenant, generation, nil
}

// DeltaAggregatedResources serves one stream. It ends with Unavailable if the
// proxy isn't known (yet) or is no more: the agent is to try again.
func (s *Server) DeltaAggregatedResources(g discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	s.mu.Lock()
	revocations := s.revocations
	s.mu.Unlock()
	id, err := s.opts.Authorize(g.Context())
	if err != nil {
		if _, ok := status.FromError(err); ok {
			return err
		}
		return status.Errorf(codes.Unauthenticated, "authorize stream: %v", err)
	}
	ctx, cancel := context.WithCancelCause(g.Context())
	defer cancel(nil)
	st := &stream{
		server: s, key: model.ProxyKey{Node: id.Node, Tenant: id.Tenant}, generation: id.Generation, identity: id, grpc: g,
		log:        s.opts.Logger.With("node", id.Node, "tenant", id.Tenant.String(), "generation", id.Generation),
		limiter:    rate.NewLimiter(rate.Limit(s.opts.NamesPerSecond), 2*s.opts.MaxNames),
		refusals:   rate.NewLimiter(refusalsPerSecond, 2*s.opts.MaxNames),
		rejections: rate.NewLimiter(1, 32),
		end:        cancel, wakeup: make(chan struct{}, 1), absent: make(chan removal),
		types: map[string]*subscription{}, unanswered: map[string]answer{},
		blocked: map[resourceKey]map[resourceKey]struct{}{}, uses: map[resourceKey]map[resourceKey]struct{}{},
	}
	if !s.add(st, revocations) {
		return errRevoked
	}
	defer s.remove(st)

	wait, stop := context.WithTimeout(ctx, s.opts.ProxyWait)
	older, err := s.store.attach(wait, st)
	stop()
	if err != nil {
		return status.Errorf(codes.Unavailable, "serve stream: %v", err)
	}
	for _, o := range older {
		o.end(errReplaced)
	}
	s.metrics.streams.Inc()
	defer func() {
		s.metrics.streams.Dec()
		for typeURL, n := range s.store.detach(st) {
			s.metrics.names.WithLabelValues(shortType(typeURL)).Sub(float64(n))
		}
	}()
	st.log.Debug("stream opened")

	// Receiver and sender end with the stream, just after this function returns, for
	// only that frees one that the proxy's silence holds up; they can't hold anything
	// any more then.
	go func() { cancel(st.receive(ctx)) }()
	go func() { cancel(st.send(ctx)) }()
	again := s.reauthorize(ctx, st)
	<-ctx.Done()
	again.stop()
	err = context.Cause(ctx)
	st.log.Debug("stream ended", "reason", err)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Unavailable, err.Error())
}

// reauthorization is a timer and not a goroutine that waits: there are as many as
// streams.
type reauthorization struct {
	mu    sync.Mutex
	timer *time.Timer // nil when it is over
}

func (r *reauthorization) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.timer.Stop()
	r.timer = nil
}

// reauthorize ends a stream whose caller may not have it any more. The caller stops
// it.
func (s *Server) reauthorize(ctx context.Context, st *stream) *reauthorization {
	r := &reauthorization{}
	// The review of one stream is the answer for the node's others.
	wait := func() time.Duration {
		h := fnv.New64a()
		h.Write([]byte(st.identity.Node))
		period := uint64(s.opts.Reauthorize)
		return time.Duration(period - (uint64(time.Now().UnixNano())+h.Sum64()%period)%period)
	}
	review := func() {
		id, err := s.opts.Authorize(st.grpc.Context())
		if ctx.Err() != nil {
			return
		}
		if (err != nil || id != st.identity) && status.Code(err) != codes.Unavailable {
			st.log.Info("stream has to authorise again", "error", err)
			st.end(errRevoked)
			return
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.timer != nil {
			r.timer.Reset(wait())
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.timer = time.AfterFunc(wait(), review)
	return r
}

// WaitServed returns once every open stream of a proxy, one at least, has
// acknowledged listeners that serve the pod with this UID as it was last set. The
// error wraps ctx's and says what is missing.
func (s *Server) WaitServed(ctx context.Context, key model.ProxyKey, podUID string) error {
	return s.store.waitServed(ctx, key, podUID)
}

// Disconnect ends the streams for which f reports true, and those that are being
// authorised; their agents come back and are authorised again. f must not call the
// Server.
func (s *Server) Disconnect(f func(StreamIdentity) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revocations++
	for st := range s.streams {
		if f(st.identity) {
			st.end(errRevoked)
		}
	}
}
