package controllers

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corev1ac "k8s.io/client-go/applyconfigurations/core/v1"
	metav1ac "k8s.io/client-go/applyconfigurations/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
)

// writeService tells a Service that proxies can't serve it as it is written, in a
// condition that goes when that is over.
func (w *writer) writeService(ctx context.Context, key types.NamespacedName) error {
	var s corev1.Service
	if err := w.Get(ctx, key, &s); apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read Service %s: %w", key, err)
	}
	problem, refusals := w.mesh.serviceProblem(key)
	want := translate.ServiceCondition(&s, problem, refusals, metav1.NewTime(w.now()))
	have := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionServed)
	if equality.Semantic.DeepEqual(have, want) {
		return nil
	}
	c := corev1ac.Service(key.Name, key.Namespace).WithStatus(corev1ac.ServiceStatus())
	if want != nil {
		c.Status.WithConditions(metav1ac.Condition().WithType(want.Type).WithStatus(want.Status).WithReason(want.Reason).
			WithMessage(want.Message).WithLastTransitionTime(want.LastTransitionTime))
	}
	err := w.Status().Apply(ctx, c, client.FieldOwner(FieldManager), client.ForceOwnership)
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("apply status of Service %s: %w", key, err)
	}
	if want != nil && (have == nil || have.Reason != want.Reason) {
		w.tell(&s, "Service", warning(want.Reason, want.Message))
	}
	return nil
}
