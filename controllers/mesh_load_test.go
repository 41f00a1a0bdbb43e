package controllers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// An object that can't be taken in, as the API server may have from before it checked it,
// keeps no other out: the operator starts, and says which one it is.
func TestLoadGoesOnWithoutWhatIsRefused(t *testing.T) {
	bad := newPod("bad", "n1", "10.0.1.2")
	bad.Spec.ServiceAccountName = "Not Valid"
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("good", "n1", "10.0.1.1"), bad)
	if good := c.pod("good"); len(good.held) != 1 || !c.HasTenant("n1", model.NamespaceTenant("a")) {
		t.Errorf("the other pod is %+v", good)
	}
	if !slices.ContainsFunc(c.refused, func(r string) bool { return strings.HasPrefix(r, "bad: ") && strings.Contains(r, `"Not Valid"`) }) {
		t.Errorf("events %q", c.refused)
	}

	for n := range 2 * refusalsTold {
		other := newPod(fmt.Sprint("bad", n), "n1", fmt.Sprintf("10.0.1.%d", n+3))
		other.Spec.ServiceAccountName = "Not Valid"
		if err := c.Create(t.Context(), other); err != nil {
			t.Fatal(err)
		}
	}
	var log bytes.Buffer
	again := func(reader client.Reader) error {
		store := xds.NewStore(xds.StoreOptions{Logger: slog.New(slog.DiscardHandler)})
		return newMesh(reader, store, nil, slog.New(slog.NewTextHandler(&log, nil))).load(t.Context())
	}
	if err := again(c.WithWatch); err != nil {
		t.Fatal(err)
	}
	if text := log.String(); !strings.Contains(text, "Not Valid") || strings.Count(text, "\n") > refusalsTold+2 || !strings.Contains(text, "more objects aren't in force") {
		t.Errorf("the log says %s", text)
	}
	// A cache that can't be read is no object's fault.
	broken := errors.New("the cache is closed")
	if err := again(interceptor.NewClient(c.WithWatch, interceptor.Funcs{Get: func(ctx context.Context, w client.WithWatch, key client.ObjectKey, o client.Object, options ...client.GetOption) error {
		if _, ok := o.(*corev1.Pod); ok && key.Name == "good" {
			return broken
		}
		return w.Get(ctx, key, o, options...)
	}})); !errors.Is(err, broken) {
		t.Errorf("without a pod that couldn't be read: %v", err)
	}
}

// So does a trust domain that no identity can have: the MeshTopology says it.
func TestLoadGoesOnWithoutATrustDomain(t *testing.T) {
	c := newCluster(t, newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("one", "n1", "10.0.1.1"))
	topology := newTopology("t", "mesh")
	topology.Spec.TrustDomain = "Not A Domain"
	if err := c.Create(t.Context(), topology); err != nil {
		t.Fatal(err)
	}
	c.mesh = newMesh(c.WithWatch, xds.NewStore(xds.StoreOptions{Logger: slog.New(slog.DiscardHandler)}), nil, slog.New(slog.DiscardHandler))
	if err := c.load(t.Context()); err != nil {
		t.Fatal(err)
	}
	w := c.writer()
	if _, err := w.keeper.sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.writeTopology(t.Context(), "t"); err != nil {
		t.Fatal(err)
	}
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(topology), topology); err != nil {
		t.Fatal(err)
	}
	if got := meta.FindStatusCondition(topology.Status.Conditions, v1alpha1.ConditionIdentityReady); got == nil || got.Reason != "InvalidTrustDomain" {
		t.Errorf("it is told %+v", got)
	}
}
