package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

var (
	soaks = flag.Bool("soak", false, "run the tests that take minutes as well: make soak")
	seed  = flag.Uint64("seed", 0, "of what happens at random in them; 0 for another each time")
)

func onlySoaks(t *testing.T) {
	t.Helper()
	if !*soaks {
		t.Skip("takes minutes: make soak")
	}
}

// lookers are pods on all nodes, for as long as the test.
func lookers(t *testing.T) map[string]*harness.NodePod {
	t.Helper()
	pods := map[string]*harness.NodePod{}
	for _, node := range e.nodes {
		p, err := e.OnNode(t.Context(), node)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := p.Remove(); err != nil {
				t.Error(err)
			}
		})
		pods[node] = p
	}
	return pods
}

// killed ends one of the product's programs on a node with SIGKILL, and has its pod
// replaced, for a container that ends again and again is started later each time. It
// returns how many ran there.
func killed(t *testing.T, on map[string]*harness.NodePod, node, component string) int {
	t.Helper()
	n, err := on[node].Kill(t.Context(), "/bulkhead/"+component)
	if err != nil {
		t.Fatal(err)
	}
	pods, err := e.Kube.CoreV1().Pods(harness.SystemNamespace).List(t.Context(), metav1.ListOptions{
		LabelSelector: "app.kubernetes.io/name=bulkhead-" + component, FieldSelector: "spec.nodeName=" + node})
	if err != nil {
		t.Fatal(err)
	}
	now := int64(0)
	for _, p := range pods.Items {
		if err := e.Kube.CoreV1().Pods(p.Namespace).Delete(t.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// TestSoakRolloutsKilled kills agents and operators at random moments of rollouts, under
// load: each rollout comes to its end, and nothing else than what it says runs.
func TestSoakRolloutsKilled(t *testing.T) {
	onlySoaks(t)
	for _, tenant := range tenants {
		onlyVersion(t, tenant, newEnvoy)
	}
	s := *seed
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d: make soak-rollouts SEED=%[1]d has the same happen", s)
	random := rand.New(rand.NewPCG(s, 1))
	on := lookers(t)
	const duration = 4 * time.Minute
	results := make(chan loaded, 1)
	startLoad(t, results, "load", e.pod(webB, 0), duration, "--protocol", "http", "--connections", "16", "--rate", "100", "--new-connection-ratio", "0.5", hostPort(e.pod(webA, 1).IPv4, app.HTTPPort))
	version, rounds, all := newEnvoy, 0, map[string]int{}
	// A round takes half a minute at most where all goes well.
	for end := time.Now().Add(duration - time.Minute); time.Now().Before(end) || version != newEnvoy; rounds++ {
		version = map[string]string{newEnvoy: olderEnvoy, olderEnvoy: newEnvoy}[version]
		name := fmt.Sprint("e2e-killed-", rounds)
		rollOut(t, name, "version: "+version, "{namespaces: [e2e-a], weight: 30}, {weight: 60, pause: 1s}, {weight: 100}")
		for range 1 + random.IntN(3) {
			wait := time.Duration(random.IntN(3000)) * time.Millisecond
			node, component := e.nodes[random.IntN(len(e.nodes))], []string{"agent", "operator"}[random.IntN(2)]
			select {
			case <-time.After(wait): // the moment is the test's matter
			case <-t.Context().Done():
				t.Fatal(t.Context().Err())
			}
			all[component] += killed(t, on, node, component)
		}
		phase(t, name, v1alpha1.RolloutSucceeded)
		for _, tenant := range tenants {
			onlyVersion(t, tenant, version)
		}
		planned(t, version)
	}
	t.Logf("%d rollouts, killed were %v", rounds, all)
	if all["agent"] == 0 || all["operator"] == 0 {
		t.Error("that proves nothing")
	}
	if _, err := e.Kubectl(t.Context(), "", "delete", "proxyrollout", "--all"); err != nil {
		t.Fatal(err)
	}
	planned(t, newEnvoy)
	l := <-results
	if r := l.result; r.Failures.Total > 0 || r.Exchanges == 0 {
		t.Errorf("%d exchanges, %d failures %v, first %+v; %v", r.Exchanges, r.Failures.Total, r.Failures.ByKind, r.Failures.First, l.err)
	}
	if err := e.WaitInstalled(t.Context(), patience); err != nil {
		t.Error(err)
	}
}

// grows is by how much agents and operators may grow in twenty rollouts, in KiB: the
// runtime doesn't give back at once what it has had.
const grows = 24 << 10

// TestSoakRollouts has twenty rollouts in a row leave nothing.
func TestSoakRollouts(t *testing.T) {
	onlySoaks(t)
	on := lookers(t)
	version := newEnvoy
	next := func(name string) {
		version = map[string]string{newEnvoy: olderEnvoy, olderEnvoy: newEnvoy}[version]
		rollOut(t, name, "version: "+version, "{weight: 50}, {weight: 100}")
		phase(t, name, v1alpha1.RolloutSucceeded)
		for _, tenant := range tenants {
			onlyVersion(t, tenant, version)
		}
	}
	// What the first two make stays: logs, and what programs hold for the next time.
	next("e2e-warm-0")
	next("e2e-warm-1")
	before := map[string]map[string]int{}
	for node, p := range on {
		report, err := p.Look(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if before[node] = report.Counts; before[node]["proxies"] < len(tenants) || before[node]["files"] == 0 || before[node]["cgroups"] == 0 || before[node]["open files of the agent"] == 0 {
			t.Fatalf("counted on %s are %v: that proves nothing", node, before[node])
		}
	}
	for i := range 20 {
		next(fmt.Sprint("e2e-row-", i))
	}
	if _, err := e.Kubectl(t.Context(), "", "delete", "proxyrollout", "--all"); err != nil {
		t.Fatal(err)
	}
	planned(t, newEnvoy)
	err := harness.Wait(t.Context(), patience, 2*time.Second, "nothing to be left", func(ctx context.Context) error {
		var errs []error
		for node, p := range on {
			report, err := p.Look(ctx)
			if err != nil {
				return err
			}
			if left := more(before[node], report.Counts); len(left) > 0 {
				errs = append(errs, fmt.Errorf("on %s: %s", node, strings.Join(left, ", ")))
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Error(err)
	}
	for node, p := range on {
		if report, err := p.Look(t.Context()); err == nil {
			t.Logf("%s before: %v\nafter: %v", node, before[node], report.Counts)
		}
	}
}

// more is what there is more of than before.
func more(before, after map[string]int) (out []string) {
	for _, what := range slices.Sorted(maps.Keys(after)) {
		may := before[what]
		switch {
		case what == "entries of flows":
			continue // connections in the clear, of probes for example
		case strings.HasPrefix(what, "KiB"):
			may += grows
		}
		if after[what] > may {
			out = append(out, fmt.Sprintf("%d %s, before %d", after[what], what, before[what]))
		}
	}
	return out
}
