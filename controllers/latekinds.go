package controllers

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"

	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
)

const kindReferenceGrant = "ReferenceGrant"

const (
	// servedPoll is how long to wait for a CRD that is there to be served.
	servedPoll = time.Second
	// informerSync is how long the first list of a kind may take.
	informerSync = time.Minute
)

// lateKinds are kinds of others whose CRDs a cluster may lack, get while the
// operator runs, and lose again. An informer runs only while a kind is served: one
// for a kind that isn't would hold up the whole cache. It is safe for concurrent
// use.
type lateKinds struct {
	cache  cache.Cache
	mapper meta.RESTMapper
	gone   func(ctx context.Context, kind string) error

	mu    sync.Mutex
	kinds map[string]*lateKind // by the CRD's name
}

type lateKind struct {
	gvk    schema.GroupVersionKind
	object client.Object
	// informer is nil while the kind isn't served.
	informer cache.Informer
	// enqueue are the controllers that run.
	enqueue []func(client.Object)
}

func newLateKinds(c cache.Cache, mapper meta.RESTMapper) *lateKinds {
	return &lateKinds{cache: c, mapper: mapper, gone: func(context.Context, string) error { return nil }, kinds: map[string]*lateKind{
		"httproutes." + gatewayv1.GroupName:      {gvk: gatewayGVK(gatewayv1.GroupVersion.Version, translate.KindHTTPRoute), object: &gatewayv1.HTTPRoute{}},
		"grpcroutes." + gatewayv1.GroupName:      {gvk: gatewayGVK(gatewayv1.GroupVersion.Version, translate.KindGRPCRoute), object: &gatewayv1.GRPCRoute{}},
		"referencegrants." + gatewayv1.GroupName: {gvk: gatewayGVK(gatewayv1beta1.GroupVersion.Version, kindReferenceGrant), object: &gatewayv1beta1.ReferenceGrant{}},
	}}
}

// served reports whether a kind's objects can be read from the cache.
func (l *lateKinds) served(kind string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range l.kinds {
		if k.gvk.Kind == kind {
			return k.informer != nil
		}
	}
	return false
}

// open starts the informers of the kinds that are served, and returns when they
// have their objects: the first picture isn't one without the routes.
func (l *lateKinds) open(ctx context.Context) error {
	for name := range l.kinds {
		if _, err := l.begin(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// begin starts a kind's informer if it is served and doesn't run yet.
func (l *lateKinds) begin(ctx context.Context, crd string) (served bool, err error) {
	k := l.kinds[crd]
	if _, err := l.mapper.RESTMapping(k.gvk.GroupKind(), k.gvk.Version); meta.IsNoMatchError(err) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("look for %s: %w", k.gvk, err)
	}
	ctx, cancel := context.WithTimeout(ctx, informerSync)
	defer cancel()
	i, err := l.cache.GetInformer(ctx, k.object)
	if err != nil {
		return false, fmt.Errorf("watch %s: %w", k.gvk, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.informer != nil {
		return true, nil
	}
	k.informer = i
	for _, enqueue := range k.enqueue {
		if err := k.handle(enqueue); err != nil {
			return true, err
		}
	}
	return true, nil
}

// handle hands all objects to a controller, now and when they change.
func (k *lateKind) handle(enqueue func(client.Object)) error {
	take := func(o any) {
		if d, ok := o.(toolscache.DeletedFinalStateUnknown); ok {
			o = d.Obj
		}
		if object, ok := o.(client.Object); ok {
			enqueue(object)
		}
	}
	if _, err := k.informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{AddFunc: take, UpdateFunc: func(_, o any) { take(o) }, DeleteFunc: take}); err != nil {
		return fmt.Errorf("watch %s: %w", k.gvk, err)
	}
	return nil
}

// sync is called when a CRD came, changed or went.
func (l *lateKinds) sync(ctx context.Context, crd string) (time.Duration, error) {
	k := l.kinds[crd]
	if k == nil {
		return 0, nil
	}
	definition := newCRD()
	err := l.cache.Get(ctx, client.ObjectKey{Name: crd}, definition)
	if client.IgnoreNotFound(err) != nil {
		return 0, fmt.Errorf("read CustomResourceDefinition %s: %w", crd, err)
	}
	if err == nil && definition.DeletionTimestamp == nil {
		served, err := l.begin(ctx, crd)
		if err == nil && !served {
			return servedPoll, nil // it isn't established yet, or lacks the version
		}
		return 0, err
	}
	l.mu.Lock()
	running := k.informer != nil
	k.informer = nil
	l.mu.Unlock()
	if !running {
		return 0, nil
	}
	if err := l.cache.RemoveInformer(ctx, k.object); err != nil {
		return 0, fmt.Errorf("stop watching %s: %w", k.gvk, err)
	}
	return 0, l.gone(ctx, k.gvk.Kind)
}

func newCRD() *metav1.PartialObjectMetadata {
	o := &metav1.PartialObjectMetadata{}
	o.SetGroupVersionKind(schema.GroupVersionKind{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition"})
	return o
}

// lateSource gives a controller a key for each event of some late kinds.
type lateSource[K comparable] struct {
	late  *lateKinds
	kinds []string
	key   func(client.Object) K
}

// Start implements source.TypedSource.
func (s lateSource[K]) Start(_ context.Context, q workqueue.TypedRateLimitingInterface[K]) error {
	s.late.mu.Lock()
	defer s.late.mu.Unlock()
	for _, k := range s.late.kinds {
		for _, kind := range s.kinds {
			if k.gvk.Kind != kind {
				continue
			}
			enqueue := func(o client.Object) { q.Add(s.key(o)) }
			k.enqueue = append(k.enqueue, enqueue)
			if k.informer == nil {
				continue
			}
			if err := k.handle(enqueue); err != nil {
				return err
			}
		}
	}
	return nil
}

// routeKey of a route's object, whose TypeMeta the cache leaves empty.
func routeKey(o client.Object) translate.RouteKey {
	key := translate.RouteKey{Kind: translate.KindHTTPRoute, Namespace: o.GetNamespace(), Name: o.GetName()}
	if _, ok := o.(*gatewayv1.GRPCRoute); ok {
		key.Kind = translate.KindGRPCRoute
	}
	return key
}

func gatewayGVK(version, kind string) schema.GroupVersionKind {
	return schema.GroupVersionKind{Group: gatewayv1.GroupName, Version: version, Kind: kind}
}
