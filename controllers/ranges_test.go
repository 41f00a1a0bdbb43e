package controllers

import (
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Who runs the mesh is told of nodes whose pods are dialled in plain text, for as long as
// there are some: with pods of the mesh, and at work.
func TestNodesWithoutRangesAreTold(t *testing.T) {
	topology := newTopology("t", "mesh")
	away := newNode("away")
	away.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, LastTransitionTime: metav1.NewTime(born)}}
	first := newNode("n1")
	c := newCluster(t, topology, newNamespace("a", "mesh"), newNamespace("out"), first, newNode("ranged", "10.0.1.0/24"), newNode("empty"), away,
		newPod("ranged", "ranged", "10.0.1.1"), newPod("away", "away", "10.0.9.1"))
	w := c.writer()
	var events []string
	w.events = func(about, _ *corev1.ObjectReference, kind, reason, _, note string) {
		events = append(events, fmt.Sprint(kind, " ", about.Kind, " ", about.Name, " ", reason, " ", note))
	}
	c.triggers.status.delay = 0
	status := start(t, &c.triggers.status)
	check := func(what string, known metav1.ConditionStatus, message string, nodes, told int) {
		t.Helper()
		if err := w.writeTopology(t.Context(), "t"); err != nil {
			t.Fatal(err)
		}
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(topology), topology); err != nil {
			t.Fatal(err)
		}
		got := meta.FindStatusCondition(topology.Status.Conditions, v1alpha1.ConditionPodRangesKnown)
		if got == nil || got.Status != known || !strings.Contains(got.Message, message) || len(got.Message) > 512 {
			t.Errorf("%s: %+v", what, got)
		}
		metric := fmt.Sprintf("# HELP bulkhead_nodes_without_pod_ranges Nodes with pods of the mesh that have no podCIDRs: these pods are dialled in plain text by their own addresses.\n# TYPE bulkhead_nodes_without_pod_ranges gauge\nbulkhead_nodes_without_pod_ranges %d\n", nodes)
		if err := testutil.CollectAndCompare(c.mesh, strings.NewReader(metric), "bulkhead_nodes_without_pod_ranges"); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if len(events) != told {
			t.Errorf("%s: events %q", what, events)
		}
	}
	check("all are known", metav1.ConditionTrue, "", 0, 0)
	pod := newPod("one", "n1", "192.0.2.1")
	if err := c.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	c.syncPodNamed("one")
	check("a pod on one that isn't", metav1.ConditionFalse, "spec.podCIDRs: n1", 1, 1)
	for n := range 20 {
		node := fmt.Sprintf("m%02d", n)
		for _, o := range []client.Object{newNode(node), newPod(node, node, fmt.Sprintf("192.0.2.%d", n+2))} {
			if err := c.Create(t.Context(), o); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.syncNode(t.Context(), node); err != nil {
			t.Fatal(err)
		}
		c.syncPodNamed(node)
	}
	check("many", metav1.ConditionFalse, "m00, m01, m02, m03, m04 and 16 more", 21, 1)
	if len(events) > 0 && !strings.HasPrefix(events[0], "Warning MeshTopology t NodesWithoutRanges ") {
		t.Errorf("the event is %q", events[0])
	}
	for n := range 20 {
		if err := c.Delete(t.Context(), newPod(fmt.Sprintf("m%02d", n), "")); err != nil {
			t.Fatal(err)
		}
		c.syncPodNamed(fmt.Sprintf("m%02d", n))
	}
	for status.Len() > 0 {
		key, _ := status.Get()
		status.Done(key)
	}
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(first), first); err != nil {
		t.Fatal(err)
	}
	first.Spec.PodCIDRs = []string{"192.0.2.0/24"}
	if err := c.Update(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if err := c.syncNode(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	if status.Len() == 0 {
		t.Error("the condition isn't looked at again when ranges come")
	}
	check("with ranges", metav1.ConditionTrue, "", 0, 1)
}
