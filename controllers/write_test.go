package controllers

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

func (c *cluster) writer() *writer {
	k := c.keeper()
	return &writer{Client: c.WithWatch, mesh: c.mesh, keeper: k, jwts: c.jwtKeeper(), namespace: "bulkhead-system", now: func() time.Time { return born }}
}

func (c *cluster) keeper() *keeper {
	return &keeper{cache: c.WithWatch, live: c.WithWatch, writer: c.WithWatch, namespace: "bulkhead-system", dnsNames: []string{"bulkhead-operator.bulkhead-system.svc"},
		mesh: c.mesh, log: slog.New(slog.DiscardHandler), now: time.Now, leading: func() bool { return true },
		event: func(secret *corev1.ObjectReference, _, reason, note string) {
			c.events, c.about = append(c.events, secret.Name+" "+reason+": "+note), secret
		}}
}

func (c *cluster) nodeProxy(name string) *v1alpha1.NodeProxy {
	c.t.Helper()
	np := &v1alpha1.NodeProxy{}
	if err := c.Get(c.t.Context(), client.ObjectKey{Name: name}, np); err != nil {
		c.t.Fatal(err)
	}
	return np
}

// setCanary does what a rollout does. The fake API server fills in what an applied
// object hasn't, so the version is there as it is.
func (c *cluster) setCanary(node, tenant string) error {
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "mesh.bulkhead.dev/v1alpha1", "kind": "NodeProxy", "metadata": map[string]any{"name": node},
		"spec": map[string]any{"tenants": []any{map[string]any{"name": tenant, "version": "1.40.0", "canary": map[string]any{"version": "1.39.3", "weight": int64(10)}}}},
	}}
	return c.Apply(c.t.Context(), client.ApplyConfigurationFromUnstructured(u), client.FieldOwner("rollout"))
}

func TestPlanKeepsCanary(t *testing.T) {
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("one", "n1", "10.0.1.1"))
	w := c.writer()
	write := func() {
		t.Helper()
		if err := w.writePlan(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
	}
	write()
	np := c.nodeProxy("n1")
	if len(np.Spec.Pods) != 1 || len(np.Spec.Tenants) != 1 || np.Spec.Tenants[0].Version != "1.40.0" || np.Spec.TrustDomain != "td" || !ownedBy(np.OwnerReferences, "uid-n1") {
		t.Fatalf("plan %+v of %+v", np.Spec, np.OwnerReferences)
	}
	version := np.ResourceVersion
	write()
	if got := c.nodeProxy("n1").ResourceVersion; got != version {
		t.Error("a plan that stays is written again")
	}
	if err := c.setCanary("n1", "a"); err != nil {
		t.Fatal(err)
	}
	if err := c.Create(t.Context(), newPod("two", "n1", "10.0.1.2")); err != nil {
		t.Fatal(err)
	}
	c.syncPodNamed("two")
	write()
	np = c.nodeProxy("n1")
	if len(np.Spec.Pods) != 2 || np.Spec.Tenants[0].Canary == nil || np.Spec.Tenants[0].Canary.Weight != 10 || np.Spec.Tenants[0].Version != "1.40.0" {
		t.Fatalf("with a canary: %+v", np.Spec)
	}
	// When the tenant leaves the node, its canary goes with it.
	for _, name := range []string{"one", "two"} {
		if err := c.Delete(t.Context(), newPod(name, "n1")); err != nil {
			t.Fatal(err)
		}
		c.syncPodNamed(name)
	}
	write()
	if np = c.nodeProxy("n1"); len(np.Spec.Pods) != 0 || len(np.Spec.Tenants) != 0 {
		t.Errorf("without pods: %+v", np.Spec)
	}
}

