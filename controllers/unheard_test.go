package controllers

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
)

// becomes has the node be ready or not, since then.
func (r *rolling) becomes(ready corev1.ConditionStatus, since time.Time) {
	r.t.Helper()
	var node corev1.Node
	r.must(r.Get(r.t.Context(), client.ObjectKey{Name: "n1"}, &node))
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready, LastTransitionTime: metav1.NewTime(since)}}
	r.must(r.Status().Update(r.t.Context(), &node))
	r.must(r.syncNode(r.t.Context(), "n1"))
}

// says has the node's agent report a tenant, knowing its node to be ready since then.
func (r *rolling) says(tenant v1alpha1.NodeTenantStatus, since time.Time) {
	r.t.Helper()
	at := metav1.NewTime(since)
	r.report(func(s *v1alpha1.NodeProxyStatus) {
		s.ReadySince, s.Tenants = &at, []v1alpha1.NodeTenantStatus{tenant}
	})
	r.must(r.syncReport(r.t.Context(), "n1"))
}

// A proxy on a node that goes isn't told to its owner as one that serves, nor to who
// bounds it or runs the mesh, and it is again when the node's agent has spoken: each at
// once.
func TestOwnersAreToldOfNodesUnheard(t *testing.T) {
	r := newRolling(t)
	r.triggers.tenants.delay, r.triggers.policies.delay, r.triggers.status.delay = 0, 0, 0
	start(t, &r.triggers.tenants)
	start(t, &r.triggers.policies)
	start(t, &r.triggers.status)
	policy := &v1alpha1.IsolationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p"}}
	r.must(r.Create(t.Context(), policy))
	limits := translate.Limits([]v1alpha1.IsolationPolicy{*policy}, r.namespaces["a"].Bounds)
	serves := v1alpha1.NodeTenantStatus{Name: "a", Ready: true, Limits: limits}
	type status = metav1.ConditionStatus
	want := func(what string, serving int32, reason string, ready, enforced status) {
		t.Helper()
		if handle(r.cluster, &r.triggers.tenants, r.w.writeTenant) == 0 {
			t.Errorf("%s: the owner isn't told anew", what)
		}
		var got v1alpha1.TenantProxy
		r.must(r.Get(t.Context(), client.ObjectKey{Namespace: "a", Name: "a"}, &got))
		if s := got.Status; s.ReadyProxies != serving || len(s.Nodes) != 1 || !strings.Contains(s.Nodes[0].Reason, reason) || reason == "" && s.Nodes[0].Reason != "" {
			t.Errorf("%s: %d serve, %+v", what, s.ReadyProxies, s.Nodes)
		}
		if c := meta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionReady); c == nil || c.Status != ready || !strings.Contains(c.Message, reason) {
			t.Errorf("%s: TenantProxy has %+v", what, c)
		}
		if handle(r.cluster, &r.triggers.policies, r.w.writePolicies) == 0 || handle(r.cluster, &r.triggers.status, r.w.writeTopology) == 0 {
			t.Errorf("%s: who bounds it or runs the mesh isn't told anew", what)
		}
		handle(r.cluster, &r.triggers.tenants, func(context.Context, string) error { return nil }) // what policies asked for
		var topology v1alpha1.MeshTopology
		r.must(r.Get(t.Context(), client.ObjectKey{Name: "t"}, &topology))
		r.must(r.Get(t.Context(), client.ObjectKeyFromObject(policy), policy))
		if c := meta.FindStatusCondition(topology.Status.Conditions, v1alpha1.ConditionReady); c == nil || c.Status != ready || !strings.Contains(c.Message, reason) {
			t.Errorf("%s: MeshTopology has %+v", what, c)
		}
		if c := meta.FindStatusCondition(policy.Status.Conditions, v1alpha1.ConditionReady); c == nil || c.Status != enforced || !strings.Contains(c.Message, reason) && c.Reason != translate.ReasonNoProxies {
			t.Errorf("%s: IsolationPolicy has %+v", what, c)
		}
		if topology.Status.ReadyProxies != serving {
			t.Errorf("%s: the MeshTopology has %d that serve", what, topology.Status.ReadyProxies)
		}
	}
	r.becomes(corev1.ConditionTrue, born)
	r.says(serves, born)
	want("it serves", 1, "", metav1.ConditionTrue, metav1.ConditionTrue)
	r.becomes(corev1.ConditionUnknown, born.Add(time.Minute))
	want("its node is away", 0, "isn't Ready since", metav1.ConditionUnknown, metav1.ConditionTrue)
	r.becomes(corev1.ConditionTrue, born.Add(time.Hour))
	want("its node is back", 0, "has said nothing since", metav1.ConditionFalse, metav1.ConditionFalse)
	r.says(serves, born.Add(time.Hour))
	want("its agent has spoken", 1, "", metav1.ConditionTrue, metav1.ConditionTrue)
	// Its NodeProxy goes after it, and its pods much later.
	r.must(r.Delete(t.Context(), newNode("n1")))
	r.must(r.syncNode(t.Context(), "n1"))
	want("it is removed", 0, noSuchNode, metav1.ConditionUnknown, metav1.ConditionFalse)
}

