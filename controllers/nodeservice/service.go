package nodeservice

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// Callers tells which node calls; *Authenticator does.
type Callers interface {
	// Authenticate returns a gRPC status error for calls that aren't an agent's.
	Authenticate(ctx context.Context) (Caller, error)
}

// Pods reads pods as they are.
type Pods interface {
	// Live reads from the API server, not from a cache. The error is the API's.
	Live(ctx context.Context, namespace, name string) (*corev1.Pod, error)
}

// Mesh is what the operator knows of the mesh. Implementations answer from synced
// caches, without waiting, and are safe for concurrent use.
type Mesh interface {
	// Member says what a pod is in the mesh, by its labels, namespace and service
	// account; false if it isn't in it.
	Member(pod *corev1.Pod) (model.Identity, model.Tenant, bool)
	// CertificateTTL is how long certificates of a namespace's workloads are to live;
	// 0 is identity.DefaultTTL.
	CertificateTTL(namespace string) time.Duration
	// HasTenant reports whether a node has a pod, and so a proxy, of the tenant.
	HasTenant(node string, tenant model.Tenant) bool
	// NodePodCIDRs are the ranges that a node's pods have addresses of; none if the
	// cluster doesn't assign any. It is false for a node that isn't known (yet).
	NodePodCIDRs(node string) ([]netip.Prefix, bool)
	// Holders are the pods that are known, or were announced, to have an address.
	// They may be out of date: who is refused for one has it read again first.
	Holders(addr netip.Addr) []Holder
	// Announce adds the addresses of a pod of the node that its API object doesn't
	// have yet. It is idempotent; the addresses go with the pod. An error says that
	// it is too early or that somebody else announced the address just now.
	Announce(node string, pod *corev1.Pod, addrs []netip.Addr) error
}

// Holder is a pod that has an address.
type Holder struct {
	UID, Namespace, Name string
}

// Authorities tells the mesh's authority.
type Authorities interface {
	// Authority returns the current one, nil before it is loaded.
	Authority() *identity.Authority
}

// Proxies knows what proxies have acknowledged; *xds.Server does.
type Proxies interface {
	// WaitServed returns when every open stream of the proxy, one at least, has
	// acknowledged what serves the pod. Its error wraps ctx's.
	WaitServed(ctx context.Context, key model.ProxyKey, podUID string) error
}

// Options configure a Service. All but JWTs, JWTPods, Log and the bounds are required.
type Options struct {
	Callers     Callers
	Pods        Pods
	Mesh        Mesh
	Authorities Authorities
	Proxies     Proxies
	// JWTs; without, SignJWT is Unimplemented.
	JWTs JWTAuthorities
	// JWTPods reads the pods that JWT-SVIDs are for: applications ask for those as often
	// as they like, and what else needs a pod read isn't to wait for it. Default Pods.
	JWTPods Pods
	// AttachTimeout bounds AttachPod beyond what the caller asks for. Default 30 s.
	AttachTimeout time.Duration
	// Log; default slog.Default().
	Log *slog.Logger
}

const (
	// Calls in flight of one node; more are ResourceExhausted. An agent signs 8 at
	// once, and attaches as many pods as it starts at once.
	signsPerNode    = 32
	attachesPerNode = 512
	serversPerNode  = 2
)

// ServerTTL is how long an agent's certificate as a server lives.
const ServerTTL = 24 * time.Hour

// Service is the NodeService of one operator replica. It is safe for concurrent
// use and has nothing to close; its calls end with the gRPC server's.
type Service struct {
	nodev1alpha1.UnimplementedNodeServiceServer

	o   Options
	now func() time.Time

	mu       sync.Mutex
	inFlight map[inFlight]int

	signed   prometheus.Counter
	refusals *refusals
	jwts     *prometheus.CounterVec // by code
}

var _ nodev1alpha1.NodeServiceServer = (*Service)(nil)

type inFlight struct{ node, call string }

// New panics if something required is missing.
func New(o Options) *Service {
	if o.Callers == nil || o.Pods == nil || o.Mesh == nil || o.Authorities == nil || o.Proxies == nil {
		panic("nodeservice: Options.Callers, Pods, Mesh, Authorities and Proxies are required")
	}
	if o.AttachTimeout <= 0 {
		o.AttachTimeout = 30 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.JWTPods == nil {
		o.JWTPods = o.Pods
	}
	return &Service{o: o, now: time.Now, inFlight: map[inFlight]int{}, jwts: newJWTCounter(), refusals: newRefusals(),
		signed: prometheus.NewCounter(prometheus.CounterOpts{Namespace: "bulkhead", Subsystem: "nodeservice", Name: "certificates_signed_total", Help: "Certificates signed for workloads."})}
}

// Register adds the service to a gRPC server. Its calls are registered as streams of one
// message, which are the same to who calls: gRPC reads the message of any other before
// it asks whose it is.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	d := nodev1alpha1.NodeService_ServiceDesc
	d.Streams = slices.Clone(d.Streams)
	for _, m := range d.Methods {
		d.Streams = append(d.Streams, grpc.StreamDesc{StreamName: m.MethodName, Handler: func(_ any, stream grpc.ServerStream) error {
			if _, err := s.o.Callers.Authenticate(stream.Context()); err != nil {
				return s.stranger(stream.Context(), m.MethodName, err)
			}
			answer, err := m.Handler(s, stream.Context(), stream.RecvMsg, nil)
			if err != nil {
				return err
			}
			return stream.SendMsg(answer)
		}})
	}
	d.Methods = nil
	r.RegisterService(&d, s)
}

