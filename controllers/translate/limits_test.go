package translate

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

func cpuLimit(s string) *v1alpha1.CPUIsolation {
	q := resource.MustParse(s)
	return &v1alpha1.CPUIsolation{Limit: &q}
}

func memoryMax(s string) *v1alpha1.MemoryIsolation {
	q := resource.MustParse(s)
	return &v1alpha1.MemoryIsolation{Max: &q}
}

func policyOf(l v1alpha1.ProxyLimits) v1alpha1.IsolationPolicy {
	return v1alpha1.IsolationPolicy{Spec: v1alpha1.IsolationPolicySpec{ProxyLimits: l}}
}

// A namespace can be stricter than its topology, and never less strict.
func TestLimitsWithinTopology(t *testing.T) {
	weight := func(n int64) *v1alpha1.CPUIsolation { return &v1alpha1.CPUIsolation{Weight: &n} }
	for _, test := range []struct {
		name     string
		topology *v1alpha1.TopologyLimits
		policies []v1alpha1.IsolationPolicy
		want     v1alpha1.Limits
	}{
		{"nothing said", nil, nil, v1alpha1.Limits{Pids: DefaultPids}},
		{"a default", &v1alpha1.TopologyLimits{Defaults: &v1alpha1.ProxyLimits{CPU: cpuLimit("1"), Pids: new(int64(100))}}, nil,
			v1alpha1.Limits{CPUMillis: 1000, Pids: 100}},
		{"stricter than the default", &v1alpha1.TopologyLimits{Defaults: &v1alpha1.ProxyLimits{CPU: cpuLimit("1")}},
			[]v1alpha1.IsolationPolicy{policyOf(v1alpha1.ProxyLimits{CPU: cpuLimit("500m")})}, v1alpha1.Limits{CPUMillis: 500, Pids: DefaultPids}},
		{"above a default that is the ceiling", &v1alpha1.TopologyLimits{Defaults: &v1alpha1.ProxyLimits{CPU: cpuLimit("1")}},
			[]v1alpha1.IsolationPolicy{policyOf(v1alpha1.ProxyLimits{CPU: cpuLimit("4")})}, v1alpha1.Limits{CPUMillis: 1000, Pids: DefaultPids}},
		{"between default and ceiling", &v1alpha1.TopologyLimits{Defaults: &v1alpha1.ProxyLimits{CPU: cpuLimit("1")}, Ceilings: &v1alpha1.ProxyLimits{CPU: cpuLimit("4")}},
			[]v1alpha1.IsolationPolicy{policyOf(v1alpha1.ProxyLimits{CPU: cpuLimit("3")})}, v1alpha1.Limits{CPUMillis: 3000, Pids: DefaultPids}},
		{"a ceiling alone", &v1alpha1.TopologyLimits{Ceilings: &v1alpha1.ProxyLimits{Memory: memoryMax("64Mi"), Pids: new(int64(64))}}, nil,
			v1alpha1.Limits{MemoryMax: 64 << 20, Pids: 64}},
		{"a default above the ceiling", &v1alpha1.TopologyLimits{Defaults: &v1alpha1.ProxyLimits{Pids: new(int64(400))}, Ceilings: &v1alpha1.ProxyLimits{Pids: new(int64(64))}}, nil,
			v1alpha1.Limits{Pids: 64}},
		{"the strictest of several, field by field", nil,
			[]v1alpha1.IsolationPolicy{policyOf(v1alpha1.ProxyLimits{CPU: cpuLimit("2"), Pids: new(int64(64))}), policyOf(v1alpha1.ProxyLimits{CPU: cpuLimit("3"), Memory: memoryMax("1Gi"), Pids: new(int64(48))})},
			v1alpha1.Limits{CPUMillis: 2000, MemoryMax: 1 << 30, Pids: 48}},
		{"no weight is the normal one", &v1alpha1.TopologyLimits{Ceilings: &v1alpha1.ProxyLimits{CPU: weight(500)}}, nil, v1alpha1.Limits{Pids: DefaultPids}},
		{"a weight below the normal one", &v1alpha1.TopologyLimits{Ceilings: &v1alpha1.ProxyLimits{CPU: weight(50)}}, nil, v1alpha1.Limits{CPUWeight: 50, Pids: DefaultPids}},
		{"a weight above the ceiling", &v1alpha1.TopologyLimits{Ceilings: &v1alpha1.ProxyLimits{CPU: weight(500)}},
			[]v1alpha1.IsolationPolicy{policyOf(v1alpha1.ProxyLimits{CPU: weight(9000)})}, v1alpha1.Limits{CPUWeight: 500, Pids: DefaultPids}},
	} {
		t.Run(test.name, func(t *testing.T) {
			topology := newTopology("t", 0, "td", "a")
			topology.Spec.Limits = test.topology
			m, _ := NewTopologies([]v1alpha1.MeshTopology{topology}, "", nil).Match(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "x", Labels: map[string]string{"a": "1"}}})
			if got := Limits(test.policies, m.Bounds); got != test.want {
				t.Errorf("limits %+v, want %+v", got, test.want)
			}
			// What one proxy of a whole node gets is no namespace's business.
			spec := NodeProxySpec(NodePlan{Members: []Pod{{UID: "u", Namespace: "x", Tenant: model.Tenant{Scope: model.ScopeNode}, Standing: Member}},
				Shared: NamespacePlan{Version: "v", Bounds: m.Bounds}, Namespaces: map[string]NamespacePlan{"x": {Limits: v1alpha1.Limits{Pids: 33}}}})
			if got := spec.Tenants[0].Limits; got != Limits(nil, m.Bounds) {
				t.Errorf("limits of a shared proxy are %+v", got)
			}
		})
	}
}