// A node that was away and is removed isn't judged by what it said last, however long ago
// that is: its NodeProxy stays for a while, and is nobody's to write to.
func TestNodeThatIsRemoved(t *testing.T) {
	r := newRolling(t)
	r.triggers.rollouts.delay = 0
	start(t, &r.triggers.rollouts)
	r.decide()
	at := metav1.NewTime(born)
	r.report(func(s *v1alpha1.NodeProxyStatus) {
		s.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Ready: true, Generations: []v1alpha1.GenerationStatus{
			generation(v1alpha1.RoleFirst, "1.40.0", 0), {Generation: 1, Version: "1.41.0", Role: v1alpha1.RoleCanary, StartedAt: &at}}}}
	})
	r.becomes(corev1.ConditionUnknown, born)
	r.clock = r.clock.Add(time.Hour) // far beyond readyWithin
	if s := r.decide(); s.Verdict != nil || s.Phase != v1alpha1.RolloutProgressing || !strings.Contains(s.Message, "n1 (the node isn't Ready") {
		t.Fatalf("its node is away: %s, %+v: %s", s.Phase, s.Verdict, s.Message)
	}
	handle(r.cluster, &r.triggers.rollouts, func(context.Context, struct{}) error { return nil })
	r.must(r.Delete(t.Context(), newNode("n1")))
	r.must(r.syncNode(t.Context(), "n1"))
	if handle(r.cluster, &r.triggers.rollouts, func(context.Context, struct{}) error { return nil }) == 0 {
		t.Error("its node is removed, and nothing is decided anew")
	}
	before := r.nodeProxy("n1")
	if s := r.decide(); s.Verdict != nil || s.Phase != v1alpha1.RolloutWaiting || strings.Contains(s.Message, "n1") {
		t.Errorf("its node is removed: %s, %+v: %s", s.Phase, s.Verdict, s.Message)
	}
	r.must(r.Delete(t.Context(), &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}}))
	_, err := r.w.writeRollouts(t.Context(), struct{}{})
	r.must(err)
	if after := r.nodeProxy("n1"); after.ResourceVersion != before.ResourceVersion {
		t.Errorf("its plan was %+v, is %+v", before.Spec, after.Spec)
	}
}

// That is so whatever was known of the node.
func TestNodeThatIsRemovedUnsaid(t *testing.T) {
	r := newRolling(t)
	r.triggers.rollouts.delay, r.triggers.tenants.delay = 0, 0
	start(t, &r.triggers.rollouts)
	start(t, &r.triggers.tenants)
	r.must(r.Delete(t.Context(), newNode("n1")))
	r.must(r.syncNode(t.Context(), "n1"))
	if handle(r.cluster, &r.triggers.rollouts, func(context.Context, struct{}) error { return nil }) == 0 {
		t.Error("nothing is decided anew")
	}
	if handle(r.cluster, &r.triggers.tenants, r.w.writeTenant) == 0 {
		t.Error("the owner isn't told anew")
	}
}

// An owner whose only node goes away while an upgrade is under way, and comes back, isn't
// told that it began again.
func TestOwnersAreToldNothingNewOfNodesUnheard(t *testing.T) {
	r := newRolling(t)
	halfway := v1alpha1.NodeTenantStatus{Name: "a", Ready: true, Weight: 10, Generations: []v1alpha1.GenerationStatus{
		generation(v1alpha1.RoleFirst, "1.40.0", 0), {Generation: 1, Version: "1.41.0", Role: v1alpha1.RoleCanary, Serving: true}}}
	told := func(what, message string, want ...string) {
		t.Helper()
		r.told = nil
		r.must(r.w.writeTenant(t.Context(), "a"))
		if !slices.EqualFunc(r.told, want, strings.HasPrefix) {
			t.Errorf("%s: told is %q, want %q", what, r.told, want)
		}
		var got v1alpha1.TenantProxy
		r.must(r.Get(t.Context(), client.ObjectKey{Namespace: "a", Name: "a"}, &got))
		if u := got.Status.Upgrade; u == nil || u.Verdict != translate.UpgradeHealthy || u.Weight != 10 || !strings.Contains(u.Message, message) {
			t.Errorf("%s: %+v, want a message with %q", what, u, message)
		}
	}
	r.becomes(corev1.ConditionTrue, born)
	r.says(halfway, born)
	r.decide()
	told("under way", "10 % of new connections", "TenantProxy Normal UpgradeHealthy Shift10Percent: ")
	r.becomes(corev1.ConditionUnknown, born.Add(time.Minute))
	told("away", "how far it is here isn't known")
	r.becomes(corev1.ConditionTrue, born.Add(time.Hour))
	told("back", "how far it is here isn't known")
	r.says(halfway, born.Add(time.Hour))
	told("heard", "it serves, has not crashed")
}
