package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// What passes the proxies by because somebody said so, and what is refused: all of it
// is changed while the pods run.

func TestExclusions(t *testing.T) {
	tm := newTeam(t, "e2e-excluded")
	one, two, batch, to := tm.pod(tm.web, 0), tm.pod(tm.web, 1), tm.pod(tm.batch, 0), e.pod(webB, 1)
	inbound := func(p harness.Pod) { t.Helper(); seenAs(t, p, to, "inbound", p.Identity(trustDomain)) }
	plain := func(p harness.Pod) { t.Helper(); seenAs(t, p, to, "plain", "") }
	inbound(one)

	excluded := "outbound " + to.IPv4 + "/32:" + fmt.Sprint(app.GreetPort)
	tm.change(t, map[string]any{"exclusions": []v1alpha1.Exclusion{{Direction: v1alpha1.DirectionOutbound, CIDR: to.IPv4 + "/32", Port: app.GreetPort}}})
	tm.waitPods(t, "the exclusion", 4, func(_ string, p agent.InspectedPod) bool { return slices.Equal(p.Excluded, []string{excluded}) })
	plain(one)
	plain(batch)
	tm.change(t, map[string]any{"exclusions": nil})
	none := func(_ string, p agent.InspectedPod) bool { return len(p.Excluded) == 0 }
	tm.waitPods(t, "no exclusion", 4, none)
	inbound(one)

	annotate := func(value string) {
		t.Helper()
		if _, err := e.Kubectl(t.Context(), "", "annotate", "pod", "-n", tm.name, "--overwrite", one.Name, v1alpha1.AnnotationExcludeOutbound+value); err != nil {
			t.Fatal(err)
		}
	}
	annotate("=" + to.IPv4 + "/32")
	tm.waitEvent(t, "Pod", one.Name, "ExclusionsDenied")
	tm.waitPods(t, "no exclusion without leave", 4, none)
	inbound(one)
	tm.change(t, map[string]any{"podExclusions": v1alpha1.PodExclusionsAllow})
	tm.waitPods(t, "the pod's exclusion", 4, func(_ string, p agent.InspectedPod) bool {
		return slices.Equal(p.Excluded, []string{"outbound " + to.IPv4 + "/32"}) == (p.Name == one.Name)
	})
	plain(one)
	inbound(two)
	annotate("=nonsense")
	tm.waitEvent(t, "Pod", one.Name, "ExclusionsInvalid")
	plain(one)
	annotate("-")
	tm.waitPods(t, "no exclusion again", 4, none)
	inbound(one)
}

// waitEvent waits for an event about an object of the team.
func (tm *team) waitEvent(t *testing.T, kind, name, reason string) {
	t.Helper()
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "the event "+reason, func(ctx context.Context) error {
		list, err := e.Kube.CoreV1().Events("").List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.kind=" + kind + ",involvedObject.name=" + name})
		if err != nil {
			return err
		}
		var reasons []string
		for _, event := range list.Items {
			if reasons = append(reasons, event.Reason); event.Reason == reason {
				return nil
			}
		}
		return fmt.Errorf("of %s %s there are %v", kind, name, reasons)
	})
	if err != nil {
		t.Error(err)
	}
}

// metric sums a metric's series of a namespace over pods with an app label.
func metric(ctx context.Context, app string, port int, name, namespace string) (sum float64, err error) {
	pods, err := e.Pods(ctx, harness.SystemNamespace, "app.kubernetes.io/name="+app)
	if err != nil {
		return 0, err
	}
	for _, p := range pods {
		address, end, err := e.Forward(harness.SystemNamespace, p.Name, port)
		if err != nil {
			return 0, err
		}
		r, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			return 0, errors.Join(err, end())
		}
		b, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err := errors.Join(err, end()); err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, name+"{") && strings.Contains(line, `namespace="`+namespace+`"`) {
				var v float64
				if _, err := fmt.Sscan(line[strings.LastIndexByte(strings.TrimSpace(line), ' ')+1:], &v); err != nil {
					return 0, err
				}
				sum += v
			}
		}
	}
	return sum, nil
}

