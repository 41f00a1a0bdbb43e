package translate

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// The first rule that selects a namespace says what its tenants are made of.
func TestTenancyRules(t *testing.T) {
	topology := newTopology("t", 0, "td", "pod", "account", "node", "namespace", "pod")
	for i, isolation := range []v1alpha1.Isolation{v1alpha1.IsolationPod, v1alpha1.IsolationServiceAccount, v1alpha1.IsolationNode, "", v1alpha1.IsolationNode} {
		topology.Spec.Rules[i].Isolation = isolation
	}
	all := NewTopologies([]v1alpha1.MeshTopology{topology}, "td", nil)
	long := strings.Repeat("n", 63)
	for _, test := range []struct{ namespace, labels, want string }{
		{"a", "namespace", "a"},
		{"a", "node", "_node"},
		{"a", "account", "a.sa.web"},
		{"a", "pod", "a.pod.web-0"},
		{"a", "account pod", "a.pod.web-0"},
		{"a", "namespace node", "_node"},
		{"a", "other", ""},
		{long, "pod", long + ".pod.web-0"},
	} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: test.namespace, Labels: map[string]string{}}}
		for _, l := range strings.Fields(test.labels) {
			ns.Labels[l] = "1"
		}
		m, _ := all.Match(ns)
		p := NewPod(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: test.namespace, Name: "web-0", UID: "u"}, Spec: corev1.PodSpec{NodeName: "n", ServiceAccountName: "web"}}, m)
		if got := p.Tenant.String(); got != test.want {
			t.Errorf("labels %q: tenant %q, want %q", test.labels, got, test.want)
		}
		if want := (model.Identity{TrustDomain: "td", Namespace: test.namespace, ServiceAccount: "web"}); test.want != "" && p.Identity != want {
			t.Errorf("labels %q: identity %v; it must not depend on the tenant", test.labels, p.Identity)
		}
	}
}

