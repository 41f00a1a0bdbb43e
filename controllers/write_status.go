package controllers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corev1ac "k8s.io/client-go/applyconfigurations/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Names of the ConfigMaps that agents read, in the operator's namespace.
const (
	ConfigMapMembership  = "bulkhead-membership"
	ConfigMapTrustBundle = "bulkhead-trust-bundle"
)

// Reasons of events about the emergency bypass.
const (
	reasonBypassOn  = "EmergencyBypassOn"
	reasonBypassOff = "EmergencyBypassOff"
)

// membership is the value of membership.json. The agents' side is the CNI plugin's
// agent/cni.Membership.
type membership struct {
	TrustDomain string   `json:"trustDomain"`
	Namespaces  []string `json:"namespaces"`
}

// startWriters adds the leader's controllers.
func startWriters(mgr manager.Manager, w *writer, late *lateKinds) error {
	t := &w.mesh.triggers
	for _, start := range []func() error{
		func() error {
			return reconciles[string]{name: "plans", leader: true, workers: 8, do: once(w.writePlan)}.start(mgr, w.mesh,
				watch(mgr, &corev1.Node{}, byName), watch(mgr, &v1alpha1.NodeProxy{}, byName, changedSpec[*v1alpha1.NodeProxy]()), &t.plans)
		},
		func() error {
			return reconciles[struct{}]{name: "rollouts", leader: true, do: w.writeRollouts}.start(mgr, w.mesh,
				watch(mgr, &v1alpha1.ProxyRollout{}, single), watch(mgr, &v1alpha1.MeshTopology{}, single, changedSpec[*v1alpha1.MeshTopology]()), &t.rollouts)
		},
		func() error {
			return reconciles[string]{name: "rolledout", leader: true, do: once(w.rolloutChanged)}.start(mgr, w.mesh,
				watch(mgr, &v1alpha1.ProxyRollout{}, byName, changedRollout))
		},
		func() error {
			return reconciles[string]{name: "tenants", leader: true, workers: 4, do: once(w.writeTenant)}.start(mgr, w.mesh,
				watch(mgr, &corev1.Namespace{}, byName), watch(mgr, &v1alpha1.TenantProxy{}, byNamespace), &t.tenants)
		},
		func() error {
			return reconciles[string]{name: "costs", leader: true, workers: 2, do: once(w.writeCosts)}.start(mgr, w.mesh, &t.costs)
		},
		func() error {
			return reconciles[string]{name: "policies", leader: true, workers: 4, do: once(w.writePolicies)}.start(mgr, w.mesh,
				watch(mgr, &v1alpha1.IsolationPolicy{}, byNamespace, changedSpec[*v1alpha1.IsolationPolicy]()), &t.policies)
		},
		func() error {
			return reconciles[string]{name: "status", leader: true, do: once(w.writeTopology)}.start(mgr, w.mesh,
				watch(mgr, &v1alpha1.MeshTopology{}, byName, changedSpec[*v1alpha1.MeshTopology]()), &t.status)
		},
		func() error {
			return reconciles[types.NamespacedName]{name: "served", leader: true, workers: 4, do: once(w.writeService)}.start(mgr, w.mesh,
				watch(mgr, &corev1.Service{}, byKey), &t.served)
		},
		func() error {
			return reconciles[translate.RouteKey]{name: "routestatus", leader: true, workers: 4, do: w.writeRoute}.start(mgr, w.mesh,
				&t.routeStatus, lateSource[translate.RouteKey]{late, []string{translate.KindHTTPRoute, translate.KindGRPCRoute}, routeKey})
		},
		func() error {
			return reconciles[struct{}]{name: "membership", leader: true, do: once(w.writeMembership)}.start(mgr, w.mesh,
				// There is always a namespace, so there is a key at the start.
				watch(mgr, &corev1.ConfigMap{}, single), watch(mgr, &corev1.Namespace{}, single), &t.membership)
		},
	} {
		if err := start(); err != nil {
			return err
		}
	}
	return nil
}