func TestEmergencyBypass(t *testing.T) {
	tm := newTeam(t, "e2e-bypass")
	from, to := tm.pod(tm.web, 0), e.pod(webB, 1)
	seenAs(t, from, to, "inbound", from.Identity(trustDomain))
	over := make(chan struct{})
	held := beginUntil(t, over, "begun before the bypass", from, "hold", "--connections=20", "--interval=500ms", "--timeout=15s", hostPort(to.IPv4, app.GreetPort))

	me, err := e.Kubectl(t.Context(), "", "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}")
	if err != nil {
		t.Fatal(err)
	}
	bypass := func(by string) map[string]any {
		return map[string]any{"emergencyBypass": []v1alpha1.EmergencyBypass{{Namespace: tm.name, RequestedBy: by, Reason: "the end-to-end test of it"}}}
	}
	var topology v1alpha1.MeshTopology
	if err := e.Client.Get(t.Context(), client.ObjectKey{Name: tm.name}, &topology); err != nil {
		t.Fatal(err)
	}
	forged := topology.DeepCopy()
	forged.Spec.EmergencyBypass = bypass("somebody-else")["emergencyBypass"].([]v1alpha1.EmergencyBypass)
	if err := e.Client.Update(t.Context(), forged); err == nil {
		t.Error("a bypass in somebody else's name was taken")
	}

	tm.change(t, bypass(me))
	tm.waitPods(t, "the bypass", 4, func(_ string, p agent.InspectedPod) bool { return p.Bypass })
	seenAs(t, from, to, "plain", "")
	status := func(on bool, bypassed int) {
		t.Helper()
		err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "the bypass's status", func(ctx context.Context) error {
			if err := e.Client.Get(ctx, client.ObjectKey{Name: tm.name}, &topology); err != nil {
				return err
			}
			var proxies v1alpha1.TenantProxyList
			if err := e.Client.List(ctx, &proxies, client.InNamespace(tm.name)); err != nil {
				return err
			}
			if len(proxies.Items) != 1 {
				return fmt.Errorf("%d TenantProxies", len(proxies.Items))
			}
			for _, conditions := range [][]metav1.Condition{topology.Status.Conditions, proxies.Items[0].Status.Conditions} {
				if meta.IsStatusConditionTrue(conditions, v1alpha1.ConditionEmergencyBypass) != on {
					return fmt.Errorf("conditions %+v", conditions)
				}
			}
			if b := topology.Status.Bypasses; on && (len(b) != 1 || b[0].RequestedBy != me || int(b[0].BypassedPods) != bypassed) || !on && len(b) > 0 {
				return fmt.Errorf("bypasses %+v", b)
			}
			for _, m := range []struct {
				app  string
				port int
				name string
				want float64
			}{{"bulkhead-operator", 8080, "bulkhead_emergency_bypass", 1}, {"bulkhead-agent", 15021, "bulkhead_bypassed_pods", float64(bypassed)}} {
				if got, err := metric(ctx, m.app, m.port, m.name, tm.name); err != nil || (got >= m.want) != on {
					return fmt.Errorf("metric %s is %g, %v", m.name, got, err)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		reason := "EmergencyBypassOff"
		if on {
			reason = "EmergencyBypassOn"
		}
		tm.waitEvent(t, "MeshTopology", tm.name, reason)
		tm.waitEvent(t, "TenantProxy", tm.name, reason)
	}
	status(true, 4)
	tm.change(t, map[string]any{"emergencyBypass": nil})
	tm.waitPods(t, "the end of the bypass", 4, func(_ string, p agent.InspectedPod) bool { return !p.Bypass })
	seenAs(t, from, to, "inbound", from.Identity(trustDomain))
	status(false, 4)
	close(over)
	held.want(t, 20)
}

func TestStrict(t *testing.T) {
	tm := newTeam(t, "e2e-strict")
	to, outside, mesh := tm.pod(tm.web, 0), e.pod(webO, 1), e.pod(webB, 1)
	if err := e.Apply(t.Context(), fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: %s}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{name: greet, port: %d}]
`, tm.name, app.GreetPort)); err != nil {
		t.Fatal(err)
	}
	var service corev1.Service
	var node corev1.Node
	if err := errors.Join(e.Client.Get(t.Context(), client.ObjectKey{Namespace: tm.name, Name: "outside"}, &service),
		e.Client.Get(t.Context(), client.ObjectKey{Name: to.Spec.NodeName}, &node)); err != nil {
		t.Fatal(err)
	}
	nodePort := ""
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP && !strings.Contains(a.Address, ":") {
			nodePort = hostPort(a.Address, int(service.Spec.Ports[0].NodePort))
		}
	}
	pass := func(from harness.Pod, address string) { t.Helper(); mustCall(t, from, "", "tcp", address) }
	// The application greets first: not even that gets out.
	refused := func(address string) {
		t.Helper()
		for range 4 { // a service has an endpoint on each node
			r, err := e.Call(t.Context(), outside, "tcp", "--timeout", "3s", address)
			if err != nil || r.OK || r.Answer != nil || r.Body != "" {
				t.Errorf("%s from outside: %+v, %v", address, r, err)
			}
		}
	}
	direct, vip := hostPort(to.IPv4, app.GreetPort), hostPort(service.Spec.ClusterIP, app.GreetPort)
	for _, a := range []string{direct, hostPort(to.IPv6, app.GreetPort), vip, nodePort} {
		e.reaches(t, outside, "tcp", a) // the Service was made just now: nodes and proxies hear of it
	}
	e.reaches(t, mesh, "tcp", vip)
	check := func(when string) {
		t.Helper()
		tm.waitPods(t, when, 4, func(_ string, p agent.InspectedPod) bool { return p.Strict })
		for _, a := range []string{direct, hostPort(to.IPv6, app.GreetPort), vip, nodePort} {
			refused(a)
		}
		pass(mesh, direct)
		pass(mesh, vip)
		pass(tm.pod(tm.batch, 0), direct)
		pass(to, hostPort(outside.IPv4, app.GreetPort)) // out goes on
		seenAs(t, mesh, to, "inbound", mesh.Identity(trustDomain))
	}
	policy := fmt.Sprintf("---\napiVersion: mesh.bulkhead.dev/v1alpha1\nkind: IsolationPolicy\nmetadata: {name: proxies, namespace: %s}\nspec: {plainText: %%s}\n", tm.name)
	if err := e.Apply(t.Context(), fmt.Sprintf(policy, "Strict")); err != nil {
		t.Fatal(err)
	}
	check("Strict by the namespace")
	if err := e.Apply(t.Context(), fmt.Sprintf(policy, "Permissive")); err == nil {
		t.Error("a namespace could be Permissive by itself")
	}
	tm.change(t, map[string]any{"plainText": v1alpha1.PlainTextStrict})
	if _, err := e.Kubectl(t.Context(), "", "delete", "isolationpolicy", "-n", tm.name, "proxies"); err != nil {
		t.Fatal(err)
	}
	check("Strict by the topology")
	tm.change(t, map[string]any{"plainText": v1alpha1.PlainTextPermissive})
	tm.waitPods(t, "Permissive again", 4, func(_ string, p agent.InspectedPod) bool { return !p.Strict })
	pass(outside, direct)
	pass(outside, nodePort)
}

// TestEgress closes what is outside of the cluster for one topology's pods, who go on
// to talk within it, and opens it again.
func TestEgress(t *testing.T) {
	tm := newTeam(t, "e2e-egress")
	from, other := tm.pod(tm.web, 0), e.pod(webB, 1)
	var service corev1.Service
	var node corev1.Node
	err := e.Apply(t.Context(), fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: %s}
spec:
  type: NodePort
  selector: {app: %s}
  ports: [{name: greet, port: %d}]
`, tm.name, tm.web.Name, app.GreetPort))
	err = errors.Join(err, e.Client.Get(t.Context(), client.ObjectKey{Namespace: tm.name, Name: "outside"}, &service),
		e.Client.Get(t.Context(), client.ObjectKey{Name: e.nodes[1]}, &node))
	if err != nil {
		t.Fatal(err)
	}
	// Another node's own address is in no range of pods or services.
	var outside []string
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP && !strings.Contains(a.Address, ":") {
			outside = append(outside, hostPort(a.Address, int(service.Spec.Ports[0].NodePort)))
		}
	}
	reaches := func(when string, want bool) {
		t.Helper()
		for _, address := range outside {
			err := harness.Wait(t.Context(), patience, 200*time.Millisecond, when, func(ctx context.Context) error {
				if r, err := e.Call(ctx, from, "tcp", "--timeout", "3s", address); err != nil || r.OK != want || !want && r.Body != "" {
					return fmt.Errorf("%s to %s outside: %+v, %v", from, address, r, err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		}
		mustCall(t, from, from.IPv4, "tcp", hostPort(other.IPv4, app.GreetPort))
		mustCall(t, from, from.IPv6, "tcp", hostPort(e.pod(webO, 1).IPv6, app.GreetPort))
		mustCall(t, from, "", "tcp", hostPort(service.Spec.ClusterIP, app.GreetPort))
	}
	if len(outside) == 0 {
		t.Fatalf("node %s has no address", node.Name)
	}
	e.reaches(t, from, "tcp", hostPort(service.Spec.ClusterIP, app.GreetPort)) // which was made just now
	reaches("by default what is outside is there", true)
	held := begin(t, "begun before", from, "hold", "--connections=5", "--interval=200ms", "--duration=8s", "--timeout=5s", outside[0])
	tm.change(t, map[string]any{"egress": v1alpha1.EgressReject})
	reaches("outside is closed", false)
	tm.change(t, map[string]any{"egress": nil})
	reaches("outside is open again", true)
	<-held.outcome
	t.Logf("of connections that began before, %d were held, %d failures, first %+v", held.result.Held, held.result.Failures.Total, held.result.Failures.First)
}