func TestPlansAreForLinux(t *testing.T) {
	windows := newNode("w", "10.0.3.0/24")
	windows.Labels = map[string]string{corev1.LabelOSStable: "windows"}
	c := newCluster(t, newNode("n1", "10.0.1.0/24"), windows)
	w := c.writer()
	for _, n := range []string{"n1", "w"} {
		if err := w.writePlan(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	var list v1alpha1.NodeProxyList
	if err := c.List(t.Context(), &list); err != nil || len(list.Items) != 1 || list.Items[0].Name != "n1" {
		t.Errorf("NodeProxies %+v, %v", list.Items, err)
	}
}

// A node's redirection comes from its labels, and its agent's word reaches the
// topology.
func TestRedirectionFollowsLabels(t *testing.T) {
	topology := newTopology("t", "mesh")
	topology.Spec.NodeRedirections = []v1alpha1.NodeRedirection{{NodeSelector: metav1.LabelSelector{MatchLabels: map[string]string{"kernel": "old"}}, Redirection: v1alpha1.RedirectionNetfilter}}
	node := newNode("n1", "10.0.1.0/24")
	c := newCluster(t, topology, node)
	w := c.writer()
	plans := start(t, &c.triggers.plans)
	write := func() *v1alpha1.NodeProxy {
		t.Helper()
		for _, err := range []error{w.writePlan(t.Context(), "n1"), c.syncReport(t.Context(), "n1"), w.writeTopology(t.Context(), "t")} {
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Get(t.Context(), client.ObjectKey{Name: "t"}, topology); err != nil {
			t.Fatal(err)
		}
		return c.nodeProxy("n1")
	}
	if np := write(); np.Spec.Redirection != v1alpha1.RedirectionEBPF {
		t.Errorf("redirection %q", np.Spec.Redirection)
	}
	node.Labels = map[string]string{"kernel": "old"}
	if err := c.Update(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	if err := c.syncNode(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); plans.Len() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the node's plan isn't made anew")
		}
	}
	np := write()
	if np.Spec.Redirection != v1alpha1.RedirectionNetfilter {
		t.Errorf("redirection %q after the label", np.Spec.Redirection)
	}
	np.Status.Redirection = v1alpha1.RedirectionEBPF
	np.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionRedirected, Status: metav1.ConditionFalse, Reason: "Unsupported", Message: "no nftables", LastTransitionTime: metav1.NewTime(born)}}
	if err := c.Status().Update(t.Context(), np); err != nil {
		t.Fatal(err)
	}
	write()
	if s := meta.FindStatusCondition(topology.Status.Conditions, v1alpha1.ConditionRedirected); s == nil || s.Reason != "NodesDiffer" || s.Message != "n1 has EBPF instead of Netfilter: no nftables" {
		t.Errorf("conditions %+v", topology.Status.Conditions)
	}
}

func TestStatusFollowsAgents(t *testing.T) {
	policy := &v1alpha1.IsolationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p"}, Spec: v1alpha1.IsolationPolicySpec{ProxyLimits: v1alpha1.ProxyLimits{Pids: new(int64(64))}}}
	topology := newTopology("t", "mesh")
	c := newCluster(t, topology, newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("one", "n1", "10.0.1.1"), policy)
	w := c.writer()
	write := func() (tenant v1alpha1.TenantProxy) {
		t.Helper()
		for _, err := range []error{w.writePlan(t.Context(), "n1"), c.syncReport(t.Context(), "n1"), w.writeTenant(t.Context(), "a"), w.writePolicies(t.Context(), "a"), w.writeTopology(t.Context(), "t")} {
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: "a", Name: "a"}, &tenant); err != nil {
			t.Fatal(err)
		}
		return tenant
	}
	if s := write().Status; s.Proxies != 1 || s.ReadyProxies != 0 || s.Pods != 1 || s.Conditions[0].Reason != "Progressing" {
		t.Errorf("before the agent's word: %+v", s)
	}
	np := c.nodeProxy("n1")
	if np.Spec.Tenants[0].Limits.Pids != 64 {
		t.Errorf("limits %+v", np.Spec.Tenants[0].Limits)
	}
	np.Status.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Ready: true, Limits: v1alpha1.Limits{Pids: 64}, Generations: []v1alpha1.GenerationStatus{{Version: "1.40.0", PID: 7, Ready: true}}}}
	np.Status.ProxyVersions = []string{"1.40.0"}
	if err := c.Status().Update(t.Context(), np); err != nil {
		t.Fatal(err)
	}
	if s := write().Status; s.ReadyProxies != 1 || !meta.IsStatusConditionTrue(s.Conditions, "Ready") || s.Nodes[0].Generations[0].PID != 7 {
		t.Errorf("ready: %+v", s)
	}
	for _, o := range []client.Object{policy, topology} {
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			t.Fatal(err)
		}
	}
	if !meta.IsStatusConditionTrue(policy.Status.Conditions, "Ready") || !meta.IsStatusConditionTrue(topology.Status.Conditions, "Ready") || topology.Status.Proxies != 1 {
		t.Errorf("policy %+v, topology %+v", policy.Status, topology.Status)
	}
	// A crash loop is an event for each cause, not for each crash.
	var events []string
	w.events = func(_, _ *corev1.ObjectReference, _, reason, _, note string) {
		events = append(events, reason+" "+note)
	}
	for i, f := range []v1alpha1.ProxyFailure{{Cause: "Crash", Restarts: 1, Log: "assert failure"}, {Cause: "Crash", Restarts: 2}, {Cause: "OutOfMemory", Restarts: 3}, {Cause: "OutOfMemory", Restarts: 3, Recovered: true}} {
		np = c.nodeProxy("n1")
		f.At = metav1.NewTime(born.Add(time.Duration(i) * time.Minute))
		np.Status.Tenants[0].Failure = &f
		if err := c.Status().Update(t.Context(), np); err != nil {
			t.Fatal(err)
		}
		if stable := meta.IsStatusConditionTrue(write().Status.Conditions, v1alpha1.ConditionStable); stable != f.Recovered {
			t.Errorf("after %+v the proxy is told as stable: %t", f, stable)
		}
	}
	if len(events) != 2 || !strings.HasPrefix(events[0], "Crash ") || !strings.Contains(events[0], "assert failure") || !strings.HasPrefix(events[1], "OutOfMemory ") {
		t.Errorf("events %q", events)
	}
	// A namespace that leaves the mesh has no TenantProxy.
	if err := c.Delete(t.Context(), topology); err != nil {
		t.Fatal(err)
	}
	if err := c.syncTopologies(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.drain()
	if err := w.writeTenant(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	var list v1alpha1.TenantProxyList
	if err := c.List(t.Context(), &list); err != nil || len(list.Items) != 0 {
		t.Errorf("TenantProxies %+v, %v", list.Items, err)
	}
}

func newService(name, vip string, ports ...corev1.ServicePort) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name, UID: types.UID("uid-" + name)}, Spec: corev1.ServiceSpec{ClusterIPs: []string{vip}, Ports: ports}}
}