// writeTenant shows a namespace the proxies that serve it, or takes that away.
func (w *writer) writeTenant(ctx context.Context, namespace string) error {
	m, views := w.mesh.views(namespace)
	if m.IsMember() {
		if active, err := w.isActive(ctx, namespace); err != nil || !active {
			return err // a namespace that goes takes its objects with it
		}
		if m.Scope == model.ScopeNamespace && len(views) == 0 {
			views[model.NamespaceTenant(namespace)] = nil // it has a tenant, without pods
		}
	}
	var list v1alpha1.TenantProxyList
	if err := w.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		return fmt.Errorf("list TenantProxies of %s: %w", namespace, err)
	}
	have := map[string]*v1alpha1.TenantProxy{}
	for i := range list.Items {
		have[list.Items[i].Name] = &list.Items[i]
	}
	rollouts, err := w.rollouts(ctx, w.Client)
	if err != nil {
		return err
	}
	policies, err := w.policies(ctx, namespace)
	if err != nil {
		return err
	}
	asked := m.Version
	var errs []error
	for tenant, nodes := range views {
		name := translate.TenantProxyName(tenant)
		m.Version = translate.RolledOutVersion(asked, tenant.String(), rollouts)
		in := translate.UpgradeInput{Version: m.Version, Nodes: nodes, Rollouts: rollouts, Policies: policies, Now: w.now()}
		if t := have[name]; t != nil {
			in.Told = t.Status.Upgrade
		}
		upgrade := translate.Upgrade(in)
		errs = append(errs, w.writeTenantProxy(ctx, namespace, tenant, m, nodes, have[name], upgrade, rollouts))
		delete(have, name)
	}
	for _, t := range have {
		if err := w.Delete(ctx, t); client.IgnoreNotFound(err) != nil {
			errs = append(errs, fmt.Errorf("delete TenantProxy %s/%s: %w", namespace, t.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (w *writer) writeTenantProxy(ctx context.Context, namespace string, tenant model.Tenant, m translate.Membership, views []translate.NodeView, have *v1alpha1.TenantProxy, upgrade *v1alpha1.TenantUpgrade, rollouts []v1alpha1.ProxyRollout) error {
	want := v1alpha1.TenantProxy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: translate.TenantProxyName(tenant)}}
	if have == nil {
		if err := w.apply(ctx, &want, "TenantProxy", ""); err != nil {
			return err
		}
		have = want.DeepCopy()
	}
	want.Status = translate.TenantProxyStatus(tenant, m, views, have.Status.Conditions, metav1.NewTime(w.now()))
	want.Status.Upgrade = upgrade
	want.Status.Cost = have.Status.Cost
	if equality.Semantic.DeepEqual(have.Status, want.Status) {
		return nil
	}
	want.Status.Cost = nil // writeCosts owns it
	of := func() []news {
		ended := translate.EndedUpgrade(have, m.Version, upgrade, rollouts)
		return newsOfTenant(have.Status, want.Status, ended, views)
	}
	if len(of()) > 0 {
		have = &v1alpha1.TenantProxy{}
		if there, err := w.latest(ctx, client.ObjectKeyFromObject(&want), have); err != nil {
			return fmt.Errorf("read TenantProxy %s/%s: %w", namespace, want.Name, err)
		} else if !there {
			return nil // its deletion is on the way to us
		}
	}
	if err := w.applyStatus(ctx, &want, "TenantProxy"); err != nil {
		return err
	}
	w.tell(have, "TenantProxy", of()...)
	return nil
}

// newsOfTenant is what the owner of a tenant is told of a change.
func newsOfTenant(had, now v1alpha1.TenantProxyStatus, ended *v1alpha1.TenantUpgrade, views []translate.NodeView) (all []news) {
	condition := func(kind string) (before, after *metav1.Condition) {
		return meta.FindStatusCondition(had.Conditions, kind), meta.FindStatusCondition(now.Conditions, kind)
	}
	is := func(c *metav1.Condition) bool { return c != nil && c.Status == metav1.ConditionTrue }
	if was, on := condition(v1alpha1.ConditionEmergencyBypass); is(on) != is(was) {
		reason := reasonBypassOff
		if is(on) {
			reason = reasonBypassOn
		}
		all = append(all, warning(reason, on.Message))
	}
	// Once for each cause, not for each restart: a crash loop must not fill the log of
	// events.
	if before, stable := condition(v1alpha1.ConditionStable); stable.Status == metav1.ConditionFalse && (before == nil || before.Status != stable.Status || before.Reason != stable.Reason) {
		all = append(all, warning(stable.Reason, stable.Message))
	}
	if ended != nil {
		all = append(all, newsOfEnd(ended, translate.Behind(views, ended.To)))
	}
	if u, before := now.Upgrade, had.Upgrade; u != nil {
		// One that began at another time is another, whatever its name.
		same := before != nil && before.Rollout == u.Rollout && before.Since.Equal(u.Since)
		// What is over gives its share back by itself, after that has been told.
		if !same || before.Verdict != u.Verdict || before.Weight != u.Weight && !translate.IsOver(u) {
			all = append(all, newsOfUpgrade(u))
		}
		if same && before.Paused != u.Paused && !translate.IsOver(u) {
			all = append(all, newsOfPause(u))
		}
	}
	if before, configured := condition(v1alpha1.ConditionConfigured); configured.Status == metav1.ConditionFalse && (before == nil || before.Message != configured.Message) {
		all = append(all, warning(configured.Reason, configured.Message))
	}
	return all
}

// writePolicies tells the policies of a namespace what is enforced, and has the
// plans of its nodes made anew.
func (w *writer) writePolicies(ctx context.Context, namespace string) error {
	w.mesh.triggers.plans.add(w.mesh.tenantNodes(namespace)...)
	w.mesh.triggers.rollouts.add(struct{}{}) // they may say when it may begin
	w.mesh.triggers.tenants.add(namespace)   // and their owner is told
	policies, err := w.policies(ctx, namespace)
	if err != nil || len(policies) == 0 {
		return err
	}
	m, byTenant := w.mesh.views(namespace)
	views := slices.Concat(slices.Collect(maps.Values(byTenant))...)
	in := translate.PolicyInput{Member: m.IsMember(), Want: translate.Limits(policies, m.Bounds), Bounds: m.Bounds, Strict: m.Strict || translate.IsStrict(policies), Nodes: views}
	for i := range policies {
		p := &policies[i]
		status := translate.IsolationPolicyStatus(p, in, metav1.NewTime(w.now()))
		if equality.Semantic.DeepEqual(p.Status, status) {
			continue
		}
		want := v1alpha1.IsolationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: p.Name}, Status: status}
		if err := w.applyStatus(ctx, &want, "IsolationPolicy"); err != nil {
			return err
		}
	}
	return nil
}

