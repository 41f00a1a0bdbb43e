package controllers

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
)

// RolloutManager is the name under which rollouts own canaries and images.
const RolloutManager = "bulkhead-rollout"

const (
	// rolloutWrites is how many nodes are written to at a time.
	rolloutWrites = 16
	// rolloutRetry is how long after it failed a node is written to again.
	rolloutRetry = 10 * time.Second
)

// Reasons of events about rollouts.
const (
	reasonRolloutStep  = "RolloutStep"
	reasonRolloutPhase = "RolloutPhase"
	reasonHeldBack     = "TenantHeldBack"
)

// rollouts are all of them, the oldest first.
func (w *writer) rollouts(ctx context.Context, from client.Reader) ([]v1alpha1.ProxyRollout, error) {
	var list v1alpha1.ProxyRolloutList
	if err := from.List(ctx, &list); err != nil {
		return nil, fmt.Errorf("list ProxyRollouts: %w", err)
	}
	slices.SortFunc(list.Items, func(a, b v1alpha1.ProxyRollout) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	return list.Items, nil
}

// changedRollout leaves out updates that tell only people more: how far a step is, and
// what it waits for.
var changedRollout = predicate.TypedFuncs[*v1alpha1.ProxyRollout]{UpdateFunc: func(e event.TypedUpdateEvent[*v1alpha1.ProxyRollout]) bool {
	had, now := e.ObjectOld.Status, e.ObjectNew.Status
	for _, s := range []*v1alpha1.ProxyRolloutStatus{&had, &now} {
		s.Message, s.Conditions, s.Tenants, s.ReachedTenants = "", nil, 0, 0
	}
	return e.ObjectOld.Generation != e.ObjectNew.Generation || !equality.Semantic.DeepEqual(had, now)
}}

// rolloutChanged has made anew what depends on rollouts' status.
func (w *writer) rolloutChanged(context.Context, string) error {
	nodes, namespaces := w.mesh.everything()
	w.mesh.triggers.plans.add(nodes...)
	w.mesh.triggers.tenants.add(namespaces...)
	return nil
}

// writeRollouts decides what all rollouts do next. Statuses are read from the API
// server itself, and written before nodes are: a verdict must be on record before its
// cause is taken away. It returns when to decide again, 0 if only what changes asks for
// it; nodes that can't be written to are logged.
func (w *writer) writeRollouts(ctx context.Context, _ struct{}) (time.Duration, error) {
	rollouts, err := w.rollouts(ctx, w.keeper.live)
	if err != nil {
		return 0, err
	}
	// One that has begun goes on before one of the same second whose name is less.
	slices.SortStableFunc(rollouts, func(a, b v1alpha1.ProxyRollout) int {
		switch begun := a.Status.StartedAt != nil; {
		case begun == (b.Status.StartedAt != nil):
			return 0
		case begun:
			return -1
		}
		return 1
	})
	// Before nodes are read: what they report later has this decided anew.
	w.mesh.rollingOut.Store(len(rollouts) > 0)
	var nodes v1alpha1.NodeProxyList
	if err := w.List(ctx, &nodes); err != nil {
		return 0, fmt.Errorf("list NodeProxies: %w", err)
	}
	if len(rollouts) == 0 && !slices.ContainsFunc(nodes.Items, hasRollout) {
		return 0, nil
	}
	from, err := w.topologyVersions(ctx)
	if err != nil {
		return 0, err
	}
	var policies v1alpha1.IsolationPolicyList
	if err := w.List(ctx, &policies); err != nil {
		return 0, fmt.Errorf("list IsolationPolicies: %w", err)
	}
	byNamespace := map[string][]v1alpha1.IsolationPolicy{}
	for _, p := range policies.Items {
		byNamespace[p.Namespace] = append(byNamespace[p.Namespace], p)
	}
	away, readySince := w.mesh.away()
	// The NodeProxy of a Node that is gone follows it soon. Until then its last word would
	// be taken for that of a node which is there.
	nodes.Items = slices.DeleteFunc(nodes.Items, func(n v1alpha1.NodeProxy) bool {
		_, isAway := away[n.Name]
		_, there := readySince[n.Name]
		return !isAway && !there
	})
	want := map[string]translate.NodeRollout{}
	var after time.Duration
	older := ""
	for i := range rollouts {
		r := &rollouts[i]
		in := translate.RolloutInput{Rollout: r, Older: older, Nodes: nodes.Items, Policies: byNamespace, Bounds: w.mesh.bounds(), Away: away, ReadySince: readySince, Now: w.now()}
		for _, version := range from {
			for _, tenant := range append(translate.HeldBackTenants(rollouts), "") {
				in.From = append(in.From, translate.RolledOutVersion(version, tenant, rollouts))
			}
		}
		slices.Sort(in.From)
		in.From = slices.Compact(in.From)
		d := translate.DecideRollout(in)
		if err := w.writeRolloutStatus(ctx, r, d.Status); err != nil {
			return 0, err
		}
		r.Status = d.Status
		if older == "" && !translate.IsDone(d.Status.Phase) {
			older = r.Name
		}
		for node, n := range d.Nodes {
			all := want[node]
			for _, image := range n.Images {
				if !slices.ContainsFunc(all.Images, func(i v1alpha1.NodeImage) bool { return i.Version == image.Version }) {
					all.Images = append(all.Images, image)
				}
			}
			if all.Canaries == nil {
				all.Canaries = map[string]v1alpha1.CanaryGeneration{}
			}
			maps.Copy(all.Canaries, n.Canaries) // the later one's: the earlier is done
			want[node] = all
		}
		if d.After > 0 && (after == 0 || d.After < after) {
			after = d.After
		}
	}
	var writing errgroup.Group
	writing.SetLimit(rolloutWrites)
	var failed atomic.Bool
	for i := range nodes.Items {
		n := &nodes.Items[i]
		if sameRollout(n, want[n.Name]) {
			continue
		}
		writing.Go(func() error {
			// One node doesn't hold up the others, nor what is due at a time, as an error
			// would: it puts the next decision off, longer each time.
			if err := w.applyRollout(ctx, n.Name, want[n.Name]); err != nil {
				failed.Store(true)
				w.mesh.log.Error("a node doesn't follow its rollout", "node", n.Name, "error", err)
			}
			return nil
		})
	}
	_ = writing.Wait()
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if failed.Load() && (after == 0 || after > rolloutRetry) {
		after = rolloutRetry
	}
	return after, nil
}

// topologyVersions are those that MeshTopologies ask for.
func (w *writer) topologyVersions(ctx context.Context) (versions []string, err error) {
	var list v1alpha1.MeshTopologyList
	if err := w.List(ctx, &list); err != nil {
		return nil, fmt.Errorf("list MeshTopologies: %w", err)
	}
	for _, t := range list.Items {
		versions = append(versions, cmp.Or(t.Spec.Proxy.Version, translate.DefaultProxyVersion))
	}
	return versions, nil
}

func (w *writer) writeRolloutStatus(ctx context.Context, r *v1alpha1.ProxyRollout, status v1alpha1.ProxyRolloutStatus) error {
	if equality.Semantic.DeepEqual(r.Status, status) {
		return nil
	}
	want := v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: r.Name}, Status: status}
	if err := w.applyStatus(ctx, &want, "ProxyRollout"); err != nil {
		return err
	}
	w.tell(r, "ProxyRollout", newsOfRollout(r.Status, status)...) // it was read from the API server itself
	return nil
}