func TestStandby(t *testing.T) {
	yes, no := v1alpha1.ProxyLimits{WarmStandby: new(true)}, v1alpha1.ProxyLimits{WarmStandby: new(false)}
	for _, test := range []struct {
		name     string
		topology v1alpha1.TopologyLimits
		policies []v1alpha1.IsolationPolicy
		want     bool
	}{
		{"nobody says", v1alpha1.TopologyLimits{}, nil, false},
		{"by default", v1alpha1.TopologyLimits{Defaults: &yes}, nil, true},
		{"not here", v1alpha1.TopologyLimits{Defaults: &yes}, []v1alpha1.IsolationPolicy{policyOf(no)}, false},
		{"one of two", v1alpha1.TopologyLimits{}, []v1alpha1.IsolationPolicy{policyOf(no), policyOf(yes)}, true},
		{"forbidden", v1alpha1.TopologyLimits{Ceilings: &no}, []v1alpha1.IsolationPolicy{policyOf(yes)}, false},
	} {
		if got := Standby(test.policies, bounds(&test.topology)); got != test.want {
			t.Errorf("%s: %t", test.name, got)
		}
	}
	if cut := capped(&yes, bounds(&v1alpha1.TopologyLimits{Ceilings: &no})); cut == "" {
		t.Error("a policy's owner isn't told that it is forbidden")
	}
}

// All proxies of a node have one bound: the oldest topology's.
func TestNodeLimits(t *testing.T) {
	if got := NewTopologies(nil, "", nil).NodeLimits(); got != (v1alpha1.Limits{}) {
		t.Errorf("without a topology %+v", got)
	}
	old, young := newTopology("old", time.Hour, "td", "a"), newTopology("young", 0, "td", "a")
	young.Spec.Limits = &v1alpha1.TopologyLimits{Node: &v1alpha1.NodeLimits{Pids: new(int64(200))}}
	if got := NewTopologies([]v1alpha1.MeshTopology{young, old}, "", nil).NodeLimits(); got != (v1alpha1.Limits{Pids: DefaultNodePids}) {
		t.Errorf("the older says nothing, but it is %+v", got)
	}
	most := resource.MustParse("2Gi")
	old.Spec.Limits = &v1alpha1.TopologyLimits{Node: &v1alpha1.NodeLimits{CPU: cpuLimit("1500m"), MemoryMax: &most}}
	if got := NewTopologies([]v1alpha1.MeshTopology{young, old}, "", nil).NodeLimits(); got != (v1alpha1.Limits{CPUMillis: 1500, MemoryMax: 2 << 30, Pids: DefaultNodePids}) {
		t.Errorf("limits of all %+v", got)
	}
}

// A policy's owner sees what of it is cut, what a node can't hold, and how often it
// was met.
func TestPolicyStatusOfBounds(t *testing.T) {
	want := v1alpha1.Limits{CPUMillis: 1000, MemoryHigh: 32 << 20, Pids: DefaultPids}
	since := metav1.NewTime(born)
	node := NodeView{Node: "n1", Tenant: model.NamespaceTenant("a"), Pods: 1, Reported: true, Status: v1alpha1.NodeTenantStatus{
		Limits: v1alpha1.Limits{CPUMillis: 1000, Pids: DefaultPids}, Unenforced: []string{"memory high: no"}, Hits: &v1alpha1.LimitHits{Since: &since, OOMKills: 3}}}
	other := node
	other.Tenant = model.Tenant{Scope: model.ScopePod, Namespace: "a", Name: "p"}
	p := policyOf(v1alpha1.ProxyLimits{CPU: cpuLimit("4")})
	s := IsolationPolicyStatus(&p, PolicyInput{Member: true, Want: want, Bounds: Bounds{Ceilings: v1alpha1.Limits{CPUMillis: 1000}}, Nodes: []NodeView{node, other}}, metav1.NewTime(born))
	wantCondition(t, s.Conditions, "Accepted", metav1.ConditionTrue, ReasonCapped, "cpuMillis 4000 is cut to 1000")
	wantCondition(t, s.Conditions, "Ready", metav1.ConditionTrue, ReasonPartlyEnforced, "n1: memory high: no")
	if len(s.Nodes) != 2 || s.Nodes[0].Tenant == s.Nodes[1].Tenant || s.Nodes[0].Hits.OOMKills != 3 || len(s.Nodes[0].Unenforced) != 1 {
		t.Errorf("nodes %+v", s.Nodes)
	}
	// A limit that was taken back is waited for, too.
	s = IsolationPolicyStatus(&p, PolicyInput{Member: true, Want: v1alpha1.Limits{Pids: DefaultPids}, Nodes: []NodeView{node}}, metav1.NewTime(born))
	if c := meta.FindStatusCondition(s.Conditions, "Ready"); c.Reason != ReasonProgressing || !strings.Contains(c.Message, "n1") {
		t.Errorf("ready: %+v", c)
	}
}
