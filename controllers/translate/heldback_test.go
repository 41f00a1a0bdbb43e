package translate

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

func letters(n int) (names []string) {
	for i := range n {
		names = append(names, string(rune('a'+i)))
	}
	return names
}

// crashes has tenants' new proxies end on n2, for want of memory or by themselves.
func crashes(cause string, tenants ...string) func(string, *v1alpha1.NodeTenantStatus) {
	return func(node string, s *v1alpha1.NodeTenantStatus) {
		if node != "n2" || !slices.Contains(tenants, s.Name) {
			return
		}
		for i := range s.Generations {
			if g := &s.Generations[i]; g.Version == newEnvoy {
				g.Restarts, g.LastExit = 1, "killed by SIGKILL"
				s.Failure = &v1alpha1.ProxyFailure{Generation: g.Generation, Cause: cause}
			}
		}
	}
}

// limit gives tenants other limits than their topology does.
func (f *fleet) limit(l v1alpha1.Limits, tenants ...string) {
	for i := range f.nodes {
		for k := range f.nodes[i].Spec.Tenants {
			if t := &f.nodes[i].Spec.Tenants[k]; slices.Contains(tenants, t.Name) {
				t.Limits = l
			}
		}
	}
}

// What a namespace does to its own proxies takes the rollout back there, and nowhere
// else.
func TestRolloutGoesOnWithout(t *testing.T) {
	const mib = 1 << 20
	all := v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}
	recently, before := metav1.NewTime(time.Unix(1e9, 0).Add(-time.Minute)), metav1.NewTime(time.Unix(1e9, 0).Add(-11*time.Minute))
	old := func(cause string, at metav1.Time) func(string, *v1alpha1.NodeTenantStatus) {
		return func(node string, s *v1alpha1.NodeTenantStatus) {
			crashes(cause, "b")(node, s)
			for i := range s.Generations {
				if g := &s.Generations[i]; s.Name == "b" && node == "n1" && g.Version == oldEnvoy {
					g.Restarts, g.StartedAt = 1, &at
				}
			}
		}
	}
	stuck := func(node string, s *v1alpha1.NodeTenantStatus) {
		for i := range s.Generations {
			if g := &s.Generations[i]; s.Name == "b" && g.Version == newEnvoy {
				g.Serving, g.StartedAt = false, &before
			}
		}
	}
	for name, tc := range map[string]struct {
		limits  v1alpha1.Limits
		usual   v1alpha1.Limits
		told    func(string, *v1alpha1.NodeTenantStatus)
		percent *int32
		tenants []string
		stays   bool // b alone stays behind
		says    string
	}{
		"memory of its own choice":        {limits: v1alpha1.Limits{MemoryMax: 40 * mib}, told: crashes("OutOfMemory", "b"), stays: true, says: "40 MiB of memory"},
		"less memory than is usual":       {limits: v1alpha1.Limits{MemoryMax: 40 * mib}, usual: v1alpha1.Limits{MemoryMax: 80 * mib}, told: crashes("OutOfMemory", "b"), stays: true},
		"the memory that is usual":        {limits: v1alpha1.Limits{MemoryMax: 40 * mib}, usual: v1alpha1.Limits{MemoryMax: 40 * mib}, told: crashes("OutOfMemory", "b")},
		"a crash with little memory":      {limits: v1alpha1.Limits{MemoryMax: 40 * mib}, told: crashes("Crash", "b")},
		"a crash":                         {told: crashes("Crash", "b")},
		"too few threads":                 {limits: v1alpha1.Limits{Pids: 20}, told: crashes("Crash", "b"), stays: true, says: "20 threads"},
		"enough threads":                  {limits: v1alpha1.Limits{Pids: 400}, told: crashes("Crash", "b")},
		"the old one crashed as well":     {told: old("Crash", recently), stays: true, says: "Envoy 1.39.3 ended by itself as well, on n1"},
		"the old one crashed long before": {told: old("Crash", before)},
		"one took the memory of both":     {told: old("OutOfMemory", recently)},
		"hardly any CPU":                  {limits: v1alpha1.Limits{CPUMillis: 1}, told: stuck, stays: true, says: "1m of CPU"},
		"never ready":                     {told: stuck},
		"nobody may stay behind":          {limits: v1alpha1.Limits{MemoryMax: 40 * mib}, percent: percent(0), told: crashes("OutOfMemory", "b")},
		"two of ten":                      {limits: v1alpha1.Limits{MemoryMax: 40 * mib}, tenants: letters(10), told: crashes("OutOfMemory", "b", "c")},
		"the only tenant":                 {limits: v1alpha1.Limits{MemoryMax: 40 * mib}, tenants: []string{"b"}, told: crashes("OutOfMemory", "b")},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.tenants == nil {
				tc.tenants = letters(4)
			}
			f := newFleet(t, *all.DeepCopy(), tc.tenants...)
			f.rollout.Spec.MaxHeldBackPercent = tc.percent
			f.bounds = map[string]Bounds{"b": {Defaults: tc.usual}, "c": {Defaults: tc.usual}}
			f.limit(tc.limits, "b", "c")
			var begun []string
			for _, name := range tc.tenants {
				begun = append(begun, name+" 50")
			}
			f.want("begun", v1alpha1.RolloutWaiting, strings.Join(begun, ", "))
			f.told = tc.told
			f.report()
			if !tc.stays {
				f.want("all go back", v1alpha1.RolloutRolledBack, "")
				return
			}
			s := f.want("b goes back", v1alpha1.RolloutWaiting, "a 50, c 50, d 50")
			if len(s.HeldBack) != 1 || s.HeldBack[0].Tenant != "b" || s.Verdict != nil || !strings.Contains(s.HeldBack[0].Message, tc.says) || !strings.Contains(s.Message, "without b (") {
				t.Errorf("%+v", s)
			}
			f.rollout.Spec.ApprovedSteps = 1
			s = f.want("the others", v1alpha1.RolloutSucceeded, "a promoted, c promoted, d promoted")
			if s.Tenants != 3 || !strings.Contains(s.Message, "all tenants (3) run") {
				t.Errorf("%+v", s)
			}
			done := []v1alpha1.ProxyRollout{f.rollout}
			if a, b := RolledOutVersion(oldEnvoy, "a", done), RolledOutVersion(oldEnvoy, "b", done); a != newEnvoy || b != oldEnvoy {
				t.Errorf("a is planned with %s, b with %s", a, b)
			}
			u := Upgrade(UpgradeInput{Version: oldEnvoy, Rollouts: done, Now: f.now, Nodes: []NodeView{{Node: "n1", Tenant: model.NamespaceTenant("b")}}})
			if u == nil || u.Verdict != UpgradeHeldBack || !strings.Contains(u.Message, tc.says) || !strings.Contains(u.Message, "the next ProxyRollout brings it") {
				t.Errorf("its owner reads %+v", u)
			}
			if u := Upgrade(UpgradeInput{Version: newEnvoy, Rollouts: done, Now: f.now, Nodes: []NodeView{{Node: "n1", Tenant: model.NamespaceTenant("a")}}}); u != nil {
				t.Errorf("another one reads %+v", u)
			}
		})
	}
}

