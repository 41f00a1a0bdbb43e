package e2e

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// processes are the pids and versions of all tenants' proxies, by node and tenant, when
// none of them comes or goes.
func (e *env) processes(ctx context.Context, t *testing.T) (pids map[string]string) {
	t.Helper()
	err := harness.Wait(ctx, patience, 200*time.Millisecond, "one process of each tenant", func(ctx context.Context) error {
		pids = map[string]string{}
		for _, node := range e.nodes {
			for _, tenant := range tenants {
				p, err := e.Proxy(ctx, node, tenant)
				if err != nil {
					return err
				}
				if len(p.Generations) != 1 {
					return fmt.Errorf("%s on %s has %+v", tenant, node, p.Generations)
				}
				for _, g := range p.Generations {
					pids[fmt.Sprintf("%s %s generation %d", node, tenant, g.Generation)] = fmt.Sprintf("%d, Envoy %s, serving %v", g.PID, g.Version, g.Serving)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return pids
}

// goesOn fails the test if bad input changed what runs.
func (e *env) goesOn(t *testing.T) {
	t.Helper()
	before := e.processes(t.Context(), t)
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		if after := e.processes(context.Background(), t); !maps.Equal(before, after) {
			t.Errorf("proxies were %v, are %v", before, after)
		}
	})
}

func topologyManifest(name, selector, more string) string {
	return fmt.Sprintf(`
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: MeshTopology
metadata: {name: %s}
spec:
  trustDomain: %s
  rules: [{namespaceSelector: {%s}}]
%s`, name, trustDomain, selector, more)
}

func TestRefusedAtAdmission(t *testing.T) {
	e.goesOn(t)
	policy := func(spec string) string {
		return "apiVersion: mesh.bulkhead.dev/v1alpha1\nkind: IsolationPolicy\nmetadata: {name: bad, namespace: e2e-a}\nspec: {" + spec + "}\n"
	}
	for name, bad := range map[string]struct{ manifest, says string }{
		"no rules":             {strings.Replace(topologyManifest("e2e-bad", "", ""), "[{namespaceSelector: {}}]", "[]", 1), "spec.rules"},
		"a word as version":    {topologyManifest("e2e-bad", "", "  proxy: {version: latest}"), "spec.proxy.version"},
		"a trust domain's URL": {strings.Replace(topologyManifest("e2e-bad", "", ""), trustDomain, "spiffe://x", 1), "spec.trustDomain"},
		"another trust domain": {strings.Replace(topologyManifest("e2e", "", ""), trustDomain, "other.example", 1), "trustDomain can't be changed"},
		"unknown isolation":    {strings.Replace(topologyManifest("e2e-bad", "", ""), "}}]", "}, isolation: Cluster}]", 1), "isolation"},
		"hardly any CPU":       {policy("cpu: {limit: 1m}"), "cpu.limit must be at least"},
		"negative CPU":         {policy("cpu: {limit: -1}"), "cpu.limit must be at least"},
		"CPU that is no number": {policy("cpu: {limit: much}"),
			"cpu.limit"},
		"hardly any memory":                {policy("memory: {max: 1Mi}"), "memory.max must be at least"},
		"high above max":                   {policy("memory: {high: 200Mi, max: 100Mi}"), "memory.high must not be above"},
		"more than a machine":              {policy("memory: {max: 1000Ti}"), "memory.max must be at most"},
		"a weight of nothing":              {policy("cpu: {weight: 0}"), "weight"},
		"no process":                       {policy("pids: 1"), "pids"},
		"no connection":                    {policy("connections: {concurrent: 0}"), "connections.concurrent"},
		"connections of no kind":           {policy("connections: {}"), "set concurrent, newPerSecond, newDirectPerSecond, or several of them"},
		"a negative pace":                  {policy("connections: {newPerSecond: -1}"), "newPerSecond"},
		"no flow in a second":              {policy("connections: {newDirectPerSecond: 0}"), "newDirectPerSecond"},
		"threads without sockets":          {policy("concurrency: 64"), "concurrency"},
		"standby without memory":           {policy("warmStandby: true, memory: {max: 64Mi}"), "at least 96Mi with warmStandby"},
		"less CPU than Envoy needs":        {policy("cpu: {limit: 19m}"), "cpu.limit must be at least 20m"},
		"less memory than Envoy needs":     {policy("memory: {max: 47Mi}"), "memory.max must be at least 48Mi"},
		"less of it than two Envoys need":  {policy("warmStandby: true, memory: {max: 95Mi}"), "memory.max must be at least 96Mi"},
		"slowed down from the start":       {policy("memory: {high: 31Mi}"), "memory.high must be at least 32Mi"},
		"fewer threads than Envoy needs":   {policy("pids: 31"), "greater than or equal to 32"},
		"no CPU":                           {policy("cpu: {limit: 0}"), "cpu.limit must be at least 20m"},
		"no memory":                        {policy("memory: {max: 0}"), "memory.max must be at least 48Mi"},
		"negative memory":                  {policy("memory: {max: -1Gi}"), "memory.max must be at least 48Mi"},
		"slowed down at once":              {policy("memory: {high: 0}"), "memory.high must be at least 32Mi"},
		"a negative weight":                {policy("cpu: {weight: -100}"), "cpu.weight"},
		"no process at all":                {policy("pids: 0"), "pids"},
		"negative processes":               {policy("pids: -32"), "pids"},
		"negative connections":             {policy("connections: {concurrent: -5}"), "connections.concurrent"},
		"no pace":                          {policy("connections: {newPerSecond: 0}"), "newPerSecond"},
		"no thread":                        {policy("concurrency: 0"), "concurrency"},
		"no bandwidth":                     {policy("bandwidth: {egress: 0}"), "bandwidth.egress must be at least 128Ki"},
		"more CPUs than any machine":       {policy("cpu: {limit: 1025}"), "cpu.limit must be at most 1024"},
		"more processes than may be":       {policy("pids: 40000"), "pids"},
		"hardly any bandwidth":             {policy("bandwidth: {egress: 1k}"), "bandwidth.egress must be at least 128Ki"},
		"negative bandwidth":               {policy("bandwidth: {ingress: -5}"), "bandwidth.ingress must be at least 128Ki"},
		"a field that isn't":               {policy("cpus: {limit: 1}"), "cpus"},
		"a default below what Envoy needs": {topologyManifest("e2e-bad", "matchLabels: {e2e.bulkhead.dev/nowhere: x}", "  limits: {defaults: {memory: {max: 1Mi}}}"), "memory.max must be at least"},
		"a negative ceiling":               {topologyManifest("e2e-bad", "matchLabels: {e2e.bulkhead.dev/nowhere: x}", "  limits: {ceilings: {pids: -1}}"), "pids"},
		"hardly any CPU for a node":        {topologyManifest("e2e-bad", "matchLabels: {e2e.bulkhead.dev/nowhere: x}", "  limits: {node: {cpu: {limit: 1m}}}"), "cpu.limit must be at least"},
		"hardly any memory for a node":     {topologyManifest("e2e-bad", "matchLabels: {e2e.bulkhead.dev/nowhere: x}", "  limits: {node: {memoryMax: 64Mi}}"), "node.memoryMax must be at least 128Mi"},
		"a path as tenant": {`
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: NodeProxy
metadata: {name: nowhere}
spec: {tenants: [{name: "../etc", version: 1.40.0}]}
`, "name"},
	} {
		t.Run(name, func(t *testing.T) {
			err := e.Apply(t.Context(), bad.manifest)
			if err == nil {
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), bad.says) {
				t.Errorf("refused, but not with %q: %v", bad.says, err)
			}
		})
	}
}

// accepted waits until the condition Accepted of a topology has a reason, and
// returns its message.
func accepted(t *testing.T, topology, reason string) string {
	t.Helper()
	message := ""
	err := harness.Wait(t.Context(), patience, 100*time.Millisecond, topology+" to be "+reason, func(ctx context.Context) error {
		var o v1alpha1.MeshTopology
		if err := e.Client.Get(ctx, client.ObjectKey{Name: topology}, &o); err != nil {
			return err
		}
		c := meta.FindStatusCondition(o.Status.Conditions, v1alpha1.ConditionAccepted)
		if c == nil || c.Reason != reason || c.ObservedGeneration != o.Generation {
			return fmt.Errorf("conditions of generation %d are %+v", o.Generation, o.Status.Conditions)
		}
		message = c.Message
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return message
}

func (e *env) remove(t *testing.T, kind, name string) {
	t.Helper()
	t.Cleanup(func() {
		if _, err := e.Kubectl(context.Background(), "", "delete", kind, name, "--ignore-not-found", "--wait=true"); err != nil {
			t.Error(err)
		}
	})
}

func TestToldInAConditionOnly(t *testing.T) {
	for _, bad := range []struct{ name, selector, more, reason, says string }{
		{"e2e-nothing", "matchLabels: {e2e.bulkhead.dev/nowhere: x}", "", "NothingSelected", "labels"},
		{"e2e-overlap", `matchLabels: {e2e.bulkhead.dev/mesh: "true"}`, "", "Overlaps", "e2e-a"},
		{"e2e-selector", "matchExpressions: [{key: a, operator: In}]", "", "InvalidSelector", "spec.rules[0]"},
	} {
		t.Run(bad.reason, func(t *testing.T) {
			e.goesOn(t)
			e.remove(t, "meshtopology", bad.name)
			if err := e.Apply(t.Context(), topologyManifest(bad.name, bad.selector, bad.more)); err != nil {
				t.Fatal(err)
			}
			if message := accepted(t, bad.name, bad.reason); !strings.Contains(message, bad.says) {
				t.Errorf("the message %q doesn't say %q", message, bad.says)
			}
			accepted(t, "e2e", "Accepted")
			mustCall(t, e.pod(webA, 0), e.pod(webA, 0).IPv4, "tcp", hostPort(e.pod(webB, 1).IPv4, app.GreetPort))
		})
	}
}

func TestUnknownProxyVersion(t *testing.T) {
	e.goesOn(t)
	set := func(ctx context.Context, version string) error {
		_, err := e.Kubectl(ctx, "", "patch", "meshtopology", "e2e", "--type=merge", "--patch", `{"spec":{"proxy":{"version":"`+version+`"}}}`)
		return err
	}
	var before v1alpha1.MeshTopology
	if err := e.Client.Get(t.Context(), client.ObjectKey{Name: "e2e"}, &before); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := set(context.Background(), before.Spec.Proxy.Version); err != nil {
			t.Error(err)
		}
	})
	if err := set(t.Context(), "9.9.9"); err != nil {
		t.Fatal(err)
	}
	if message := accepted(t, "e2e", "UnknownProxyVersion"); !strings.Contains(message, "9.9.9") || !strings.Contains(message, e.nodes[0]) {
		t.Errorf("the message names neither version nor node: %q", message)
	}
	mustCall(t, e.pod(jobA, 0), e.pod(jobA, 0).IPv4, "tcp", hostPort(e.pod(webB, 1).IPv4, app.GreetPort))
	if err := set(t.Context(), before.Spec.Proxy.Version); err != nil {
		t.Fatal(err)
	}
	accepted(t, "e2e", "Accepted")
	for _, tenant := range tenants {
		if _, err := e.WaitTenant(t.Context(), tenant, len(e.nodes), patience); err != nil {
			t.Error(err)
		}
	}
}
