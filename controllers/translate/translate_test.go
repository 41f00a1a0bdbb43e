package translate

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

var born = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newTopology(name string, age time.Duration, trustDomain string, labels ...string) v1alpha1.MeshTopology {
	t := v1alpha1.MeshTopology{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(born.Add(-age))}, Spec: v1alpha1.MeshTopologySpec{TrustDomain: trustDomain}}
	for _, l := range labels {
		t.Spec.Rules = append(t.Spec.Rules, v1alpha1.TenancyRule{NamespaceSelector: metav1.LabelSelector{MatchLabels: map[string]string{l: "1"}}})
	}
	return t
}

func TestMatch(t *testing.T) {
	everything := newTopology("all", 0, "td")
	everything.Spec.Rules = []v1alpha1.TenancyRule{{}}
	broken := newTopology("broken", time.Hour, "td", "a")
	broken.Spec.Egress = v1alpha1.EgressReject
	broken.Spec.Rules = append(broken.Spec.Rules, v1alpha1.TenancyRule{NamespaceSelector: metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "x", Operator: "Maybe"}}}})
	tests := []struct {
		name       string
		topologies []v1alpha1.MeshTopology
		namespace  string
		label      string
		want       string
		lost       []string
	}{
		{"none", nil, "a", "a", "", nil},
		{"by label", []v1alpha1.MeshTopology{newTopology("one", 0, "td", "a", "b")}, "x", "b", "one", nil},
		{"no label", []v1alpha1.MeshTopology{newTopology("one", 0, "td", "a")}, "x", "b", "", nil},
		{"the older counts", []v1alpha1.MeshTopology{newTopology("young", 0, "td", "a"), newTopology("old", time.Hour, "td", "a")}, "x", "a", "old", []string{"young"}},
		{"of the same age the first by name", []v1alpha1.MeshTopology{newTopology("b", 0, "td", "a"), newTopology("a", 0, "td", "a")}, "x", "a", "a", []string{"b"}},
		{"kube-system never", []v1alpha1.MeshTopology{everything}, "kube-system", "a", "", nil},
		{"an empty selector is all", []v1alpha1.MeshTopology{everything}, "x", "zzz", "all", nil},
		{"another trust domain", []v1alpha1.MeshTopology{newTopology("old", time.Hour, "td", "b"), newTopology("other", 0, "td2", "a")}, "x", "a", "", nil},
		{"a broken rule leaves the others", []v1alpha1.MeshTopology{broken}, "x", "a", "broken", nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			all := NewTopologies(test.topologies, "", []string{"kube-system", "bulkhead-system"})
			m, lost := all.Match(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: test.namespace, Labels: map[string]string{test.label: "1"}}})
			if m.Topology != test.want || cmp.Diff(test.lost, lost) != "" {
				t.Errorf("Match = %+v, %v; want %q, %v", m, lost, test.want, test.lost)
			}
			if m.IsMember() && (m.TrustDomain != "td" || m.Version != DefaultProxyVersion) {
				t.Errorf("membership %+v", m)
			}
			if key := (model.ProxyKey{Node: "n"}); m.RejectOutside != (test.want == "broken") || Proxy(key, "z", m, nil).RejectOutside != m.RejectOutside {
				t.Errorf("egress of %+v", m)
			}
		})
	}
}

func TestPodStanding(t *testing.T) {
	member := Membership{Topology: "t", Scope: model.ScopeNamespace, TrustDomain: "td"}
	tests := []struct {
		name   string
		change func(*corev1.Pod)
		m      Membership
		want   Standing
	}{
		{"member", func(*corev1.Pod) {}, member, Member},
		{"namespace outside", func(*corev1.Pod) {}, Membership{}, Outside},
		{"host network", func(p *corev1.Pod) { p.Spec.HostNetwork = true }, member, Host},
		{"mirror", func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"} }, member, Outside},
		{"finished", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, member, Absent},
		{"failed", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, member, Absent},
		{"not bound", func(p *corev1.Pod) { p.Spec.NodeName = "" }, member, Absent},
		{"terminating still serves", func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: born} }, member, Member},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u", Namespace: "a", Name: "p"}, Spec: corev1.PodSpec{NodeName: "n"}}
			test.change(p)
			got := NewPod(p, test.m)
			if got.Standing != test.want {
				t.Fatalf("standing %d, want %d", got.Standing, test.want)
			}
			want := model.Identity{}
			if test.want == Member {
				want = model.Identity{TrustDomain: "td", Namespace: "a", ServiceAccount: "default"}
			}
			if got.Identity != want || got.Tenant.IsZero() != (test.want != Member) {
				t.Errorf("identity %v, tenant %v", got.Identity, got.Tenant)
			}
		})
	}
}

