package translate

import (
	"slices"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// RouteController is the name under which the mesh speaks in the status of routes.
const RouteController gatewayv1.GatewayController = "mesh.bulkhead.dev/operator"

// maxParents is how many entries the status of a route can have.
const maxParents = 32

// RouteStatus is a route's status with our say about each of its parents in it, as
// far as there is an outcome. Others' entries stay, and so does the transition time of a condition whose
// status does.
func RouteStatus(r *Route, outcomes []Outcome, had []gatewayv1.RouteParentStatus, now metav1.Time) []gatewayv1.RouteParentStatus {
	var out []gatewayv1.RouteParentStatus
	for _, p := range had {
		if p.ControllerName != RouteController {
			out = append(out, p)
		}
	}
	for _, p := range r.Parents {
		i := slices.IndexFunc(outcomes, func(o Outcome) bool { return equality.Semantic.DeepEqual(o.Parent, p.Ref) })
		if i < 0 || len(out) == maxParents {
			continue
		}
		o := outcomes[i]
		accepted := metav1.Condition{
			Type: string(gatewayv1.RouteConditionAccepted), Status: metav1.ConditionTrue, Reason: string(gatewayv1.RouteReasonAccepted), Message: o.note, ObservedGeneration: r.Generation,
		}
		if !o.accepted.isZero() {
			accepted.Status, accepted.Reason, accepted.Message = metav1.ConditionFalse, o.accepted.reason, o.accepted.message
		}
		resolved := metav1.Condition{
			Type: string(gatewayv1.RouteConditionResolvedRefs), Status: metav1.ConditionTrue, Reason: string(gatewayv1.RouteReasonResolvedRefs), Message: "all backends are known", ObservedGeneration: r.Generation,
		}
		if !o.resolved.isZero() {
			resolved.Status, resolved.Reason, resolved.Message = metav1.ConditionFalse, o.resolved.reason, o.resolved.message
		}
		var before []metav1.Condition
		if i := slices.IndexFunc(had, func(p gatewayv1.RouteParentStatus) bool {
			return p.ControllerName == RouteController && equality.Semantic.DeepEqual(p.ParentRef, o.Parent)
		}); i >= 0 {
			before = had[i].Conditions
		}
		out = append(out, gatewayv1.RouteParentStatus{ParentRef: o.Parent, ControllerName: RouteController, Conditions: conditions(before, now, accepted, resolved)})
	}
	return out
}
