package controllers

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
)

// writeRoute tells a route what came of it at each of its parents. The list of
// parents is everyone's, so it is written only onto the version that was read.
func (w *writer) writeRoute(ctx context.Context, key translate.RouteKey) (time.Duration, error) {
	o, route, err := readRoute(ctx, w.mesh, key)
	if err != nil || o == nil {
		return 0, err
	}
	outcomes, known := w.mesh.routeOutcomes(route)
	if !known {
		return 0, nil // called again when it is
	}
	before := o.DeepCopyObject().(client.Object)
	status := routeStatus(o)
	had := status.Parents
	status.Parents = translate.RouteStatus(route, outcomes, had, metav1.NewTime(w.now()))
	if equality.Semantic.DeepEqual(had, status.Parents) {
		return 0, nil
	}
	if status.Parents == nil {
		status.Parents = []gatewayv1.RouteParentStatus{} // it is required
	}
	err = w.Status().Patch(ctx, o, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}), client.FieldOwner(FieldManager))
	switch {
	case apierrors.IsNotFound(err):
		return 0, nil
	case apierrors.IsConflict(err):
		return 100 * time.Millisecond, nil // the newer version is on the way to us
	case err != nil:
		return 0, fmt.Errorf("patch status of %s: %w", key, err)
	}
	return 0, nil
}

func routeStatus(o client.Object) *gatewayv1.RouteStatus {
	if g, ok := o.(*gatewayv1.GRPCRoute); ok {
		return &g.Status.RouteStatus
	}
	return &o.(*gatewayv1.HTTPRoute).Status.RouteStatus
}