// Collectors are the service's metrics, to be registered once.
func (s *Service) Collectors() []prometheus.Collector {
	return []prometheus.Collector{s.signed, s.refusals.counter, s.jwts}
}

// Authorize is for xds.ServerOptions: the node is the token's, the tenant the one
// that the stream's metadata names, which must have a pod on that node. Errors are
// statuses: Unauthenticated, InvalidArgument, or Unavailable for a tenant that
// isn't there (yet).
func (s *Service) Authorize(ctx context.Context) (xds.StreamIdentity, error) {
	caller, err := s.o.Callers.Authenticate(ctx)
	if err != nil {
		return xds.StreamIdentity{}, s.stranger(ctx, "Stream", err)
	}
	tenant, generation, err := xds.ParseStreamMetadata(ctx)
	if err != nil {
		return xds.StreamIdentity{}, err
	}
	if !s.o.Mesh.HasTenant(caller.Node, tenant) {
		return xds.StreamIdentity{}, status.Errorf(codes.Unavailable, "tenant %s has no pod on node %s that is visible here", tenant, caller.Node)
	}
	return xds.StreamIdentity{Node: caller.Node, Tenant: tenant, Generation: generation}, nil
}

// SignCertificate implements nodev1alpha1.NodeServiceServer.
func (s *Service) SignCertificate(ctx context.Context, r *nodev1alpha1.SignCertificateRequest) (*nodev1alpha1.SignCertificateResponse, error) {
	caller, done, err := s.enter(ctx, "SignCertificate", signsPerNode)
	if err != nil {
		return nil, err
	}
	defer done()
	authority := s.o.Authorities.Authority()
	if authority == nil {
		return nil, status.Error(codes.Unavailable, "the authority isn't loaded yet")
	}
	ref := podRef{UID: r.GetPodUid(), Namespace: r.GetPodNamespace(), Name: r.GetPodName()}
	p, err := s.member(ctx, s.o.Pods, caller, ref)
	if err != nil {
		return nil, s.refused(caller, "SignCertificate", ref, err)
	}
	ttl := s.o.Mesh.CertificateTTL(p.Namespace)
	if ttl <= 0 {
		ttl = identity.DefaultTTL
	}
	chain, err := authority.Sign(r.GetCsr(), p.identity, ttl, s.now())
	switch {
	case errors.Is(err, identity.ErrCSR):
		err = refusal(codes.InvalidArgument, CauseInvalidCSR, p.identity, "pod %s: %v", ref, err)
	case errors.Is(err, identity.ErrOtherIdentity):
		err = refusal(codes.PermissionDenied, CauseOtherIdentity, p.identity, "pod %s is %s: %v", ref, p.identity, err)
	case err != nil:
		// The authority's trouble (ended, of another trust domain), not the pod's.
		err = status.Errorf(codes.Unavailable, "pod %s: %v", ref, err)
	}
	if err != nil {
		return nil, s.refused(caller, "SignCertificate", ref, err)
	}
	s.signed.Inc()
	s.o.Log.Debug("certificate signed", "node", caller.Node, "pod", ref.String(), "identity", p.identity.String())
	return &nodev1alpha1.SignCertificateResponse{Chain: chain}, nil
}

// SignServerCertificate implements nodev1alpha1.NodeServiceServer.
func (s *Service) SignServerCertificate(ctx context.Context, r *nodev1alpha1.SignServerCertificateRequest) (*nodev1alpha1.SignServerCertificateResponse, error) {
	caller, done, err := s.enter(ctx, "SignServerCertificate", serversPerNode)
	if err != nil {
		return nil, err
	}
	defer done()
	authority := s.o.Authorities.Authority()
	if authority == nil {
		return nil, status.Error(codes.Unavailable, "the authority isn't loaded yet")
	}
	chain, err := authority.SignServer(r.GetCsr(), []string{identity.AgentServerName(caller.Node), identity.MetricsServerName}, ServerTTL, s.now())
	switch {
	case errors.Is(err, identity.ErrCSR):
		return nil, s.refused(caller, "SignServerCertificate", podRef{}, refusal(codes.InvalidArgument, CauseInvalidCSR, model.Identity{}, "%v", err))
	case err != nil:
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &nodev1alpha1.SignServerCertificateResponse{Chain: chain}, nil
}

// enter authenticates a call and counts it; done must be called.
func (s *Service) enter(ctx context.Context, call string, limit int) (c Caller, done func(), err error) {
	c, err = s.o.Callers.Authenticate(ctx)
	if err != nil {
		return c, nil, s.stranger(ctx, call, err)
	}
	key := inFlight{c.Node, call}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inFlight[key] >= limit {
		return c, nil, status.Errorf(codes.ResourceExhausted, "node %s has %d calls of %s in flight: try again", c.Node, limit, call)
	}
	s.inFlight[key]++
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.inFlight[key]--; s.inFlight[key] == 0 {
			delete(s.inFlight, key)
		}
	}, nil
}

// LivePods are the Pods of a reader without a cache, such as a controller-runtime
// manager's GetAPIReader.
func LivePods(r client.Reader) Pods { return livePods{r} }

type livePods struct{ reader client.Reader }

func (l livePods) Live(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	pod := &corev1.Pod{}
	if err := l.reader.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, pod); err != nil {
		return nil, err
	}
	return pod, nil
}