func TestOptOut(t *testing.T) {
	m := Membership{Topology: "t", Scope: model.ScopeNamespace, TrustDomain: "td"}
	for value, out := range map[string]bool{"true": true, "false": false, "": false, "yes": false} {
		p := NewPod(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p", UID: "u", Labels: map[string]string{v1alpha1.LabelOptOut: value}}, Spec: corev1.PodSpec{NodeName: "n"}}, m)
		if p.OptedOut != out || (p.Standing == Outside) != out || p.Tenant.IsZero() != out {
			t.Errorf("%q: %+v", value, p)
		}
	}
}

func TestTenantProxyName(t *testing.T) {
	long, pod := strings.Repeat("n", 63), strings.Repeat("p", 62)+"."
	pod = strings.Repeat(pod, 4)[:252]
	names := map[string]string{}
	for _, tenant := range []model.Tenant{
		{Scope: model.ScopeNode}, model.NamespaceTenant("shared"), model.NamespaceTenant(long),
		{Scope: model.ScopeServiceAccount, Namespace: "a", Name: "web"}, {Scope: model.ScopePod, Namespace: "a", Name: "web"},
		{Scope: model.ScopePod, Namespace: long, Name: pod}, {Scope: model.ScopePod, Namespace: long, Name: pod + "x"}, {Scope: model.ScopeServiceAccount, Namespace: long, Name: pod},
		{Scope: model.ScopePod, Namespace: "shared", Name: "node"},
	} {
		name := TenantProxyName(tenant)
		if problems := validation.IsDNS1123Subdomain(name); len(problems) > 0 {
			t.Errorf("%s: %q: %v", tenant, name, problems)
		}
		if other, ok := names[name]; ok {
			t.Errorf("%s and %s are both %q", other, tenant, name)
		}
		names[name] = tenant.String()
	}
}

// A proxy for all pods of a node is nobody's to bound, and who is full is told.
func TestPlanOfTenants(t *testing.T) {
	var members []Pod
	add := func(namespace, name string, tenant model.Tenant) {
		members = append(members, Pod{UID: namespace + name, Namespace: namespace, Name: name, Tenant: tenant, Standing: Member})
	}
	add("a", "p", model.Tenant{Scope: model.ScopeNode})
	add("b", "p", model.Tenant{Scope: model.ScopeNode})
	tight := NamespacePlan{Version: "1.39.3", Limits: v1alpha1.Limits{CPUMillis: 20, Pids: 32}}
	namespaces := map[string]NamespacePlan{"a": tight, "b": tight, "c": tight}
	plan := NodePlan{TrustDomain: "td", Members: members, Namespaces: namespaces, Shared: NamespacePlan{Version: "1.40.0"}, OptedOut: []Pod{{UID: "o", Namespace: "a", Name: "out"}}}
	spec := NodeProxySpec(plan)
	if want := (v1alpha1.NodeTenant{Name: "_node", Version: "1.40.0", Limits: v1alpha1.Limits{Pids: DefaultPids}}); len(spec.Tenants) != 1 || spec.Tenants[0] != want {
		t.Errorf("tenants %+v, want %+v", spec.Tenants, want)
	}
	if len(spec.Outside) != 1 || spec.Outside[0] != (v1alpha1.OutsidePod{UID: "o", Namespace: "a", Name: "out"}) {
		t.Errorf("outside %+v", spec.Outside)
	}
	if got := Crowded(members); got != "" {
		t.Errorf("crowded: %s", got)
	}
	for i := range MaxTenants - 1 {
		name := fmt.Sprintf("p%03d", i)
		add("c", name, model.Tenant{Scope: model.ScopePod, Namespace: "c", Name: name})
	}
	plan.Members = members
	if got := len(NodeProxySpec(plan).Tenants); got != MaxTenants || !strings.Contains(Crowded(members), "there are 500") {
		t.Errorf("%d tenants; %s", got, Crowded(members))
	}
	// One more, which comes first by name: it waits, what runs stays.
	plan.Had = map[string]bool{}
	for _, t := range NodeProxySpec(plan).Tenants {
		plan.Had[t.Name] = true
	}
	add("a", "new", model.NamespaceTenant("a"))
	plan.Members = members
	spec = NodeProxySpec(plan)
	if len(spec.Tenants) != MaxTenants || len(spec.Pods) != len(members)-1 || !strings.Contains(Crowded(members), "1 of 501") {
		t.Errorf("%d tenants, %d of %d pods; %s", len(spec.Tenants), len(spec.Pods), len(members), Crowded(members))
	}
	for _, tenant := range spec.Tenants {
		if !plan.Had[tenant.Name] {
			t.Errorf("%s took the place of one that runs", tenant.Name)
		}
	}
}

// The owner of a namespace learns of a shared proxy how it is, and nothing of
// whom it is shared with.
func TestSharedProxyStatus(t *testing.T) {
	shared := model.Tenant{Scope: model.ScopeNode}
	node := NodeView{Node: "n1", Tenant: shared, Pods: 2, Reported: true, Status: v1alpha1.NodeTenantStatus{Name: "_node", Pods: 9,
		Reason: "pod secret/project isn't steered", Rejected: []v1alpha1.RejectedResource{{Type: "CDS", Name: "secret", Message: "secret"}},
		Failure:     &v1alpha1.ProxyFailure{Cause: "Crash", Message: "secret", Log: "secret"},
		Generations: []v1alpha1.GenerationStatus{{PID: 7, LastExit: "secret line"}}}}
	s := TenantProxyStatus(shared, Membership{Topology: "t", Version: "1.40.0"}, []NodeView{node}, nil, metav1.NewTime(born))
	if strings.Contains(fmt.Sprintf("%+v", s), "secret") {
		t.Errorf("status %+v", s)
	}
	if s.Pods != 2 || s.Nodes[0].Ready || !strings.Contains(s.Nodes[0].Reason, "NodeProxy n1") || s.Nodes[0].Generations[0].PID != 7 || s.Tenant != "_node" {
		t.Errorf("status %+v", s)
	}
	wantCondition(t, s.Conditions, "Stable", metav1.ConditionFalse, "Crash", "n1")
	if node.Status.Generations[0].LastExit == "" || node.Status.Failure.Log == "" {
		t.Error("the report itself was changed")
	}
	pids := int64(64)
	policy := v1alpha1.IsolationPolicy{Spec: v1alpha1.IsolationPolicySpec{ProxyLimits: v1alpha1.ProxyLimits{Pids: &pids}}}
	p := IsolationPolicyStatus(&policy, PolicyInput{Member: true, Nodes: []NodeView{node}}, metav1.NewTime(born))
	wantCondition(t, p.Conditions, "Accepted", metav1.ConditionFalse, ReasonSharedProxy, "isolation: Node")
	if len(p.Nodes) != 0 {
		t.Errorf("limits of the shared proxy are told: %+v", p.Nodes)
	}
}
