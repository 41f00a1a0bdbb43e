// Package uninstall tests that deleting config/default leaves the nodes as they
// were. It is a package of its own because nothing else works after it.
package uninstall

import (
	"context"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// patience with what takes seconds on an idle machine.
const patience = 2 * time.Minute

func TestUninstall(t *testing.T) {
	ctx := t.Context()
	c, err := harness.Connect()
	if err != nil {
		t.Fatal(err)
	}
	root, err := harness.RepositoryRoot()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Install(ctx, root, 2*patience); err != nil {
		t.Fatal(err)
	}
	web := harness.Echo{Namespace: "e2e-uninstall", Name: "web"}
	if err := c.Apply(ctx, harness.EchoNamespace(web.Namespace, `e2e.bulkhead.dev/uninstall: "true"`)+web.Manifest()+`---
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: MeshTopology
metadata: {name: e2e-uninstall}
spec:
  trustDomain: demo.bulkhead
  rules: [{namespaceSelector: {matchLabels: {e2e.bulkhead.dev/uninstall: "true"}}}]
`); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := c.Kubectl(context.Background(), "", "delete", "namespace", web.Namespace, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	pods, err := c.EchoPods(ctx, web, patience)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WaitTenant(ctx, web.Namespace, len(pods), patience); err != nil {
		t.Fatal(err)
	}
	mounts := map[string][]string{}
	for node := range pods {
		report, err := c.LookAtNode(ctx, node)
		if err != nil {
			t.Fatal(err)
		}
		if len(report.Found) < 5 || len(report.Mounts) < 3 {
			t.Errorf("the mesh runs, and on %s there is only %+v: looking there proves nothing", node, report)
		}
		mounts[node] = report.Mounts
	}

	if _, err := c.Kubectl(ctx, "", "delete", "-k", root+"/config/default", "--wait=true", "--timeout=5m"); err != nil {
		t.Fatal(err)
	}
	err = harness.Wait(ctx, patience, 300*time.Millisecond, harness.SystemNamespace+" to be gone", func(ctx context.Context) error {
		_, err := c.Kube.CoreV1().Namespaces().Get(ctx, harness.SystemNamespace, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("still there: %w", err)
	})
	if err != nil {
		t.Fatal(err)
	}
	for node := range pods {
		var report app.NodeReport
		// The kernel and the kubelet may be at it still.
		err := harness.Wait(ctx, patience, time.Second, "nothing to be left on "+node, func(ctx context.Context) (err error) {
			if report, err = c.LookAtNode(ctx, node); err == nil && len(report.Found) > 0 {
				err = fmt.Errorf("left are %s", report.Found)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		for _, m := range mounts[node] {
			if !slices.Contains(report.Mounts, m) {
				t.Errorf("%s was mounted on %s before, and isn't now", m, node)
			}
		}
	}
	// The pods that were in the mesh run on, and new ones start.
	for _, from := range pods {
		for _, to := range pods {
			call(t, c, from, to)
		}
	}
	if _, err := c.Kubectl(ctx, "", "rollout", "restart", "-n", web.Namespace, "daemonset/"+web.Name); err != nil {
		t.Fatal(err)
	}
	if pods, err = c.EchoPods(ctx, web, patience); err != nil {
		t.Fatal(err)
	}
	for _, from := range pods {
		for _, to := range pods {
			call(t, c, from, to)
		}
	}
}

func call(t *testing.T, c *harness.Cluster, from, to harness.Pod) {
	t.Helper()
	for _, ip := range []string{to.IPv4, to.IPv6} {
		r, err := c.Call(t.Context(), from, "tcp", net.JoinHostPort(ip, fmt.Sprint(app.GreetPort)))
		if err != nil || !r.OK {
			t.Errorf("%s to %s at %s: %v, %+v", from, to, ip, err, r.Failure)
		}
	}
}