// newsOfRollout is what who runs the mesh is told of a change.
func newsOfRollout(had, now v1alpha1.ProxyRolloutStatus) (all []news) {
	if n, ok := newsOfVersion(had.Conditions, now.Conditions); ok {
		all = append(all, n)
	}
	for _, h := range now.HeldBack {
		if slices.ContainsFunc(had.HeldBack, func(old v1alpha1.HeldBackTenant) bool { return old.Tenant == h.Tenant }) {
			continue
		}
		all = append(all, news{referenceToNamespace(translate.NamespaceOf(h.Tenant)), corev1.EventTypeWarning, reasonHeldBack, "Leave" + h.Reason,
			fmt.Sprintf("%s stays at the version before (%s on %s): %s", h.Tenant, h.Reason, h.Node, h.Message)})
	}
	kind := corev1.EventTypeNormal
	if now.Phase == v1alpha1.RolloutRollingBack || now.Phase == v1alpha1.RolloutRolledBack {
		kind = corev1.EventTypeWarning
	}
	switch {
	case had.Phase != now.Phase && (now.Phase != v1alpha1.RolloutWaiting || had.Phase == v1alpha1.RolloutPaused) && (had.Phase != v1alpha1.RolloutWaiting || now.Phase != v1alpha1.RolloutProgressing):
		all = append(all, news{nil, kind, reasonRolloutPhase, string(now.Phase), string(now.Phase) + ": " + now.Message})
	case had.Step != now.Step:
		all = append(all, news{nil, kind, reasonRolloutStep, fmt.Sprint("Step", now.Step), now.Message})
	}
	return all
}

// newsOfVersion is, once, why nodes can't have a rollout's version, and that they can.
func newsOfVersion(before, now []metav1.Condition) (n news, ok bool) {
	had := meta.FindStatusCondition(before, v1alpha1.ConditionVersionAvailable)
	c := meta.FindStatusCondition(now, v1alpha1.ConditionVersionAvailable)
	if c == nil || c.Reason == translate.ReasonFetching || had != nil && had.Reason == c.Reason {
		return n, false
	}
	kind := corev1.EventTypeWarning
	if c.Status == metav1.ConditionTrue {
		if kind = corev1.EventTypeNormal; had == nil {
			return n, false // nothing was amiss
		}
	}
	return news{nil, kind, c.Reason, "FetchVersion", c.Message}, true
}

