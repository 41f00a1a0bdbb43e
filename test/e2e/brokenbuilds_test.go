package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
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

// requests is a Service whose requests are read, for a route asks HTTP of it.
const requests = `
apiVersion: v1
kind: Service
metadata: {name: requests, namespace: e2e-a}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: HTTP}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: requests, namespace: e2e-a}
spec:
  parentRefs: [{group: "", kind: Service, name: requests}]
  rules:
  - filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-read, value: "yes"}]}}]
    backendRefs: [{name: requests, port: 80}]
`

// serveRequests makes it, and returns its address once a pod's requests are read.
func serveRequests(t *testing.T, from harness.Pod) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	if err != nil {
		t.Fatal(err)
	}
	// The operator takes the kind up when it comes, and lets it go: conformance tests
	// begin without it.
	crd := filepath.Join(strings.TrimSpace(string(out)), "config", "crd", "standard", "gateway.networking.k8s.io_httproutes.yaml")
	t.Cleanup(func() {
		if _, err := e.Kubectl(context.Background(), "", "delete", "-f", crd, "--ignore-not-found", "--wait=true"); err != nil {
			t.Error(err)
		}
	})
	if _, err := e.Kubectl(t.Context(), "", "apply", "--server-side", "-f", crd); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Kubectl(t.Context(), "", "wait", "--for=condition=Established", "--timeout=2m", "-f", crd); err != nil {
		t.Fatal(err)
	}
	e.removeIn(t, "e2e-a", "service", "requests")
	if err := e.Apply(t.Context(), strings.ReplaceAll(requests, "targetPort: HTTP", fmt.Sprint("targetPort: ", app.HTTPPort))); err != nil {
		t.Fatal(err)
	}
	var s corev1.Service
	if err := e.Client.Get(t.Context(), client.ObjectKey{Namespace: "e2e-a", Name: "requests"}, &s); err != nil {
		t.Fatal(err)
	}
	address := hostPort(s.Spec.ClusterIP, 80)
	e.answers(t, from, func(r app.CallResult) bool { return r.Answer != nil && r.Answer.Headers["X-Read"] != nil }, "get", "http://"+address+"/")
	return address
}