// An owner who makes a tenant of each pod takes the place of one.
func TestNamespaceIsHeldBackAsOne(t *testing.T) {
	pods := []string{"b.pod.one", "b.pod.three", "b.pod.two"}
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, append([]string{"a", "c"}, pods...)...)
	f.bounds = map[string]Bounds{}
	f.limit(v1alpha1.Limits{MemoryMax: 40 << 20}, append(pods, "c")...)
	f.want("begun", v1alpha1.RolloutWaiting, "a 50, c 50, b.pod.one 50, b.pod.three 50, b.pod.two 50")
	f.told = crashes("OutOfMemory", "b.pod.one")
	f.report()
	s := f.want("one pod's", v1alpha1.RolloutWaiting, "a 50, c 50, b.pod.three 50, b.pod.two 50")
	if len(s.HeldBack) != 1 || s.HeldBack[0].Tenant != "b.pod.one" {
		t.Errorf("%+v", s.HeldBack)
	}
	f.told = crashes("OutOfMemory", "b.pod.two")
	f.report()
	s = f.want("a second one of it", v1alpha1.RolloutWaiting, "a 50, c 50")
	if len(s.HeldBack) != 1 || s.HeldBack[0].Tenant != "b" {
		t.Errorf("%+v", s.HeldBack)
	}
	u := Upgrade(UpgradeInput{Version: oldEnvoy, Rollouts: []v1alpha1.ProxyRollout{f.rollout}, Now: f.now, Nodes: []NodeView{{Node: "n1", Tenant: model.Tenant{Scope: model.ScopePod, Namespace: "b", Name: "three"}}}})
	if u == nil || u.Verdict != UpgradeHeldBack {
		t.Errorf("its owner reads %+v", u)
	}
	if v := RolledOutVersion(oldEnvoy, "b.pod.three", []v1alpha1.ProxyRollout{{Status: v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutSucceeded, FinishedAt: s.StartedAt, From: []string{oldEnvoy}, Version: newEnvoy, HeldBack: s.HeldBack}}}); v != oldEnvoy {
		t.Errorf("it is planned with %s", v)
	}
	// Another namespace is one too many.
	f.told = crashes("OutOfMemory", "c")
	f.report()
	f.want("two of three namespaces", v1alpha1.RolloutRolledBack, "")
}

