package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

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
	pods, err := e.EchoPods(t.Context(), joiner, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	from, to := pods[e.nodes[0]], e.pod(webB, 1)
	// seen is how the server's proxy saw a new connection of the joiner.
	seen := func(kind, peer string) {
		t.Helper()
		since := time.Now().Add(-time.Second)
		mustCall(t, from, from.IPv4, "tcp", hostPort(to.IPv4, app.GreetPort))
		err := harness.Wait(t.Context(), 10*time.Second, 200*time.Millisecond, "the server's access log", func(ctx context.Context) error {
			entries, err := e.AccessLog(ctx, e.nodes[1], to.Echo.Namespace)
			if err != nil {
				return err
			}
			for _, a := range entries {
				if a.Time.After(since) && host(a.Source) == from.IPv4 && host(a.Destination) == to.IPv4 {
					if a.Kind != kind || a.Peer != peer {
						return fmt.Errorf("the connection was %s of %q, want %s of %q", a.Kind, a.Peer, kind, peer)
					}
					return nil
				}
			}
			return errors.New("no line of it yet")
		})
		if err != nil {
			t.Error(err)
		}
	}
	label := func(value string) {
		t.Helper()
		if _, err := e.Kubectl(t.Context(), "", "label", "namespace", joiner.Namespace, "--overwrite", "e2e.bulkhead.dev/mesh"+value); err != nil {
			t.Fatal(err)
		}
	}

	type outcome struct {
		what   string
		result app.RunResult
		err    error
	}
	outcomes := make(chan outcome)
	holding := 0
	// hold keeps connections busy from now on, until after the namespace has left.
	hold := func(what string, duration time.Duration, to harness.Pod, ip string) {
		t.Helper()
		holding++
		started := make(chan struct{})
		go func() {
			r, err := e.Load(t.Context(), from, started, "hold", "--connections", "10", "--interval", "200ms", "--duration", duration.String(), hostPort(ip, app.GreetPort))
			outcomes <- outcome{what, r, err}
		}()
		<-started
	}

	seen("plain", "")
	beside := pods[e.nodes[1]]
	hold("begun in the clear, to a mesh pod", 40*time.Second, to, to.IPv4)
	hold("begun in the clear, to a pod that joins as well", 40*time.Second, beside, beside.IPv6)
	label("=true")
	if _, err := e.WaitTenant(t.Context(), joiner.Namespace, len(e.nodes), time.Minute); err != nil {
		t.Fatal(err)
	}
	seen("inbound", from.Identity(trustDomain))
	hold("begun in the mesh, to a mesh pod", 20*time.Second, to, to.IPv6)
	hold("begun in the mesh, to a pod that leaves as well", 20*time.Second, beside, beside.IPv4)
	label("-")
	left := time.Now()
	err = harness.Wait(t.Context(), time.Minute, 300*time.Millisecond, "its proxies to be gone", func(ctx context.Context) error {
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
	if waited := time.Since(left); waited < 10*time.Second {
		t.Errorf("the proxies were gone after %s, before the connections through them had ended", waited)
	}
	for range holding {
		o := <-outcomes
		if o.err != nil || o.result.Failures.Total > 0 || o.result.Held != 10 {
			t.Errorf("%s: %d of 10 connections held, %d failures, first %+v, %v", o.what, o.result.Held, o.result.Failures.Total, o.result.Failures.First, o.err)
		}
	}
	seen("plain", "")
	after, err := e.EchoPods(t.Context(), joiner, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	for node, p := range after {
		if p.UID != pods[node].UID || p.Status.ContainerStatuses[0].RestartCount > 0 {
			t.Errorf("%s was restarted", p)
		}
	}
}
