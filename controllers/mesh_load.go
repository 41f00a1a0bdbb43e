package controllers

import (
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// refusalsTold is how many objects the log names that are refused at the start.
const refusalsTold = 20

// load brings the whole cluster in, in the order in which things depend on each
// other, and opens the store. What the store refuses of an object keeps nothing else out.
func (m *mesh) load(ctx context.Context) error {
	errs := []error{m.syncTopologies(ctx)}
	var namespaces corev1.NamespaceList
	var nodes corev1.NodeList
	var pods corev1.PodList
	var services corev1.ServiceList
	var reports v1alpha1.NodeProxyList
	for _, l := range []client.ObjectList{&namespaces, &nodes, &pods, &services, &reports} {
		if err := m.reader.List(ctx, l, client.UnsafeDisableDeepCopy); err != nil {
			return fmt.Errorf("list %T: %w", l, err)
		}
	}
	for _, r := range reports.Items {
		for _, p := range r.Spec.Pods {
			if len(p.Exclusions) > 0 {
				m.planned[p.UID] = p.Exclusions
			}
		}
	}
	for i := range namespaces.Items {
		errs = append(errs, m.syncNamespace(ctx, namespaces.Items[i].Name))
	}
	for i := range nodes.Items {
		errs = append(errs, m.syncNode(ctx, nodes.Items[i].Name))
	}
	errs = append(errs, m.syncNetwork(ctx))
	// Of two pods that claim an address, the older is believed.
	items := slices.Clone(pods.Items)
	slices.SortStableFunc(items, func(a, b corev1.Pod) int { return a.CreationTimestamp.Compare(b.CreationTimestamp.Time) })
	for i := range items {
		_, err := m.syncPod(ctx, client.ObjectKeyFromObject(&items[i]))
		errs = append(errs, err)
	}
	for i := range services.Items {
		errs = append(errs, m.syncService(ctx, client.ObjectKeyFromObject(&services.Items[i])))
	}
	errs = append(errs, m.loadRoutes(ctx))
	for i := range reports.Items {
		errs = append(errs, m.syncReport(ctx, reports.Items[i].Name))
	}
	refused, err := refusedObjects(errors.Join(errs...))
	if err != nil {
		return err
	}
	// All pods of a proxy tell of the one that it hasn't.
	told := map[string]bool{}
	for _, r := range refused {
		if text := r.Error(); !told[text] && len(told) < refusalsTold {
			m.log.Error("object isn't in force", "error", r)
			told[text] = true
		} else if !told[text] {
			m.log.Error("more objects aren't in force")
			break
		}
	}
	m.mu.Lock()
	clear(m.planned)
	m.mu.Unlock()
	m.store.MarkSynced()
	close(m.loaded)
	m.log.Info("mesh loaded", "namespaces", len(namespaces.Items), "nodes", len(nodes.Items), "pods", len(pods.Items), "services", len(services.Items))
	return nil
}

// refusedObjects takes what the store refuses of objects out of err; rest is everything else,
// and so the cache's trouble, which is about all objects.
func refusedObjects(err error) (refused []error, rest error) {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var others []error
		for _, e := range joined.Unwrap() {
			r, other := refusedObjects(e)
			refused, others = append(refused, r...), append(others, other)
		}
		return refused, errors.Join(others...)
	}
	if object := (*xds.ObjectError)(nil); errors.As(err, &object) {
		return []error{err}, nil
	}
	return nil, err
}
