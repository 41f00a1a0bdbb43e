package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// team is a namespace with a MeshTopology of its own, which a test may change.
type team struct {
	name       string
	web, batch harness.Echo
	pods       map[harness.Echo]map[string]harness.Pod
}

// newTeam makes one, and waits for its proxies. It goes with the test.
func newTeam(t *testing.T, name string) *team {
	t.Helper()
	tm := &team{name: name, web: harness.Echo{Namespace: name, Name: "web"}, batch: harness.Echo{Namespace: name, Name: "batch"},
		pods: map[harness.Echo]map[string]harness.Pod{}}
	t.Cleanup(func() {
		ctx := context.Background()
		_, err := e.Kubectl(ctx, "", "delete", "namespace", name, "--ignore-not-found", "--wait=true")
		_, err2 := e.Kubectl(ctx, "", "delete", "meshtopology", name, "--ignore-not-found", "--wait=true")
		if err := errors.Join(err, err2); err != nil {
			t.Error(err)
		}
	})
	err := e.Apply(t.Context(), harness.EchoNamespace(name, "e2e.bulkhead.dev/team: "+name)+fmt.Sprintf(`---
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: MeshTopology
metadata: {name: %[1]s}
spec:
  trustDomain: %[2]s
  proxy: {accessLog: Connections}
  rules:
  - namespaceSelector: {matchLabels: {e2e.bulkhead.dev/team: %[1]s}}
`, name, trustDomain)+tm.web.Manifest()+tm.batch.Manifest())
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []harness.Echo{tm.web, tm.batch} {
		if tm.pods[a], err = e.EchoPods(t.Context(), a, patience); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := e.WaitTenant(t.Context(), name, len(e.nodes), patience); err != nil {
		t.Fatal(err)
	}
	return tm
}

func (tm *team) pod(a harness.Echo, i int) harness.Pod { return tm.pods[a][e.nodes[i]] }

// change changes the MeshTopology's spec.
func (tm *team) change(t *testing.T, spec any) {
	t.Helper()
	patch, err := json.Marshal(map[string]any{"spec": spec})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Kubectl(t.Context(), "", "patch", "meshtopology", tm.name, "--type=merge", "-p", string(patch)); err != nil {
		t.Fatal(err)
	}
}

// join labels the namespace, or takes the label away.
func (tm *team) join(t *testing.T, is bool) {
	t.Helper()
	label := "e2e.bulkhead.dev/team-"
	if is {
		label = "e2e.bulkhead.dev/team=" + tm.name
	}
	if _, err := e.Kubectl(t.Context(), "", "label", "namespace", tm.name, "--overwrite", label); err != nil {
		t.Fatal(err)
	}
}

// readyAgents are the agents' pods by node, when there is one on each.
func (e *env) readyAgents(t *testing.T) (agents map[string]corev1.Pod) {
	t.Helper()
	if err := harness.Wait(t.Context(), patience, 300*time.Millisecond, "agents", func(ctx context.Context) (err error) {
		agents, err = e.Agents(ctx)
		for _, node := range e.nodes {
			if _, ok := agents[node]; err == nil && !ok {
				err = fmt.Errorf("none is ready on %s", node)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return agents
}

// reaches waits until a call from a pod succeeds.
func (e *env) reaches(t *testing.T, from harness.Pod, args ...string) {
	t.Helper()
	e.answers(t, from, func(app.CallResult) bool { return true }, args...)
}

// answers waits until a call from a pod succeeds and its result is so.
func (e *env) answers(t *testing.T, from harness.Pod, so func(app.CallResult) bool, args ...string) {
	t.Helper()
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, from.String()+": echo "+strings.Join(args, " "), func(ctx context.Context) error {
		r, err := e.Call(ctx, from, args...)
		if err == nil && (!r.OK || !so(r)) {
			err = fmt.Errorf("%+v, answer %+v, failure %+v", r, r.Answer, r.Failure)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// waitPods waits until the agents say so of each of the team's pods that they steer,
// and returns how many those are.
func (tm *team) waitPods(t *testing.T, what string, want int, so func(tenant string, p agent.InspectedPod) bool) {
	t.Helper()
	err := harness.Wait(t.Context(), patience, 100*time.Millisecond, what, func(ctx context.Context) error {
		found := 0
		for _, node := range e.nodes {
			i, err := inspect(ctx, node)
			if err != nil {
				return err
			}
			for _, tenant := range i.Tenants {
				for _, p := range tenant.Pods {
					if p.Namespace != tm.name {
						continue
					}
					if found++; !tenant.Ready || !so(tenant.Name, p) {
						return fmt.Errorf("%s in tenant %s on %s (%s): %+v", p.Name, tenant.Name, node, tenant.Reason, p)
					}
				}
			}
		}
		if found != want {
			return fmt.Errorf("%d pods are steered, want %d", found, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func inspect(ctx context.Context, node string) (i agent.Inspection, err error) {
	out, err := e.AgentExec(ctx, node, "inspect")
	if err != nil {
		return i, err
	}
	return i, json.Unmarshal([]byte(out), &i)
}

// begun is a client that runs.
type begun struct {
	what    string
	from    harness.Pod
	args    []string
	outcome chan error
	result  app.RunResult
	ended   chan struct{}
}

// begin starts one, and returns when its connections are there.
func begin(t *testing.T, what string, from harness.Pod, args ...string) *begun {
	t.Helper()
	return beginWith(what, from, args, func(started chan<- struct{}) (app.RunResult, error) {
		return e.Load(t.Context(), from, started, args...)
	})
}

// beginUntil is begin of one that ends when over is closed.
func beginUntil(t *testing.T, over <-chan struct{}, what string, from harness.Pod, args ...string) *begun {
	t.Helper()
	all := append([]string{args[0], "--duration", longest.String()}, args[1:]...)
	return beginWith(what, from, all, func(started chan<- struct{}) (app.RunResult, error) {
		return e.LoadUntil(t.Context(), from, started, over, all...)
	})
}

func beginWith(what string, from harness.Pod, args []string, load func(started chan<- struct{}) (app.RunResult, error)) *begun {
	b := &begun{what: what, from: from, args: args, outcome: make(chan error, 1), ended: make(chan struct{})}
	started := make(chan struct{})
	go func() {
		var err error
		b.result, err = load(started)
		b.outcome <- err
		close(b.ended)
	}()
	<-started
	return b
}

// want waits for its end, without a failure and with that many connections.
func (b *begun) want(t *testing.T, least int) {
	t.Helper()
	if err := <-b.outcome; err != nil {
		t.Errorf("%s: echo %s: %v", b.what, strings.Join(b.args, " "), err)
	}
	r, n := b.result, b.result.Connections
	if b.args[0] == "hold" {
		n = r.Held
	}
	if r.Failures.Total > 0 || n < least {
		t.Errorf("%s: %d connections, want %d; %d failures, first %+v", b.what, n, least, r.Failures.Total, r.Failures.First)
	}
}

// seenAs makes a connection and waits for how the server's proxy saw it: inbound, of
// a peer, or plain.
func seenAs(t *testing.T, from, to harness.Pod, kind, peer string) {
	t.Helper()
	seenBy(t, from, to, kind, peer, "tcp", app.GreetPort)
}

// seenBy is seenAs by a call of a protocol to a port.
func seenBy(t *testing.T, from, to harness.Pod, kind, peer, protocol string, port int) {
	t.Helper()
	since := time.Now().Add(-time.Second)
	mustCall(t, from, from.IPv4, protocol, hostPort(to.IPv4, port))
	err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "the server's access log", func(ctx context.Context) error {
		entries, err := e.AccessLog(ctx, to.Spec.NodeName, to.Echo.Namespace)
		if err != nil {
			return err
		}
		for _, a := range entries {
			if a.Time.After(since) && host(a.Source) == from.IPv4 && host(a.Destination) == to.IPv4 {
				if a.Kind == kind && a.Peer == peer {
					return nil
				}
				err = fmt.Errorf("the connection was %s of %q, want %s of %q", a.Kind, a.Peer, kind, peer)
			}
		}
		return errors.Join(err, errors.New("no such line"))
	})
	if err != nil {
		t.Error(err)
	}
}