// byRollout is the rollout that an owner is told of.
func byRollout(u *v1alpha1.TenantUpgrade) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: apiVersion("ProxyRollout"), Kind: "ProxyRollout", Name: u.Rollout}
}

// newsOfUpgrade tells the owner of a tenant how the upgrade of its proxies is.
func newsOfUpgrade(u *v1alpha1.TenantUpgrade) news {
	kind := corev1.EventTypeNormal
	if u.Verdict == translate.UpgradeRolledBack || u.Verdict == translate.UpgradeHeldBack {
		kind = corev1.EventTypeWarning
	}
	return news{byRollout(u), kind, "Upgrade" + u.Verdict, fmt.Sprintf("Shift%dPercent", u.Weight), u.Message}
}

// newsOfPause tells the owner of a tenant that the upgrade of its proxies was paused, or
// goes on.
func newsOfPause(u *v1alpha1.TenantUpgrade) news {
	reason, action, word := "UpgradePaused", "Pause", "paused by who runs the mesh: what has begun stays as it is, and what goes wrong is still taken back"
	if !u.Paused {
		reason, action, word = "UpgradeResumed", "Resume", "goes on after a pause"
	}
	return news{byRollout(u), corev1.EventTypeNormal, reason, fmt.Sprintf("%sAt%dPercent", action, u.Weight), word + ". " + u.Message}
}

// newsOfEnd tells the owner of a tenant that an upgrade has come to its end, and on
// which nodes it hasn't: a rollout may leave out so many that are away.
func newsOfEnd(u *v1alpha1.TenantUpgrade, behind string) news {
	if behind != "" {
		behind = ", but on nodes that haven't said so yet: " + behind
	}
	return news{byRollout(u), corev1.EventTypeNormal, "UpgradeSucceeded", "Finish",
		fmt.Sprintf("the upgrade from Envoy %s to %s by ProxyRollout %s is done: all new connections go to the new one%s", u.From, u.To, u.Rollout, behind)}
}

// forRollouts is a digest of what rollouts decide by: agents report more than that, and
// more often, and each decision reads all nodes.
func forRollouts(n *v1alpha1.NodeProxy) [sha256.Size]byte {
	s := n.Status
	s.Conditions, s.TrustBundle = nil, ""
	s.Tenants = slices.Clone(s.Tenants)
	for i := range s.Tenants {
		t := &s.Tenants[i]
		t.Cost, t.Shares, t.Hits, t.Unenforced = nil, nil, nil, nil
		t.Pods, t.StrictPods, t.BypassedPods = 0, 0, 0
	}
	b, err := json.Marshal([]any{n.Generation, n.Spec.Images, n.Spec.Tenants, s})
	if err != nil {
		return [sha256.Size]byte{} // it has been read from JSON
	}
	return sha256.Sum256(b)
}

func hasRollout(n v1alpha1.NodeProxy) bool {
	return slices.ContainsFunc(n.Spec.Images, func(i v1alpha1.NodeImage) bool { return i.Rollout != "" }) ||
		slices.ContainsFunc(n.Spec.Tenants, func(t v1alpha1.NodeTenant) bool { return t.Canary != nil && t.Canary.Rollout != "" })
}

// sameRollout reports whether a node has what rollouts want of it, whatever was made
// by hand besides.
func sameRollout(n *v1alpha1.NodeProxy, want translate.NodeRollout) bool {
	images, canaries := 0, 0
	for _, i := range n.Spec.Images {
		if i.Rollout == "" {
			continue
		}
		if images++; !slices.Contains(want.Images, i) {
			return false
		}
	}
	for _, t := range n.Spec.Tenants {
		if t.Canary == nil || t.Canary.Rollout == "" {
			continue
		}
		if canaries++; want.Canaries[t.Name] != *t.Canary {
			return false
		}
	}
	return images == len(want.Images) && canaries == len(want.Canaries)
}

// applyRollout gives a node all that rollouts own there, and takes the rest of it away.
// What others own is a conflict: a canary that was made by hand is its maker's.
func (w *writer) applyRollout(ctx context.Context, node string, want translate.NodeRollout) error {
	type tenant struct {
		Name   string                    `json:"name"`
		Canary v1alpha1.CanaryGeneration `json:"canary"`
	}
	spec := struct {
		Images  []v1alpha1.NodeImage `json:"images,omitempty"`
		Tenants []tenant             `json:"tenants,omitempty"`
	}{Images: want.Images}
	for _, name := range slices.Sorted(maps.Keys(want.Canaries)) {
		spec.Tenants = append(spec.Tenants, tenant{name, want.Canaries[name]})
	}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&spec)
	if err != nil {
		return fmt.Errorf("convert the rollout of NodeProxy %s: %w", node, err)
	}
	u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": v1alpha1.GroupVersion.String(), "kind": "NodeProxy",
		"metadata": map[string]any{"name": node}, "spec": content}}
	if err := w.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(RolloutManager)); err != nil {
		return fmt.Errorf("apply the rollout of NodeProxy %s: %w", node, err)
	}
	return nil
}