// writeTopology tells a MeshTopology what it came to.
func (w *writer) writeTopology(ctx context.Context, name string) error {
	var t v1alpha1.MeshTopology
	if err := w.Get(ctx, client.ObjectKey{Name: name}, &t); apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read MeshTopology %s: %w", name, err)
	}
	all, in := w.mesh.topologyInput(name)
	status := translate.MeshTopologyStatus(&t, all, in, metav1.NewTime(w.now()))
	if equality.Semantic.DeepEqual(t.Status, status) {
		return nil
	}
	if len(newsOfTopology(t.Status, status)) > 0 {
		t = v1alpha1.MeshTopology{}
		if there, err := w.latest(ctx, client.ObjectKey{Name: name}, &t); err != nil {
			return fmt.Errorf("read MeshTopology %s: %w", name, err)
		} else if !there {
			return nil
		}
	}
	want := v1alpha1.MeshTopology{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: status}
	if err := w.applyStatus(ctx, &want, "MeshTopology"); err != nil {
		return err
	}
	w.tell(&t, "MeshTopology", newsOfTopology(t.Status, status)...)
	return nil
}

// newsOfTopology is what who runs the mesh is told of a change.
func newsOfTopology(had, now v1alpha1.MeshTopologyStatus) []news {
	all := newsOfBypasses(had.Bypasses, now.Bypasses)
	was := meta.FindStatusCondition(had.Conditions, v1alpha1.ConditionPodRangesKnown)
	// Once, not for each node that comes.
	if c := meta.FindStatusCondition(now.Conditions, v1alpha1.ConditionPodRangesKnown); c.Status == metav1.ConditionFalse && (was == nil || was.Status != c.Status) {
		all = append(all, warning(c.Reason, c.Message))
	}
	return all
}

