// Package cluster tests what all else takes for granted of the cluster: pods on
// all nodes reach each other, services and names over IPv4 and IPv6, and a user's
// exec, logs and port-forward work. It needs no mesh.
package cluster

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

const namespace = "e2e-cluster"

var (
	c    *harness.Cluster
	apps = []harness.Echo{{Namespace: namespace, Name: "one"}, {Namespace: namespace, Name: "two"}}
	pods []harness.Pod
)

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx := context.Background()
	if err := setUp(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "set up:", err)
		return 1
	}
	code := m.Run()
	if _, err := c.Kubectl(ctx, "", "delete", "namespace", namespace); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func setUp(ctx context.Context) (err error) {
	if c, err = harness.Connect(); err != nil {
		return err
	}
	manifest := harness.EchoNamespace(namespace)
	for _, a := range apps {
		manifest += a.Manifest()
	}
	manifest += `---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: ` + namespace + `}
spec:
  type: NodePort
  selector: {app: one}
  ipFamilyPolicy: PreferDualStack
  ports: [{name: http, port: ` + fmt.Sprint(app.HTTPPort) + `}]
`
	if err := c.Apply(ctx, manifest); err != nil {
		return err
	}
	nodes := map[string]bool{}
	for _, a := range apps {
		of, err := c.EchoPods(ctx, a, 2*time.Minute)
		if err != nil {
			return err
		}
		for node, p := range of {
			nodes[node] = true
			pods = append(pods, p)
		}
	}
	if len(pods) < 3 || len(nodes) < 2 {
		return fmt.Errorf("%d pods on %d nodes, want three on two", len(pods), len(nodes))
	}
	return nil
}

func port(n int) string { return fmt.Sprint(n) }

// get calls a URL's host from a pod until pods on all nodes have answered.
func get(t *testing.T, from harness.Pod, host string) {
	t.Helper()
	seen := map[string]bool{}
	err := harness.Wait(t.Context(), time.Minute, time.Millisecond, "answers of two pods", func(ctx context.Context) error {
		r, err := c.Call(ctx, from, "get", "http://"+net.JoinHostPort(host, port(app.HTTPPort))+"/")
		if err != nil {
			return err
		}
		if !r.OK || r.Answer == nil {
			return fmt.Errorf("%+v", r.Failure)
		}
		if seen[r.Answer.Pod] = true; len(seen) < 2 {
			return fmt.Errorf("only %v answered", seen)
		}
		return nil
	})
	if err != nil {
		t.Errorf("%s to %s: %v", from, host, err)
	}
}

func TestPodsByAddress(t *testing.T) {
	for _, from := range pods {
		for _, to := range pods {
			for _, ip := range []string{to.IPv4, to.IPv6} {
				r, err := c.Call(t.Context(), from, "tcp", net.JoinHostPort(ip, port(app.GreetPort)))
				if err != nil || !r.OK {
					t.Errorf("%s to %s at %s: %v, %+v", from, to, ip, err, r.Failure)
				} else if r.Answer.Pod != to.Name {
					t.Errorf("%s at %s answered as %s", to, ip, r.Answer.Pod)
				}
			}
		}
	}
}

