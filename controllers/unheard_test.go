package controllers

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// A proxy on a node that goes isn't told to its owner as one that serves, and it is
// again when the node's agent has spoken: each at once.
func TestOwnersAreToldOfNodesUnheard(t *testing.T) {
	r := newRolling(t)
	r.triggers.tenants.delay = 0
	start(t, &r.triggers.tenants)
	var node corev1.Node
	r.must(r.Get(t.Context(), client.ObjectKey{Name: "n1"}, &node))
	becomes := func(ready corev1.ConditionStatus, at time.Time) {
		t.Helper()
		node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready, LastTransitionTime: metav1.NewTime(at)}}
		r.must(r.Status().Update(t.Context(), &node))
		r.must(r.syncNode(t.Context(), "n1"))
	}
	says := func(since time.Time) {
		t.Helper()
		at := metav1.NewTime(since)
		r.report(func(s *v1alpha1.NodeProxyStatus) {
			s.ReadySince = &at
			s.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Ready: true}}
		})
		r.must(r.syncReport(t.Context(), "n1"))
	}
	want := func(what string, serving int32, reason string) {
		t.Helper()
		if handle(r.cluster, &r.triggers.tenants, r.w.writeTenant) == 0 {
			t.Errorf("%s: the owner isn't told anew", what)
		}
		var got v1alpha1.TenantProxy
		r.must(r.Get(t.Context(), client.ObjectKey{Namespace: "a", Name: "a"}, &got))
		if s := got.Status; s.ReadyProxies != serving || len(s.Nodes) != 1 || !strings.Contains(s.Nodes[0].Reason, reason) || reason == "" && s.Nodes[0].Reason != "" {
			t.Errorf("%s: %d serve, %+v", what, s.ReadyProxies, s.Nodes)
		}
	}
	becomes(corev1.ConditionTrue, born)
	says(born)
	want("it serves", 1, "")
	becomes(corev1.ConditionUnknown, born.Add(time.Minute))
	want("its node is away", 0, "isn't Ready since")
	becomes(corev1.ConditionTrue, born.Add(time.Hour))
	want("its node is back", 0, "has said nothing since")
	says(born.Add(time.Hour))
	want("its agent has spoken", 1, "")
}
