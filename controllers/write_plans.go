package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
)

// FieldManager is the name under which the operator owns fields.
const FieldManager = "bulkhead-operator"

// writer is what the leader's controllers write with.
type writer struct {
	client.Client // reads from the cache
	mesh          *mesh
	keeper        *keeper
	jwts          *jwtKeeper
	namespace     string
	now           func() time.Time
	// events are told so. Default: not.
	events teller
}

// reasonCrowded is of events about a node with hardly any room for tenants.
const reasonCrowded = "Crowded"

// writePlan brings a node's NodeProxy up to date.
func (w *writer) writePlan(ctx context.Context, node string) error {
	var have v1alpha1.NodeProxy
	err := w.Get(ctx, client.ObjectKey{Name: node}, &have)
	exists := err == nil
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("read NodeProxy %s: %w", node, err)
	}
	plan := w.mesh.plan(node)
	if !plan.known || !plan.node.Linux {
		if !exists {
			return nil
		}
		if err := w.Delete(ctx, &have); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("delete NodeProxy %s: %w", node, err)
		}
		return nil
	}
	rollouts, err := w.rollouts(ctx, w.Client)
	if err != nil {
		return err
	}
	plan.shared.Version = translate.RolledOutVersion(plan.shared.Version, "", rollouts)
	left := translate.HeldBackTenants(rollouts)
	for namespace, p := range plan.namespaces {
		p.HeldBack = map[string]string{}
		for _, tenant := range left {
			p.HeldBack[tenant] = translate.RolledOutVersion(p.Version, tenant, rollouts)
		}
		p.Version = translate.RolledOutVersion(p.Version, "", rollouts)
		policies, err := w.policies(ctx, namespace)
		if err != nil {
			return err
		}
		p.Limits, p.Standby, p.Strict = translate.Limits(policies, p.Bounds), translate.Standby(policies, p.Bounds), p.Strict || translate.IsStrict(policies)
		p.Drain = translate.Drain(policies)
		plan.namespaces[namespace] = p
	}
	// One that isn't Ready isn't asked to say anything.
	readySince := have.Spec.ReadySince
	if at := plan.node.ReadySince; !at.IsZero() {
		readySince = &metav1.Time{Time: at}
	}
	had := map[string]bool{}
	for _, t := range have.Spec.Tenants {
		had[t.Name] = true
	}
	if crowded := translate.Crowded(plan.members); crowded != "" && exists {
		w.tell(&have, "NodeProxy", warning(reasonCrowded, crowded))
	}
	want := v1alpha1.NodeProxy{
		ObjectMeta: metav1.ObjectMeta{Name: node, OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node, UID: types.UID(plan.node.UID)}}},
		Spec: translate.NodeProxySpec(translate.NodePlan{TrustDomain: plan.trustDomain, ReadySince: readySince, Redirection: plan.redirection, Limits: plan.limits, Members: plan.members,
			OptedOut: plan.optedOut, Shared: plan.shared, Had: had, Namespaces: plan.namespaces}),
	}
	if exists && ownedBy(have.OwnerReferences, plan.node.UID) && translate.SamePlan(have.Spec, want.Spec) {
		return nil
	}
	if exists {
		if err := w.dropForeignTenants(ctx, &have, want.Spec); err != nil {
			return err
		}
	}
	return w.apply(ctx, &want, "NodeProxy", "spec")
}

func ownedBy(refs []metav1.OwnerReference, uid string) bool {
	return len(refs) == 1 && string(refs[0].UID) == uid
}

