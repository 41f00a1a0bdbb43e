// Package e2e tests the installed product on a real cluster of at least two
// nodes, by what its users can see: pods that call each other, proxies' access
// logs, the kernel's state as the agents read it, packets between nodes.
//
// It uses the cluster of KUBECONFIG and expects the images there; `make
// test-e2e` sees to both.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// patience with what takes seconds on an idle machine. Only a test that fails waits so
// long; one that is about a time measures it.
const patience = 2 * time.Minute

const trustDomain = "demo.bulkhead" // one mesh has one; the demo may have run before

var (
	webA = harness.Echo{Namespace: "e2e-a", Name: "web"}
	jobA = harness.Echo{Namespace: "e2e-a", Name: "batch"}
	webB = harness.Echo{Namespace: "e2e-b", Name: "web"}
	webO = harness.Echo{Namespace: "e2e-outside", Name: "web"}

	meshApps = []harness.Echo{webA, jobA, webB}
	tenants  = []string{"e2e-a", "e2e-b"}
)

// env is what all tests use.
type env struct {
	*harness.Cluster
	root  string
	nodes []string // with a pod of each application, sorted
	pods  map[harness.Echo]map[string]harness.Pod
	// roots is the change of roots that goes on while the tests run.
	roots *rootChange
}

var e *env

func TestMain(m *testing.M) {
	flag.Parse() // setUp asks which tests run
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	var err error
	if e, err = setUp(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: set up:", err)
		os.Exit(1)
	}
	code := m.Run()
	stop()
	os.Exit(code)
}

func setUp(ctx context.Context) (*env, error) {
	cluster, err := harness.Connect()
	if err != nil {
		return nil, err
	}
	e := &env{Cluster: cluster, pods: map[harness.Echo]map[string]harness.Pod{}}
	if e.root, err = harness.RepositoryRoot(); err != nil {
		return nil, err
	}
	if err := e.Install(ctx, e.root, 2*patience); err != nil {
		return nil, err
	}
	m := harness.EchoNamespace("e2e-outside") +
		harness.EchoNamespace("e2e-a", `e2e.bulkhead.dev/mesh: "true"`) + harness.EchoNamespace("e2e-b", `e2e.bulkhead.dev/mesh: "true"`) +
		fmt.Sprintf(`---
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: MeshTopology
metadata: {name: e2e}
spec:
  trustDomain: %s
  proxy: {accessLog: Connections}
  rules:
  - namespaceSelector: {matchLabels: {e2e.bulkhead.dev/mesh: "true"}}
`, trustDomain)
	apps := append(slices.Clone(meshApps), webO)
	for _, a := range apps {
		m += a.Manifest()
	}
	if err := e.Apply(ctx, m); err != nil {
		return nil, err
	}
	for _, a := range apps {
		if e.pods[a], err = e.EchoPods(ctx, a, 2*patience); err != nil {
			return nil, err
		}
	}
	e.nodes = slices.Sorted(maps.Keys(e.pods[webA]))
	if len(e.nodes) < 2 {
		return nil, fmt.Errorf("pods on %v, want two nodes", e.nodes)
	}
	for _, tenant := range tenants {
		if _, err := e.WaitTenant(ctx, tenant, len(e.nodes), patience); err != nil {
			return nil, err
		}
	}
	e.roots, err = e.changeRoots(ctx)
	return e, err
}

func (e *env) pod(a harness.Echo, i int) harness.Pod { return e.pods[a][e.nodes[i]] }

func hostPort(host string, port int) string { return net.JoinHostPort(host, fmt.Sprint(port)) }

// identities maps each mesh pod's addresses to its SPIFFE ID.
func (e *env) identities() map[string]string {
	m := map[string]string{}
	for _, a := range meshApps {
		for _, p := range e.pods[a] {
			for _, ip := range p.Status.PodIPs {
				m[ip.IP] = p.Identity(trustDomain)
			}
		}
	}
	return m
}

// mustCall fails the test unless the call succeeded and the application saw
// client as the client's address ("" for any).
func mustCall(t *testing.T, from harness.Pod, client string, args ...string) app.CallResult {
	t.Helper()
	r, err := e.Call(t.Context(), from, args...)
	switch {
	case err != nil:
		t.Errorf("%s: echo %s: %v", from, strings.Join(args, " "), err)
	case !r.OK:
		t.Errorf("%s: echo %s: %+v", from, strings.Join(args, " "), r.Failure)
	case r.Answer == nil:
		t.Errorf("%s: echo %s: no answer: %s", from, strings.Join(args, " "), r.Body)
	case client != "" && r.Answer.ClientIP() != client:
		t.Errorf("%s: echo %s: the application saw client %s, want %s", from, strings.Join(args, " "), r.Answer.Client, client)
	}
	return r
}