func TestAddrs(t *testing.T) {
	got := PodAddrs([]corev1.PodIP{{IP: "fd00::2"}, {IP: "10.0.0.1"}, {IP: "::ffff:10.0.0.1"}, {IP: "127.0.0.1"}, {IP: "nonsense"}})
	if len(got) != 2 || got[0] != netip.MustParseAddr("10.0.0.1") || got[1] != netip.MustParseAddr("fd00::2") {
		t.Errorf("PodAddrs = %v", got)
	}
	node := NewNode(&corev1.Node{Spec: corev1.NodeSpec{PodCIDRs: []string{"10.0.0.0/24"}}})
	for addr, want := range map[string]bool{"10.0.0.9": true, "10.0.1.1": false, "fd00::1": false} {
		if InRanges(netip.MustParseAddr(addr), node.PodCIDRs) != want {
			t.Errorf("InRanges(%s) isn't %t", addr, want)
		}
	}
	if !InRanges(netip.MustParseAddr("10.0.1.1"), nil) {
		t.Error("a node without ranges refuses addresses")
	}
}

func TestLimits(t *testing.T) {
	cpu, cpu2, mem, high := resource.MustParse("500m"), resource.MustParse("2"), resource.MustParse("64Mi"), resource.MustParse("128Mi")
	weight := int64(50)
	got := Limits([]v1alpha1.IsolationPolicy{
		{Spec: v1alpha1.IsolationPolicySpec{ProxyLimits: v1alpha1.ProxyLimits{CPU: &v1alpha1.CPUIsolation{Limit: &cpu2, Weight: &weight}, Memory: &v1alpha1.MemoryIsolation{High: &high}}}},
		{Spec: v1alpha1.IsolationPolicySpec{ProxyLimits: v1alpha1.ProxyLimits{CPU: &v1alpha1.CPUIsolation{Limit: &cpu}, Memory: &v1alpha1.MemoryIsolation{Max: &mem}}}},
	}, Bounds{})
	if want := (v1alpha1.Limits{CPUWeight: 50, CPUMillis: 500, MemoryHigh: 64 << 20, MemoryMax: 64 << 20, Pids: DefaultPids}); got != want {
		t.Errorf("Limits = %+v, want %+v", got, want)
	}
}

func TestNodeProxySpec(t *testing.T) {
	m := Membership{Topology: "t", Scope: model.ScopeNamespace, TrustDomain: "td", Version: "1.40.0"}
	var pods []Pod
	for _, n := range [][2]string{{"b", "2"}, {"a", "3"}, {"a", "1"}} {
		pods = append(pods, NewPod(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: n[0], Name: "p" + n[1], UID: "u" + "-" + "x"}, Spec: corev1.PodSpec{NodeName: "n"}}, m))
		pods[len(pods)-1].UID = "u" + n[1]
	}
	out, in := v1alpha1.Exclusion{Direction: v1alpha1.DirectionOutbound, Port: 1}, v1alpha1.Exclusion{Direction: v1alpha1.DirectionInbound, Port: 2}
	for i := range pods {
		pods[i].Exclusions = []v1alpha1.Exclusion{out, in}
	}
	a := NamespacePlan{Version: "1.40.0", Limits: v1alpha1.Limits{Pids: 5}}
	b := a
	b.Exclusions, b.Strict, b.Bypass = []v1alpha1.Exclusion{in}, true, true
	got := NodeProxySpec(NodePlan{TrustDomain: "td", Redirection: v1alpha1.RedirectionNetfilter, Members: pods, Namespaces: map[string]NamespacePlan{"a": a, "b": b}})
	want := v1alpha1.NodeProxySpec{TrustDomain: "td", Redirection: v1alpha1.RedirectionNetfilter,
		Tenants:    []v1alpha1.NodeTenant{{Name: "a", Version: "1.40.0", Limits: v1alpha1.Limits{Pids: 5}}, {Name: "b", Version: "1.40.0", Limits: v1alpha1.Limits{Pids: 5}}},
		Namespaces: []v1alpha1.NodeNamespace{{Name: "b", Exclusions: []v1alpha1.Exclusion{in}, PlainText: v1alpha1.PlainTextStrict, EmergencyBypass: true}},
		Pods: []v1alpha1.NodePod{
			{UID: "u1", Namespace: "a", Name: "p1", ServiceAccount: "default", Tenant: "a", Exclusions: []v1alpha1.Exclusion{out, in}},
			// A pod can't let plain text in where its namespace doesn't.
			{UID: "u2", Namespace: "b", Name: "p2", ServiceAccount: "default", Tenant: "b", Exclusions: []v1alpha1.Exclusion{out}},
			{UID: "u3", Namespace: "a", Name: "p3", ServiceAccount: "default", Tenant: "a", Exclusions: []v1alpha1.Exclusion{out, in}},
		}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	canary := *got.DeepCopy()
	canary.Tenants[0].Canary = &v1alpha1.CanaryGeneration{Version: "1.39.3", Weight: 5}
	if !SamePlan(canary, got) {
		t.Error("a canary makes another plan")
	}
	canary.Tenants[1].Limits.Pids = 6
	if SamePlan(canary, got) {
		t.Error("other limits are the same plan")
	}
	for name, change := range map[string]func(*v1alpha1.NodeProxySpec){
		"another redirection": func(s *v1alpha1.NodeProxySpec) { s.Redirection = v1alpha1.RedirectionEBPF },
		"no bypass":           func(s *v1alpha1.NodeProxySpec) { s.Namespaces[0].EmergencyBypass = false },
		"other exclusions":    func(s *v1alpha1.NodeProxySpec) { s.Namespaces[0].Exclusions[0].Port++ },
		"a pod's exclusions":  func(s *v1alpha1.NodeProxySpec) { s.Pods[0].Exclusions = nil },
		"another tenant":      func(s *v1alpha1.NodeProxySpec) { s.Pods[0].Tenant = "b" },
	} {
		other := *got.DeepCopy()
		if change(&other); SamePlan(other, got) {
			t.Error(name + " is the same plan")
		}
	}
	other := *got.DeepCopy()
	slices.Reverse(other.Pods)
	slices.Reverse(other.Tenants)
	if !SamePlan(other, got) {
		t.Error("another order is another plan")
	}
}

