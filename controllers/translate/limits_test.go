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
	wantCondition(t, s.Conditions, "Accepted", metav1.ConditionTrue, ReasonCapped, "cpu.limit 4 is cut to 1")
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

// A policy is enforced once each kernel has what is wanted, neither more nor less, and
// what it has instead is told of.
func TestEnforced(t *testing.T) {
	limits := v1alpha1.Limits{CPUWeight: 200, CPUMillis: 1000, MemoryHigh: 80 << 20, MemoryMax: 100 << 20, Pids: 200, Connections: 50, NewConnections: 20, NewDirect: 90, Egress: 1 << 20, Ingress: 2 << 20}
	without := func(change func(*v1alpha1.Limits)) v1alpha1.Limits {
		l := limits
		change(&l)
		return l
	}
	for _, test := range []struct {
		name       string
		have, want v1alpha1.Limits
		unenforced []string
		reason     string
	}{
		{"as wanted", limits, limits, nil, ReasonEnforced},
		{"in pages and shares", without(func(l *v1alpha1.Limits) { l.MemoryMax -= 4095; l.MemoryHigh -= 4095; l.CPUWeight-- }), limits, nil, ReasonEnforced},
		{"no controller of memory", without(func(l *v1alpha1.Limits) { l.MemoryMax, l.MemoryHigh = 0, 0 }), limits, []string{"memory: the node has none"}, ReasonPartlyEnforced},
		{"no controller of CPU", without(func(l *v1alpha1.Limits) { l.CPUMillis, l.CPUWeight = 0, 0 }), limits, []string{"cpu: the node has none"}, ReasonPartlyEnforced},
		{"no controller of pids", without(func(l *v1alpha1.Limits) { l.Pids = 0 }), limits, []string{"pids: the node has none"}, ReasonPartlyEnforced},
		{"not above all proxies together", without(func(l *v1alpha1.Limits) { l.CPUMillis = 400 }), limits, []string{"cpu limit 1000m: all proxies have only 400m"}, ReasonPartlyEnforced},
		{"another limit can't be held", without(func(l *v1alpha1.Limits) { l.MemoryMax = 0 }), limits, []string{"memory high: no"}, ReasonProgressing},
		{"another than the quota is below all", without(func(l *v1alpha1.Limits) { l.CPUMillis = 400 }), limits, []string{"memory max 9: no"}, ReasonProgressing},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantReady(t, test.have, test.want, test.unenforced, test.reason)
		})
	}
	// On its way up or down, come or gone: each field is waited for. Concurrency is told
	// by the node.
	for _, f := range fields {
		if f.name == "concurrency" || f.name == "memory.high" {
			continue
		}
		for what, n := range map[string]int64{"above": *f.of(&limits) + pages, "below": *f.of(&limits) / 2, "none yet": 0} {
			other := limits
			*f.of(&other) = n
			t.Run(f.name+"/"+what, func(t *testing.T) { wantReady(t, other, limits, nil, ReasonProgressing) })
			if f.name != "cpu.weight" && n != 0 { // no weight is the kernel's own
				none := without(func(l *v1alpha1.Limits) { *f.of(l) = 0 })
				t.Run(f.name+"/"+what+" and none wanted", func(t *testing.T) { wantReady(t, other, none, nil, ReasonProgressing) })
			}
		}
	}
}

func wantReady(t *testing.T, have, want v1alpha1.Limits, unenforced []string, reason string) {
	t.Helper()
	node := NodeView{Node: "n1", Tenant: model.NamespaceTenant("a"), Pods: 1, Reported: true,
		Status: v1alpha1.NodeTenantStatus{Limits: have, Unenforced: unenforced, Reason: "limit memory of a to 1: busy"}}
	s := IsolationPolicyStatus(&v1alpha1.IsolationPolicy{}, PolicyInput{Member: true, Want: want, Nodes: []NodeView{node}}, metav1.NewTime(born))
	c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionReady)
	if c == nil || c.Reason != reason {
		t.Fatalf("%+v", c)
	}
	if reason == ReasonProgressing && !strings.Contains(c.Message, "n1: limit memory of a to 1: busy") {
		t.Errorf("the owner isn't told why: %s", c.Message)
	}
}