// TestBrokenBuilds rolls out builds that fail one tenant: each is taken back
// everywhere before more than its share of the connections has seen it, and
// everybody is told why.
func TestBrokenBuilds(t *testing.T) {
	allServe(t)
	registry := startRegistry(t)
	e.removeIn(t, "e2e-b", "isolationpolicy", "e2e-analysis")
	if err := e.Apply(t.Context(), "apiVersion: mesh.bulkhead.dev/v1alpha1\nkind: IsolationPolicy\nmetadata: {name: e2e-analysis, namespace: e2e-b}\nspec: {memory: {max: 240Mi}}\n"); err != nil {
		t.Fatal(err)
	}
	e.enforced(t, "e2e-b", v1alpha1.Limits{MemoryMax: 240 << 20, Pids: 512})
	const weight, rate = 20, 200
	var failing []time.Duration // how long it took with those that fail
	for _, c := range []struct {
		fault, version string
		// reason of the verdict, and what its message says.
		reason, says string
		// within is how soon after the first connection all is back; 0 if there is none.
		within time.Duration
		// fails: requests of the tenant may.
		fails bool
		// requests of the tenant are read by its proxies.
		requests bool
		// crashes: who calls the tenant loses connections as well.
		crashes bool
	}{
		{fault: "RESETS", version: "1.40.3", reason: string(v1alpha1.FigureResets), says: "limit", within: 30 * time.Second, fails: true},
		{fault: "LEAK", version: "1.40.4", reason: string(v1alpha1.FigureMemory), says: "limit", within: time.Minute},
		{fault: "ERRORS", version: "1.40.5", reason: string(v1alpha1.FigureServerErrors), says: "limit", within: 30 * time.Second, fails: true, requests: true},
		{fault: "CRASH", version: "1.40.6", reason: translate.VerdictCrashed, says: "killed by", within: 30 * time.Second, fails: true, crashes: true},
		{fault: "HANGS", version: "1.40.7", reason: translate.VerdictNotReady, says: "takes no connections"},
	} {
		t.Run(c.fault, func(t *testing.T) {
			image := brokenEnvoy(t, registry, c.version, "e2e-b", c.fault)
			name := "e2e-" + strings.ToLower(c.fault)
			results, over := make(chan loaded, 2), make(chan struct{})
			load := func(what string, from harness.Pod, to string) {
				startLoadUntil(t, results, over, what, from, "--connections", "16", "--rate", fmt.Sprint(rate), "--new-connection-ratio", "0.25", to)
			}
			to, of := hostPort(e.pod(webA, 1).IPv4, app.HTTPPort), e.pod(webB, 1)
			if c.requests {
				to = serveRequests(t, e.pod(webB, 0))
			}
			if c.crashes {
				of = e.pod(jobA, 1)
			}
			load("e2e-b", e.pod(webB, 0), to)
			load("e2e-a", e.pod(webA, 0), hostPort(of.IPv4, app.HTTPPort))
			rollOut(t, name, fmt.Sprintf("version: %s, image: %q", c.version, image), fmt.Sprintf("{weight: %d, pause: 1h}, {weight: 100}", weight), "readyWithin: 15s")
			began := time.Time{}
			s := v1alpha1.ProxyRolloutStatus{}
			err := harness.Wait(t.Context(), patience, 20*time.Millisecond, "the rollout to be taken back", func(ctx context.Context) error {
				if began.IsZero() {
					p, err := e.Proxy(ctx, e.nodes[0], "e2e-b")
					if err != nil {
						return err
					}
					if p.Weight > 0 {
						began = time.Now()
					}
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
			back := time.Now()
			t.Log(s.Message)
			if v := s.Verdict; v == nil || v.Reason != c.reason || v.Tenant != "e2e-b" || !strings.Contains(v.Message, c.says) {
				t.Errorf("%+v", v)
			}
			servingVersions(t, "e2e-a", newEnvoy)
			servingVersions(t, "e2e-b", newEnvoy)
			close(over)
			loads := map[string]loaded{}
			for range cap(results) {
				l := <-results
				loads[l.what] = l
			}
			// Its connections may be there for less than it takes to look for them.
			if f := loads["e2e-b"].result.Failures.First; c.fails && f != nil && (began.IsZero() || f.At.Before(began)) {
				began = f.At
			}
			took := time.Duration(0)
			if !began.IsZero() {
				took = back.Sub(began)
			}
			t.Logf("taken back everywhere %s after the first connection", took.Round(10*time.Millisecond))
			if took > c.within || took <= 0 && c.within > 0 {
				t.Errorf("it took %s", took)
			}
			if c.fails {
				failing = append(failing, took)
			}
			for _, l := range loads {
				r := l.result
				t.Logf("%s: %d exchanges on %d connections, %d failures", l.what, r.Exchanges, r.Connections, r.Failures.Total)
				// At most the canary's share of what went on while it was there, which is seen
				// a little later than it is so.
				most := int((took + 3*time.Second).Seconds() * rate * weight / 100)
				if !c.fails || l.what != "e2e-b" {
					most = 0
				}
				if l.err != nil || r.Exchanges == 0 || r.Failures.Total > most || c.fails && l.what == "e2e-b" && r.Failures.Total == 0 {
					t.Errorf("%s: %v; %d failures, at most %d may be: %+v", l.what, l.err, r.Failures.Total, most, r.Failures.First)
				}
				if r.Failures.Total > 0 {
					late := back.Sub(r.Failures.First.At)
					t.Logf("all was back %s after the first failure", late.Round(10*time.Millisecond))
					// 2 s on an idle machine.
					if c.crashes && late > 15*time.Second {
						t.Errorf("going back took %s after the crash", late)
					}
				}
			}
			err = harness.Wait(t.Context(), patience, 200*time.Millisecond, "the owner to be told", func(ctx context.Context) error {
				if u := upgradeOf(t, "e2e-b"); u == nil || u.Verdict != "RolledBack" || !strings.Contains(u.Message, c.reason) {
					return fmt.Errorf("%+v", u)
				}
				list, err := e.Kube.CoreV1().Events("e2e-b").List(ctx, metav1.ListOptions{})
				if err != nil {
					return err
				}
				for _, ev := range list.Items {
					if ev.Reason == "UpgradeRolledBack" && strings.Contains(ev.Message, c.reason) && ev.Type == corev1.EventTypeWarning {
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
	// A busy machine is late now and then; what waits for more than it must is always.
	if len(failing) > 1 && slices.Min(failing) > 10*time.Second {
		t.Errorf("each time it took more than 10 s: %s", failing)
	}
}
