package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/hack/images/oci"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// brokenEnvoy pushes a real Envoy with a library that breaks it for a tenant.
func brokenEnvoy(t *testing.T, r *registryHere, version, tenant, fault string) (image string) {
	t.Helper()
	library := filepath.Join(t.TempDir(), "librt.so.1")
	out, err := exec.CommandContext(t.Context(), "clang-14", "-shared", "-fPIC", "-O1", "-Wall", "-Wl,-soname,librt.so.1",
		fmt.Sprintf("-DTENANT=%q", tenant), "-D"+fault, "-o", library, "testdata/broken.c").CombinedOutput()
	if err != nil {
		t.Fatalf("build %s: %v: %s", fault, err, out)
	}
	envoy, err := dist.Fetch(t.Context(), newEnvoy)
	if err != nil {
		t.Fatal(err)
	}
	files, replaced := oci.EnvoyFiles(envoy, "/"), false
	for i := range files {
		if path.Base(files[i].Path) == "librt.so.1" {
			files[i].Source, replaced = library, true
		}
	}
	if !replaced {
		t.Fatalf("there is no librt.so.1 among %+v", files)
	}
	img, err := oci.ProxyOf(version, files)
	if err != nil {
		t.Fatal(err)
	}
	if image, err = r.Push(img); err != nil {
		t.Fatal(err)
	}
	return image
}

// TestAnalysis rolls out builds that serve, but worse than the one before for one
// tenant: each is taken back everywhere, before more than its share of the
// connections has seen it, and everybody is told why.
func TestAnalysis(t *testing.T) {
	for _, tenant := range tenants {
		onlyVersion(t, tenant, newEnvoy)
	}
	e.goesOn(t)
	registry, err := newRegistry(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Close()
	e.removeIn(t, "e2e-b", "isolationpolicy", "e2e-analysis")
	if err := e.Apply(t.Context(), "apiVersion: mesh.bulkhead.dev/v1alpha1\nkind: IsolationPolicy\nmetadata: {name: e2e-analysis, namespace: e2e-b}\nspec: {memory: {max: 240Mi}}\n"); err != nil {
		t.Fatal(err)
	}
	e.enforced(t, "e2e-b", v1alpha1.Limits{MemoryMax: 240 << 20, Pids: 512})
	const weight, rate = 20, 200
	for _, c := range []struct {
		fault, version string
		reason         v1alpha1.RolloutFigure
		fails          bool
	}{
		{"RESETS", "1.40.3", v1alpha1.FigureResets, true},
		{"LEAK", "1.40.4", v1alpha1.FigureMemory, false},
	} {
		t.Run(c.fault, func(t *testing.T) {
			image := brokenEnvoy(t, registry, c.version, "e2e-b", c.fault)
			name := "e2e-" + strings.ToLower(c.fault)
			results := make(chan loaded, 2)
			load := func(what string, from harness.Pod, to harness.Pod) {
				startLoad(t, results, what, from, 45*time.Second, "--connections", "16", "--rate", fmt.Sprint(rate), "--new-connection-ratio", "0.25", hostPort(to.IPv4, app.HTTPPort))
			}
			load("e2e-b", e.pod(webB, 0), e.pod(webA, 1))
			load("e2e-a", e.pod(webA, 0), e.pod(webB, 1))
			rollOut(t, name, fmt.Sprintf("version: %s, image: %q", c.version, image), fmt.Sprintf("{weight: %d, pause: 1h}, {weight: 100}", weight))
			began := time.Time{}
			s := v1alpha1.ProxyRolloutStatus{}
			err := harness.Wait(t.Context(), time.Minute, 20*time.Millisecond, "the rollout to be taken back", func(ctx context.Context) error {
				p, err := e.Proxy(ctx, e.nodes[0], "e2e-b")
				if err != nil {
					return err
				}
				if began.IsZero() && p.Weight > 0 {
					began = time.Now()
				}
				var r v1alpha1.ProxyRollout
				if err := e.Client.Get(ctx, client.ObjectKey{Name: name}, &r); err != nil {
					return err
				}
				if s = r.Status; s.Phase != v1alpha1.RolloutRolledBack {
					return fmt.Errorf("it is %s: %s", s.Phase, s.Message)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			took := time.Since(began)
			t.Logf("taken back everywhere %s after the first connection: %s", took.Round(10*time.Millisecond), s.Message)
			if v := s.Verdict; v == nil || v.Reason != string(c.reason) || v.Tenant != "e2e-b" || !strings.Contains(v.Message, "limit") {
				t.Errorf("%+v", v)
			}
			if began.IsZero() || took > 30*time.Second || took > 10*time.Second && c.reason != v1alpha1.FigureMemory {
				t.Errorf("it took %s", took)
			}
			servingVersions(t, "e2e-a", newEnvoy)
			servingVersions(t, "e2e-b", newEnvoy)
			for range cap(results) {
				l := <-results
				r := l.result
				t.Logf("%s: %d exchanges on %d connections, %d failures", l.what, r.Exchanges, r.Connections, r.Failures.Total)
				// At most the canary's share of what went on while it was there.
				most := int(took.Seconds()*rate*weight/100) + rate*weight/100
				if !c.fails || l.what != "e2e-b" {
					most = 0
				}
				if r.Exchanges == 0 || r.Failures.Total > most || c.fails && l.what == "e2e-b" && r.Failures.Total == 0 {
					t.Errorf("%s: %v; %d failures, at most %d may be: %+v", l.what, l.err, r.Failures.Total, most, r.Failures.First)
				}
			}
			err = harness.Wait(t.Context(), 15*time.Second, 200*time.Millisecond, "the owner to be told", func(ctx context.Context) error {
				if u := upgradeOf(t, "e2e-b"); u == nil || u.Verdict != "RolledBack" || !strings.Contains(u.Message, string(c.reason)) {
					return fmt.Errorf("%+v", u)
				}
				list, err := e.Kube.CoreV1().Events("e2e-b").List(ctx, metav1.ListOptions{})
				if err != nil {
					return err
				}
				for _, ev := range list.Items {
					if ev.Reason == "UpgradeRolledBack" && strings.Contains(ev.Message, string(c.reason)) && ev.Type == corev1.EventTypeWarning {
						return nil
					}
				}
				return fmt.Errorf("none of %d events", len(list.Items))
			})
			if err != nil {
				t.Error(err)
			}
			for _, tenant := range tenants {
				onlyVersion(t, tenant, newEnvoy)
			}
		})
	}
}
