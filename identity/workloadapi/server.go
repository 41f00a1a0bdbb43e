// Package workloadapi serves the SPIFFE Workload API to the pods of a node: an
// application fetches the X.509-SVID and the JWT-SVIDs of its pod's service
// account and what to verify its peers' with, over a Unix socket.
//
//	connect ──▶ attest: process, pod ──▶ bounds of that pod ──▶ each call: attest again ──▶ answer
//	                                                            each push: attest again ──▶ or end
//
// Who calls is what the kernel says and nothing that the caller does.
package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/identity/attest"
)

// JWTSigner has JWT-SVIDs signed for pods of this node; on the node, by the
// operator.
type JWTSigner interface {
	// SignJWT returns a token of the pod's identity. An error that is, or wraps, a
	// gRPC PermissionDenied says that the pod gets none; all others are passing. It
	// is called concurrently, with a deadline.
	SignJWT(ctx context.Context, pod identity.Pod, audiences []string) (token string, err error)
}

// Options configure a Server.
type Options struct {
	// Socket is the path of the socket. Its directory is made, for all to enter, and
	// is never made anew: pods have it mounted. Required.
	Socket string
	// Identities are those of the node's pods. Required.
	Identities *identity.Store
	// Signer is required.
	Signer JWTSigner
	// Pods says where the pods' cgroups are. Required.
	Pods attest.PodCgroups
	// Netns returns the path of a pod's network namespace, "" if it isn't known. It is
	// called concurrently. Default: no pod's is known.
	Netns func(podUID string) string
	// Log gets no key and no token. Default slog.Default().
	Log *slog.Logger
}

const (
	// maxRequest and maxHeaders bound what a caller may send: the largest request is
	// a token to validate.
	maxRequest = 32 << 10
	maxHeaders = 8 << 10
	// handshakeTime is how long a connection may take to say anything.
	handshakeTime = 5 * time.Second
	// A caller that doesn't take what it is sent is gone after these.
	pingAfter   = time.Minute
	pingTimeout = 20 * time.Second
	idleTime    = 10 * time.Minute
	// recheck is how often streams are looked at without a reason.
	recheck = 30 * time.Second
)

// Server serves the Workload API. It is safe for concurrent use.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	o      Options
	nodeNS attest.Namespace
	limits limits
	tokens tokens
	calls  *prometheus.CounterVec
	conns  *prometheus.CounterVec

	mu sync.Mutex
	// jwts verify tokens; nil before SetBundle. Immutable.
	jwts     *jwtbundle.Bundle
	jwksJSON []byte
	changed  chan struct{} // closed and replaced with jwts
}

var _ workload.SpiffeWorkloadAPIServer = (*Server)(nil)

// New returns a server that doesn't serve yet.
func New(o Options) (*Server, error) {
	if o.Socket == "" || o.Identities == nil || o.Signer == nil {
		return nil, errors.New("make Workload API: Options.Socket, Identities and Signer are required")
	}
	if o.Netns == nil {
		o.Netns = func(string) string { return "" }
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	node, err := attest.NamespaceAt("/proc/self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("make Workload API: %w", err)
	}
	return &Server{
		o: o, nodeNS: node, changed: make(chan struct{}),
		limits: limits{pods: map[string]*usage{}}, tokens: newTokens(o.Signer),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "bulkhead_workload_api_calls_total", Help: "Calls of the SPIFFE Workload API that have ended, by method and gRPC code.",
		}, []string{"method", "code"}),
		conns: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "bulkhead_workload_api_connections_total", Help: "Connections to the SPIFFE Workload API: accepted, limited (its pod has too many), or unknown (the process was gone).",
		}, []string{"result"}),
	}, nil
}

// Collectors are the server's metrics.
func (s *Server) Collectors() []prometheus.Collector {
	return []prometheus.Collector{s.calls, s.conns, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "bulkhead_workload_api_connections", Help: "Open connections to the SPIFFE Workload API.",
	}, func() float64 { return float64(s.limits.open()) })}
}

// Serve binds the socket in place of a former one and serves until ctx ends. It
// returns nil when all calls have ended; the socket stays, for the next process
// to replace: clients that are refused meanwhile come back. It can be called once.
func (s *Server) Serve(ctx context.Context) error {
	l, err := listen(s.o.Socket)
	if err != nil {
		return fmt.Errorf("serve Workload API: %w", err)
	}
	return s.serve(ctx, l)
}

func (s *Server) serve(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(
		grpc.Creds(attestation{s}),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxRequest), grpc.MaxHeaderListSize(maxHeaders), grpc.MaxConcurrentStreams(callsPerUID),
		grpc.InitialWindowSize(64<<10), grpc.InitialConnWindowSize(64<<10), grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(4<<10),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingAfter, Timeout: pingTimeout, MaxConnectionIdle: idleTime}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	workload.RegisterSpiffeWorkloadAPIServer(g, s)
	// Streams have no end of their own.
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	if err := g.Serve(l); ctx.Err() == nil {
		return fmt.Errorf("serve Workload API: %w", err)
	}
	g.Stop() // returns when the calls have
	return nil
}
