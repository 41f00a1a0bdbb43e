package controllers

import (
	"context"
	"errors"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// costDelay gathers what the nodes of a namespace say into one write: with 5,000
	// namespaces, 83 a second.
	costDelay = time.Minute
	// costManager owns status.cost of TenantProxies, and nothing else.
	costManager = FieldManager + "-cost"
)

// writeCosts tells the tenants of a namespace what they have taken.
func (w *writer) writeCosts(ctx context.Context, namespace string) error {
	_, views := w.mesh.views(namespace)
	var errs []error
	for tenant, nodes := range views {
		errs = append(errs, w.writeCost(ctx, namespace, tenant, nodes))
	}
	return errors.Join(errs...)
}

func (w *writer) writeCost(ctx context.Context, namespace string, tenant model.Tenant, nodes []translate.NodeView) error {
	name := translate.TenantProxyName(tenant)
	var have v1alpha1.TenantProxy
	if err := w.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &have); apierrors.IsNotFound(err) {
		return nil // its next reading comes soon enough
	} else if err != nil {
		return fmt.Errorf("read TenantProxy %s/%s: %w", namespace, name, err)
	}
	// have may be older than what was written last: what is added then is the more.
	cost := translate.TenantCost(namespace, nodes, have.Status.Cost, metav1.NewTime(w.now()))
	if cost == nil || equality.Semantic.DeepEqual(have.Status.Cost, cost) {
		return nil
	}
	want := v1alpha1.TenantProxy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Status: v1alpha1.TenantProxyStatus{Cost: cost}}
	return w.applyStatusAs(ctx, &want, "TenantProxy", costManager)
}
