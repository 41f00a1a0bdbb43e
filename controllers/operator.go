package controllers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/bulkhead-mesh/bulkhead/controllers/nodeservice"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// Options configure an operator replica. The zero value works but for Config.
type Options struct {
	// Config of the API server's client; required.
	Config *rest.Config
	// Namespace that the operator runs in. Default bulkhead-system.
	Namespace string
	// Service is the name of the Service in front of the replicas, and so of the
	// server's certificate. Default bulkhead-operator.
	Service string
	// Listen is where agents are served. Default :15012.
	Listen string
	// Health is where /healthz and /readyz are, "0" for nowhere. Default :8081.
	Health string
	// Metrics is where /metrics is, "0" for nowhere. Default :8080.
	Metrics string
	// JWTTTL is how long JWT-SVIDs live, between identity.MinJWTTTL and
	// identity.MaxJWTTTL. Default identity.DefaultJWTTTL.
	JWTTTL time.Duration
	// Logger; default slog.Default().
	Logger *slog.Logger
}

// Run runs a replica until ctx is done. Replicas elect a leader among them for
// what is written; all of them serve agents. It can be called once in a process.
func Run(ctx context.Context, o Options) error {
	if o.Config == nil {
		return errors.New("run operator: no client configuration")
	}
	if o.JWTTTL != 0 && (o.JWTTTL < identity.MinJWTTTL || o.JWTTTL > identity.MaxJWTTTL) {
		return fmt.Errorf("run operator: the TTL of JWT-SVIDs is %s, must be %s to %s", o.JWTTTL, identity.MinJWTTTL, identity.MaxJWTTTL)
	}
	o.Namespace, o.Service = cmp.Or(o.Namespace, "bulkhead-system"), cmp.Or(o.Service, "bulkhead-operator")
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	ctrl.SetLogger(logr.FromSlogHandler(o.Logger.Handler()))
	mgr, err := ctrl.NewManager(o.Config, manager.Options{
		Scheme: newScheme(), Cache: cacheOptions(o.Namespace),
		LeaderElection: true, LeaderElectionID: "bulkhead-operator", LeaderElectionNamespace: o.Namespace, LeaderElectionReleaseOnCancel: true,
		// Its own servers have no bounds; see openPorts.
		HealthProbeBindAddress: "0", Metrics: metricsserver.Options{BindAddress: "0"},
	})
	if err != nil {
		return fmt.Errorf("make manager: %w", err)
	}
	if err := setUp(ctx, mgr, o); err != nil {
		return err
	}
	if err := mgr.Start(ctx); err != nil {
		return fmt.Errorf("run manager: %w", err)
	}
	return nil
}

// setUp adds all parts to the manager.
func setUp(ctx context.Context, mgr manager.Manager, o Options) error {
	if err := mgr.GetFieldIndexer().IndexField(ctx, &discoveryv1.EndpointSlice{}, sliceService, indexSlice); err != nil {
		return fmt.Errorf("index EndpointSlices: %w", err)
	}
	leading := func() bool {
		select {
		case <-mgr.Elected():
			return true
		default:
			return false
		}
	}
	store := xds.NewStore(xds.StoreOptions{Logger: o.Logger})
	m := newMesh(mgr.GetCache(), store, []string{o.Namespace, metav1.NamespaceSystem}, o.Logger)
	tell := newTeller(mgr.GetEventRecorder("bulkhead-operator"))
	m.event = func(pod *corev1.ObjectReference, reason, note string) {
		if leading() { // all replicas see it
			tell(pod, nil, corev1.EventTypeWarning, reason, "Refuse", note)
		}
	}
	k := &keeper{
		cache: mgr.GetCache(), live: mgr.GetAPIReader(), writer: mgr.GetClient(), namespace: o.Namespace, mesh: m, log: o.Logger, now: time.Now, leading: leading,
		event: func(secret *corev1.ObjectReference, kind, reason, note string) {
			tell(secret, nil, kind, reason, "Sign", note)
		},
		dnsNames: []string{o.Service + "." + o.Namespace + ".svc", o.Service + "." + o.Namespace + ".svc.cluster.local"},
	}
	jwts := &jwtKeeper{
		live: mgr.GetAPIReader(), writer: mgr.GetClient(), namespace: o.Namespace, ttl: o.JWTTTL, log: o.Logger, now: time.Now, leading: leading,
		event: func(reason, note string) {
			secret := &corev1.ObjectReference{APIVersion: "v1", Kind: "Secret", Namespace: o.Namespace, Name: SecretJWT}
			tell(secret, nil, corev1.EventTypeWarning, reason, "Read", note)
		},
		changed: func() { m.triggers.membership.add(struct{}{}) },
	}
	late := newLateKinds(mgr.GetCache(), mgr.GetRESTMapper())
	m.routing.served, late.gone = late.served, m.forgetKind
	if err := startPublishers(mgr, m, k, late); err != nil {
		return err
	}
	if err := startWriters(mgr, &writer{Client: mgr.GetClient(), mesh: m, keeper: k, jwts: jwts, namespace: o.Namespace, now: time.Now, events: tell}, late); err != nil {
		return err
	}
	door := nodeservice.NewDoor()
	register, err := agentServices(mgr, m, k, jwts, store, door, o)
	if err != nil {
		return err
	}
	err = errors.Join(
		mgr.Add(loader{m, k, late}),
		mgr.Add(jwts),
		mgr.Add(&server{address: cmp.Or(o.Listen, ":15012"), keeper: k, mesh: m, log: o.Logger, door: door, register: register}),
		openPorts(mgr, cmp.Or(o.Health, ":8081"), cmp.Or(o.Metrics, ":8080"), func(*http.Request) error {
			select {
			case <-m.loaded:
				return nil
			default:
				return errNotLoaded
			}
		}),
	)
	if err != nil {
		return fmt.Errorf("add to manager: %w", err)
	}
	return nil
}

// loader brings the first picture in; the manager starts it with the caches full.
type loader struct {
	mesh   *mesh
	keeper *keeper
	late   *lateKinds
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (loader) NeedLeaderElection() bool { return false }

// Start implements manager.Runnable.
func (l loader) Start(ctx context.Context) error {
	// The trust domain is the authority's if there is one. If its Secret can't be
	// read, its own controller says so and tries again; nothing is served meanwhile.
	if _, err := l.keeper.sync(ctx); err != nil {
		l.mesh.log.Error("authority isn't loaded yet", "error", err)
	}
	if err := l.late.open(ctx); err != nil {
		return fmt.Errorf("load the mesh: %w", err)
	}
	if err := l.mesh.load(ctx); err != nil {
		return fmt.Errorf("load the mesh: %w", err)
	}
	return nil
}
