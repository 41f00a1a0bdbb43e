package controllers

import (
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

// tell makes a warning event of an object.
func (w *writer) tell(o client.Object, kind, reason, note string) {
	w.tellOf(referenceTo(o, kind), nil, corev1.EventTypeWarning, reason, "Refuse", note)
}

func (w *writer) tellOf(about, by *corev1.ObjectReference, kind, reason, action, note string) {
	if w.events != nil {
		w.events(about, by, kind, reason, action, note)
	}
}

// referenceTo names an object in one of its versions. What it was read as when something
// was written to it may be older than that: see written.
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
