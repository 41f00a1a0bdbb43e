package translate

import (
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

const goneSince = "the node isn't Ready since noon"

// What a node said before it went is no word on how a tenant's proxy is there.
func TestUnheard(t *testing.T) {
	back := time.Unix(2e9, 0)
	same, other := metav1.NewTime(back), metav1.NewTime(back.Add(-time.Hour))
	for name, tc := range map[string]struct {
		node Node
		said *metav1.Time
		want string
	}{
		"away":                       {Node{Away: goneSince}, &same, goneSince},
		"back, and has said nothing": {Node{ReadySince: back}, &other, staleReport},
		"back, and has spoken":       {Node{ReadySince: back}, &same, ""},
		"an agent of before":         {Node{ReadySince: back}, nil, ""},
		"nobody says since when":     {Node{}, &other, ""},
	} {
		if got := Unheard(tc.node, tc.said); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

// An owner is told how many proxies serve that are heard, and which aren't.
func TestTenantOfNodesUnheard(t *testing.T) {
	at := metav1.NewTime(time.Unix(1e9, 0))
	until := metav1.NewTime(time.Unix(2e9, 0))
	rollout := v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}, Spec: v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 100}}},
		Status: v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Version: newEnvoy, Step: 1}}
	view := func(node, unheard string, serves bool) NodeView {
		v := NodeView{Node: node, Tenant: model.NamespaceTenant("a"), Pods: 1, Reported: true, Unheard: unheard, Away: unheard == goneSince, Status: v1alpha1.NodeTenantStatus{Name: "a", Ready: true, Waits: "an image",
			Generations: []v1alpha1.GenerationStatus{{Version: oldEnvoy, Role: v1alpha1.RoleLeaving, DrainUntil: &until}, {Version: newEnvoy, Role: v1alpha1.RoleFirst, Serving: serves}}}}
		if unheard == "" {
			v.Status.Waits, v.Status.Generations = "", v.Status.Generations[1:]
		}
		return v
	}
	for name, tc := range map[string]struct {
		nodes       []NodeView
		verdict     string
		weight      int32
		serving     int32
		ready       metav1.ConditionStatus
		says, never []string
		behind      string
	}{
		"all are heard": {[]NodeView{view("n1", "", true), view("n2", "", true)}, UpgradeHealthy, 100, 2, metav1.ConditionTrue,
			[]string{"all nodes (2)"}, []string{"isn't known"}, ""},
		"one is away": {[]NodeView{view("n1", "", true), view("n2", goneSince, true)}, UpgradeInProgress, 100, 1, metav1.ConditionTrue,
			[]string{"on 1 of 2 nodes", "isn't known: n2 (" + goneSince + ")"}, []string{"finish in", "an image"}, "n2 (" + goneSince + ")"},
		"all are away": {[]NodeView{view("n1", goneSince, true)}, UpgradeNotYet, 0, 0, metav1.ConditionUnknown,
			[]string{"isn't known: n1 (" + goneSince + ")"}, []string{"100 %"}, "n1 (" + goneSince + ")"},
		"one lags": {[]NodeView{view("n1", "", false), view("n2", staleReport, true)}, UpgradeNotYet, 0, 1, metav1.ConditionFalse,
			[]string{"isn't known: n2 (" + staleReport + ")"}, nil, "n1, n2 (" + staleReport + ")"},
	} {
		t.Run(name, func(t *testing.T) {
			u := Upgrade(UpgradeInput{Version: oldEnvoy, Rollouts: []v1alpha1.ProxyRollout{rollout}, Nodes: tc.nodes})
			if u == nil || u.Verdict != tc.verdict || u.Weight != tc.weight {
				t.Fatalf("%+v, want %s with %d", u, tc.verdict, tc.weight)
			}
			for _, says := range tc.says {
				if !strings.Contains(u.Message, says) {
					t.Errorf("%q doesn't say %q", u.Message, says)
				}
			}
			for _, never := range tc.never {
				if strings.Contains(u.Message, never) {
					t.Errorf("%q says %q", u.Message, never)
				}
			}
			if got := Behind(tc.nodes, newEnvoy); got != tc.behind {
				t.Errorf("behind are %q, want %q", got, tc.behind)
			}
			s := TenantProxyStatus(model.NamespaceTenant("a"), Membership{}, tc.nodes, nil, at)
			if c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionReady); s.ReadyProxies != tc.serving || c.Status != tc.ready {
				t.Errorf("%d proxies serve, want %d; Ready is %+v", s.ReadyProxies, tc.serving, c)
			} else if tc.behind != "" && c.Status != metav1.ConditionFalse && (c.Reason != ReasonNodesAway || !strings.HasSuffix(c.Message, "nobody knows how it is on "+tc.behind)) {
				t.Errorf("Ready doesn't say that %s: %+v", tc.behind, c)
			}
			for i, n := range tc.nodes {
				if got := s.Nodes[i]; got.Ready != (n.Unheard == "") || got.Reason != n.Unheard {
					t.Errorf("%s: %+v", n.Node, got)
				}
			}
		})
	}
}