func newSlice(service string, port discoveryv1.EndpointPort, addresses ...string) *discoveryv1.EndpointSlice {
	es := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "a", Name: service + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{port},
	}
	for _, a := range addresses {
		es.Endpoints = append(es.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	return es
}

// What is wrong with a service is a condition and an event of that service, goes
// when it is over, and nobody else's object is written to.
func TestServicesAreTold(t *testing.T) {
	http := corev1.ServicePort{Name: "http", Port: 80}
	httpOf := discoveryv1.EndpointPort{Name: new("http"), Port: new(int32(8080))}
	foreign := newService("foreign", "10.96.0.9", http)
	foreign.Namespace = "out"
	long := strings.Repeat("x", 63)
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNamespace("b", "mesh"), newNamespace("c", "mesh"), newNamespace("out"), newNode("n1", "10.0.1.0/24"),
		newPod("one", "n1", "10.0.1.1"),
		newService("good", "10.96.0.1", http), newSlice("good", httpOf, "10.0.1.1"),
		newService("empty", "10.96.0.2", http),
		newService("typo", "10.96.0.3", http), newSlice("typo", discoveryv1.EndpointPort{Name: new("htpp"), Port: new(int32(8080))}, "10.0.1.1"),
		newService(long, "10.96.0.4", corev1.ServicePort{Name: strings.Repeat("p", 15), Port: 80}),
		foreign)
	w := c.writer()
	var events []string
	w.events = func(o, _ *corev1.ObjectReference, _, reason, _, _ string) {
		events = append(events, o.Kind+" "+o.Name+" "+reason)
	}
	condition := func(namespace, name string) (c1 metav1.Condition) {
		t.Helper()
		key := types.NamespacedName{Namespace: namespace, Name: name}
		if err := w.writeService(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		var s corev1.Service
		if err := c.Get(t.Context(), key, &s); err != nil {
			t.Fatal(err)
		}
		if got := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionServed); got != nil {
			return *got
		}
		return c1
	}
	for name, reason := range map[string]string{"good": "", "empty": "NoEndpoints", "typo": "PortMismatch", long: "NoEndpoints"} {
		if got := condition("a", name); got.Reason != reason || reason != "" && got.Status != metav1.ConditionFalse {
			t.Errorf("%s is told %+v", name, got)
		}
	}
	if got := condition("out", "foreign"); got.Reason != "" {
		t.Errorf("a service outside of the mesh is told %+v", got)
	}
	condition("a", "empty")
	slices.Sort(events)
	if want := []string{"Service empty NoEndpoints", "Service typo PortMismatch", "Service " + long + " NoEndpoints"}; !slices.Equal(events, want) {
		t.Errorf("events %q", events)
	}
	if err := c.Create(t.Context(), newSlice("empty", httpOf, "10.0.1.1")); err != nil {
		t.Fatal(err)
	}
	if err := c.syncService(t.Context(), types.NamespacedName{Namespace: "a", Name: "empty"}); err != nil {
		t.Fatal(err)
	}
	if got := condition("a", "empty"); got.Reason != "" {
		t.Errorf("with an endpoint it is told %+v", got)
	}

	// What Envoys refuse: a stranger's word alone counts for nothing.
	refuse := func(tenants ...string) {
		t.Helper()
		if err := w.writePlan(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
		np := c.nodeProxy("n1")
		np.Status.Tenants = nil
		for _, tenant := range tenants {
			np.Status.Tenants = append(np.Status.Tenants, v1alpha1.NodeTenantStatus{Name: tenant,
				Rejected: []v1alpha1.RejectedResource{{Type: "EDS", Name: "vip|10.96.0.1:80", Message: tenant + " says no"}}})
		}
		if err := c.Status().Update(t.Context(), np); err != nil {
			t.Fatal(err)
		}
		if err := c.syncReport(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
	}
	events = nil
	refuse("b")
	if got := condition("a", "good"); got.Reason != "" {
		t.Errorf("one stranger's word makes it %+v", got)
	}
	refuse("b", "c")
	if got := condition("a", "good"); got.Reason != "ConfigRejected" || !strings.Contains(got.Message, "of tenants: 2") || strings.Contains(got.Message, "says no") {
		t.Errorf("two tenants' words make it %+v", got)
	}
	refuse("a")
	if got := condition("a", "good"); got.Reason != "ConfigRejected" || !strings.Contains(got.Message, "EDS vip|10.96.0.1:80: a says no") {
		t.Errorf("its own tenant's word makes it %+v", got)
	}
	tenant := func() *metav1.Condition {
		t.Helper()
		if err := w.writeTenant(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		var tp v1alpha1.TenantProxy
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: "a", Name: "a"}, &tp); err != nil {
			t.Fatal(err)
		}
		return meta.FindStatusCondition(tp.Status.Conditions, v1alpha1.ConditionConfigured)
	}
	if got := tenant(); got == nil || got.Reason != "ConfigRejected" || !strings.Contains(got.Message, "n1 refused EDS vip|10.96.0.1:80 of Service a/good: a says no") {
		t.Errorf("the tenant is told %+v", got)
	}
	if want := []string{"Service good ConfigRejected", "TenantProxy a ConfigRejected"}; !slices.Equal(events, want) {
		t.Errorf("events %q", events)
	}
	refuse()
	if got := condition("a", "good"); got.Reason != "" {
		t.Errorf("when it is over it is told %+v", got)
	}
	if got := tenant(); got == nil || got.Status != metav1.ConditionTrue {
		t.Errorf("when it is over the tenant is told %+v", got)
	}
}

func TestAuthorityIsMadeOnce(t *testing.T) {
	c := newCluster(t, newNamespace("a", "mesh"))
	first, second := c.keeper(), c.keeper()
	secret := func() (s corev1.Secret) {
		t.Helper()
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: "bulkhead-system", Name: SecretAuthority}, &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	sync := func() {
		t.Helper()
		for _, k := range []*keeper{first, second, first} {
			if _, err := k.sync(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		a := first.Authority()
		b := second.Authority()
		if !bytes.Equal(a.Roots()[0], b.Roots()[0]) {
			t.Error("two replicas have two authorities")
		}
	}
	sync()
	if first.trustDomain != "" || c.topologies.TrustDomain() != "" {
		t.Error("the trust domain is decided before there is a topology")
	}
	if cert, err := first.certificate(nil); err != nil || cert == nil {
		t.Errorf("agents can't be served before there is a topology: %v", err)
	}
	if err := c.Create(t.Context(), newTopology("t", "mesh")); err != nil {
		t.Fatal(err)
	}
	sync()
	c.drain()
	confirmed := secret()
	if a, err := identity.ParseAuthority(confirmed.Data); err != nil || a.TrustDomain() != "td" || confirmed.Annotations[annotationProvisional] != "" {
		t.Errorf("authority of %q, %v", a.TrustDomain(), err)
	}
	if got := c.topologies.TrustDomain(); got != "td" {
		t.Errorf("trust domain %q", got)
	}
	// From now on it stays, whatever comes.
	if err := c.Delete(t.Context(), newTopology("t", "mesh")); err != nil {
		t.Fatal(err)
	}
	other := newTopology("other", "mesh")
	other.Spec.TrustDomain = "td2"
	if err := c.Create(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	sync()
	if err := c.syncTopologies(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.drain()
	if now := secret(); now.ResourceVersion != confirmed.ResourceVersion {
		t.Error("the authority was written again")
	}
	w := c.writer()
	w.keeper = first
	if err := w.writeMembership(t.Context(), struct{}{}); err != nil {
		t.Fatal(err)
	}
	var bundle, members corev1.ConfigMap
	for name, m := range map[string]*corev1.ConfigMap{ConfigMapTrustBundle: &bundle, ConfigMapMembership: &members} {
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: "bulkhead-system", Name: name}, m); err != nil {
			t.Fatal(err)
		}
	}
	if bundle.Data["trustDomain"] != "td" || bundle.Data["ca.crt"] == "" || members.Data["membership.json"] != `{"trustDomain":"td","namespaces":[]}` {
		t.Errorf("bundle %v, membership %v", bundle.Data["trustDomain"], members.Data)
	}
}
