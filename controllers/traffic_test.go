package controllers

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// plan writes a node's plan and returns it.
func (c *cluster) plan1(w *writer) v1alpha1.NodeProxySpec {
	c.t.Helper()
	if err := w.writePlan(c.t.Context(), "n1"); err != nil {
		c.t.Fatal(err)
	}
	return c.nodeProxy("n1").Spec
}

// change updates an object and brings the mesh up to date.
func (c *cluster) change(o client.Object) {
	c.t.Helper()
	if err := c.Update(c.t.Context(), o); err != nil {
		c.t.Fatal(err)
	}
	if p, ok := o.(*corev1.Pod); ok {
		c.syncPodNamed(p.Name)
		return
	}
	if err := c.syncTopologies(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
	c.drain()
}

func TestPodExclusions(t *testing.T) {
	topology := newTopology("t", "mesh")
	topology.Spec.Exclusions = []v1alpha1.Exclusion{{Direction: v1alpha1.DirectionOutbound, CIDR: "192.0.2.0/24"}}
	pod := newPod("one", "n1", "10.0.1.1")
	c := newCluster(t, topology, newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), pod)
	w := c.writer()
	own := func(when string, want ...v1alpha1.Exclusion) {
		t.Helper()
		spec := c.plan1(w)
		if got := spec.Pods[0].Exclusions; !slices.Equal(got, want) {
			t.Errorf("%s: exclusions of the pod are %+v, want %+v", when, got, want)
		}
		if len(spec.Namespaces) != 1 || !slices.Equal(spec.Namespaces[0].Exclusions, topology.Spec.Exclusions) {
			t.Errorf("%s: namespaces %+v", when, spec.Namespaces)
		}
	}
	told := func(reason string) bool {
		return slices.ContainsFunc(c.refused, func(s string) bool { return strings.HasPrefix(s, "one: ") && strings.Contains(s, reason) })
	}
	c.triggers.plans.delay = 0
	plans := start(t, &c.triggers.plans)
	annotate := func(value string) {
		t.Helper()
		pod.Annotations = map[string]string{v1alpha1.AnnotationExcludeOutbound: value}
		c.change(pod)
	}
	own("without an annotation")
	annotate("5432")
	own("without leave")
	if !told("podExclusions: Deny") {
		t.Errorf("events %q don't say that it isn't allowed", c.refused)
	}
	topology.Spec.PodExclusions = v1alpha1.PodExclusionsAllow
	c.change(topology)
	port := v1alpha1.Exclusion{Direction: v1alpha1.DirectionOutbound, Port: 5432}
	own("allowed", port)
	for plans.Len() > 0 {
		key, _ := plans.Get()
		plans.Done(key)
	}
	if annotate("5433"); plans.Len() == 0 {
		t.Error("the node's plan isn't made anew")
	}
	port.Port = 5433
	own("changed", port)
	annotate("postgres")
	own("changed to nonsense", port)
	if !told(`entry 1 ("postgres")`) {
		t.Errorf("events %q don't say what is wrong", c.refused)
	}
	// Another replica that takes over, which never saw the annotation that was good.
	other := &cluster{t: t, WithWatch: c.WithWatch, mesh: newMesh(c.WithWatch, c.store, c.exempt, c.log)}
	if err := other.load(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := other.pod("one").Exclusions; !slices.Equal(got, []v1alpha1.Exclusion{port}) {
		t.Errorf("with another replica the pod's exclusions are %+v", got)
	}
	delete(pod.Annotations, v1alpha1.AnnotationExcludeOutbound)
	c.change(pod)
	own("taken away")
}

// A namespace can close itself to plain text, but not open what the mesh closes.
func TestPlainText(t *testing.T) {
	topology := newTopology("t", "mesh")
	policy := &v1alpha1.IsolationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p"}, Spec: v1alpha1.IsolationPolicySpec{PlainText: v1alpha1.PlainTextStrict}}
	c := newCluster(t, topology, newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("one", "n1", "10.0.1.1"))
	w := c.writer()
	strict := func(when string, want bool) {
		t.Helper()
		spec := c.plan1(w)
		if got := len(spec.Namespaces) == 1 && spec.Namespaces[0].PlainText == v1alpha1.PlainTextStrict; got != want {
			t.Errorf("%s: namespaces %+v", when, spec.Namespaces)
		}
	}
	strict("by default", false)
	if err := c.Create(t.Context(), policy); err != nil {
		t.Fatal(err)
	}
	strict("by policy", true)
	if err := c.Delete(t.Context(), policy); err != nil {
		t.Fatal(err)
	}
	strict("without the policy", false)
	topology.Spec.PlainText = v1alpha1.PlainTextStrict
	c.change(topology)
	strict("by the topology", true)
}

func TestEmergencyBypass(t *testing.T) {
	topology := newTopology("t", "mesh")
	c := newCluster(t, topology, newNamespace("a", "mesh"), newNamespace("b", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("one", "n1", "10.0.1.1"),
		newService("web", "10.96.0.1", corev1.ServicePort{Name: "http", Port: 80}), newSlice("web", discoveryv1.EndpointPort{Name: new("http"), Port: new(int32(8080))}, "10.0.1.1"))
	w := c.writer()
	var events []string
	w.events = func(o, _ *corev1.ObjectReference, _, reason, _, note string) {
		events = append(events, o.Kind+" "+o.Name+" "+reason+": "+note)
	}
	status := func() (tenant v1alpha1.TenantProxy) {
		t.Helper()
		c.plan1(w)
		for _, err := range []error{c.syncReport(t.Context(), "n1"), w.writeTenant(t.Context(), "a"), w.writeTopology(t.Context(), "t")} {
			if err != nil {
				t.Fatal(err)
			}
		}
		for _, o := range []client.Object{topology, &tenant} {
			key := client.ObjectKey{Name: "t"}
			if o == client.Object(&tenant) {
				key = client.ObjectKey{Namespace: "a", Name: "a"}
			}
			if err := c.Get(t.Context(), key, o); err != nil {
				t.Fatal(err)
			}
		}
		return tenant
	}
	// seen is what others find at the pod's address.
	seen := func() (translate.Standing, model.Identity) {
		c.mu.Lock()
		defer c.mu.Unlock()
		return directory{c.mesh}.ByAddr(addrs("10.0.1.1")[0])
	}
	status()
	if n := testutil.CollectAndCount(c.mesh, "bulkhead_emergency_bypass"); n != 0 {
		t.Errorf("%d series while nothing is bypassed", n)
	}
	topology.Spec.EmergencyBypass = []v1alpha1.EmergencyBypass{{Namespace: "a", RequestedBy: "eve", Reason: "proxies crash"}}
	if err := c.Update(t.Context(), topology); err != nil {
		t.Fatal(err)
	}
	if err := c.syncTopologies(t.Context()); err != nil {
		t.Fatal(err)
	}
	handle(c, &c.triggers.namespaces, c.syncNamespace)
	handle(c, &c.triggers.pods, func(ctx context.Context, key types.NamespacedName) error { _, err := c.syncPod(ctx, key); return err })
	if c.triggers.services.queue.Len() != 1 {
		t.Error("the service isn't looked at again, so that its clients still look for an identity")
	}
	c.drain()
	tenant := status()
	if spec := c.nodeProxy("n1").Spec; len(spec.Namespaces) != 1 || !spec.Namespaces[0].EmergencyBypass || len(spec.Pods) != 1 {
		t.Errorf("plan %+v", spec)
	}
	if standing, id := seen(); standing != translate.Outside || !id.IsZero() {
		t.Errorf("others look for %v at its address, as of %d", id, standing)
	}
	if p := c.pod("one"); p.Identity.IsZero() {
		t.Error("its own proxy has lost its identity")
	}
	wantMetric := "# HELP bulkhead_emergency_bypass 1 for each namespace that an emergency bypass takes past the mesh; there is no series while none is on.\n# TYPE bulkhead_emergency_bypass gauge\nbulkhead_emergency_bypass{namespace=\"a\",topology=\"t\"} 1\n"
	if err := testutil.CollectAndCompare(c.mesh, strings.NewReader(wantMetric), "bulkhead_emergency_bypass"); err != nil {
		t.Error(err)
	}
	if !meta.IsStatusConditionTrue(topology.Status.Conditions, v1alpha1.ConditionEmergencyBypass) || !meta.IsStatusConditionTrue(tenant.Status.Conditions, v1alpha1.ConditionEmergencyBypass) {
		t.Errorf("topology %+v, tenant %+v", topology.Status.Conditions, tenant.Status.Conditions)
	}
	if b := topology.Status.Bypasses; len(b) != 1 || b[0].RequestedBy != "eve" || b[0].Pods != 1 || b[0].BypassedPods != 0 || !b[0].Since.Time.Equal(born) {
		t.Errorf("bypasses %+v", b)
	}
	np := c.nodeProxy("n1")
	np.Status.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Ready: true, BypassedPods: 1}}
	if err := c.Status().Update(t.Context(), np); err != nil {
		t.Fatal(err)
	}
	w.now = func() time.Time { return born.Add(time.Hour) }
	status()
	if b := topology.Status.Bypasses; len(b) != 1 || b[0].BypassedPods != 1 || !b[0].Since.Time.Equal(born) {
		t.Errorf("later: bypasses %+v", b)
	}
	topology.Spec.EmergencyBypass = nil
	c.change(topology)
	status()
	if standing, id := seen(); standing != translate.Member || id.IsZero() {
		t.Errorf("afterwards others look for %v at its address, as of %d", id, standing)
	}
	if n := testutil.CollectAndCount(c.mesh, "bulkhead_emergency_bypass"); n != 0 || len(topology.Status.Bypasses) != 0 {
		t.Errorf("afterwards: %d series, bypasses %+v", n, topology.Status.Bypasses)
	}
	var reasons []string
	for _, e := range events {
		name, note, _ := strings.Cut(e, ": ")
		reasons = append(reasons, name)
		if strings.HasPrefix(name, "MeshTopology") && !strings.Contains(note, "by order of eve") {
			t.Errorf("event %q doesn't say who", e)
		}
	}
	want := []string{"TenantProxy a EmergencyBypassOn", "MeshTopology t EmergencyBypassOn", "TenantProxy a EmergencyBypassOff", "MeshTopology t EmergencyBypassOff"}
	if !slices.Equal(reasons, want) {
		t.Errorf("events %q, want %q", reasons, want)
	}
}
