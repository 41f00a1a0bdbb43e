package controllers

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/bulkhead-mesh/bulkhead/controllers/nodeservice"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// drainFor is how long streams have to go elsewhere when the operator ends.
const drainFor = 3 * time.Second

// agentServices are what is served to agents: a way to register them.
func agentServices(mgr manager.Manager, m *mesh, k *keeper, jwts *jwtKeeper, store *xds.Store, door *nodeservice.Door, o Options) (func(grpc.ServiceRegistrar), error) {
	clients, err := kubernetes.NewForConfigAndClient(mgr.GetConfig(), mgr.GetHTTPClient())
	if err != nil {
		return nil, fmt.Errorf("make client: %w", err)
	}
	// A client has a pace of its own for each kind, and so the pods of JWT-SVIDs theirs.
	jwtPods, err := client.New(mgr.GetConfig(), client.Options{HTTPClient: mgr.GetHTTPClient(), Scheme: mgr.GetScheme(), Mapper: mgr.GetRESTMapper()})
	if err != nil {
		return nil, fmt.Errorf("make client: %w", err)
	}
	// The two need each other: streams are authorised by the one, and the other waits
	// for what the streams acknowledge.
	var nodes *nodeservice.Service
	ads := xds.NewServer(store, xds.ServerOptions{Logger: o.Logger, Authorize: func(ctx context.Context) (xds.StreamIdentity, error) { return nodes.Authorize(ctx) }})
	nodes = nodeservice.New(nodeservice.Options{
		Callers: door.Callers(nodeservice.NewAuthenticator(nodeservice.AuthenticatorOptions{
			Reviews: clients.AuthenticationV1().TokenReviews(), Username: "system:serviceaccount:" + o.Namespace + ":bulkhead-agent",
		})),
		Pods: nodeservice.LivePods(mgr.GetAPIReader()), Mesh: m, Authorities: k, JWTs: jwts, JWTPods: nodeservice.LivePods(jwtPods), Proxies: ads, Log: o.Logger,
	})
	for _, c := range slices.Concat(ads.Collectors(), nodes.Collectors(), door.Collectors(), []prometheus.Collector{m}) {
		if err := metrics.Registry.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return func(r grpc.ServiceRegistrar) {
		ads.Register(r)
		nodes.Register(r)
	}, nil
}

// server serves the agents. It is a manager.Runnable of every replica.
type server struct {
	address string
	keeper  *keeper
	mesh    *mesh
	log     *slog.Logger
	// door is what callers have to pass.
	door *nodeservice.Door
	// register adds the services.
	register func(grpc.ServiceRegistrar)
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (s *server) NeedLeaderElection() bool { return false }

// Start listens once the mesh is loaded: an agent is better told to come back than
// that pods which do exist aren't known. It returns when ctx is done and the
// server has ended.
func (s *server) Start(ctx context.Context) error {
	if s.mesh.wait(ctx) != nil {
		return nil
	}
	l, err := net.Listen("tcp", s.address)
	if err != nil {
		return fmt.Errorf("listen for agents: %w", err)
	}
	g := grpc.NewServer(slices.Concat(xds.GRPCOptions(), s.door.ServerOptions(), []grpc.ServerOption{grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, GetCertificate: s.keeper.certificate,
	}))})...)
	s.register(g)
	ended := make(chan error, 1)
	go func() { ended <- g.Serve(s.door.Listener(l)) }()
	s.log.Info("serving agents", "address", l.Addr().String())
	select {
	case err := <-ended:
		return fmt.Errorf("serve agents: %w", err)
	case <-ctx.Done():
	}
	// Streams have no end of their own: agents are told to go, and then cut off.
	stop := time.AfterFunc(drainFor, g.Stop)
	defer stop.Stop()
	g.GracefulStop()
	<-ended
	return nil
}
