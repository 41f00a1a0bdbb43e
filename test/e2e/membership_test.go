package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// TestNamespaceJoinsAndLeaves puts the running pods of a namespace into the mesh
// by a label and takes them out again; none is restarted, and connections that
// exist go on where they began.
func TestNamespaceJoinsAndLeaves(t *testing.T) {
	joiner := harness.Echo{Namespace: "e2e-join", Name: "web"}
	t.Cleanup(func() {
		if _, err := e.Kubectl(context.Background(), "", "delete", "namespace", joiner.Namespace, "--ignore-not-found", "--wait=true"); err != nil {
			t.Error(err)
		}
	})
	if err := e.Apply(t.Context(), harness.EchoNamespace(joiner.Namespace)+joiner.Manifest()); err != nil {
		t.Fatal(err)
	}
	pods, err := e.EchoPods(t.Context(), joiner, patience)
	if err != nil {
		t.Fatal(err)
	}
	from, to := pods[e.nodes[0]], e.pod(webB, 1)
	// seen is how the server's proxy saw a new connection of the joiner.
	seen := func(kind, peer string) { t.Helper(); seenAs(t, from, to, kind, peer) }
	label := func(value string) {
		t.Helper()
		if _, err := e.Kubectl(t.Context(), "", "label", "namespace", joiner.Namespace, "--overwrite", "e2e.bulkhead.dev/mesh"+value); err != nil {
			t.Fatal(err)
		}
	}

	// hold keeps connections busy from now on, until it is told to end.
	through, past := make(chan struct{}), make(chan struct{})
	var held []*begun
	hold := func(what string, over <-chan struct{}, ip string) {
		t.Helper()
		held = append(held, beginUntil(t, over, what, from, "hold", "--connections", "10", "--interval", "200ms", "--timeout", "15s", hostPort(ip, app.GreetPort)))
	}

	seen("plain", "")
	beside := pods[e.nodes[1]]
	hold("begun in the clear, to a mesh pod", past, to.IPv4)
	hold("begun in the clear, to a pod that joins as well", past, beside.IPv6)
	label("=true")
	if _, err := e.WaitTenant(t.Context(), joiner.Namespace, len(e.nodes), patience); err != nil {
		t.Fatal(err)
	}
	joined := &team{name: joiner.Namespace}
	joined.waitPods(t, "its pods to be steered", len(pods), func(tenant string, _ agent.InspectedPod) bool { return tenant == joiner.Namespace })
	seen("inbound", from.Identity(trustDomain))
	hold("begun in the mesh, to a mesh pod", through, to.IPv6)
	hold("begun in the mesh, to a pod that leaves as well", through, beside.IPv4)
	label("-")
	joined.waitPods(t, "its pods to be steered no more", 0, func(string, agent.InspectedPod) bool { return false })
	// Proxies stay for the connections through them, however long those last.
	select {
	// Longer than proxies without connections stay, 10 s, and until agents look at all
	// again, after another 10 s at most.
	case <-time.After(22 * time.Second):
	case <-t.Context().Done():
	}
	for _, node := range e.nodes {
		if err := harness.Wait(t.Context(), patience, time.Second, "the proxy on "+node+", through which connections go", func(ctx context.Context) error {
			_, err := e.Proxy(ctx, node, joiner.Namespace)
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	close(through)
	err = harness.Wait(t.Context(), patience, 300*time.Millisecond, "its proxies to be gone", func(ctx context.Context) error {
		for _, node := range e.nodes {
			i, err := e.Inspect(ctx, node)
			if err != nil {
				return err
			}
			for _, p := range i.Tenants {
				if p.Tenant == joiner.Namespace {
					return fmt.Errorf("still on %s", node)
				}
			}
		}
		var list v1alpha1.TenantProxyList
		if err := e.Client.List(ctx, &list, client.InNamespace(joiner.Namespace)); err != nil {
			return err
		}
		if len(list.Items) > 0 {
			return fmt.Errorf("%d TenantProxies are left", len(list.Items))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	close(past)
	for _, h := range held {
		h.want(t, 10)
	}
	seen("plain", "")
	after, err := e.EchoPods(t.Context(), joiner, patience)
	if err != nil {
		t.Fatal(err)
	}
	for node, p := range after {
		if p.UID != pods[node].UID || p.Status.ContainerStatuses[0].RestartCount > 0 {
			t.Errorf("%s was restarted", p)
		}
	}
}