// dropForeignTenants takes tenants that have left the node out, with the canaries
// that rollouts own there. Apply would leave those, as tenants without a version,
// which the API server refuses.
func (w *writer) dropForeignTenants(ctx context.Context, have *v1alpha1.NodeProxy, want v1alpha1.NodeProxySpec) error {
	wanted := map[string]bool{}
	for _, t := range want.Tenants {
		wanted[t.Name] = true
	}
	type operation struct {
		Op    string `json:"op"`
		Path  string `json:"path"`
		Value any    `json:"value,omitempty"`
	}
	var ops []operation
	for i := len(have.Spec.Tenants) - 1; i >= 0; i-- {
		if t := have.Spec.Tenants[i]; t.Canary != nil && !wanted[t.Name] {
			ops = append(ops, operation{Op: "remove", Path: fmt.Sprintf("/spec/tenants/%d", i)})
		}
	}
	if len(ops) == 0 {
		return nil
	}
	// The places in the list are those of this version only.
	ops = append([]operation{{Op: "test", Path: "/metadata/resourceVersion", Value: have.ResourceVersion}}, ops...)
	patch, err := json.Marshal(ops)
	if err != nil {
		return fmt.Errorf("patch NodeProxy %s: %w", have.Name, err)
	}
	if err := w.Patch(ctx, have, client.RawPatch(types.JSONPatchType, patch), client.FieldOwner(FieldManager)); err != nil {
		return fmt.Errorf("remove canaries of tenants that left from NodeProxy %s: %w", have.Name, err)
	}
	return nil
}

func (w *writer) policies(ctx context.Context, namespace string) ([]v1alpha1.IsolationPolicy, error) {
	var list v1alpha1.IsolationPolicyList
	if err := w.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		return nil, fmt.Errorf("list IsolationPolicies of %s: %w", namespace, err)
	}
	return list.Items, nil
}

// applyConfiguration is an object with only the given field, and what names it.
func applyConfiguration(o client.Object, kind, field string) (runtime.ApplyConfiguration, error) {
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
	if err != nil {
		return nil, fmt.Errorf("convert %s %s: %w", kind, o.GetName(), err)
	}
	metadata := map[string]any{"name": o.GetName()}
	if ns := o.GetNamespace(); ns != "" {
		metadata["namespace"] = ns
	}
	if m, ok := content["metadata"].(map[string]any); ok && field != "status" && m["ownerReferences"] != nil {
		metadata["ownerReferences"] = m["ownerReferences"]
	}
	u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": v1alpha1.GroupVersion.String(), "kind": kind, "metadata": metadata}}
	if field != "" {
		u.Object[field] = content[field]
	}
	return client.ApplyConfigurationFromUnstructured(u), nil
}

// apply creates or updates an object of ours, without its status.
func (w *writer) apply(ctx context.Context, o client.Object, kind, field string) error {
	c, err := applyConfiguration(o, kind, field)
	if err != nil {
		return err
	}
	if err := w.Apply(ctx, c, client.FieldOwner(FieldManager), client.ForceOwnership); err != nil {
		return fmt.Errorf("apply %s %s: %w", kind, client.ObjectKeyFromObject(o), err)
	}
	return nil
}

// applyStatus updates the status of an object of ours that exists.
func (w *writer) applyStatus(ctx context.Context, o client.Object, kind string) error {
	return w.applyStatusAs(ctx, o, kind, FieldManager)
}

// applyStatusAs updates the part of a status that a field manager owns.
func (w *writer) applyStatusAs(ctx context.Context, o client.Object, kind, manager string) error {
	c, err := applyConfiguration(o, kind, "status")
	if err != nil {
		return err
	}
	err = w.Status().Apply(ctx, c, client.FieldOwner(manager), client.ForceOwnership)
	if apierrors.IsNotFound(err) {
		return nil // its deletion is on the way to us
	} else if err != nil {
		return fmt.Errorf("apply status of %s %s: %w", kind, client.ObjectKeyFromObject(o), err)
	}
	return nil
}

// isActive reports whether objects can be made in a namespace.
func (w *writer) isActive(ctx context.Context, namespace string) (bool, error) {
	var ns corev1.Namespace
	if err := w.Get(ctx, client.ObjectKey{Name: namespace}, &ns); apierrors.IsNotFound(err) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("read Namespace %s: %w", namespace, err)
	}
	return ns.DeletionTimestamp == nil, nil
}
