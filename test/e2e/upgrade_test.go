package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/hack/images/oci"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

const newEnvoy, olderEnvoy = "1.40.0", "1.39.3"

// rollOut creates a ProxyRollout that ends with the test. more are further fields of
// its spec.
func rollOut(t *testing.T, name, target, steps string, more ...string) {
	t.Helper()
	t.Cleanup(func() {
		ctx := context.Background()
		if _, err := e.Kubectl(ctx, "", "delete", "proxyrollout", name, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
		// What follows the end of the last one is no other test's business.
		var left v1alpha1.ProxyRolloutList
		if err := e.Client.List(ctx, &left); err != nil || len(left.Items) > 0 || t.Failed() {
			return
		}
		for _, tenant := range tenants {
			for _, node := range e.nodes {
				if err := onlyVersionOn(ctx, node, tenant, newEnvoy); err != nil {
					t.Error(err)
				}
			}
		}
	})
	if err := e.Apply(t.Context(), fmt.Sprintf(`
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: ProxyRollout
metadata: {name: %s}
spec: {target: {%s}, steps: [%s]%s}
`, name, target, steps, strings.Join(append([]string{""}, more...), ", "))); err != nil {
		t.Fatal(err)
	}
}

// phase waits until a rollout is in a phase, and what it says contains words.
func phase(t *testing.T, name string, phase v1alpha1.RolloutPhase, words ...string) (s v1alpha1.ProxyRolloutStatus) {
	t.Helper()
	err := harness.Wait(t.Context(), 2*patience, 50*time.Millisecond, "rollout "+name+" to be "+string(phase), func(ctx context.Context) error {
		var r v1alpha1.ProxyRollout
		if err := e.Client.Get(ctx, client.ObjectKey{Name: name}, &r); err != nil {
			return err
		}
		s = r.Status
		if s.Phase != phase {
			return fmt.Errorf("it is %s: %s", s.Phase, s.Message)
		}
		for _, word := range words {
			if !strings.Contains(s.Message, word) {
				return fmt.Errorf("%q doesn't say %q", s.Message, word)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// onlyVersion waits until a tenant has one process on each node, of a version.
func onlyVersion(t *testing.T, tenant, version string) {
	t.Helper()
	for _, node := range e.nodes {
		if err := onlyVersionOn(t.Context(), node, tenant, version); err != nil {
			t.Fatal(err)
		}
	}
}

func onlyVersionOn(ctx context.Context, node, tenant, version string) error {
	return harness.Wait(ctx, patience, 200*time.Millisecond, tenant+" on "+node+" to have nothing but Envoy "+version, func(ctx context.Context) error {
		p, err := e.Proxy(ctx, node, tenant)
		if err == nil && (len(p.Generations) != 1 || p.Generations[0].Version != version || !p.Generations[0].Serving) {
			err = fmt.Errorf("%+v", p.Generations)
		}
		return err
	})
}

// servingVersions waits until new connections of a tenant go to these versions on
// all nodes.
func servingVersions(t *testing.T, tenant string, versions ...string) {
	t.Helper()
	for _, node := range e.nodes {
		err := harness.Wait(t.Context(), patience, 200*time.Millisecond, tenant+" on "+node+" to be served by "+fmt.Sprint(versions), func(ctx context.Context) error {
			p, err := e.Proxy(ctx, node, tenant)
			if err != nil {
				return err
			}
			serving := map[string]bool{}
			for _, g := range p.Generations {
				if g.Serving {
					serving[g.Version] = true
				}
			}
			for _, v := range versions {
				if !serving[v] {
					return fmt.Errorf("%+v", p.Generations)
				}
			}
			if len(serving) != len(versions) {
				return fmt.Errorf("%+v", p.Generations)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func upgradeOf(t *testing.T, namespace string) *v1alpha1.TenantUpgrade {
	t.Helper()
	p, err := e.WaitTenant(t.Context(), namespace, len(e.nodes), patience)
	if err != nil {
		t.Fatal(err)
	}
	return p.Status.Upgrade
}

// pushEnvoy pushes a pinned Envoy, and returns its image and how nodes name it.
func pushEnvoy(t *testing.T, r *registryHere, version string) (image, named string) {
	t.Helper()
	img, err := oci.Proxy(t.Context(), version)
	if err != nil {
		t.Fatal(err)
	}
	if image, err = r.Push(img); err != nil {
		t.Fatal(err)
	}
	return image, translate.RolloutVersion(v1alpha1.RolloutTarget{Version: version, Image: image})
}

// TestRolloutTakenBack: rollouts that can't go well change nothing, or are taken back.
func TestRolloutTakenBack(t *testing.T) {
	e.roots.loadEnded(t)
	allServe(t)
	registry := startRegistry(t)
	everything := "{weight: 50, pause: 1h}, {weight: 100}"

	t.Run("no program", func(t *testing.T) {
		broken := filepath.Join(t.TempDir(), "envoy")
		if err := os.WriteFile(broken, []byte("no program"), 0o755); err != nil {
			t.Fatal(err)
		}
		img, err := oci.ProxyOf("1.40.2", []oci.File{{Source: broken, Path: "/envoy"}})
		if err != nil {
			t.Fatal(err)
		}
		image, err := registry.Push(img)
		if err != nil {
			t.Fatal(err)
		}
		results, over := make(chan loaded, 1), make(chan struct{})
		startLoadUntil(t, results, over, "load", e.pod(webB, 0), "--connections", "8", "--rate", "100", "--new-connection-ratio", "0.5", hostPort(e.pod(webA, 1).IPv4, app.HTTPPort))
		rollOut(t, "e2e-broken", fmt.Sprintf("version: 1.40.2, image: %q", image), everything)
		s := phase(t, "e2e-broken", v1alpha1.RolloutRolledBack)
		if s.Verdict == nil || s.Verdict.Reason != "Crashed" {
			t.Errorf("%+v", s.Verdict)
		}
		close(over)
		l := <-results
		if r := l.result; l.err != nil || r.Failures.Total > 0 || r.Exchanges == 0 {
			t.Errorf("%d exchanges, %d failures, first %+v; %v", r.Exchanges, r.Failures.Total, r.Failures.First, l.err)
		}
	})
	t.Run("crash", func(t *testing.T) {
		rollOut(t, "e2e-crash", "version: "+olderEnvoy, everything)
		phase(t, "e2e-crash", v1alpha1.RolloutWaiting)
		p, err := e.Proxy(t.Context(), e.nodes[0], "e2e-a")
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range p.Generations {
			if g.Version != olderEnvoy {
				continue
			}
			if _, err := e.AgentExec(t.Context(), e.nodes[0], "kill", "--signal", "KILL", fmt.Sprint(g.PID)); err != nil {
				t.Fatal(err)
			}
		}
		killed := time.Now()
		s := phase(t, "e2e-crash", v1alpha1.RolloutRolledBack, "e2e-a on "+e.nodes[0], "SIGKILL")
		// As the nodes say it, written every fifth of a second at most. Waiting for nodes
		// that are silent would take 30 s.
		t.Logf("all new connections were back %s after the crash", time.Since(killed).Round(10*time.Millisecond))
		if took := time.Since(killed); took > 20*time.Second {
			t.Errorf("going back took %s", took)
		}
		if s.Verdict == nil || s.Verdict.Reason != "Crashed" || s.Verdict.Tenant != "e2e-a" || s.Verdict.Node != e.nodes[0] {
			t.Errorf("%+v", s.Verdict)
		}
		servingVersions(t, "e2e-a", newEnvoy)
		servingVersions(t, "e2e-b", newEnvoy)
		err = harness.Wait(t.Context(), patience, 200*time.Millisecond, "an event", func(ctx context.Context) error {
			list, err := e.Kube.CoreV1().Events("e2e-a").List(ctx, metav1.ListOptions{})
			if err != nil {
				return err
			}
			for _, ev := range list.Items {
				if ev.Reason == "UpgradeRolledBack" && strings.Contains(ev.Message, "SIGKILL") && ev.Type == corev1.EventTypeWarning {
					return nil
				}
			}
			return fmt.Errorf("%d events", len(list.Items))
		})
		if err != nil {
			t.Error(err)
		}
	})
	// goesOn looks at the processes again: those that leave have ended.
	for _, node := range e.nodes {
		for _, tenant := range tenants {
			err := harness.Wait(t.Context(), patience, 300*time.Millisecond, "the end of what leaves", func(ctx context.Context) error {
				p, err := e.Proxy(ctx, node, tenant)
				if err == nil && len(p.Generations) != 1 {
					err = fmt.Errorf("%s on %s: %+v", tenant, node, p.Generations)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
}

// TestProxyRolloutRefused: what makes no sense is refused at once, with the reason.
func TestProxyRolloutRefused(t *testing.T) {
	manifest := func(target, steps string) string {
		return fmt.Sprintf("apiVersion: mesh.bulkhead.dev/v1alpha1\nkind: ProxyRollout\nmetadata: {name: bad}\nspec: {target: {%s}, steps: [%s]}\n", target, steps)
	}
	for name, bad := range map[string]struct{ manifest, says string }{
		"an Envoy that is too old":   {manifest("version: 1.38.9", "{weight: 100}"), "1.39.0 or newer"},
		"an image by its tag":        {manifest("version: 1.40.0, image: 'registry.example/envoy:latest'", "{weight: 100}"), "spec.target.image"},
		"no end":                     {manifest("version: 1.40.0", "{weight: 50}"), "last step"},
		"only a part":                {manifest("version: 1.40.0", "{namespaces: [e2e-a], weight: 100}"), "last step"},
		"a step of two minds":        {manifest("version: 1.40.0", "{namespaces: [e2e-a], tenantsPercent: 10, weight: 10}, {weight: 100}"), "not both"},
		"a step that weighs nothing": {manifest("version: 1.40.0", "{weight: 0}, {weight: 100}"), "weight"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := e.Apply(t.Context(), bad.manifest); err == nil || !strings.Contains(err.Error(), bad.says) {
				t.Errorf("refused with %v, want %q", err, bad.says)
			}
		})
	}
}
