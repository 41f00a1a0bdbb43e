package e2e

import (
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// TestLongestNames has a namespace, a topology, a service and a service account with
// the longest names that Kubernetes takes for a namespace or a service, by each rule:
// cgroups, sockets, files, resources and certificates are named after them.
func TestLongestNames(t *testing.T) {
	long := func(name string) string { return name + strings.Repeat("x", 63-len(name)) }
	tm := newTeam(t, long("e2e-names-"))
	server := harness.Echo{Namespace: tm.name, Name: long("server-")}
	// Beside such a service there is no room for "-headless".
	if err := e.Apply(t.Context(), strings.ReplaceAll(server.Manifest(), server.Name+"-headless", "headless")); err != nil {
		t.Fatal(err)
	}
	var err error
	if tm.pods[server], err = e.EchoPods(t.Context(), server, patience); err != nil {
		t.Fatal(err)
	}
	account := map[string]string{} // by pod
	for a, pods := range tm.pods {
		for _, p := range pods {
			account[p.Name] = a.Name
		}
	}
	from, to, service := tm.pod(server, 0), tm.pod(server, 1), server.Name+"."+server.Namespace+".svc"
	// The Service was made just now: nodes and proxies hear of it.
	for _, caller := range []harness.Pod{from, e.pod(webA, 0)} {
		e.reaches(t, caller, "get", "http://"+hostPort(service, app.HTTPPort)+"/")
	}
	for _, rule := range []struct {
		isolation v1alpha1.Isolation
		tenant    func(pod string) string
	}{
		{v1alpha1.IsolationNamespace, func(string) string { return tm.name }},
		{v1alpha1.IsolationServiceAccount, func(pod string) string { return tm.name + ".sa." + account[pod] }},
		{v1alpha1.IsolationPod, func(pod string) string { return tm.name + ".pod." + pod }},
	} {
		tm.change(t, map[string]any{"rules": []map[string]any{{
			"namespaceSelector": map[string]any{"matchLabels": map[string]string{"e2e.bulkhead.dev/team": tm.name}}, "isolation": rule.isolation}}})
		tm.waitPods(t, "tenants of "+string(rule.isolation), len(account), func(tenant string, p agent.InspectedPod) bool { return tenant == rule.tenant(p.Name) })
		mustCall(t, from, "", "get", "http://"+hostPort(service, app.HTTPPort)+"/")
		mustCall(t, from, from.IPv6, "get", "http://"+hostPort(to.IPv6, app.HTTPPort)+"/")
		mustCall(t, e.pod(webA, 1), e.pod(webA, 1).IPv4, "tcp", hostPort(from.IPv4, app.GreetPort))
		begin(t, "to the service, "+string(rule.isolation), e.pod(webA, 0), "load", "--protocol=http", "--connections=4", "--rate=20", "--new-connection-ratio=0.5", "--duration=4s", "--timeout=20s",
			hostPort(service, app.HTTPPort)).want(t, 4)
		seenAs(t, from, e.pod(webB, 1), "inbound", from.Identity(trustDomain))
	}
}