// What an owner was told of an upgrade stays told while nobody can say how it is, and
// nothing is said of their connections that isn't known.
func TestUpgradeOfNodesUnheard(t *testing.T) {
	began := metav1.NewTime(time.Unix(1e9, 0))
	rollout := v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}, Spec: v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50}, {Weight: 100}}},
		Status: v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Version: newEnvoy, Step: 1, StartedAt: &began}}
	view := func(node, unheard string, weight int32) NodeView {
		v := NodeView{Node: node, Tenant: model.NamespaceTenant("a"), Pods: 1, Reported: true, Unheard: unheard, Status: v1alpha1.NodeTenantStatus{Name: "a", Ready: true, Weight: weight}}
		if weight > 0 {
			v.Status.Generations = []v1alpha1.GenerationStatus{{Version: newEnvoy, Role: v1alpha1.RoleCanary, Serving: true}}
		}
		return v
	}
	notBefore := metav1.NewTime(began.Add(time.Hour))
	holds := []v1alpha1.IsolationPolicy{{Spec: v1alpha1.IsolationPolicySpec{Upgrades: &v1alpha1.UpgradePolicy{NotBefore: &notBefore}}}}
	told := func(change func(*v1alpha1.TenantUpgrade)) *v1alpha1.TenantUpgrade {
		u := &v1alpha1.TenantUpgrade{Rollout: "r", Since: &began, Verdict: UpgradeHealthy, Weight: 50}
		if change != nil {
			change(u)
		}
		return u
	}
	const untouched, unknown = "aren't touched", "how far it is here isn't known; as it was heard last, up to 50 %"
	later := metav1.NewTime(began.Add(time.Minute))
	for name, tc := range map[string]struct {
		nodes       []NodeView
		told        *v1alpha1.TenantUpgrade
		policies    []v1alpha1.IsolationPolicy
		verdict     string
		weight      int32
		says, never string
	}{
		"all are away":                 {[]NodeView{view("n1", goneSince, 50)}, told(nil), nil, UpgradeHealthy, 50, unknown, untouched},
		"it was on its way":            {[]NodeView{view("n1", goneSince, 50)}, told(func(u *v1alpha1.TenantUpgrade) { u.Verdict = UpgradeInProgress }), nil, UpgradeInProgress, 50, unknown, untouched},
		"its namespace would hold it":  {[]NodeView{view("n1", goneSince, 50)}, told(nil), holds, UpgradeHealthy, 50, unknown, "held back"},
		"where it began":               {[]NodeView{view("n1", goneSince, 50), view("n2", "", 0)}, told(nil), nil, UpgradeInProgress, 50, unknown, untouched},
		"where it didn't":              {[]NodeView{view("n1", "", 50), view("n2", goneSince, 0)}, told(nil), nil, UpgradeInProgress, 50, "on 1 of 2 nodes", unknown},
		"all are back":                 {[]NodeView{view("n1", "", 0)}, told(nil), nil, UpgradeNotYet, 0, untouched, "isn't known"},
		"nothing was told":             {[]NodeView{view("n1", goneSince, 50)}, nil, nil, UpgradeNotYet, 0, "is on its way; ", untouched},
		"held back, and nothing told":  {[]NodeView{view("n1", goneSince, 0)}, nil, holds, UpgradeOnHold, 0, "until 2001-09-09T02:46:40Z. To let it", untouched},
		"told of another":              {[]NodeView{view("n1", goneSince, 0)}, told(func(u *v1alpha1.TenantUpgrade) { u.Rollout = "q" }), nil, UpgradeNotYet, 0, "is on its way; ", untouched},
		"told of another of its name":  {[]NodeView{view("n1", goneSince, 0)}, told(func(u *v1alpha1.TenantUpgrade) { u.Since = &later }), nil, UpgradeNotYet, 0, "is on its way; ", untouched},
		"told that it was taken back":  {[]NodeView{view("n1", goneSince, 0)}, told(func(u *v1alpha1.TenantUpgrade) { u.Verdict = UpgradeRolledBack }), nil, UpgradeNotYet, 0, "is on its way; ", untouched},
		"told that nothing has begun":  {[]NodeView{view("n1", goneSince, 0)}, told(func(u *v1alpha1.TenantUpgrade) { u.Verdict, u.Weight = UpgradeNotYet, 0 }), nil, UpgradeNotYet, 0, "is on its way; ", untouched},
		"heard, and nothing has begun": {[]NodeView{view("n1", "", 0)}, nil, holds, UpgradeOnHold, 0, untouched, "isn't known"},
	} {
		u := Upgrade(UpgradeInput{Version: oldEnvoy, Rollouts: []v1alpha1.ProxyRollout{rollout}, Nodes: tc.nodes, Policies: tc.policies, Told: tc.told, Now: began.Add(time.Second)})
		if u == nil || u.Verdict != tc.verdict || u.Weight != tc.weight || !strings.Contains(u.Message, tc.says) || strings.Contains(u.Message, tc.never) {
			t.Errorf("%s: %+v, want %s with %d that says %q and not %q", name, u, tc.verdict, tc.weight, tc.says, tc.never)
		}
	}
}