// newsOfBypasses is of each emergency bypass that begins, changes or ends.
func newsOfBypasses(before, now []v1alpha1.BypassStatus) (all []news) {
	add := func(namespace, reason, note string) {
		n := warning(reason, note)
		n.by = referenceToNamespace(namespace)
		all = append(all, n)
	}
	had := map[string]v1alpha1.BypassStatus{}
	for _, b := range before {
		had[b.Namespace] = b
	}
	for _, b := range now {
		old := had[b.Namespace]
		delete(had, b.Namespace)
		if old.RequestedBy != b.RequestedBy || old.Reason != b.Reason {
			add(b.Namespace, reasonBypassOn, fmt.Sprintf("namespace %s bypasses the mesh, in plain text, by order of %s: %s", b.Namespace, b.RequestedBy, b.Reason))
		}
	}
	for _, b := range had {
		add(b.Namespace, reasonBypassOff, fmt.Sprintf("namespace %s is behind its proxies again; it bypassed the mesh since %s, by order of %s", b.Namespace, b.Since.UTC().Format(time.RFC3339), b.RequestedBy))
	}
	return all
}

// writeMembership tells the agents who is in the mesh and whom to trust.
func (w *writer) writeMembership(ctx context.Context, _ struct{}) error {
	trustDomain, namespaces := w.mesh.membership()
	value, err := json.Marshal(membership{TrustDomain: trustDomain, Namespaces: namespaces})
	if err != nil {
		return fmt.Errorf("write ConfigMap %s: %w", ConfigMapMembership, err)
	}
	if err := w.writeConfigMap(ctx, ConfigMapMembership, map[string]string{"membership.json": string(value)}); err != nil {
		return err
	}
	trustDomain, roots := w.keeper.bundle()
	if roots == "" {
		return nil
	}
	bundle, err := w.bundle(ctx)
	if err != nil {
		return fmt.Errorf("write ConfigMap %s: %w", ConfigMapTrustBundle, err)
	}
	return w.writeConfigMap(ctx, ConfigMapTrustBundle, map[string]string{"trustDomain": trustDomain, "ca.crt": roots, bundleKey: bundle})
}

// bundleKey of the ConfigMap has roots and keys of JWT-SVIDs in the SPIFFE bundle
// format.
const bundleKey = "bundle.json"

// bundle is the value of bundleKey. Before this replica has read the keys of
// JWT-SVIDs, or if it can't, they are those that another one wrote: tokens are to
// be verified on, and roots don't wait for them.
func (w *writer) bundle(ctx context.Context) (string, error) {
	authority := w.keeper.Authority()
	if jwts, _ := w.jwts.JWTAuthority(); jwts != nil {
		document, err := authority.BundleDocument(jwts)
		return string(document), err
	}
	var have corev1.ConfigMap
	err := w.Get(ctx, client.ObjectKey{Namespace: w.namespace, Name: ConfigMapTrustBundle}, &have)
	if client.IgnoreNotFound(err) != nil {
		return "", err
	}
	document, err := authority.BundleDocumentAfter([]byte(have.Data[bundleKey]))
	return string(document), err
}

func (w *writer) writeConfigMap(ctx context.Context, name string, data map[string]string) error {
	key := client.ObjectKey{Namespace: w.namespace, Name: name}
	var have corev1.ConfigMap
	if err := w.Get(ctx, key, &have); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("read ConfigMap %s: %w", key, err)
	} else if err == nil && equality.Semantic.DeepEqual(have.Data, data) {
		return nil
	}
	c := corev1ac.ConfigMap(name, w.namespace).WithLabels(map[string]string{"app.kubernetes.io/part-of": "bulkhead"}).WithData(data)
	if err := w.Apply(ctx, c, client.FieldOwner(FieldManager), client.ForceOwnership); err != nil {
		return fmt.Errorf("apply ConfigMap %s: %w", key, err)
	}
	return nil
}
