package controllers

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// reconciler handles a key; a duration says when to do so again.
type reconciler[K comparable] func(context.Context, K) (time.Duration, error)

// reconciles is one controller. Its workers wait until the mesh is loaded, so that
// nothing is decided from half of a picture.
type reconciles[K comparable] struct {
	name    string
	leader  bool // runs on the leader only
	early   bool // runs before the mesh is loaded
	workers int
	do      reconciler[K]
}

func (r reconciles[K]) start(mgr manager.Manager, m *mesh, sources ...source.TypedSource[K]) error {
	c, err := controller.NewTyped(r.name, mgr, controller.TypedOptions[K]{
		MaxConcurrentReconciles: max(r.workers, 1), NeedLeaderElection: &r.leader,
		Reconciler: reconcile.TypedFunc[K](func(ctx context.Context, key K) (reconcile.Result, error) {
			if !r.early {
				if err := m.wait(ctx); err != nil {
					return reconcile.Result{}, err
				}
			}
			after, err := r.do(ctx, key)
			return reconcile.Result{RequeueAfter: after}, err
		}),
	})
	if err != nil {
		return fmt.Errorf("make controller %s: %w", r.name, err)
	}
	for _, s := range sources {
		if err := c.Watch(s); err != nil {
			return fmt.Errorf("make controller %s: %w", r.name, err)
		}
	}
	return nil
}

// watch gives a controller a key for each event of a kind.
func watch[T client.Object, K comparable](mgr manager.Manager, o T, key func(T) K, predicates ...predicate.TypedPredicate[T]) source.TypedSource[K] {
	return source.TypedKind(mgr.GetCache(), o, handler.TypedEnqueueRequestsFromMapFunc(func(_ context.Context, o T) []K { return []K{key(o)} }), predicates...)
}

func byName[T client.Object](o T) string              { return o.GetName() }
func byNamespace[T client.Object](o T) string         { return o.GetNamespace() }
func byKey[T client.Object](o T) types.NamespacedName { return client.ObjectKeyFromObject(o) }
func single[T client.Object](T) struct{}              { return struct{}{} }
func once[K comparable](do func(context.Context, K) error) reconciler[K] {
	return func(ctx context.Context, key K) (time.Duration, error) { return 0, do(ctx, key) }
}

// startPublishers adds the controllers of every replica: each keeps the store
// that its own agents are served from.
func startPublishers(mgr manager.Manager, m *mesh, k *keeper, late *lateKinds) error {
	t := &m.triggers
	ignoreKey := func(do func(context.Context) error) reconciler[struct{}] {
		return func(ctx context.Context, _ struct{}) (time.Duration, error) { return 0, do(ctx) }
	}
	for _, start := range []func() error{
		func() error {
			// The others wait for what this one makes, so it doesn't wait for them.
			return reconciles[struct{}]{name: "authority", early: true, do: func(ctx context.Context, _ struct{}) (time.Duration, error) { return k.sync(ctx) }}.
				start(mgr, m, watch(mgr, &corev1.Secret{}, single), watch(mgr, &v1alpha1.MeshTopology{}, single, changedSpec[*v1alpha1.MeshTopology]()), &t.authority)
		},
		func() error {
			return reconciles[struct{}]{name: "topologies", do: ignoreKey(m.syncTopologies)}.
				start(mgr, m, watch(mgr, &v1alpha1.MeshTopology{}, single, changedSpec[*v1alpha1.MeshTopology]()), &t.topologies)
		},
		func() error {
			return reconciles[string]{name: "namespaces", do: once(m.syncNamespace)}.start(mgr, m, watch(mgr, &corev1.Namespace{}, byName), &t.namespaces)
		},
		func() error {
			return reconciles[string]{name: "nodes", do: once(m.syncNode)}.start(mgr, m, watch(mgr, &corev1.Node{}, byName))
		},
		func() error {
			return reconciles[struct{}]{name: "network", do: ignoreKey(m.syncNetwork)}.start(mgr, m, watch(mgr, &networkingv1.ServiceCIDR{}, single), &t.network)
		},
		func() error {
			return reconciles[types.NamespacedName]{name: "pods", do: m.syncPod}.start(mgr, m, watch(mgr, &corev1.Pod{}, byKey), &t.pods)
		},
		func() error {
			return reconciles[types.NamespacedName]{name: "services", do: once(m.syncService)}.
				start(mgr, m, watch(mgr, &corev1.Service{}, byKey), watch(mgr, &discoveryv1.EndpointSlice{}, serviceOf, predicate.NewTypedPredicateFuncs(hasService)), &t.services)
		},
		func() error {
			return reconciles[string]{name: "kinds", do: late.sync}.start(mgr, m, watch(mgr, newCRD(), byName))
		},
		func() error {
			return reconciles[translate.RouteKey]{name: "routes", do: once(m.syncRoute)}.
				start(mgr, m, lateSource[translate.RouteKey]{late, []string{translate.KindHTTPRoute, translate.KindGRPCRoute}, routeKey})
		},
		func() error {
			return reconciles[types.NamespacedName]{name: "grants", do: once(m.syncGrant)}.
				start(mgr, m, lateSource[types.NamespacedName]{late, []string{kindReferenceGrant}, client.ObjectKeyFromObject})
		},
		func() error {
			return reconciles[model.ServiceKey]{name: "routings", do: once(m.syncRouting)}.start(mgr, m, &t.routings)
		},
		func() error {
			return reconciles[string]{name: "reports", do: once(m.syncReport)}.start(mgr, m, watch(mgr, &v1alpha1.NodeProxy{}, byName))
		},
	} {
		if err := start(); err != nil {
			return err
		}
	}
	return nil
}

func serviceOf(s *discoveryv1.EndpointSlice) types.NamespacedName {
	return types.NamespacedName{Namespace: s.Namespace, Name: s.Labels[discoveryv1.LabelServiceName]}
}

func hasService(s *discoveryv1.EndpointSlice) bool {
	return s.Labels[discoveryv1.LabelServiceName] != ""
}

// changedSpec leaves out updates of status alone.
func changedSpec[T client.Object]() predicate.TypedPredicate[T] {
	return predicate.TypedGenerationChangedPredicate[T]{}
}