// Who runs the mesh, and who bounds proxies, aren't kept waiting by nodes that are away,
// and aren't told of these that all is well.
func TestOthersOfNodesUnheard(t *testing.T) {
	at := metav1.NewTime(time.Unix(1e9, 0))
	policy := v1alpha1.IsolationPolicy{}
	limits := Limits([]v1alpha1.IsolationPolicy{policy}, Bounds{})
	view := func(node, unheard string, change func(*NodeView)) NodeView {
		v := NodeView{Node: node, Tenant: model.NamespaceTenant("a"), Pods: 1, Reported: true, Unheard: unheard, Away: unheard == goneSince,
			Status: v1alpha1.NodeTenantStatus{Name: "a", Ready: true, Limits: limits, Pods: 1, StrictPods: 1}}
		if change != nil {
			change(&v)
		}
		return v
	}
	shared := func(v *NodeView) { v.Tenant = model.Tenant{Scope: model.ScopeNode} }
	removed := func(v *NodeView) { v.Away, v.Gone = true, true }
	open := func(v *NodeView) { v.Status.StrictPods = 0 }
	type says struct {
		status          metav1.ConditionStatus
		reason, message string
	}
	const away, nobody = "n1 (" + goneSince + ")", "nobody knows how it is on n1 (" + goneSince + ")"
	unknown := says{metav1.ConditionUnknown, ReasonNodesAway, nobody}
	waits := says{metav1.ConditionFalse, ReasonProgressing, "not enforced yet on n1: " + goneSince}
	stays := says{metav1.ConditionTrue, ReasonNodesAway, "enforced (nodes: 1); on these when they were heard last: " + away}
	for name, tc := range map[string]struct {
		nodes              []NodeView
		serve              int32
		topology, enforced says
		told               int // nodes whose limits are told
	}{
		"heard": {[]NodeView{view("n1", "", nil), view("n2", "", nil)}, 2,
			says{metav1.ConditionTrue, ReasonReady, "all proxies serve: 2"}, says{metav1.ConditionTrue, ReasonEnforced, "enforced (nodes: 2)"}, 2},
		"one is away": {[]NodeView{view("n2", "", nil), view("n1", goneSince, nil)}, 1,
			says{metav1.ConditionTrue, ReasonNodesAway, "all proxies serve: 1; " + nobody}, says{metav1.ConditionTrue, ReasonNodesAway, "enforced (nodes: 2); on these when they were heard last: " + away}, 2},
		"all are away":   {[]NodeView{view("n1", goneSince, nil)}, 0, unknown, stays, 1},
		"it never spoke": {[]NodeView{view("n1", goneSince, func(v *NodeView) { v.Reported, v.Status = false, v1alpha1.NodeTenantStatus{} })}, 0, unknown, waits, 0},
		// What is asked for since hasn't come to it.
		"it had other limits": {[]NodeView{view("n1", goneSince, func(v *NodeView) { v.Status.Limits.Pids++ })}, 0, unknown, waits, 1},
		"it wasn't strict":    {[]NodeView{view("n1", goneSince, open)}, 0, unknown, waits, 1},
		"shared":              {[]NodeView{view("n1", goneSince, shared)}, 0, unknown, stays, 0},
		"shared, not strict":  {[]NodeView{view("n1", goneSince, func(v *NodeView) { shared(v); open(v) })}, 0, unknown, waits, 0},
		"it can't hold all": {[]NodeView{view("n1", goneSince, func(v *NodeView) { v.Status.Unenforced = []string{"memory.high"} })}, 0,
			unknown, says{metav1.ConditionTrue, ReasonPartlyEnforced, "enforced but for n1: memory.high; on these when they were heard last: " + away}, 1},
		"back, and silent": {[]NodeView{view("n2", "", nil), view("n1", staleReport, nil)}, 1,
			says{metav1.ConditionFalse, ReasonNodesNotReady, "proxies aren't ready on n1 (" + staleReport + ")"}, says{metav1.ConditionFalse, ReasonProgressing, "not enforced yet on n1: " + staleReport}, 2},
		"one more fails": {[]NodeView{view("n1", goneSince, nil), view("n2", "", func(v *NodeView) { v.Status.Ready = false })}, 0,
			says{metav1.ConditionFalse, ReasonNodesNotReady, "proxies aren't ready on n2; " + nobody}, says{metav1.ConditionTrue, ReasonNodesAway, "enforced (nodes: 2); on these when they were heard last: " + away}, 2},
		"one more is new": {[]NodeView{view("n1", goneSince, nil), view("n2", "", func(v *NodeView) { v.Reported, v.Status = false, v1alpha1.NodeTenantStatus{} })}, 0,
			says{metav1.ConditionFalse, ReasonProgressing, "waiting for the agents of n2; " + nobody}, says{metav1.ConditionFalse, ReasonProgressing, "not enforced yet on n2"}, 1},
		"removed": {[]NodeView{view("n1", goneSince, removed)}, 0, unknown, says{metav1.ConditionFalse, ReasonNoProxies, "the namespace has no pods, so no proxies"}, 0},
		"one is removed": {[]NodeView{view("n1", goneSince, removed), view("n2", "", nil)}, 1,
			says{metav1.ConditionTrue, ReasonNodesAway, "all proxies serve: 1; " + nobody}, says{metav1.ConditionTrue, ReasonEnforced, "enforced (nodes: 1)"}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			check := func(what string, conditions []metav1.Condition, want says) {
				t.Helper()
				if c := meta.FindStatusCondition(conditions, v1alpha1.ConditionReady); c == nil || (says{c.Status, c.Reason, c.Message}) != want {
					t.Errorf("%s: Ready is %+v, want %+v", what, c, want)
				}
			}
			topology := MeshTopologyStatus(&v1alpha1.MeshTopology{}, NewTopologies(nil, "", nil), TopologyInput{Namespaces: 1, Proxies: tc.nodes}, at)
			check("MeshTopology", topology.Conditions, tc.topology)
			if topology.ReadyProxies != tc.serve {
				t.Errorf("%d proxies serve, want %d", topology.ReadyProxies, tc.serve)
			}
			enforced := IsolationPolicyStatus(&policy, PolicyInput{Member: true, Want: limits, Strict: true, Nodes: tc.nodes}, at)
			check("IsolationPolicy", enforced.Conditions, tc.enforced)
			if len(enforced.Nodes) != tc.told {
				t.Errorf("limits of %d nodes are told, want %d", len(enforced.Nodes), tc.told)
			}
		})
	}
}