func TestStatus(t *testing.T) {
	now, before := metav1.NewTime(born), metav1.NewTime(born.Add(-time.Hour))
	limits := v1alpha1.Limits{CPUMillis: 500, MemoryMax: 64 << 20, Pids: 512}
	up := NodeView{Node: "n1", Pods: 2, Reported: true, Status: v1alpha1.NodeTenantStatus{Ready: true, Limits: limits}, ProxyVersions: []string{"1.40.0"}}
	down := NodeView{Node: "n2", Pods: 1, Reported: true, Status: v1alpha1.NodeTenantStatus{Reason: "it crashed"}}
	silent := NodeView{Node: "n0", Pods: 1}

	for _, test := range []struct {
		name    string
		nodes   []NodeView
		status  metav1.ConditionStatus
		reason  string
		message string
	}{
		{"no pods", nil, metav1.ConditionTrue, ReasonReady, "no pods"},
		{"all ready", []NodeView{up}, metav1.ConditionTrue, ReasonReady, "all proxies serve: 1"},
		{"not reported", []NodeView{up, silent}, metav1.ConditionFalse, ReasonProgressing, "n0"},
		{"crashed", []NodeView{down, up, silent}, metav1.ConditionFalse, ReasonProxiesNotReady, "n2: it crashed"},
	} {
		t.Run("tenant/"+test.name, func(t *testing.T) {
			had := []metav1.Condition{{Type: "Ready", Status: metav1.ConditionTrue, LastTransitionTime: before}}
			s := TenantProxyStatus(model.NamespaceTenant("a"), Membership{Version: "1.40.0"}, test.nodes, had, now)
			wantCondition(t, s.Conditions, "Ready", test.status, test.reason, test.message)
			if kept := s.Conditions[0].LastTransitionTime.Equal(&before); kept != (test.status == metav1.ConditionTrue) {
				t.Errorf("transition time kept: %t", kept)
			}
			if int(s.Proxies) != len(test.nodes) || len(s.Nodes) != len(test.nodes) {
				t.Errorf("status %+v", s)
			}
		})
	}

	crashed := up
	crashed.Status.Failure = &v1alpha1.ProxyFailure{Cause: "OutOfMemory", Message: "killed by SIGKILL: out of memory", Restarts: 4, Log: "last words"}
	s := TenantProxyStatus(model.NamespaceTenant("a"), Membership{}, []NodeView{crashed}, nil, now)
	wantCondition(t, s.Conditions, "Stable", metav1.ConditionFalse, "OutOfMemory", "what ended is started again by itself; n1: generation 0 ended (restarts: 4): killed by SIGKILL: out of memory; last it wrote: last words")
	if s.Nodes[0].Failure == nil {
		t.Error("the failure isn't told by node")
	}
	over := *crashed.Status.Failure
	over.Recovered = true
	crashed.Status.Failure = &over
	s = TenantProxyStatus(model.NamespaceTenant("a"), Membership{}, []NodeView{crashed}, nil, now)
	wantCondition(t, s.Conditions, "Stable", metav1.ConditionTrue, "Stable", "")

	noHigh := limits
	noHigh.MemoryHigh = 32 << 20
	closed := up
	closed.Status.StrictPods = 2
	loose := up
	loose.Status.Limits.CPUMillis = 600
	for _, test := range []struct {
		name   string
		in     PolicyInput
		reason string
		ready  metav1.ConditionStatus
	}{
		{"enforced", PolicyInput{true, limits, Bounds{}, false, []NodeView{up}}, ReasonEnforced, metav1.ConditionTrue},
		{"no memory.high on v1", PolicyInput{true, noHigh, Bounds{}, false, []NodeView{up}}, ReasonEnforced, metav1.ConditionTrue},
		{"looser", PolicyInput{true, limits, Bounds{}, false, []NodeView{loose}}, ReasonProgressing, metav1.ConditionFalse},
		{"closed to plain text", PolicyInput{true, limits, Bounds{}, true, []NodeView{closed}}, ReasonEnforced, metav1.ConditionTrue},
		{"open to plain text", PolicyInput{true, limits, Bounds{}, true, []NodeView{up}}, ReasonProgressing, metav1.ConditionFalse},
		{"nothing reported", PolicyInput{true, limits, Bounds{}, false, []NodeView{up, silent}}, ReasonProgressing, metav1.ConditionFalse},
		{"no proxies", PolicyInput{true, limits, Bounds{}, false, nil}, ReasonNoProxies, metav1.ConditionFalse},
		{"not in the mesh", PolicyInput{false, limits, Bounds{}, false, nil}, ReasonNoProxies, metav1.ConditionFalse},
	} {
		t.Run("policy/"+test.name, func(t *testing.T) {
			s := IsolationPolicyStatus(&v1alpha1.IsolationPolicy{}, test.in, now)
			wantCondition(t, s.Conditions, "Ready", test.ready, test.reason, "")
			if c := meta.FindStatusCondition(s.Conditions, "Accepted"); (c.Reason == ReasonNotInMesh) == test.in.Member {
				t.Errorf("accepted: %+v", c)
			}
		})
	}

	old, young := newTopology("old", time.Hour, "td", "a"), newTopology("young", 0, "td", "a")
	other := newTopology("other", 0, "td2", "a")
	all := NewTopologies([]v1alpha1.MeshTopology{old, young, other}, "", nil)
	without := up
	without.ProxyVersions = []string{"1.39.3"}
	for _, test := range []struct {
		name            string
		topology        v1alpha1.MeshTopology
		in              TopologyInput
		accepted, ready string
		message         string
	}{
		{"in force", old, TopologyInput{Namespaces: 1, Proxies: []NodeView{up}}, ReasonAccepted, ReasonReady, ""},
		{"overlaps", young, TopologyInput{Lost: map[string]string{"shop": "old"}}, ReasonOverlaps, ReasonReady, "shop (in old)"},
		{"nothing selected", old, TopologyInput{}, ReasonNothingSelected, ReasonReady, "(a=1)"},
		{"unknown version", old, TopologyInput{Namespaces: 1, Proxies: []NodeView{without}}, ReasonUnknownProxyVersion, ReasonReady, "n1"},
		{"other trust domain", other, TopologyInput{}, ReasonTrustDomainMismatch, ReasonReady, `"td"`},
		{"not ready", old, TopologyInput{Namespaces: 1, Proxies: []NodeView{down, silent}}, ReasonAccepted, ReasonNodesNotReady, ""},
	} {
		t.Run("topology/"+test.name, func(t *testing.T) {
			test.in.TrustDomain = "td"
			s := MeshTopologyStatus(&test.topology, all, test.in, now)
			if c := meta.FindStatusCondition(s.Conditions, "Accepted"); c.Reason != test.accepted || !strings.Contains(c.Message, test.message) {
				t.Errorf("accepted: %+v", c)
			}
			if c := meta.FindStatusCondition(s.Conditions, "Ready"); c.Reason != test.ready {
				t.Errorf("ready: %+v", c)
			}
		})
	}
}

func wantCondition(t *testing.T, have []metav1.Condition, kind string, status metav1.ConditionStatus, reason, message string) {
	t.Helper()
	c := meta.FindStatusCondition(have, kind)
	if c == nil || c.Status != status || c.Reason != reason || !strings.Contains(c.Message, message) {
		t.Errorf("%s: %+v, want %s %s %q", kind, c, status, reason, message)
	}
}
