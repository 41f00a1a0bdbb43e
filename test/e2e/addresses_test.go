package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// TestAddressesOfOthers has a node that somebody took over: it says that its pod has
// the addresses of another node's, as kubelets may. Nobody's traffic goes astray.
func TestAddressesOfOthers(t *testing.T) {
	const node, thief = "e2e-liar", "thief"
	victim, caller := e.pod(webB, 1), e.pod(webA, 0)
	now := int64(0)
	t.Cleanup(func() {
		ctx := context.Background()
		if err := e.Kube.CoreV1().Nodes().Delete(ctx, node, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		list, err := e.Kube.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
		if err != nil {
			t.Error(err)
			return
		}
		for _, p := range list.Items { // no kubelet ends them
			// So do the garbage collector and DaemonSets, once the node is gone.
			if err := e.Kube.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); client.IgnoreNotFound(err) != nil {
				t.Error(err)
			}
		}
		if err := e.WaitInstalled(ctx, patience); err != nil {
			t.Error(err)
		}
	})
	if _, err := e.Kube.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}, Spec: corev1.NodeSpec{
		PodCIDR: "10.251.7.0/24", PodCIDRs: []string{"10.251.7.0/24"},
		Taints: []corev1.Taint{{Key: "e2e.bulkhead.dev/liar", Effect: corev1.TaintEffectNoSchedule}},
	}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pods := e.Kube.CoreV1().Pods(webA.Namespace)
	pod, err := pods.Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: thief, Labels: map[string]string{"app": thief}}, Spec: corev1.PodSpec{
		NodeName: node, ServiceAccountName: webA.Name, TerminationGracePeriodSeconds: &now,
		Containers: []corev1.Container{{Name: "echo", Image: harness.EchoImage}},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	status, err := json.Marshal(map[string]any{"status": corev1.PodStatus{Phase: corev1.PodRunning, PodIP: victim.Status.PodIP, PodIPs: victim.Status.PodIPs,
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pods.Patch(t.Context(), thief, types.StrategicMergePatchType, status, metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	for _, ip := range victim.Status.PodIPs {
		says := ip.IP + " isn't in the pod ranges of node " + node
		if err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "an event that says "+says, func(ctx context.Context) error {
			list, err := e.Kube.EventsV1().Events(webA.Namespace).List(ctx, metav1.ListOptions{})
			if err != nil {
				return err
			}
			var others []string
			for _, event := range list.Items {
				if event.Regarding.UID != pod.UID {
					continue
				}
				if event.Reason == "AddressRefused" && strings.Contains(event.Note, says) {
					return nil
				}
				others = append(others, event.Reason+" "+event.Note)
			}
			return fmt.Errorf("there are %q", others)
		}); err != nil {
			t.Error(err)
		}
	}
	// The identity that the victim's clients expect is the victim's.
	for _, address := range []string{victim.IPv4, victim.IPv6} {
		if r := mustCall(t, caller, "", "get", "http://"+hostPort(address, app.HTTPPort)+"/"); r.Answer != nil && r.Answer.Pod != victim.Name {
			t.Errorf("%s answers at %s, which is %s's", r.Answer.Pod, address, victim)
		}
	}
	seenAs(t, caller, victim, "inbound", caller.Identity(trustDomain))
	seenAs(t, victim, e.pod(webA, 1), "inbound", victim.Identity(trustDomain))
}
