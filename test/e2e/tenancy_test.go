package e2e

import (
	"fmt"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// TestTenancyRuleChanges changes who shares a proxy, and then who is in the mesh, of
// pods that talk and are never restarted: 1,000 connections go on to their ends, and
// none that begins while the rule changes fails.
func TestTenancyRuleChanges(t *testing.T) {
	tm := newTeam(t, "e2e-tenancy")
	web, batch, other := tm.pod(tm.web, 0), tm.pod(tm.batch, 1), e.pod(webB, 1)
	const rate = 20
	changed, over := make(chan struct{}), make(chan struct{})
	// At another port than the held ones', whose ports the next proxy could take again
	// (decision 31).
	seen := func(from harness.Pod, kind, peer string) {
		t.Helper()
		seenBy(t, from, other, kind, peer, "grpc", app.GRPCPort)
	}
	var held, fresh []*begun
	for _, w := range []struct {
		what string
		n    int
		from string
	}{{"to a pod of the team on another node", 400, "web"}, {"to another namespace", 300, "web"}, {"from another pod of the team", 200, "batch"}, {"from outside", 100, "outside"}} {
		from, to := web, tm.pod(tm.web, 1)
		switch {
		case w.from == "batch":
			from, to = batch, web
		case w.from == "outside":
			from, to = e.pod(webO, 1), web
		case w.n == 300:
			to = other
		}
		held = append(held, beginUntil(t, over, w.what, from, "hold", fmt.Sprint("--connections=", w.n), "--interval=1s", "--timeout=15s", hostPort(to.IPv4, app.GreetPort)))
		fresh = append(fresh, beginUntil(t, changed, "new, "+w.what, from, "load", "--protocol=http", "--connections=4", fmt.Sprint("--rate=", rate), "--new-connection-ratio=1", hostPort(to.IPv4, app.HTTPPort)))
	}
	service := hostPort(tm.web.Name+"."+tm.web.Namespace+".svc", app.HTTPPort)
	e.reaches(t, e.pod(webA, 0), "get", "http://"+service+"/") // it was made just now
	fresh = append(fresh, beginUntil(t, changed, "new, to the team's service", e.pod(webA, 0), "load", "--protocol=http", "--connections=4", fmt.Sprint("--rate=", rate), "--new-connection-ratio=1", service))

	for _, rule := range []struct {
		isolation v1alpha1.Isolation
		tenant    func(p agent.InspectedPod) string
	}{
		{v1alpha1.IsolationServiceAccount, func(p agent.InspectedPod) string {
			if p.Name[:3] == "web" {
				return tm.name + ".sa.web"
			}
			return tm.name + ".sa.batch"
		}},
		{v1alpha1.IsolationNode, func(agent.InspectedPod) string { return "_node" }},
		{v1alpha1.IsolationNamespace, func(agent.InspectedPod) string { return tm.name }},
	} {
		tm.change(t, map[string]any{"rules": []map[string]any{{
			"namespaceSelector": map[string]any{"matchLabels": map[string]string{"e2e.bulkhead.dev/team": tm.name}}, "isolation": rule.isolation}}})
		tm.waitPods(t, "tenants of "+string(rule.isolation), 4, func(tenant string, p agent.InspectedPod) bool { return tenant == rule.tenant(p) })
		seen(web, "inbound", web.Identity(trustDomain))
	}
	close(changed)
	for _, b := range fresh {
		b.want(t, 1)
		if r := b.result; r.Connections < rate*int(r.Ended.Sub(r.Started).Seconds())/2 {
			t.Errorf("%s: %d connections from %s to %s", b.what, r.Connections, r.Started, r.Ended)
		}
	}

	tm.join(t, false)
	tm.waitPods(t, "the namespace to leave", 0, func(string, agent.InspectedPod) bool { return false })
	seen(web, "plain", "")
	held = append(held, beginUntil(t, over, "begun in the clear", batch, "hold", "--connections=20", "--interval=500ms", "--timeout=15s", hostPort(other.IPv4, app.GreetPort)))
	tm.join(t, true)
	tm.waitPods(t, "the namespace to join again", 4, func(tenant string, p agent.InspectedPod) bool { return tenant == tm.name })
	seen(web, "inbound", web.Identity(trustDomain))

	optOut := func(value string, steered int) {
		t.Helper()
		if _, err := e.Kubectl(t.Context(), "", "label", "pod", "-n", tm.name, "--overwrite", web.Name, v1alpha1.LabelOptOut+value); err != nil {
			t.Fatal(err)
		}
		tm.waitPods(t, "the pod to opt out"+value, steered, func(string, agent.InspectedPod) bool { return true })
	}
	optOut("=true", 3)
	seen(web, "plain", "")
	seen(tm.pod(tm.web, 1), "inbound", web.Identity(trustDomain))
	optOut("-", 4)
	seen(web, "inbound", web.Identity(trustDomain))
	close(over)
	for i, n := range []int{400, 300, 200, 100, 20} {
		held[i].want(t, n)
	}
	for _, a := range []string{"web", "batch"} {
		echo := tm.web
		if a == "batch" {
			echo = tm.batch
		}
		after, err := e.EchoPods(t.Context(), echo, patience)
		if err != nil {
			t.Fatal(err)
		}
		for node, p := range after {
			if p.UID != tm.pods[echo][node].UID || p.Status.ContainerStatuses[0].RestartCount > 0 {
				t.Errorf("%s was restarted", p)
			}
		}
	}
}
