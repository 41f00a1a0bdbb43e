package controllers

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// recorder implements events.EventRecorder.
type recorder func(about *corev1.ObjectReference, by runtime.Object, kind, reason, action, note string)

func (r recorder) Eventf(about, by runtime.Object, kind, reason, action, note string, args ...any) {
	r(about.(*corev1.ObjectReference), by, kind, reason, action, fmt.Sprintf(note, args...))
}

// The API server takes notes of 1,024 bytes, not characters, and refuses longer ones:
// their event would never be.
func TestNotesOfEvents(t *testing.T) {
	const most = 1024
	var told string
	tell := newTeller(recorder(func(_ *corev1.ObjectReference, by runtime.Object, _, _, _, note string) {
		if told = note; by != nil {
			t.Errorf("it is by %v", by)
		}
	}))
	secret := &corev1.ObjectReference{Kind: "Secret", Name: "s"}
	for what, tc := range map[string]struct{ note, begins string }{
		"short":         {"100% of it: %s", "100% of it: %s"},
		"wide":          {"refused: " + strings.Repeat("ä", 1000), "refused: ää"},
		"wider":         {strings.Repeat("€", 1000) + "; see there", "€€"},
		"of four bytes": {strings.Repeat("🚧", 1000), "🚧🚧"},
	} {
		tell(secret, nil, corev1.EventTypeWarning, "Reason", "Act", tc.note)
		if len(told) > most || !utf8.ValidString(told) || !strings.HasPrefix(told, tc.begins) || len(tc.note) > most && len(told) < most*9/10 {
			t.Errorf("%s: %d bytes: %q", what, len(told), told)
		}
	}
}

// eventLog is an API server's events.
type eventLog struct {
	mu   sync.Mutex
	made []*eventsv1.Event
	// again counts those that only say that one happened again.
	again int
}

func (l *eventLog) Create(_ context.Context, e *eventsv1.Event) (*eventsv1.Event, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.made = append(l.made, e)
	return e, nil
}

func (l *eventLog) Update(ctx context.Context, e *eventsv1.Event) (*eventsv1.Event, error) {
	return l.Create(ctx, e)
}

func (l *eventLog) Patch(_ context.Context, e *eventsv1.Event, _ []byte) (*eventsv1.Event, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.again++
	return e, nil
}

// read returns what people read of all that was told within minutes, of a reason: as
// client-go's recorder has it.
func (told tellings) read(t *testing.T, reason string) (notes []string) {
	t.Helper()
	var log eventLog
	synctest.Test(t, func(t *testing.T) {
		broadcaster := events.NewBroadcaster(&log)
		if err := broadcaster.StartRecordingToSinkWithContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		tell := newTeller(broadcaster.NewRecorder(newScheme(), "bulkhead-operator"))
		for _, again := range told {
			again(tell)
			synctest.Wait()
		}
		broadcaster.Shutdown()
	})
	if log.again > 0 {
		t.Errorf("%d of %d events are told as others that happened again", log.again, len(told))
	}
	for _, e := range log.made {
		if e.Reason == reason {
			notes = append(notes, e.Note)
		}
		if e.Regarding.ResourceVersion == "" {
			t.Errorf("an event is about no version of %s %s: %s", e.Regarding.Kind, e.Regarding.Name, e.Note)
		}
	}
	return notes
}

// tellings are what was told, to be told again.
type tellings []func(teller)

func (told *tellings) teller() teller {
	return func(about, by *corev1.ObjectReference, kind, reason, action, note string) {
		*told = append(*told, func(tell teller) { tell(about, by, kind, reason, action, note) })
	}
}

