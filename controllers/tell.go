package controllers

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
)

// teller makes an event of a type, kind, about an object and by another, which may be
// nil. It never blocks. Within minutes, what is alike in all but the note is one event,
// with the first one's note.
type teller func(about, by *corev1.ObjectReference, kind, reason, action, note string)

// newTeller has all events recorded, with notes that the API server takes.
func newTeller(recorder events.EventRecorder) teller {
	return func(about, by *corev1.ObjectReference, kind, reason, action, note string) {
		var related runtime.Object
		if by != nil {
			related = by
		}
		recorder.Eventf(about, related, kind, reason, action, "%s", translate.EventNote(note))
	}
}

// news is an event about an object that changes.
type news struct {
	by                         *corev1.ObjectReference
	kind, reason, action, note string
}

// warning is news of something that isn't as it should be.
func warning(reason, note string) news {
	return news{nil, corev1.EventTypeWarning, reason, "Refuse", note}
}

// latest reads an object of which there is something to tell from the API server itself.
// The cache may not have what was written last: the same would be told again, or what is
// new would be the same event as what was told before, in that one's words. It reports
// false if the object is no more.
func (w *writer) latest(ctx context.Context, key client.ObjectKey, o client.Object) (bool, error) {
	err := w.keeper.live.Get(ctx, key, o)
	return err == nil, client.IgnoreNotFound(err)
}

// tell makes events of an object as it was read before it was changed.
func (w *writer) tell(o client.Object, kind string, all ...news) {
	if w.events == nil {
		return
	}
	for _, n := range all {
		w.events(referenceTo(o, kind), n.by, n.kind, n.reason, n.action, n.note)
	}
}

// referenceTo names an object in one of its versions: what is told of another one is
// another event.
func referenceTo(o client.Object, kind string) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: apiVersion(kind), Kind: kind, Namespace: o.GetNamespace(), Name: o.GetName(), UID: o.GetUID(), ResourceVersion: o.GetResourceVersion()}
}

// referenceToNamespace is by what an event is another than that of the same kind about
// another namespace.
func referenceToNamespace(name string) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Namespace", Name: name}
}

func apiVersion(kind string) string {
	if kind == "Service" {
		return "v1"
	}
	return v1alpha1.GroupVersion.String()
}