// next is a younger rollout of the same version.
func (f *fleet) next() {
	f.rollout = v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: f.rollout.Name + "-again", Generation: 1}, Spec: f.rollout.Spec}
	f.rollout.Spec.Abort = false
}

// canaries of a node.
func (f *fleet) canaries(node int) (n int) {
	for _, t := range f.nodes[node].Spec.Tenants {
		if t.Canary != nil {
			n++
		}
	}
	return n
}

// What a node that is away said of a rollout's proxies isn't the next one's, of the same
// version: not their crash, and not that they serve. It gets its canary when it has let
// go of them.
func TestRolloutLeavesWhatAnotherLeft(t *testing.T) {
	for name, broken := range map[string]func(string, string, *v1alpha1.GenerationStatus){
		"they crashed": func(node, _ string, g *v1alpha1.GenerationStatus) {
			if node == "n2" {
				g.Restarts, g.Serving = 1, false
			}
		},
		"they served": nil,
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, v1alpha1.ProxyRolloutSpec{MaxUnavailable: 1, Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
			f.want("begun", v1alpha1.RolloutWaiting, "a 50, b 50")
			f.broken = broken
			f.report()
			f.away = map[string]string{"n2": goneSince}
			f.rollout.Spec.Abort = true
			if s := f.settle(); s.Phase != v1alpha1.RolloutAborted {
				t.Fatalf("%s: %s", s.Phase, s.Message)
			}
			f.broken = nil
			f.next()
			for range 3 {
				f.step()
			}
			if s := f.rollout.Status; s.Verdict != nil || s.Phase != v1alpha1.RolloutWaiting || f.canaries(0) != 2 || f.canaries(1) != 0 {
				t.Fatalf("%s, %+v with %d and %d canaries: %s", s.Phase, s.Verdict, f.canaries(0), f.canaries(1), s.Message)
			}
			// It is back, and hasn't heard that the one before is over.
			f.away = nil
			if s := f.step(); s.Phase != v1alpha1.RolloutProgressing || !strings.Contains(s.Message, "a on n2, which hasn't said that") {
				t.Errorf("%s: %s", s.Phase, s.Message)
			}
			f.step()
			f.want("it has let go of them", v1alpha1.RolloutWaiting, "a 50, b 50")
			// And what ends now is this one's.
			f.broken = func(node, _ string, g *v1alpha1.GenerationStatus) {
				if node == "n2" {
					g.Restarts = 1
				}
			}
			f.report()
			if s := f.want("a crash", v1alpha1.RolloutRolledBack, ""); s.Verdict == nil || s.Verdict.Node != "n2" {
				t.Errorf("%+v", s.Verdict)
			}
		})
	}
}