// An owner reads what is so now, once, however much of what was written before isn't in
// the operator's cache yet.
func TestOwnersReadWhatIsSo(t *testing.T) {
	r := newRolling(t)
	var told tellings
	r.w.events = told.teller()
	var cached *v1alpha1.TenantProxyList
	r.w.Client = interceptor.NewClient(r.WithWatch, interceptor.Funcs{List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, options ...client.ListOption) error {
		if l, ok := list.(*v1alpha1.TenantProxyList); ok && cached != nil {
			cached.DeepCopyInto(l)
			return nil
		}
		return c.List(ctx, list, options...)
	}})
	says := func(message string, pods int32) {
		t.Helper()
		r.report(func(s *v1alpha1.NodeProxyStatus) {
			s.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Weight: pods, Rejected: []v1alpha1.RejectedResource{{Type: "Cluster", Name: "c", Message: message}}}}
		})
		r.must(r.syncReport(t.Context(), "n1"))
		r.must(r.w.writeTenant(t.Context(), "a"))
	}
	says("the first", 1)
	cached = &v1alpha1.TenantProxyList{}
	r.must(r.List(t.Context(), cached))
	says("the second", 1)
	says("the third", 1)
	says("the third", 2)
	cached = nil
	says("the third", 3)
	notes := told.read(t, "ConfigRejected")
	if !slices.EqualFunc(notes, []string{"the first", "the second", "the third"}, strings.Contains) {
		t.Errorf("an owner reads %q", notes)
	}
}

// So does who runs the mesh: of each namespace that bypasses it, and that is left behind,
// though all are at the same moment.
func TestEachNamespaceIsRead(t *testing.T) {
	topology := newTopology("t", "mesh")
	c := newCluster(t, topology, newNamespace("a", "mesh"), newNamespace("b", "mesh"))
	w := c.writer()
	var told tellings
	w.events = told.teller()
	check := func(reason string, want ...string) {
		t.Helper()
		notes := told.read(t, reason)
		slices.Sort(notes)
		if told = nil; !slices.EqualFunc(notes, want, strings.HasPrefix) {
			t.Errorf("%s reads %q, want %q", reason, notes, want)
		}
	}
	bypass := func(bypasses ...v1alpha1.EmergencyBypass) {
		t.Helper()
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(topology), topology); err != nil {
			t.Fatal(err)
		}
		topology.Spec.EmergencyBypass = bypasses
		c.change(topology)
		if err := w.writeTopology(t.Context(), "t"); err != nil {
			t.Fatal(err)
		}
	}
	bypass(v1alpha1.EmergencyBypass{Namespace: "a", RequestedBy: "eve", Reason: "proxies crash"}, v1alpha1.EmergencyBypass{Namespace: "b", RequestedBy: "eve", Reason: "proxies crash"})
	check(reasonBypassOn, "namespace a ", "namespace b ")
	bypass()
	check(reasonBypassOff, "namespace a ", "namespace b ")

	rollout := v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}}
	if err := c.Create(t.Context(), &rollout); err != nil {
		t.Fatal(err)
	}
	left := func(tenant string) v1alpha1.HeldBackTenant {
		return v1alpha1.HeldBackTenant{Tenant: tenant, Node: "n1", Reason: "Crashed", Message: "it did"}
	}
	if err := w.writeRolloutStatus(t.Context(), &rollout, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Step: 1,
		HeldBack: []v1alpha1.HeldBackTenant{left("a"), left("b.sa.reviews")}}); err != nil {
		t.Fatal(err)
	}
	all := slices.Clone(told)
	check(reasonHeldBack, "a stays at the version before", "b.sa.reviews stays at the version before")
	told = all
	check(reasonRolloutPhase, "Progressing")
}

// So does the owner of a pod whose annotation is mended, in vain, at once.
func TestOwnersOfPodsReadWhatIsSo(t *testing.T) {
	topology, pod := newTopology("t", "mesh"), newPod("one", "n1", "10.0.1.1")
	topology.Spec.PodExclusions = v1alpha1.PodExclusionsAllow
	c := newCluster(t, topology, newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), pod)
	var told tellings
	c.event = func(pod *corev1.ObjectReference, reason, note string) {
		told.teller()(pod, nil, corev1.EventTypeWarning, reason, "Refuse", note)
	}
	for _, value := range []string{"postgres", "psql"} {
		pod.Annotations = map[string]string{v1alpha1.AnnotationExcludeOutbound: value}
		c.change(pod)
	}
	if notes := told.read(t, "ExclusionsInvalid"); !slices.EqualFunc(notes, []string{`("postgres")`, `("psql")`}, strings.Contains) {
		t.Errorf("an owner reads %q", notes)
	}
}