func TestServices(t *testing.T) {
	service, err := c.Kube.CoreV1().Services(namespace).Get(t.Context(), "one", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(service.Spec.ClusterIPs) != 2 || strings.Contains(service.Spec.ClusterIPs[0], ":") {
		t.Fatalf("cluster IPs are %v, want IPv4 and IPv6", service.Spec.ClusterIPs)
	}
	names := append([]string{"one", "one." + namespace, "one." + namespace + ".svc.cluster.local", "one-headless"}, service.Spec.ClusterIPs...)
	for _, from := range pods[:3] {
		for _, host := range names {
			get(t, from, host)
		}
	}
}

func TestNodePort(t *testing.T) {
	service, err := c.Kube.CoreV1().Services(namespace).Get(t.Context(), "outside", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	nodes, err := c.Kube.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	families := map[bool]int{}
	for _, node := range nodes.Items {
		for _, a := range node.Status.Addresses {
			if a.Type != corev1.NodeInternalIP {
				continue
			}
			families[strings.Contains(a.Address, ":")]++
			url := "http://" + net.JoinHostPort(a.Address, port(int(service.Spec.Ports[0].NodePort))) + "/"
			// Nodes hear of the Service a moment after its pods are ready.
			if err := harness.Wait(t.Context(), time.Minute, 100*time.Millisecond, url, func(ctx context.Context) error {
				r, err := c.Call(ctx, pods[0], "get", url)
				if err == nil && !r.OK {
					err = fmt.Errorf("%+v", r.Failure)
				}
				return err
			}); err != nil {
				t.Error(err)
			}
		}
	}
	if families[false] < 2 || families[true] < 2 {
		t.Errorf("nodes with an address of each family: %v", families)
	}
}

func TestLogsAndExec(t *testing.T) {
	for _, p := range pods {
		logs, err := c.Kubectl(t.Context(), "", "logs", "-n", namespace, p.Name)
		if err != nil || !strings.Contains(logs, "{") {
			t.Errorf("logs of %s: %q, %v", p, logs, err)
		}
		out, err := c.Kubectl(t.Context(), "", "exec", "-n", namespace, p.Name, "--", "echo", "tcp", "127.0.0.1:"+port(app.GreetPort))
		if err != nil || !strings.Contains(out, p.Name) {
			t.Errorf("exec in %s: %q, %v", p, out, err)
		}
	}
}

func TestPortForward(t *testing.T) {
	for _, p := range pods {
		address, end, err := c.Forward(namespace, p.Name, app.HTTPPort)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := http.Get("http://" + address + "/")
		if err != nil {
			t.Errorf("%s through port-forward: %v", p, err)
		} else {
			body, err := io.ReadAll(answer.Body)
			answer.Body.Close()
			if err != nil || !strings.Contains(string(body), p.Name) {
				t.Errorf("%s through port-forward: %q, %v", p, body, err)
			}
		}
		if err := end(); err != nil {
			t.Errorf("port-forward to %s: %v", p, err)
		}
	}
}

// TestWhoMayDoWhat looks for what a cluster that was made to be convenient would
// leave open.
func TestWhoMayDoWhat(t *testing.T) {
	anonymous := rest.AnonymousClientConfig(c.Config)
	client, err := rest.HTTPClientFor(anonymous)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := client.Get(anonymous.Host + "/api/v1/namespaces/kube-system/secrets")
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusUnauthorized && answer.StatusCode != http.StatusForbidden {
		t.Errorf("without credentials: %s", answer.Status)
	}
	node := pods[0].Spec.NodeName
	other := ""
	for _, p := range pods {
		if p.Spec.NodeName != node {
			other = p.Spec.NodeName
		}
	}
	for _, who := range []struct {
		what []string
		as   []string
		want string
	}{
		{[]string{"get", "secrets", "-n", "kube-system"}, []string{"--as=system:serviceaccount:" + namespace + ":one", "--as-group=system:serviceaccounts"}, "no"},
		{[]string{"get", "nodes/" + other}, []string{"--as=system:node:" + node, "--as-group=system:nodes"}, "no"},
		{[]string{"get", "nodes/" + node}, []string{"--as=system:node:" + node, "--as-group=system:nodes"}, "yes"},
	} {
		out, _ := c.Kubectl(t.Context(), "", append(append([]string{"auth", "can-i"}, who.what...), who.as...)...)
		if !strings.HasPrefix(out, who.want) {
			t.Errorf("%v as %v: %q, want %s", who.what, who.as, out, who.want)
		}
	}
	// NodeRestriction: a kubelet may not label another node, nor itself as what it isn't.
	for _, args := range [][]string{{other, "x=y"}, {node, "node-restriction.kubernetes.io/x=y"}} {
		_, err := c.Kubectl(t.Context(), "", append([]string{"label", "node", "--as=system:node:" + node, "--as-group=system:nodes"}, args...)...)
		if err == nil || !strings.Contains(err.Error(), "forbidden") {
			t.Errorf("%s labels %v: %v, want forbidden", node, args, err)
		}
	}
}