// Many tenants of one namespace aren't many whom a fault of the version would hit.
func TestHeldBackCountsNamespaces(t *testing.T) {
	tenants := []string{"a", "b", "c"}
	for i := range 30 {
		tenants = append(tenants, fmt.Sprintf("d.pod.p%02d", i))
	}
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, tenants...)
	f.limit(v1alpha1.Limits{MemoryMax: 40 << 20}, "a", "b")
	f.settle()
	f.told = crashes("OutOfMemory", "a", "b")
	f.report()
	f.want("two of four namespaces, though of 33 tenants", v1alpha1.RolloutRolledBack, "")
}

// A step whose only tenants stay behind shows nothing: somebody has to say that it
// goes on.
func TestUntriedStepWaits(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Namespaces: []string{"b"}, Weight: 50, Pause: "10m"}, {Weight: 100}}}, "a", "b", "c")
	f.limit(v1alpha1.Limits{MemoryMax: 40 << 20}, "b")
	f.want("begun", v1alpha1.RolloutWaiting, "b 50")
	f.told = crashes("OutOfMemory", "b")
	f.report()
	f.settle()
	f.now = f.now.Add(time.Hour)
	s := f.want("nobody tried it", v1alpha1.RolloutWaiting, "")
	if !strings.Contains(s.Message, "spec.approvedSteps to 1") || s.ReachedAt != nil {
		t.Errorf("%+v", s)
	}
	u := Upgrade(UpgradeInput{Version: oldEnvoy, Rollouts: []v1alpha1.ProxyRollout{f.rollout}, Now: f.now, Nodes: []NodeView{{Node: "n1", Tenant: model.NamespaceTenant("a")}}})
	if u == nil || !strings.Contains(u.Message, "waits for the approval of who runs the mesh") {
		t.Errorf("owners read %+v", u)
	}
	f.rollout.Spec.ApprovedSteps = 1
	f.want("by order", v1alpha1.RolloutSucceeded, "a promoted, c promoted")
}

// A step whose namespaces have no tenants, by a slip of the pen or because nothing runs
// there now, isn't one that went well.
func TestStepOfNobodyWaits(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Namespaces: []string{"canray"}, Weight: 50}, {Weight: 100}}}, "a", "b")
	if s := f.want("nobody is there", v1alpha1.RolloutWaiting, ""); !strings.Contains(s.Message, "nobody of this step is there to try it: set spec.approvedSteps to 1") {
		t.Errorf("%s", s.Message)
	}
	f.rollout.Spec.Steps[0].Namespaces = []string{"b"}
	f.want("somebody is", v1alpha1.RolloutSucceeded, "a promoted, b promoted")
}

