package translate

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Reasons of the condition EmergencyBypass, beside Progressing and NotInMesh.
const (
	ReasonInForce = "InForce"
	ReasonOff     = "Off"
)

// BypassView is a bypass that a topology asks for, and what came of it.
type BypassView struct {
	v1alpha1.EmergencyBypass
	// Member says whether the namespace is the topology's.
	Member bool
	// Pods of the namespace in the mesh, and those that nodes say are bypassed.
	Pods, Bypassed int
}

// bypassStatus keeps since when a namespace has been bypassed.
func bypassStatus(had []v1alpha1.BypassStatus, views []BypassView, now metav1.Time) ([]v1alpha1.BypassStatus, metav1.Condition) {
	c := metav1.Condition{Type: v1alpha1.ConditionEmergencyBypass, Status: metav1.ConditionFalse, Reason: ReasonOff, Message: "all namespaces are behind their proxies"}
	var out []v1alpha1.BypassStatus
	var on, waiting, strangers []string
	for _, v := range views {
		if !v.Member {
			strangers = append(strangers, v.Namespace)
			continue
		}
		s := v1alpha1.BypassStatus{Namespace: v.Namespace, RequestedBy: v.RequestedBy, Reason: v.Reason, Since: now, Pods: int32(v.Pods), BypassedPods: int32(v.Bypassed)}
		for _, old := range had {
			if old.Namespace == v.Namespace {
				s.Since = old.Since
			}
		}
		out = append(out, s)
		on = append(on, fmt.Sprintf("%s (by %s: %s)", v.Namespace, v.RequestedBy, v.Reason))
		if v.Bypassed < v.Pods {
			waiting = append(waiting, v.Namespace)
		}
	}
	switch {
	case len(waiting) > 0:
		c.Status, c.Reason = metav1.ConditionTrue, ReasonProgressing
		c.Message = fmt.Sprintf("these namespaces bypass the mesh, in plain text: %s; not on all nodes yet: %s", listed(on), listed(waiting))
	case len(on) > 0:
		c.Status, c.Reason = metav1.ConditionTrue, ReasonInForce
		c.Message = "these namespaces bypass the mesh, in plain text: " + listed(on)
	case len(strangers) > 0:
		c.Reason, c.Message = ReasonNotInMesh, "nothing is bypassed"
	}
	if len(strangers) > 0 {
		c.Message += "; not a namespace of this MeshTopology: " + listed(strangers)
	}
	return out, c
}

// tenantBypass tells the owner of a namespace of its bypass.
func tenantBypass(m Membership, nodes []NodeView) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionEmergencyBypass, Status: metav1.ConditionFalse, Reason: ReasonOff, Message: "the pods are behind their proxies"}
	if m.Bypass {
		bypassed, pods := 0, 0
		for _, n := range nodes {
			pods += n.Pods
			bypassed += int(n.Status.BypassedPods)
		}
		c.Status, c.Reason = metav1.ConditionTrue, ReasonInForce
		c.Message = fmt.Sprintf("new connections of %d of %d pods bypass the mesh, in plain text; MeshTopology %s says who asked for it, and why", bypassed, pods, m.Topology)
	}
	return c
}