// No policy bounds a proxy that namespaces share, whatever it asks for of proxies.
func TestPolicyOfASharedProxy(t *testing.T) {
	node := NodeView{Node: "n1", Tenant: model.Tenant{Scope: model.ScopeNode}, Pods: 1, Reported: true}
	for name, test := range map[string]struct {
		spec v1alpha1.IsolationPolicySpec
		want string
	}{
		"a limit":    {v1alpha1.IsolationPolicySpec{ProxyLimits: v1alpha1.ProxyLimits{CPU: cpuLimit("1")}}, ReasonSharedProxy},
		"a standby":  {v1alpha1.IsolationPolicySpec{ProxyLimits: v1alpha1.ProxyLimits{WarmStandby: new(true)}}, ReasonSharedProxy},
		"plain text": {v1alpha1.IsolationPolicySpec{PlainText: v1alpha1.PlainTextStrict}, ReasonAccepted},
	} {
		p := v1alpha1.IsolationPolicy{Spec: test.spec}
		s := IsolationPolicyStatus(&p, PolicyInput{Member: true, Nodes: []NodeView{node}}, metav1.NewTime(born))
		if c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionAccepted); c.Reason != test.want {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

// Of several policies the strictest value of each field counts, whichever comes first, and
// nothing of any gets above a ceiling.
func TestStrictestOfEachField(t *testing.T) {
	spec := func(n int64) v1alpha1.IsolationPolicy {
		q := func(n int64) *resource.Quantity { return resource.NewQuantity(n, resource.BinarySI) }
		return policyOf(v1alpha1.ProxyLimits{CPU: &v1alpha1.CPUIsolation{Weight: &n, Limit: resource.NewMilliQuantity(n, resource.DecimalSI)},
			Memory: &v1alpha1.MemoryIsolation{High: q(n), Max: q(n)}, Pids: &n, Concurrency: &n, Bandwidth: &v1alpha1.BandwidthIsolation{Egress: q(n), Ingress: q(n)},
			Connections: &v1alpha1.ConnectionIsolation{Concurrent: &n, NewPerSecond: &n, NewDirectPerSecond: &n}})
	}
	const strict, lax, ceiling = 20, 30, 25
	all := func(n int64) (l v1alpha1.Limits) {
		for _, f := range fields {
			*f.of(&l) = n
		}
		return l
	}
	if read := spec(strict); proxyLimits(&read.Spec.ProxyLimits) != all(strict) {
		t.Fatalf("read is %+v", proxyLimits(&read.Spec.ProxyLimits))
	}
	for _, f := range fields {
		one, other := all(lax), all(lax)
		*f.of(&one) = strict
		for _, order := range [][2]v1alpha1.Limits{{one, other}, {other, one}} {
			l := order[0]
			if stricter(&l, order[1]); l != one {
				t.Errorf("%s: of %+v come %+v", f.name, order, l)
			}
		}
		b := Bounds{Ceilings: all(0)}
		*f.of(&b.Ceilings) = ceiling
		got := Limits([]v1alpha1.IsolationPolicy{spec(lax), spec(lax)}, b)
		if *f.of(&got) != ceiling {
			t.Errorf("%s: %d with a ceiling of %d is %d", f.name, lax, ceiling, *f.of(&got))
		}
		wanted := spec(lax).Spec.ProxyLimits
		if cut := capped(&wanted, b); cut != f.name+" "+f.says(lax)+" is cut to "+f.says(ceiling) {
			t.Errorf("%s: the owner is told %q", f.name, cut)
		}
	}
	if got := Limits([]v1alpha1.IsolationPolicy{spec(lax), spec(strict), spec(lax)}, Bounds{}); got != all(strict) {
		t.Errorf("of three come %+v", got)
	}
}
