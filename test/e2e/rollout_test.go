package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// rolling is a Deployment as its owner should write it: a pod that is told to end
// goes on for some seconds, while everybody hears of it.
const rolling = `
apiVersion: v1
kind: Service
metadata: {name: rolling, namespace: e2e-a}
spec:
  selector: {app: rolling}
  ports: [{name: http, port: 80, targetPort: HTTP}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: rolling, namespace: e2e-a}
spec:
  replicas: 3
  selector: {matchLabels: {app: rolling}}
  strategy: {rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}
  template:
    metadata: {labels: {app: rolling}}
    spec:
      serviceAccountName: web
      terminationGracePeriodSeconds: 15
      containers:
      - name: echo
        image: IMAGE
        imagePullPolicy: IfNotPresent
        args: [serve]
        env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        lifecycle: {preStop: {sleep: {seconds: 3}}}
        readinessProbe: {tcpSocket: {port: HTTP}, periodSeconds: 1}
        resources: {requests: {cpu: 5m, memory: 16Mi}}
`

// deployRolling returns the address of its service.
func deployRolling(t *testing.T) string {
	t.Helper()
	t.Cleanup(func() {
		if _, err := e.Kubectl(context.Background(), "", "delete", "deployment/rolling", "service/rolling", "--namespace=e2e-a", "--ignore-not-found", "--wait=true"); err != nil {
			t.Error(err)
		}
	})
	if err := e.Apply(t.Context(), strings.NewReplacer("IMAGE", harness.EchoImage, "HTTP", fmt.Sprint(app.HTTPPort)).Replace(rolling)); err != nil {
		t.Fatal(err)
	}
	rolledOut(t)
	s, err := e.Kube.CoreV1().Services("e2e-a").Get(t.Context(), "rolling", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return hostPort(s.Spec.ClusterIP, 80)
}

func rolledOut(t *testing.T) {
	t.Helper()
	if _, err := e.Kubectl(t.Context(), "", "rollout", "status", "deployment/rolling", "--namespace=e2e-a", "--timeout=4m"); err != nil {
		t.Fatal(err)
	}
}

type loaded struct {
	what   string
	result app.RunResult
	err    error
}

// seconds of the load; never 0, or none at all were enough.
func (l loaded) seconds() int { return max(1, int(l.result.Ended.Sub(l.result.Started).Seconds())) }

// longest is after how long what begins ends by itself, which is an error, when nobody
// says that it is over.
const longest = 30 * time.Minute

// startLoad calls 25 times a second from a pod for so long.
func startLoad(t *testing.T, results chan<- loaded, what string, from harness.Pod, duration time.Duration, args ...string) {
	t.Helper()
	start(t, results, what, func(started chan<- struct{}) (app.RunResult, error) {
		return e.Load(t.Context(), from, started, loadCommand(duration, args)...)
	})
}

// startLoadUntil is startLoad until it is over.
func startLoadUntil(t *testing.T, results chan<- loaded, over <-chan struct{}, what string, from harness.Pod, args ...string) {
	t.Helper()
	start(t, results, what, func(started chan<- struct{}) (app.RunResult, error) {
		return e.LoadUntil(t.Context(), from, started, over, loadCommand(longest, args)...)
	})
}

func loadCommand(duration time.Duration, args []string) []string {
	return append([]string{"load", "--rate", "25", "--timeout", "15s", "--duration", duration.String()}, args...)
}

func start(t *testing.T, results chan<- loaded, what string, load func(started chan<- struct{}) (app.RunResult, error)) {
	t.Helper()
	started := make(chan struct{})
	go func() {
		r, err := load(started)
		results <- loaded{what, r, err}
	}()
	select {
	case <-started:
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	}
}

// TestRollingUpdate replaces all pods of a Deployment while another tenant calls it
// 50 times a second, half of that on kept connections: no call is lost.
func TestRollingUpdate(t *testing.T) {
	service := deployRolling(t)
	const keeps = 5
	results, over := make(chan loaded, 2), make(chan struct{})
	before, err := e.Pods(t.Context(), "e2e-a", "app=rolling")
	if err != nil {
		t.Fatal(err)
	}
	startLoadUntil(t, results, over, "new connections", e.pod(webB, 0), "--connections", "10", "--new-connection-ratio", "1", service)
	startLoadUntil(t, results, over, "kept connections", e.pod(webB, 1), "--connections", fmt.Sprint(keeps), "--reconnect", service)
	if _, err := e.Kubectl(t.Context(), "", "rollout", "restart", "deployment/rolling", "--namespace=e2e-a"); err != nil {
		t.Fatal(err)
	}
	rolledOut(t)
	old := map[string]bool{}
	for _, p := range before {
		old[p.Name] = true
	}
	if err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "the former pods to have ended", func(ctx context.Context) error {
		pods, err := e.Kube.CoreV1().Pods("e2e-a").List(ctx, metav1.ListOptions{LabelSelector: "app=rolling"})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			if old[p.Name] {
				return fmt.Errorf("%s is there", p.Name)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	close(over)
	for range 2 {
		l := <-results
		if l.err != nil {
			t.Errorf("%s: %v", l.what, l.err)
		}
		r := l.result
		t.Logf("%s: %d exchanges, %d reconnects, p99 %.1f ms, max %.1f ms, pods %v", l.what, r.Exchanges, r.Reconnects, r.Latency.P99, r.Latency.Max, r.Pods)
		if r.Failures.Total > 0 || r.Exchanges < 25*l.seconds()/2 {
			t.Errorf("%s: %d exchanges, %d failures %v, first %+v, last %+v", l.what, r.Exchanges, r.Failures.Total, r.Failures.ByKind, r.Failures.First, r.Failures.Last)
		}
		// A kept connection may end with its pod, three times in a rollout at most.
		if r.Reconnects > 3*keeps {
			t.Errorf("%s: %d reconnects", l.what, r.Reconnects)
		}
		for _, p := range before {
			if l.what == "new connections" && r.Pods[p.Name] == 0 {
				t.Errorf("%s: nothing reached %s", l.what, p.Name)
			}
		}
		if !slices.ContainsFunc(slices.Collect(maps.Keys(r.Pods)), func(pod string) bool { return !old[pod] }) {
			t.Errorf("%s: reached %v, which are all of before", l.what, r.Pods)
		}
	}
}

// TestLeaderKilled kills the operator's leader under load. Nobody notices; what
// proxies ask for anew is served while nobody leads, and new pods come up when there is
// a new leader.
func TestLeaderKilled(t *testing.T) {
	service := deployRolling(t)
	results, over := make(chan loaded, 1), make(chan struct{})
	startLoadUntil(t, results, over, "load", e.pod(webB, 0), "--connections", "10", "--new-connection-ratio", "0.5", service)
	on := lookers(t)
	old := e.leader(t)
	p, err := e.Kube.CoreV1().Pods(harness.SystemNamespace).Get(t.Context(), old, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// Not by the API alone: kubelet ends a pod that is deleted at once with SIGTERM, too,
	// and a leader that ends so frees the Lease, whoever holds it by then.
	if n := killed(t, on, p.Spec.NodeName, "operator"); n == 0 {
		t.Fatalf("no operator ran on %s, where %s leads", p.Spec.NodeName, old)
	}
	since := time.Now()
	free := e.holdLease(t)
	// A service that no proxy has heard of.
	fresh := strings.NewReplacer("name: rolling, namespace", "name: fresh, namespace", "HTTP", fmt.Sprint(app.HTTPPort)).Replace(rolling[:strings.Index(rolling, "---")])
	e.removeIn(t, "e2e-a", "service", "fresh")
	if err := e.Apply(t.Context(), fresh); err != nil {
		t.Fatal(err)
	}
	s, err := e.Kube.CoreV1().Services("e2e-a").Get(t.Context(), "fresh", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range []harness.Pod{e.pod(webB, 0), e.pod(webB, 1), e.pod(jobA, 0)} {
		e.reaches(t, from, "get", "http://"+hostPort(s.Spec.ClusterIP, 80)+"/")
	}
	t.Logf("a new service was reached from all nodes %s after the leader was killed", time.Since(since).Round(time.Millisecond))
	free()
	if _, err := e.Kubectl(t.Context(), "", "scale", "deployment/rolling", "--namespace=e2e-a", "--replicas=5"); err != nil {
		t.Fatal(err)
	}
	rolledOut(t)
	t.Logf("new pods were ready %s after", time.Since(since).Round(time.Millisecond))
	if next := e.leader(t); next == old {
		t.Errorf("the leader is %s; it was killed", next)
	}
	close(over)
	l := <-results
	if r := l.result; l.err != nil || r.Failures.Total > 0 || r.Exchanges < 25*l.seconds()/2 {
		t.Errorf("%d exchanges, %d failures, first %+v; %v", r.Exchanges, r.Failures.Total, r.Failures.First, l.err)
	}
	if err := e.WaitInstalled(t.Context(), patience); err != nil {
		t.Error(err)
	}
}

const operatorLease = "bulkhead-operator"

// leader waits until a replica of the operator that is there leads, and returns its pod's
// name.
func (e *env) leader(t *testing.T) (pod string) {
	t.Helper()
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "a leader that is there", func(ctx context.Context) error {
		lease, err := e.Kube.CoordinationV1().Leases(harness.SystemNamespace).Get(ctx, operatorLease, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity == "" {
			return errors.New("nobody leads")
		}
		pod, _, _ = strings.Cut(*lease.Spec.HolderIdentity, "_")
		_, err = e.Kube.CoreV1().Pods(harness.SystemNamespace).Get(ctx, pod, metav1.GetOptions{})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// holdLease takes the operator's Lease away from a leader that is gone: no replica leads
// until the function that it returns is called, or the test ends.
func (e *env) holdLease(t *testing.T) (free func()) {
	t.Helper()
	const nobody = "e2e-nobody"
	leases := e.Kube.CoordinationV1().Leases(harness.SystemNamespace)
	held := func(lease *coordinationv1.Lease) bool {
		return lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity == nobody
	}
	// A replica may write it before this does: then this is tried again.
	write := func(ctx context.Context, lease *coordinationv1.Lease, holder string, valid int32) error {
		now := metav1.NowMicro()
		lease.Spec.HolderIdentity, lease.Spec.LeaseDurationSeconds, lease.Spec.AcquireTime, lease.Spec.RenewTime = &holder, &valid, &now, &now
		_, err := leases.Update(ctx, lease, metav1.UpdateOptions{})
		return err
	}
	free = sync.OnceFunc(func() {
		asked := false
		err := harness.Wait(context.Background(), patience, 200*time.Millisecond, "the Lease to be free", func(ctx context.Context) error {
			lease, err := leases.Get(ctx, operatorLease, metav1.GetOptions{})
			switch {
			case err != nil:
				return err
			case held(lease):
				asked = true
				return write(ctx, lease, "", 1)
			case !asked:
				t.Errorf("the Lease was taken meanwhile: %s", lease.Spec.String())
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(free)
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "the Lease to be held", func(ctx context.Context) error {
		lease, err := leases.Get(ctx, operatorLease, metav1.GetOptions{})
		if err != nil || held(lease) {
			return err
		}
		return write(ctx, lease, nobody, int32((10 * time.Minute).Seconds()))
	})
	if err != nil {
		t.Fatal(err)
	}
	return free
}

// TestServiceIsTold: what is wrong with a Service stands in the Service.
func TestServiceIsTold(t *testing.T) {
	e.goesOn(t)
	long := strings.Repeat("x", 63)
	for name, reason := range map[string]string{"typo": "PortMismatch", long: "NoEndpoints"} {
		selector := "web"
		if reason == "NoEndpoints" {
			selector = "nobody"
		}
		e.removeIn(t, "e2e-a", "service", name)
		if err := e.Apply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: e2e-a}
spec: {selector: {app: %s}, ports: [{name: http, port: 80, targetPort: no-such-port}]}
`, name, selector)); err != nil {
			t.Fatal(err)
		}
		err := harness.Wait(t.Context(), patience, 100*time.Millisecond, name+" to be told "+reason, func(ctx context.Context) error {
			s, err := e.Kube.CoreV1().Services("e2e-a").Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			for _, c := range s.Status.Conditions {
				if c.Type == "mesh.bulkhead.dev/Served" && c.Reason == reason {
					return nil
				}
			}
			return fmt.Errorf("conditions are %+v", s.Status.Conditions)
		})
		if err != nil {
			t.Error(err)
		}
	}
	err := harness.Wait(t.Context(), patience, 100*time.Millisecond, "an event", func(ctx context.Context) error {
		events, err := e.Kube.CoreV1().Events("e2e-a").List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=typo"})
		if err != nil {
			return err
		}
		for _, ev := range events.Items {
			if ev.Reason == "PortMismatch" && ev.Type == corev1.EventTypeWarning {
				return nil
			}
		}
		return fmt.Errorf("events are %+v", events.Items)
	})
	if err != nil {
		t.Error(err)
	}
}

func (e *env) removeIn(t *testing.T, namespace, kind, name string) {
	t.Helper()
	t.Cleanup(func() {
		if _, err := e.Kubectl(context.Background(), "", "delete", kind, name, "--namespace="+namespace, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
}
