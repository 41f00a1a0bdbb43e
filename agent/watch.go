package agent

import (
	"context"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// newScheme holds the kinds that an agent reads, and asks by.
func newScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, appsv1.AddToScheme, authenticationv1.AddToScheme, authorizationv1.AddToScheme, v1alpha1.AddToScheme,
	} {
		if err := add(s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// watchOne tells f of one object, now and whenever it changes; of a deletion with
// the object as it was last and deleted set. It returns when ctx ends. Only that
// object may be read: that is all that an agent has the right to.
func watchOne[T client.Object](ctx context.Context, c client.WithWatch, list client.ObjectList, object T, f func(object T, deleted bool)) {
	options := func(o metav1.ListOptions) *client.ListOptions {
		o.FieldSelector = "metadata.name=" + object.GetName()
		return &client.ListOptions{Namespace: object.GetNamespace(), Raw: &o}
	}
	// Initial lists as a stream are of no use for one object.
	source := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			l := list.DeepCopyObject().(client.ObjectList)
			return l, c.List(ctx, l, options(o))
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return c.Watch(ctx, list.DeepCopyObject().(client.ObjectList), options(o))
		},
	}, noWatchList{})
	_, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: source,
		ObjectType:    object.DeepCopyObject(),
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { f(o.(T), false) },
			UpdateFunc: func(_, o any) { f(o.(T), false) },
			DeleteFunc: func(o any) {
				if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
					o = gone.Obj
				}
				if object, ok := o.(T); ok {
					f(object, true)
				}
			},
		},
	})
	controller.RunWithContext(ctx)
}

// noWatchList says that the client can't stream initial lists.
type noWatchList struct{}

// IsWatchListSemanticsUnSupported is asked for by client-go.
func (noWatchList) IsWatchListSemanticsUnSupported() bool { return true }
