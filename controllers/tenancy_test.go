package controllers

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Changing what tenants are made of moves pods, while their former proxies keep
// what serves their connections until the pods are gone.
func TestRuleChangesTenants(t *testing.T) {
	topology := newTopology("t", "mesh")
	other := newPod("two", "n1", "10.0.1.2")
	other.Namespace = "b"
	c := newCluster(t, topology, newNamespace("a", "mesh"), newNamespace("b", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("one", "n1", "10.0.1.1"), other)
	w := c.writer()
	check := func(when string, tenants string, served map[string]string, proxies map[string]string) {
		t.Helper()
		spec := c.plan1(w)
		var names []string
		for _, t := range spec.Tenants {
			names = append(names, t.Name)
		}
		if got := strings.Join(names, " "); got != tenants || len(spec.Pods) != 2 {
			t.Errorf("%s: planned tenants %q with %d pods, want %q", when, got, len(spec.Pods), tenants)
		}
		got := map[string]string{}
		for tenant, nodes := range c.proxies {
			for _, p := range nodes["n1"] {
				got[tenant.String()] += p.Name + " "
			}
			got[tenant.String()] = strings.Join(slices.Sorted(slices.Values(strings.Fields(got[tenant.String()]))), " ")
		}
		if !maps.Equal(got, served) {
			t.Errorf("%s: proxies have chains for %v, want %v", when, got, served)
		}
		objects := map[string]string{}
		for _, namespace := range []string{"a", "b"} {
			if err := w.writeTenant(t.Context(), namespace); err != nil {
				t.Fatal(err)
			}
			var list v1alpha1.TenantProxyList
			if err := c.List(t.Context(), &list, client.InNamespace(namespace)); err != nil {
				t.Fatal(err)
			}
			for _, o := range list.Items {
				objects[namespace+"/"+o.Name] = o.Status.Tenant
				if o.Status.Pods != 1 {
					t.Errorf("%s: %s/%s has %d pods", when, namespace, o.Name, o.Status.Pods)
				}
			}
		}
		if !maps.Equal(objects, proxies) {
			t.Errorf("%s: TenantProxies %v, want %v", when, objects, proxies)
		}
	}
	isolate := func(i v1alpha1.Isolation) {
		t.Helper()
		topology.Spec.Rules[0].Isolation = i
		c.change(topology)
	}
	check("Namespace", "a b", map[string]string{"a": "one", "b": "two"}, map[string]string{"a/a": "a", "b/b": "b"})
	isolate(v1alpha1.IsolationNode)
	check("Node", "_node", map[string]string{"a": "one", "b": "two", "_node": "one two"}, map[string]string{"a/shared.node": "_node", "b/shared.node": "_node"})
	isolate(v1alpha1.IsolationServiceAccount)
	check("ServiceAccount", "a.sa.sa-one b.sa.sa-two",
		map[string]string{"a": "one", "b": "two", "_node": "one two", "a.sa.sa-one": "one", "b.sa.sa-two": "two"},
		map[string]string{"a/a.sa.sa-one": "a.sa.sa-one", "b/b.sa.sa-two": "b.sa.sa-two"})
	isolate(v1alpha1.IsolationNamespace)
	check("Namespace again", "a b", map[string]string{"a": "one", "b": "two", "_node": "one two", "a.sa.sa-one": "one", "b.sa.sa-two": "two"}, map[string]string{"a/a": "a", "b/b": "b"})
	if m := c.membershipOf(model.Tenant{Scope: model.ScopeNode}, c.proxies[model.Tenant{Scope: model.ScopeNode}]["n1"]); m.Topology != "t" {
		t.Errorf("the shared proxy is of %+v", m)
	}
	// With its address, and with the pod, all of it goes: another may get it.
	isolate(v1alpha1.IsolationNode)
	moved := newPod("one", "n1", "10.0.1.9")
	if err := c.Status().Update(t.Context(), moved); err != nil {
		t.Fatal(err)
	}
	c.syncPodNamed("one")
	if n := len(c.pod("one").formers); n != 0 || len(c.proxies[model.NamespaceTenant("a")]) != 0 {
		t.Errorf("with another address it is still at %d former proxies", n)
	}
	isolate(v1alpha1.IsolationNamespace)
	if err := c.Delete(t.Context(), newPod("one", "n1")); err != nil {
		t.Fatal(err)
	}
	c.syncPodNamed("one")
	for tenant, nodes := range c.proxies {
		for _, p := range nodes["n1"] {
			if p.Name == "one" {
				t.Errorf("the pod that is gone is still at %s", tenant)
			}
		}
	}
}

func TestPodOptsOut(t *testing.T) {
	pod := newPod("one", "n1", "10.0.1.1")
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), pod, newPod("two", "n1", "10.0.1.2"))
	w := c.writer()
	if spec := c.plan1(w); len(spec.Pods) != 2 || len(spec.Outside) != 0 {
		t.Errorf("plan %+v", spec)
	}
	c.triggers.plans.delay = 0
	plans := start(t, &c.triggers.plans)
	pod.Labels = map[string]string{v1alpha1.LabelOptOut: "true"}
	if c.change(pod); plans.Len() == 0 {
		t.Error("the plan isn't made anew")
	}
	if spec := c.plan1(w); len(spec.Pods) != 1 || len(spec.Outside) != 1 || spec.Outside[0].UID != "uid-one" {
		t.Errorf("opted out: %+v", spec)
	}
	if standing, id := (directory{c.mesh}).ByUID("uid-one"); standing != translate.Outside || !id.IsZero() {
		t.Errorf("others see %d, %v", standing, id)
	}
	pod.Labels = nil
	c.change(pod)
	if spec := c.plan1(w); len(spec.Pods) != 2 || len(spec.Outside) != 0 {
		t.Errorf("back: %+v", spec)
	}
}