// A tenant that takes the place of one that stays behind has the whole pause.
func TestPauseBeginsAgainForAnother(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{TenantsPercent: percent(25), Weight: 50, Pause: "10m"}, {Weight: 100}}}, letters(4)...)
	f.limit(v1alpha1.Limits{MemoryMax: 40 << 20}, "a")
	f.want("begun", v1alpha1.RolloutWaiting, "a 50")
	f.now = f.now.Add(9 * time.Minute)
	f.told = crashes("OutOfMemory", "a")
	f.report()
	f.want("another one", v1alpha1.RolloutWaiting, "b 50")
	f.now = f.now.Add(9 * time.Minute)
	f.want("its pause", v1alpha1.RolloutWaiting, "b 50")
	f.now = f.now.Add(time.Minute)
	f.settle()
	f.want("the rest", v1alpha1.RolloutSucceeded, "b promoted, c promoted, d promoted")
}

// What all namespaces share is nobody's own fault.
func TestSharedProxyIsNotHeldBack(t *testing.T) {
	shared := model.Tenant{Scope: model.ScopeNode}.String()
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, shared, "a", "b")
	f.limit(v1alpha1.Limits{MemoryMax: 1 << 20}, shared)
	f.want("begun", v1alpha1.RolloutWaiting, fmt.Sprintf("%s 50, a 50, b 50", shared))
	f.told = crashes("OutOfMemory", shared)
	f.report()
	f.want("gone back", v1alpha1.RolloutRolledBack, "")
}

// A node that is away doesn't keep a rollout from going back: it follows later.
func TestRolloutGoesBackWithout(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
	f.want("begun", v1alpha1.RolloutWaiting, "a 50, b 50")
	f.away = map[string]string{"n2": "the node isn't Ready since noon"}
	if s := f.want("nobody goes on without it", v1alpha1.RolloutProgressing, "a 50, b 50"); !strings.Contains(s.Message, "n2 (the node isn't Ready since noon)") {
		t.Errorf("%s", s.Message)
	}
	f.rollout.Spec.Abort = true
	s := f.want("aborted", v1alpha1.RolloutAborted, "")
	if !strings.Contains(s.Message, "follow when they are back: n2 (the node isn't Ready since noon)") || strings.Contains(s.Message, "n1 (") {
		t.Errorf("%s", s.Message)
	}
}

// Of an agent that says nothing on a node that is there, it can't be known at once.
func TestRolloutGoesBackFromSilence(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
	f.want("begun", v1alpha1.RolloutWaiting, "a 50, b 50")
	f.rollout.Spec.Abort = true
	silent := *f.nodes[1].Status.DeepCopy()
	step := func() v1alpha1.ProxyRolloutStatus {
		s := f.step()
		f.nodes[1].Generation, f.nodes[1].Status = 7, *silent.DeepCopy()
		return s
	}
	step()
	f.now = f.now.Add(silence - time.Second)
	if s := step(); s.Phase != v1alpha1.RolloutAborting || !strings.Contains(s.Message, "a on n2, b on n2") {
		t.Errorf("%s: %s", s.Phase, s.Message)
	}
	if f.after <= 0 || f.after > time.Second {
		t.Errorf("it is looked at again after %s", f.after)
	}
	f.now = f.now.Add(time.Second)
	if s := step(); s.Phase != v1alpha1.RolloutAborted || !strings.Contains(s.Message, "n2 (its agent says nothing)") {
		t.Errorf("%s: %s", s.Phase, s.Message)
	}
}

