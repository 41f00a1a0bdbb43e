package translate

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

func TestBypassStatus(t *testing.T) {
	now, before := metav1.NewTime(born), metav1.NewTime(born.Add(-time.Hour))
	view := func(namespace string, member bool, pods, bypassed int) BypassView {
		return BypassView{EmergencyBypass: v1alpha1.EmergencyBypass{Namespace: namespace, RequestedBy: "eve", Reason: "proxies crash"}, Member: member, Pods: pods, Bypassed: bypassed}
	}
	for _, test := range []struct {
		name            string
		views           []BypassView
		status          metav1.ConditionStatus
		reason, message string
		on              int
	}{
		{"none", nil, metav1.ConditionFalse, ReasonOff, "behind their proxies", 0},
		{"on", []BypassView{view("shop", true, 3, 3)}, metav1.ConditionTrue, ReasonInForce, "in plain text: shop (by eve: proxies crash)", 1},
		{"begins", []BypassView{view("shop", true, 3, 2), view("web", true, 1, 1)}, metav1.ConditionTrue, ReasonProgressing, "not on all nodes yet: shop", 2},
		{"not a member", []BypassView{view("shop", false, 0, 0)}, metav1.ConditionFalse, ReasonNotInMesh, "nothing is bypassed; not a namespace of this MeshTopology: shop", 0},
		{"one of two", []BypassView{view("shop", false, 0, 0), view("web", true, 1, 1)}, metav1.ConditionTrue, ReasonInForce, "not a namespace of this MeshTopology: shop", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			topology := newTopology("t", 0, "td", "a")
			topology.Status.Bypasses = []v1alpha1.BypassStatus{{Namespace: "shop", Since: before}}
			s := MeshTopologyStatus(&topology, NewTopologies([]v1alpha1.MeshTopology{topology}, "td", nil), TopologyInput{TrustDomain: "td", Bypasses: test.views}, now)
			wantCondition(t, s.Conditions, v1alpha1.ConditionEmergencyBypass, test.status, test.reason, test.message)
			if len(s.Bypasses) != test.on {
				t.Errorf("bypasses %+v, want %d", s.Bypasses, test.on)
			}
			for _, b := range s.Bypasses {
				want := now
				if b.Namespace == "shop" {
					want = before
				}
				if !b.Since.Equal(&want) || b.RequestedBy != "eve" || b.Reason == "" {
					t.Errorf("bypass %+v, want since %s", b, want)
				}
			}
		})
	}
	nodes := []NodeView{{Node: "n1", Pods: 2, Reported: true, Status: v1alpha1.NodeTenantStatus{Ready: true, BypassedPods: 1}}}
	on := TenantProxyStatus(model.NamespaceTenant("shop"), Membership{Topology: "t", Bypass: true}, nodes, nil, now)
	wantCondition(t, on.Conditions, v1alpha1.ConditionEmergencyBypass, metav1.ConditionTrue, ReasonInForce, "1 of 2 pods bypass the mesh")
	off := TenantProxyStatus(model.NamespaceTenant("shop"), Membership{Topology: "t"}, nodes, nil, now)
	wantCondition(t, off.Conditions, v1alpha1.ConditionEmergencyBypass, metav1.ConditionFalse, ReasonOff, "")
}