// A node where the version serves on because the plan's own can't be had lets go of
// nothing: its rollout doesn't wait for that.
func TestRolloutTakesWhatServesOn(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 100}}}, "a")
	f.told = func(_ string, s *v1alpha1.NodeTenantStatus) {
		if len(s.Generations) == 1 {
			s.Generations[0].Version, s.Generations[0].Role = newEnvoy, v1alpha1.RoleFormer
		}
	}
	f.report()
	f.want("it is planned now", v1alpha1.RolloutSucceeded, "a promoted")
}

// If it has ended once, nothing can be told by that of the rollout, which says what it
// waits for: an agent that lags may still let go of it, and a plan may come that is it.
func TestRolloutSaysWhatServesOn(t *testing.T) {
	const stuck, lags = "where Envoy 1.40.0 serves because the planned 1.39.3 can't be had, and has ended (restarts: 2): set spec.proxy.version", "which hasn't said that"
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 100}}}, "a")
	f.told = func(_ string, s *v1alpha1.NodeTenantStatus) {
		g := &s.Generations[0]
		if g.Version == oldEnvoy {
			g.Version, g.Role, g.Restarts = newEnvoy, v1alpha1.RoleFormer, 2
		}
	}
	says := func(what string, word string, have ...string) {
		t.Helper()
		f.report()
		for i := range f.nodes {
			f.nodes[i].Status.ProxyVersions = have
		}
		s := f.step()
		if s.Phase != v1alpha1.RolloutProgressing || s.Verdict != nil || f.weights() != "" {
			t.Errorf("%s: %s with %q, %+v", what, s.Phase, f.weights(), s.Verdict)
		}
		for _, node := range []string{"n1", "n2"} {
			if !strings.Contains(s.Message, "a on "+node+", "+word) {
				t.Errorf("%s: %q doesn't say %q of %s", what, s.Message, word, node)
			}
		}
	}
	says("for good", stuck, newEnvoy)
	says("the planned one is there by now", lags, oldEnvoy, newEnvoy)
	for i := range f.nodes {
		f.nodes[i].Generation = 7
	}
	says("the plan is newer than what is said", lags, newEnvoy)
	for i := range f.nodes {
		f.nodes[i].Generation, f.nodes[i].Spec.Tenants[0].Version = 0, newEnvoy
	}
	f.report()
	f.want("it is planned", v1alpha1.RolloutSucceeded, "")
}

