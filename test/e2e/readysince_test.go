package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// readySince is since when Kubernetes says that a node is Ready.
func readySince(ctx context.Context, node string) (time.Time, error) {
	n, err := e.Kube.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return time.Time{}, err
	}
	i := slices.IndexFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == corev1.NodeReady })
	if i < 0 || n.Status.Conditions[i].Status != corev1.ConditionTrue {
		return time.Time{}, fmt.Errorf("node %s isn't Ready: %+v", node, n.Status.Conditions)
	}
	return n.Status.Conditions[i].LastTransitionTime.Time, nil
}

// spoken waits until a node's plan and its agent's word are of since when it is Ready.
func spoken(t *testing.T, node string, not time.Time) (since time.Time) {
	t.Helper()
	err := harness.Wait(t.Context(), patience, 100*time.Millisecond, "the agent of "+node+" to speak of the node that is Ready", func(ctx context.Context) (err error) {
		if since, err = readySince(ctx, node); err != nil {
			return err
		}
		var np v1alpha1.NodeProxy
		if err := e.Client.Get(ctx, client.ObjectKey{Name: node}, &np); err != nil {
			return err
		}
		if asked, said := np.Spec.ReadySince, np.Status.ReadySince; since.Equal(not) || asked == nil || said == nil || !asked.Time.Equal(since) || !said.Time.Equal(since) {
			return fmt.Errorf("it is Ready since %s, its agent is asked for %s and says %s", since, asked, said)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return since
}

// TestNodeSpeaksWhenItIsBack: whenever a Node has become Ready its agent is asked to
// say how the node is, and says so, through the API server's schema; proxies go on, and
// their owner sees them all.
func TestNodeSpeaksWhenItIsBack(t *testing.T) {
	e.goesOn(t)
	node := e.nodes[1]
	before := spoken(t, node, time.Time{})
	// Nobody has to have seen that it was away: the kubelet keeps the moment.
	back := metav1.NewTime(before.Add(-time.Hour))
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []map[string]any{{"type": corev1.NodeReady, "lastTransitionTime": back}}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Kube.CoreV1().Nodes().Patch(t.Context(), node, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	if now := spoken(t, node, before); !now.Equal(back.Time) {
		t.Errorf("it is Ready since %s, want %s", now, back)
	}
	for _, tenant := range tenants {
		if _, err := e.WaitTenant(t.Context(), tenant, len(e.nodes), patience); err != nil {
			t.Error(err)
		}
	}
}
