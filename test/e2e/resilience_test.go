package e2e

import (
	"context"
	"fmt"
	"strconv"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// TestHeldConnections holds 1,000 connections that each exchange data every
// second while every agent and every operator replica is killed and comes back.
func TestHeldConnections(t *testing.T) {
	type held struct {
		result app.RunResult
		err    error
	}
	results := make(chan held, 2)
	for _, way := range []struct {
		from harness.Pod
		to   string
	}{
		{e.pod(webA, 0), e.pod(webB, 1).IPv4},                       // by address, other tenant, other node
		{e.pod(jobA, 1), webA.Name + "." + webA.Namespace + ".svc"}, // by service, same tenant
	} {
		started := make(chan struct{})
		go func() {
			r, err := e.Load(t.Context(), way.from, started, "hold", "--connections", "500", "--interval", "1s", "--duration", "60s", "--timeout", "20s", hostPort(way.to, app.GreetPort))
			results <- held{r, err}
		}()
		select {
		case <-started:
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		}
	}
	now := int64(0) // kill -9
	for _, component := range []string{"bulkhead-agent", "bulkhead-operator"} {
		pods, err := e.Kube.CoreV1().Pods(harness.SystemNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=" + component})
		if err != nil {
			t.Fatal(err)
		}
		if len(pods.Items) == 0 {
			t.Fatalf("no pods of %s", component)
		}
		for _, p := range pods.Items {
			if err := e.Kube.CoreV1().Pods(harness.SystemNamespace).Delete(t.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); client.IgnoreNotFound(err) != nil {
				t.Fatal(err)
			}
		}
	}
	if err := e.WaitInstalled(t.Context(), patience); err != nil {
		t.Error(err)
	}
	for range 2 {
		h := <-results
		if h.err != nil && h.result.Exchanges == 0 {
			t.Error(h.err)
			continue
		}
		r := h.result
		if r.Held != 500 || r.Failures.Total > 0 {
			t.Errorf("%s: %d of 500 connections held, %d failures, first %+v", r.Address, r.Held, r.Failures.Total, r.Failures.First)
		}
		if r.Exchanges < 500*30 { // a busy machine's may be late
			t.Errorf("%s: %d exchanges in 60 s, want one each second on each of 500 connections", r.Address, r.Exchanges)
		}
	}
	// What came back still serves, also what it didn't know before.
	mustCall(t, e.pod(webB, 0), e.pod(webB, 0).IPv4, "tcp", hostPort(e.pod(jobA, 1).IPv4, app.GreetPort))
}

// TestProxyKilled kills one tenant's Envoy: its pods are refused until it is
// back, which it is by itself, and the other tenant sees nothing of it.
func TestProxyKilled(t *testing.T) {
	e.roots.loadEnded(t)
	node, tenant := e.nodes[0], "e2e-a"
	onlyVersion(t, tenant, newEnvoy)
	pid := 0
	if err := harness.Wait(t.Context(), patience, 100*time.Millisecond, "the proxy", func(ctx context.Context) error {
		p, err := e.Proxy(ctx, node, tenant)
		if err == nil && (len(p.Generations) != 1 || p.Generations[0].PID == 0) {
			err = fmt.Errorf("generations %+v", p.Generations)
		}
		if err == nil {
			pid = p.Generations[0].PID
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	started := make(chan struct{})
	other := make(chan error, 1)
	go func() {
		r, err := e.Load(t.Context(), e.pod(webB, 0), started, "load", "--protocol", "tcp", "--connections", "50", "--rate", "200",
			"--new-connection-ratio", "0.2", "--duration", "8s", "--timeout", "20s", hostPort(e.pod(webB, 1).IPv4, app.GreetPort))
		if err == nil && (r.Failures.Total > 0 || r.Exchanges < 200) {
			err = fmt.Errorf("%d exchanges, %d failures, first %+v", r.Exchanges, r.Failures.Total, r.Failures.First)
		}
		other <- err
	}()
	<-started
	if _, err := e.AgentExec(t.Context(), node, "kill", "--signal", "KILL", strconv.Itoa(pid)); err != nil {
		t.Fatal(err)
	}
	err := harness.Wait(t.Context(), patience, 100*time.Millisecond, "the proxy to come back", func(ctx context.Context) error {
		p, err := e.Proxy(ctx, node, tenant)
		if err == nil && (len(p.Generations) != 1 || p.Generations[0].PID == pid || !p.Generations[0].Ready) {
			err = fmt.Errorf("generations %+v", p.Generations)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	e.reaches(t, e.pod(webA, 0), "tcp", hostPort(e.pod(webB, 1).IPv4, app.GreetPort))
	if err := <-other; err != nil {
		t.Errorf("the other tenant: %v", err)
	}
}