// A proxy isn't judged by what a node said before it went away.
func TestRolloutForgivesNodesAway(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{MaxUnavailable: 1, Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
	f.told = func(node string, s *v1alpha1.NodeTenantStatus) {
		for i := range s.Generations {
			if g := &s.Generations[i]; node == "n2" && g.Version == newEnvoy {
				g.Serving = false
			}
		}
	}
	f.step()
	f.away = map[string]string{"n2": "away"}
	f.now = f.now.Add(time.Hour)
	f.want("n2 may be away", v1alpha1.RolloutWaiting, "a 50, b 50")
	// It is back, and its agent hasn't said anything yet.
	f.away = nil
	f.readySince = map[string]time.Time{"n2": f.now.Add(-time.Minute)}
	said := f.nodes[1].Status.DeepCopy()
	d := DecideRollout(RolloutInput{Rollout: &f.rollout, From: []string{oldEnvoy}, Nodes: f.nodes, ReadySince: f.readySince, Now: f.now})
	if d.Status.Verdict != nil || d.After <= 0 || d.After > 2*time.Minute {
		t.Errorf("judged by what it said before it went: %+v, %s; again after %s", d.Status.Verdict, said.Tenants[0].Name, d.After)
	}
	f.report()
	f.now = f.now.Add(time.Hour)
	f.want("it is back, and nothing serves there", v1alpha1.RolloutRolledBack, "")
}

// What a node said before it went away is about what was: nothing is decided by it when
// the node is back, before its agent has spoken.
func TestRolloutHearsNodesThatAreBack(t *testing.T) {
	const away = "the node isn't Ready since noon"
	begun := func(t *testing.T) *fleet {
		f := newFleet(t, v1alpha1.ProxyRolloutSpec{MaxUnavailable: 1, Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
		f.readySince = map[string]time.Time{"n1": f.now.Add(-time.Hour), "n2": f.now.Add(-time.Hour)}
		f.report()
		f.want("begun", v1alpha1.RolloutWaiting, "a 50, b 50")
		return f
	}
	// back has n2 there again; what it said stays until it reports.
	back := func(f *fleet) {
		f.now = f.now.Add(time.Hour)
		f.away, f.readySince["n2"] = map[string]string{"n2": away}, f.now.Add(-time.Second)
		f.report()
		f.away = nil
	}
	decide := func(f *fleet) v1alpha1.ProxyRolloutStatus {
		d := DecideRollout(RolloutInput{Rollout: &f.rollout, From: []string{oldEnvoy}, Nodes: f.nodes, Away: f.away, ReadySince: f.readySince, Now: f.now})
		f.rollout.Status = d.Status
		return d.Status
	}
	canary := func(f *fleet, change func(*v1alpha1.GenerationStatus)) {
		for i := range f.nodes[1].Status.Tenants {
			for k := range f.nodes[1].Status.Tenants[i].Generations {
				if g := &f.nodes[1].Status.Tenants[i].Generations[k]; g.Version == newEnvoy {
					change(g)
				}
			}
		}
	}
	for name, change := range map[string]func(*v1alpha1.GenerationStatus){
		"an end":    func(g *v1alpha1.GenerationStatus) { g.Restarts, g.Serving = 1, false },
		"a refusal": func(g *v1alpha1.GenerationStatus) { n := int32(1); g.RefusedAlone = &n },
	} {
		t.Run(name, func(t *testing.T) {
			f := begun(t)
			canary(f, change)
			back(f)
			if s := decide(f); s.Verdict != nil || s.Phase != v1alpha1.RolloutWaiting {
				t.Errorf("judged by what it said before it went: %s, %+v", s.Phase, s.Verdict)
			}
			f.nodes[1].Status.ReadySince = &metav1.Time{Time: f.readySince["n2"]}
			if s := decide(f); s.Verdict == nil || s.Verdict.Node != "n2" {
				t.Errorf("not judged by what it says now: %+v", s)
			}
		})
	}
	t.Run("figures", func(t *testing.T) {
		f := begun(t)
		back(f)
		at := metav1.NewTime(f.now)
		for i := range f.nodes[1].Status.Tenants {
			for k := range f.nodes[1].Status.Tenants[i].Generations {
				figures := &v1alpha1.GenerationFigures{At: at, Seconds: 60, Connections: 1000}
				if f.nodes[1].Status.Tenants[i].Generations[k].Version == newEnvoy {
					figures.Unanswered = 900
				}
				f.nodes[1].Status.Tenants[i].Generations[k].Figures = figures
			}
		}
		if s := decide(f); s.Verdict != nil {
			t.Errorf("judged by what it said before it went: %+v", s.Verdict)
		}
		f.nodes[1].Status.ReadySince = &metav1.Time{Time: f.readySince["n2"]}
		if s := decide(f); s.Verdict == nil || s.Verdict.Reason != string(v1alpha1.FigureConnectFailures) {
			t.Errorf("not judged by what it says now: %+v", s)
		}
	})
	t.Run("a step", func(t *testing.T) {
		f := begun(t)
		f.rollout.Spec.MaxUnavailable = 0
		back(f)
		if s := decide(f); s.Phase != v1alpha1.RolloutProgressing || !strings.Contains(s.Message, "n2 ("+staleReport+")") {
			t.Errorf("reached by what it said before it went: %s: %s", s.Phase, s.Message)
		}
		f.report()
		f.want("it says that it serves", v1alpha1.RolloutWaiting, "a 50, b 50")
	})
	t.Run("an end of all", func(t *testing.T) {
		f := begun(t)
		f.rollout.Spec.Abort = true
		decide(f)
		// It had nothing yet when it went.
		back(f)
		f.now = f.rollout.Status.StoppedAt.Add(silence - time.Second)
		for i := range f.nodes {
			for k := range f.nodes[i].Spec.Tenants {
				f.nodes[i].Spec.Tenants[k].Canary = nil
			}
		}
		f.away = map[string]string{"n2": away}
		f.report()
		f.away = nil
		canary(f, func(g *v1alpha1.GenerationStatus) { g.Serving, g.Role = false, v1alpha1.RoleLeaving })
		if s := decide(f); s.Phase != v1alpha1.RolloutAborting {
			t.Errorf("over by what it said before it went: %s: %s", s.Phase, s.Message)
		}
		f.now = f.now.Add(time.Second)
		if s := decide(f); s.Phase != v1alpha1.RolloutAborted || !strings.Contains(s.Message, "n2 ("+staleReport+")") {
			t.Errorf("%s: %s", s.Phase, s.Message)
		}
	})
	t.Run("an agent of before", func(t *testing.T) {
		f := begun(t)
		back(f)
		f.nodes[1].Status.ReadySince = nil // it doesn't know the field
		canary(f, func(g *v1alpha1.GenerationStatus) { g.Restarts = 1 })
		if s := decide(f); s.Verdict == nil {
			t.Errorf("not judged: %+v", s)
		}
	})
}

// The end of a canary isn't the next rollout's, of the same version, which may begin as
// soon as this one is over.
func TestRolloutWaitsForTheEndOfCanaries(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
	f.want("begun", v1alpha1.RolloutWaiting, "a 50, b 50")
	f.broken = func(node, tenant string, g *v1alpha1.GenerationStatus) {
		if node == "n2" && tenant == "b" {
			g.Restarts, g.Serving = 1, false
		}
	}
	f.report()
	said := *f.nodes[1].Status.DeepCopy()
	if s := f.step(); s.Phase != v1alpha1.RolloutRollingBack {
		t.Fatalf("%s: %s", s.Phase, s.Message)
	}
	f.nodes[1].Status = said // its agent hasn't followed
	if s := f.step(); s.Phase != v1alpha1.RolloutRollingBack || !strings.Contains(s.Message, "still to do: a on n2, b on n2") {
		t.Errorf("%s: %s", s.Phase, s.Message)
	}
	f.want("it has", v1alpha1.RolloutRolledBack, "")
}

// A pause goes on while an agent starts anew: the step was reached before.
func TestRolloutPauseGoesOn(t *testing.T) {
	f := newFleet(t, steps(), "a", "b", "c", "d")
	s := f.want("first step", v1alpha1.RolloutWaiting, "a 10")
	reached := s.ReachedAt.DeepCopy()
	f.now = f.now.Add(9 * time.Minute)
	f.told = func(node string, s *v1alpha1.NodeTenantStatus) {
		for i := range s.Generations {
			s.Generations[i].Serving = s.Generations[i].Serving && node != "n2"
		}
	}
	f.report()
	f.want("n2's agent starts", v1alpha1.RolloutProgressing, "a 10")
	f.now = f.now.Add(time.Minute)
	f.report()
	if s := f.want("not on while it isn't there", v1alpha1.RolloutProgressing, "a 10"); !s.ReachedAt.Equal(reached) {
		t.Errorf("reached at %s, then at %s", reached, s.ReachedAt)
	}
	f.told = nil
	f.report()
	f.want("on at once", v1alpha1.RolloutWaiting, "a 50, d 50")
	// A step that is changed is another.
	f.rollout.Spec.Steps[1].Weight, f.rollout.Spec.Steps[1].Approval, f.rollout.Spec.Steps[1].Pause = 60, false, "5m"
	f.now = f.now.Add(10 * time.Minute)
	f.want("the pause of the changed step", v1alpha1.RolloutWaiting, "a 60, d 60")
}

// An owner reads that it is their own policy that an upgrade waits for, until when,
// how to let it begin, and who stops it.
func TestUpgradeOnHold(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{MaxHold: "2h", Steps: []v1alpha1.RolloutStep{{Weight: 50}, {Weight: 100}}}, "a", "b")
	hold := func(d time.Duration) {
		at := metav1.NewTime(f.now.Add(d))
		f.policies = map[string][]v1alpha1.IsolationPolicy{"b": {{ObjectMeta: metav1.ObjectMeta{Name: "month-end"},
			Spec: v1alpha1.IsolationPolicySpec{Upgrades: &v1alpha1.UpgradePolicy{NotBefore: &at}}}, {ObjectMeta: metav1.ObjectMeta{Name: "other"}}}}
	}
	hold(time.Hour)
	f.want("a goes first", v1alpha1.RolloutProgressing, "a 50")
	read := func() *v1alpha1.TenantUpgrade {
		return Upgrade(UpgradeInput{Version: oldEnvoy, Rollouts: []v1alpha1.ProxyRollout{f.rollout}, Policies: f.policies["b"], Now: f.now,
			Nodes: []NodeView{{Node: "n1", Tenant: model.NamespaceTenant("b")}}})
	}
	u := read()
	if u == nil || u.Verdict != UpgradeOnHold || u.HeldUntil == nil || !u.HeldUntil.Equal(&metav1.Time{Time: f.now.Add(time.Hour)}) {
		t.Fatalf("%+v", u)
	}
	for _, word := range []string{"from Envoy 1.39.3 to 1.40.0", "since 2001-09-09T01:46:40Z", "(month-end)", "until 2001-09-09T02:46:40Z", "until 2001-09-09T03:46:40Z at the latest", "notBefore", "kubectl patch proxyrollout r "} {
		if !strings.Contains(u.Message, word) {
			t.Errorf("%q doesn't say %q", u.Message, word)
		}
	}
	hold(24 * time.Hour)
	if u := read(); u.HeldUntil == nil || !u.HeldUntil.Equal(&metav1.Time{Time: f.now.Add(2 * time.Hour)}) {
		t.Errorf("for longer than the rollout lets it: %+v", u)
	}
	hold(-time.Minute)
	if u := read(); u.Verdict != UpgradeNotYet || u.HeldUntil != nil {
		t.Errorf("not held: %+v", u)
	}
}

// Of a namespace that stays behind as a whole, all tenants are planned with the
// version before.
func TestPlanOfNamespaceLeftBehind(t *testing.T) {
	var plan NodePlan
	for _, ns := range []string{"a", "b"} {
		plan.Members = append(plan.Members, Pod{UID: ns, Namespace: ns, Name: "p", Standing: Member, Tenant: model.Tenant{Scope: model.ScopePod, Namespace: ns, Name: "p"}})
	}
	behind := NamespacePlan{Version: newEnvoy, HeldBack: map[string]string{"b": oldEnvoy}}
	plan.Namespaces = map[string]NamespacePlan{"a": behind, "b": behind}
	got := map[string]string{}
	for _, tenant := range NodeProxySpec(plan).Tenants {
		got[tenant.Name] = tenant.Version
	}
	if len(got) != 2 || got["a.pod.p"] != newEnvoy || got["b.pod.p"] != oldEnvoy {
		t.Errorf("%v", got)
	}
}