// A silent agent on a node that is there is waited for, by whatever it said.
func TestRolloutWaitsForAnothersProcesses(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
	f.want("begun", v1alpha1.RolloutWaiting, "a 50, b 50")
	silent := *f.nodes[1].Status.DeepCopy()
	step := func() v1alpha1.ProxyRolloutStatus {
		s := f.step()
		f.nodes[1].Generation, f.nodes[1].Status = 7, *silent.DeepCopy()
		return s
	}
	f.rollout.Spec.Abort = true
	step()
	f.now = f.now.Add(silence)
	if s := step(); s.Phase != v1alpha1.RolloutAborted {
		t.Fatalf("%s: %s", s.Phase, s.Message)
	}
	f.next()
	step()
	if s := step(); s.Phase != v1alpha1.RolloutProgressing || s.ReachedTenants != 0 || !strings.Contains(s.Message, "b on n2, which hasn't said that") {
		t.Errorf("%s, reached by %d: %s", s.Phase, s.ReachedTenants, s.Message)
	}
	f.report()
	f.step()
	f.want("it speaks", v1alpha1.RolloutWaiting, "a 50, b 50")
}

// One that was deleted and made again under the same name is another as well, on nodes
// that are heard: what the first one's process did isn't its doing.
func TestRolloutMadeAgain(t *testing.T) {
	for name, tc := range map[string]struct {
		written string // the UID that the node's canary names
		judged  bool
	}{
		"another":               {"one", false},
		"by an operator before": {"", true},
		"its own":               {"two", true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
			f.rollout.UID = "one"
			f.want("begun", v1alpha1.RolloutWaiting, "a 50, b 50")
			f.broken = func(node, _ string, g *v1alpha1.GenerationStatus) {
				g.Restarts = 1
			}
			f.report()
			for i := range f.nodes {
				for k := range f.nodes[i].Spec.Tenants {
					f.nodes[i].Spec.Tenants[k].Canary.RolloutUID = tc.written
				}
			}
			f.rollout = v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r", UID: "two", Generation: 1}, Spec: f.rollout.Spec}
			if s := f.step(); (s.Verdict != nil) != tc.judged || f.weights() != "" {
				t.Fatalf("%s with %q, %+v: %s", s.Phase, f.weights(), s.Verdict, s.Message)
			}
			if tc.judged {
				return
			}
			f.broken = nil
			f.want("they are gone", v1alpha1.RolloutWaiting, "a 50, b 50")
			for _, n := range f.nodes {
				for _, tenant := range n.Spec.Tenants {
					if tenant.Canary.RolloutUID != "two" {
						t.Errorf("%s on %s has %+v", tenant.Name, n.Name, tenant.Canary)
					}
				}
			}
		})
	}
}

// A canary that an operator before wrote without a UID goes on, and has it then.
func TestCanaryOfOperatorBefore(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a")
	f.want("begun", v1alpha1.RolloutWaiting, "a 50")
	f.rollout.UID = "one"
	if s := f.step(); s.Phase != v1alpha1.RolloutWaiting || f.weights() != "a 50" || f.nodes[0].Spec.Tenants[0].Canary.RolloutUID != "one" {
		t.Errorf("%s with %q, %+v", s.Phase, f.weights(), f.nodes[0].Spec.Tenants[0].Canary)
	}
}
