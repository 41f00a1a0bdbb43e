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

const oldEnvoy, newEnvoy = "1.39.3", "1.40.0"

// fleet plays the nodes of a mesh: each does what its plan says, at once.
type fleet struct {
	t       *testing.T
	now     time.Time
	rollout v1alpha1.ProxyRollout
	nodes   []v1alpha1.NodeProxy
	// older is a rollout that goes first.
	older string
	// broken changes what a tenant's process of the new version reports.
	broken   func(node, tenant string, g *v1alpha1.GenerationStatus)
	policies map[string][]v1alpha1.IsolationPolicy
	bounds   map[string]Bounds
	away     map[string]string
	// readySince is since when nodes are there.
	readySince map[string]time.Time
	// told changes what a tenant's node says of it.
	told func(node string, s *v1alpha1.NodeTenantStatus)
	// after is when the last decision wanted to be made again.
	after time.Duration
	// lacks are nodes that don't have the new version.
	lacks map[string]string
}

func newFleet(t *testing.T, spec v1alpha1.ProxyRolloutSpec, tenants ...string) *fleet {
	f := &fleet{t: t, now: time.Unix(1e9, 0), rollout: v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r", Generation: 1}, Spec: spec}, lacks: map[string]string{}}
	if f.rollout.Spec.Target.Version == "" {
		f.rollout.Spec.Target.Version = newEnvoy
	}
	for _, name := range []string{"n1", "n2"} {
		n := v1alpha1.NodeProxy{ObjectMeta: metav1.ObjectMeta{Name: name}}
		for _, tenant := range tenants {
			n.Spec.Tenants = append(n.Spec.Tenants, v1alpha1.NodeTenant{Name: tenant, Version: oldEnvoy})
		}
		f.nodes = append(f.nodes, n)
	}
	f.report()
	return f
}

// report has the agents say how their nodes are.
func (f *fleet) report() {
	version := RolloutVersion(f.rollout.Spec.Target)
	for i := range f.nodes {
		n := &f.nodes[i]
		if f.away[n.Name] != "" {
			continue // what it said last stays
		}
		n.Status = v1alpha1.NodeProxyStatus{ProxyVersions: []string{oldEnvoy}}
		if at, ok := f.readySince[n.Name]; ok {
			n.Status.ReadySince = &metav1.Time{Time: at}
		}
		why, lacks := f.lacks[n.Name]
		if !lacks {
			n.Status.ProxyVersions = append(n.Status.ProxyVersions, version)
		} else if why != "" {
			n.Status.Images = []v1alpha1.NodeImageStatus{{Version: version, Reason: why}}
		}
		for _, t := range n.Spec.Tenants {
			s := v1alpha1.NodeTenantStatus{Name: t.Name, Ready: true}
			at := metav1.NewTime(f.now)
			first := v1alpha1.GenerationStatus{Version: t.Version, Role: v1alpha1.RoleFirst, Serving: true, Ready: true, StartedAt: &at}
			if c := t.Canary; c != nil && !lacks {
				g := v1alpha1.GenerationStatus{Generation: 1, Version: c.Version, Role: v1alpha1.RoleCanary, Serving: true, Ready: true, StartedAt: &at}
				if f.broken != nil {
					f.broken(n.Name, t.Name, &g)
				}
				if g.Serving {
					s.Weight = c.Weight
				}
				if c.Promoted && g.Serving {
					g.Role, first.Role, first.Serving, s.Weight = v1alpha1.RoleFirst, v1alpha1.RoleLeaving, false, 0
				}
				s.Generations = append(s.Generations, g)
			}
			s.Generations = append(s.Generations, first)
			if f.told != nil {
				f.told(n.Name, &s)
			}
			n.Status.Tenants = append(n.Status.Tenants, s)
		}
	}
}

// step decides once, and has the nodes do it.
func (f *fleet) step() v1alpha1.ProxyRolloutStatus {
	f.t.Helper()
	d := DecideRollout(RolloutInput{Rollout: &f.rollout, Older: f.older, From: []string{oldEnvoy}, Nodes: f.nodes, Policies: f.policies, Bounds: f.bounds, Away: f.away, ReadySince: f.readySince, Now: f.now})
	f.rollout.Status, f.after = d.Status, d.After
	for i := range f.nodes {
		n := &f.nodes[i]
		want := d.Nodes[n.Name]
		n.Spec.Images = want.Images
		for k := range n.Spec.Tenants {
			t := &n.Spec.Tenants[k]
			t.Canary = nil
			if c, ok := want.Canaries[t.Name]; ok {
				t.Canary = &c
			}
		}
	}
	f.report()
	return d.Status
}

// settle decides until nothing changes any more.
func (f *fleet) settle() v1alpha1.ProxyRolloutStatus {
	f.t.Helper()
	for range 20 {
		before := f.weights()
		phase, step := f.rollout.Status.Phase, f.rollout.Status.Step
		if s := f.step(); s.Phase == phase && s.Step == step && f.weights() == before {
			return s
		}
	}
	f.t.Fatalf("no end: %+v", f.rollout.Status)
	panic("unreachable")
}

// weights are those of all canaries: "a 10, b promoted", of both nodes, which are
// always alike.
func (f *fleet) weights() string {
	f.t.Helper()
	of := func(n v1alpha1.NodeProxy) string {
		var all []string
		for _, t := range n.Spec.Tenants {
			switch c := t.Canary; {
			case c == nil:
			case c.Promoted:
				all = append(all, t.Name+" promoted")
			default:
				all = append(all, fmt.Sprint(t.Name, " ", c.Weight))
			}
		}
		return strings.Join(all, ", ")
	}
	if a, b := of(f.nodes[0]), of(f.nodes[1]); a != b {
		f.t.Errorf("n1 has %q, n2 %q", a, b)
	}
	return of(f.nodes[0])
}

func (f *fleet) want(what string, phase v1alpha1.RolloutPhase, weights string) v1alpha1.ProxyRolloutStatus {
	f.t.Helper()
	s := f.settle()
	if s.Phase != phase || f.weights() != weights {
		f.t.Fatalf("%s: %s with %q (%s), want %s with %q", what, s.Phase, f.weights(), s.Message, phase, weights)
	}
	return s
}

func percent(n int32) *int32 { return &n }

func steps() v1alpha1.ProxyRolloutSpec {
	return v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{
		{TenantsPercent: percent(25), Weight: 10, Pause: "10m"},
		{Namespaces: []string{"d"}, Weight: 50, Approval: true},
		{Weight: 100},
	}}
}

func TestRolloutSucceeds(t *testing.T) {
	f := newFleet(t, steps(), "a", "b", "c", "d")
	s := f.want("first step", v1alpha1.RolloutWaiting, "a 10")
	if s.Step != 1 || s.Tenants != 1 || s.ReachedTenants != 1 || !strings.Contains(s.Message, "goes on at 2001-09-09T01:56:40Z") {
		t.Errorf("%+v", s)
	}
	f.now = f.now.Add(9*time.Minute + 59*time.Second)
	f.want("before the end of the pause", v1alpha1.RolloutWaiting, "a 10")
	f.now = f.now.Add(time.Second)
	s = f.want("second step", v1alpha1.RolloutWaiting, "a 50, d 50")
	if !strings.Contains(s.Message, "spec.approvedSteps to 2") {
		t.Errorf("%s", s.Message)
	}
	f.now = f.now.Add(time.Hour)
	f.want("without approval", v1alpha1.RolloutWaiting, "a 50, d 50")
	f.rollout.Spec.ApprovedSteps = 2
	s = f.want("the end", v1alpha1.RolloutSucceeded, "a promoted, b promoted, c promoted, d promoted")
	if s.FinishedAt == nil || !slices.Equal(s.From, []string{oldEnvoy}) {
		t.Errorf("%+v", s)
	}
	// The plan follows, and then the canaries aren't needed.
	if v := RolledOutVersion(oldEnvoy, "", []v1alpha1.ProxyRollout{f.rollout}); v != newEnvoy {
		t.Errorf("the plan's version is %s", v)
	}
	for i := range f.nodes {
		for k := range f.nodes[i].Spec.Tenants {
			f.nodes[i].Spec.Tenants[k].Version = newEnvoy
		}
	}
	f.want("after the plan", v1alpha1.RolloutSucceeded, "")
}

// A tenant's weight never falls, and who takes part goes on doing so whoever joins.
func TestRolloutKeepsTenants(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{
		{Namespaces: []string{"c"}, Weight: 100, Approval: true}, {TenantsPercent: percent(50), Weight: 10, Approval: true}, {Weight: 100}}}, "b", "c")
	f.want("the chosen one", v1alpha1.RolloutWaiting, "c promoted")
	f.rollout.Spec.ApprovedSteps = 1
	f.want("half", v1alpha1.RolloutWaiting, "c promoted")
	for i := range f.nodes {
		f.nodes[i].Spec.Tenants = slices.Insert(f.nodes[i].Spec.Tenants, 0, v1alpha1.NodeTenant{Name: "a", Version: oldEnvoy}, v1alpha1.NodeTenant{Name: "a0", Version: oldEnvoy})
	}
	f.report()
	f.want("two join before it", v1alpha1.RolloutWaiting, "a 10, c promoted")
}

func TestRolloutGoesBack(t *testing.T) {
	for name, tc := range map[string]struct {
		broken func(node, tenant string, g *v1alpha1.GenerationStatus)
		later  time.Duration
		spec   func(*v1alpha1.ProxyRolloutSpec)
		reason string
		says   []string
	}{
		"crash": {reason: VerdictCrashed, says: []string{"a on n2", "ended (restarts: 1, limit 0)", "SIGSEGV"}, broken: func(node, tenant string, g *v1alpha1.GenerationStatus) {
			if node == "n2" {
				g.Restarts, g.LastExit = 1, "killed by SIGSEGV"
			}
		}},
		"refused": {reason: VerdictConfigRejected, says: []string{"a on n1", "refused more (resources: 2) than the old one (0)"}, broken: func(node, tenant string, g *v1alpha1.GenerationStatus) { g.Rejected = 2 }},
		"never ready": {reason: VerdictNotReady, later: 3 * time.Minute, says: []string{"a on n1", "limit 2m0s"}, broken: func(node, tenant string, g *v1alpha1.GenerationStatus) {
			at := metav1.NewTime(time.Unix(1e9, 0))
			g.Serving, g.StartedAt = false, &at
		}},
		"deadline": {reason: VerdictDeadlineExceeded, later: time.Hour, says: []string{"within 1h0m0s"}, spec: func(s *v1alpha1.ProxyRolloutSpec) {
			s.Deadline = "1h"
			s.Steps[0].Approval, s.Steps[0].Pause = true, ""
		}},
		"crash while paused": {reason: VerdictCrashed, spec: func(s *v1alpha1.ProxyRolloutSpec) { s.Paused = true }, broken: func(_, _ string, g *v1alpha1.GenerationStatus) { g.Restarts = 1 }},
	} {
		t.Run(name, func(t *testing.T) {
			spec := steps()
			if tc.spec != nil {
				tc.spec(&spec)
			}
			f := newFleet(t, spec, "a", "b", "c", "d")
			paused := f.rollout.Spec.Paused
			f.rollout.Spec.Paused = false
			f.step()
			f.rollout.Spec.Paused = paused
			if f.weights() != "a 10" {
				t.Fatalf("the canary didn't begin: %q", f.weights())
			}
			if tc.later > 0 && tc.broken != nil {
				f.broken = tc.broken
				f.report()
				f.want("before its time", v1alpha1.RolloutProgressing, "a 10")
			}
			f.broken = tc.broken
			f.now = f.now.Add(tc.later)
			f.report()
			if s := f.step(); s.Phase != v1alpha1.RolloutRollingBack && s.Phase != v1alpha1.RolloutRolledBack || f.weights() != "" {
				t.Fatalf("%s with %q: %s", s.Phase, f.weights(), s.Message)
			}
			s := f.want("gone back", v1alpha1.RolloutRolledBack, "")
			if s.Verdict == nil || s.Verdict.Reason != tc.reason || s.FinishedAt == nil {
				t.Fatalf("%+v", s)
			}
			for _, word := range tc.says {
				if !strings.Contains(s.Message, word) {
					t.Errorf("%q doesn't say %q", s.Message, word)
				}
			}
			f.broken, f.rollout.Spec.Paused = nil, false
			f.want("for good", v1alpha1.RolloutRolledBack, "")
		})
	}
}

// What the old proxy refuses as well is no fault of the new one.
func TestRolloutComparesRefusals(t *testing.T) {
	f := newFleet(t, steps(), "a", "b", "c", "d")
	f.step()
	for i := range f.nodes {
		for g := range f.nodes[i].Status.Tenants[0].Generations {
			f.nodes[i].Status.Tenants[0].Generations[g].Rejected = 1
		}
	}
	d := DecideRollout(RolloutInput{Rollout: &f.rollout, From: []string{oldEnvoy}, Nodes: f.nodes, Now: f.now})
	if d.Status.Verdict != nil {
		t.Errorf("%+v", d.Status.Verdict)
	}
}

// Agents that tell what one version refuses alone are believed rather than counts:
// the old process may have ended, and what it refused with it.
func TestRolloutBelievesAgentsOfRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		alone int32
		phase v1alpha1.RolloutPhase
	}{"shared with the one before": {0, v1alpha1.RolloutWaiting}, "its own": {1, v1alpha1.RolloutRolledBack}} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{TenantsPercent: percent(50), Weight: 100, Approval: true}, {Weight: 100}}}, "a", "b")
			f.want("begun", v1alpha1.RolloutWaiting, "a promoted")
			f.told = func(_ string, s *v1alpha1.NodeTenantStatus) {
				if s.Name != "a" {
					return
				}
				for i := range s.Generations {
					if s.Generations[i].Version == newEnvoy {
						s.Generations[i].Rejected, s.Generations[i].RefusedAlone = 2, &tc.alone
						s.Generations = s.Generations[i : i+1]
						break
					}
				}
				s.Rejected = []v1alpha1.RejectedResource{{Type: "CDS", Name: "known", Shared: true}, {Type: "CDS", Name: "news", Shared: tc.alone == 0}}
			}
			f.report()
			s := f.settle()
			if s.Phase != tc.phase {
				t.Errorf("%s: %s", s.Phase, s.Message)
			}
			if v := s.Verdict; v != nil && (v.Reason != VerdictConfigRejected || !strings.Contains(v.Message, "refused what the old one takes (resources: 1)") || !strings.Contains(v.Message, "CDS news") || strings.Contains(v.Message, "known")) {
				t.Errorf("%+v", v)
			}
		})
	}
}

func TestRolloutIsStopped(t *testing.T) {
	f := newFleet(t, steps(), "a", "b", "c", "d")
	f.older = "other"
	if s := f.want("another is at it", v1alpha1.RolloutPending, ""); !strings.Contains(s.Message, "ProxyRollout other") || s.StartedAt != nil {
		t.Errorf("%+v", s)
	}
	f.older = ""
	f.want("its turn", v1alpha1.RolloutWaiting, "a 10")
	f.rollout.Spec.Paused = true
	f.now = f.now.Add(time.Hour)
	f.want("paused", v1alpha1.RolloutPaused, "a 10")
	f.rollout.Spec.Paused = false
	f.want("resumed", v1alpha1.RolloutWaiting, "a 50, d 50")
	f.rollout.Spec.Abort = true
	if s := f.want("aborted", v1alpha1.RolloutAborted, ""); s.Verdict != nil || !strings.Contains(s.Message, "aborted") {
		t.Errorf("%+v", s)
	}
	f.rollout.Spec.Abort = false
	f.want("for good", v1alpha1.RolloutAborted, "")
}

// Nothing changes anywhere before all nodes have the version, but for those that may
// lag behind.
func TestRolloutWaitsForVersions(t *testing.T) {
	spec := steps()
	spec.Target.Image = "registry.example/envoy@sha256:" + strings.Repeat("ab", 32)
	f := newFleet(t, spec, "a", "b", "c", "d")
	f.lacks["n1"], f.lacks["n2"] = "ImageNotFound", "DigestMismatch"
	f.report()
	if s := f.want("all lack it", v1alpha1.RolloutProgressing, ""); s.ReachedTenants != 0 || strings.Contains(s.Message, "what serves has not crashed") {
		t.Errorf("reached by %d tenants: %s", s.ReachedTenants, s.Message)
	}
	delete(f.lacks, "n1")
	f.report()
	s := f.want("n2 lacks it", v1alpha1.RolloutProgressing, "")
	if s.Version != newEnvoy+"+abababababab" || !strings.Contains(s.Message, "n2 (DigestMismatch") || !strings.Contains(s.Message, "nothing has begun anywhere") {
		t.Errorf("%+v", s)
	}
	for _, n := range f.nodes {
		if want := (v1alpha1.NodeImage{Version: s.Version, Image: spec.Target.Image, Rollout: "r"}); !slices.Equal(n.Spec.Images, []v1alpha1.NodeImage{want}) {
			t.Errorf("%s has the images %+v", n.Name, n.Spec.Images)
		}
	}
	f.rollout.Spec.MaxUnavailable = 1
	if s := f.want("n2 may lag behind", v1alpha1.RolloutWaiting, "a 10"); s.ReachedTenants != 1 {
		t.Errorf("it was reached by %d tenants: %s", s.ReachedTenants, s.Message)
	}
	f.rollout.Spec.MaxUnavailable = 0
	f.lacks = map[string]string{}
	f.report()
	f.want("n2 has it", v1alpha1.RolloutWaiting, "a 10")
}

func TestRolledOutVersion(t *testing.T) {
	done := func(name string, at int64, version string, from ...string) v1alpha1.ProxyRollout {
		finished := metav1.NewTime(time.Unix(at, 0))
		return v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: name},
			Status: v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutSucceeded, Version: version, From: from, FinishedAt: &finished}}
	}
	failed := done("x", 9, "1.42.0", "1.39.3", "1.40.0")
	failed.Status.Phase = v1alpha1.RolloutRolledBack
	there, on, back := done("a", 1, "1.40.0", "1.39.3"), done("b", 2, "1.41.0", "1.40.0"), done("c", 3, "1.39.3", "1.41.0")
	for _, tc := range []struct {
		asked    string
		rollouts []v1alpha1.ProxyRollout
		want     string
	}{
		{"1.39.3", nil, "1.39.3"},
		{"1.39.3", []v1alpha1.ProxyRollout{there, failed}, "1.40.0"},
		{"1.39.3", []v1alpha1.ProxyRollout{on, there}, "1.41.0"},
		{"1.39.3", []v1alpha1.ProxyRollout{there, on, back}, "1.39.3"},
		{"1.40.0", []v1alpha1.ProxyRollout{there}, "1.40.0"},
		{"1.38.0", []v1alpha1.ProxyRollout{there, on}, "1.38.0"},
	} {
		if got := RolledOutVersion(tc.asked, "", tc.rollouts); got != tc.want {
			t.Errorf("%s becomes %s, want %s", tc.asked, got, tc.want)
		}
	}
}

// What an owner reads says what is happening, how far it is, and what to do.
func TestUpgrade(t *testing.T) {
	f := newFleet(t, steps(), "a", "b")
	f.want("first step", v1alpha1.RolloutWaiting, "a 10")
	views := func(tenant string) (out []NodeView) {
		for _, n := range f.nodes {
			for _, s := range n.Status.Tenants {
				if s.Name == tenant {
					out = append(out, NodeView{Node: n.Name, Tenant: model.NamespaceTenant(tenant), Reported: true, Status: s})
				}
			}
		}
		return out
	}
	check := func(tenant, verdict string, weight int32, words ...string) {
		t.Helper()
		u := Upgrade(UpgradeInput{Version: oldEnvoy, Nodes: views(tenant), Rollouts: []v1alpha1.ProxyRollout{f.rollout}, Policies: f.policies[tenant], Now: f.now})
		if u == nil || u.Verdict != verdict || u.Weight != weight || u.From != oldEnvoy || u.To != newEnvoy {
			t.Fatalf("%s: %+v", tenant, u)
		}
		for _, w := range words {
			if !strings.Contains(u.Message, w) {
				t.Errorf("%q doesn't say %q", u.Message, w)
			}
		}
	}
	check("a", UpgradeHealthy, 10, "10 % of new connections", "all nodes (2)", "kubectl patch proxyrollout r ", "step 1/3")
	check("b", UpgradeNotYet, 0, "aren't touched")
	f.broken = func(node, _ string, g *v1alpha1.GenerationStatus) {
		g.Restarts, g.LastExit = 1, "killed by SIGSEGV"
	}
	f.report()
	f.settle()
	check("a", UpgradeRolledBack, 0, "here, on n1", "SIGSEGV", "nothing that you have to do")
	check("b", UpgradeRolledBack, 0, "at another tenant")
	if u := Upgrade(UpgradeInput{Version: oldEnvoy, Nodes: views("b")}); u != nil {
		t.Errorf("without a rollout: %+v", u)
	}
}

// A tenant that has it while others haven't is told so, and last of all how to stop it.
func TestUpgradeIsDoneHere(t *testing.T) {
	r := v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}, Spec: v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 100}}},
		Status: v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Version: newEnvoy, Step: 1}}
	u := Upgrade(UpgradeInput{Version: oldEnvoy, Rollouts: []v1alpha1.ProxyRollout{r}, Nodes: []NodeView{{Node: "n1", Tenant: model.NamespaceTenant("a"), Reported: true,
		Status: v1alpha1.NodeTenantStatus{Name: "a", Generations: []v1alpha1.GenerationStatus{{Version: newEnvoy, Role: v1alpha1.RoleFirst, Serving: true}}}}}})
	if u == nil || u.Verdict != UpgradeHealthy || !strings.Contains(u.Message, "here it is done") || !strings.HasSuffix(u.Message, `'{"spec":{"abort":true}}'`) {
		t.Errorf("%+v", u)
	}
}

// An owner reads when it is over.
func TestUpgradeEnds(t *testing.T) {
	reached := metav1.NewTime(time.Unix(1e9, 0))
	now := reached.Add(time.Hour)
	paused, longer := v1alpha1.RolloutStep{Weight: 10, Pause: "30m"}, v1alpha1.RolloutStep{Weight: 20, Pause: "2h"}
	asks, last := v1alpha1.RolloutStep{Weight: 50, Approval: true}, v1alpha1.RolloutStep{Weight: 100, Pause: "1h"}
	for name, tc := range map[string]struct {
		steps    []v1alpha1.RolloutStep
		approved int32
		s        v1alpha1.ProxyRolloutStatus
		says     string
	}{
		"a pause that runs":     {[]v1alpha1.RolloutStep{paused, last}, 0, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutWaiting, Step: 1, ReachedAt: &reached}, "it ends at 2001-09-09T02:16:40Z at the earliest"},
		"a pause that is to be": {[]v1alpha1.RolloutStep{paused, paused, last}, 0, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Step: 1}, "it ends 1h0m0s after this step is reached"},
		"an approval":           {[]v1alpha1.RolloutStep{paused, asks, last}, 0, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Step: 1}, "it ends with step 3; approvals that it still needs: 1"},
		"approved":              {[]v1alpha1.RolloutStep{asks, last}, 1, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Step: 1}, "it ends when all tenants have followed"},
		// A node that joined holds up a step whose pause is over.
		"held up in a pause":          {[]v1alpha1.RolloutStep{longer, last}, 0, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Step: 1, ReachedAt: &reached}, "it ends at 2001-09-09T03:46:40Z at the earliest"},
		"held up after a pause":       {[]v1alpha1.RolloutStep{paused, longer, last}, 0, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Step: 1, ReachedAt: &reached}, "it ends 2h0m0s after this step is reached again at the earliest"},
		"held up after the last one":  {[]v1alpha1.RolloutStep{paused, last}, 0, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Step: 1, ReachedAt: &reached}, "it ends when all tenants have followed"},
		"nobody is left to try it":    {[]v1alpha1.RolloutStep{paused, asks, last}, 0, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutWaiting, Step: 1}, "approvals that it still needs: 2"},
		"nobody is left of what asks": {[]v1alpha1.RolloutStep{asks, last}, 0, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutWaiting, Step: 1}, "approvals that it still needs: 1"},
		"a pause of people":           {[]v1alpha1.RolloutStep{paused, last}, 0, v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutPaused, Step: 1}, "it is paused"},
	} {
		t.Run(name, func(t *testing.T) {
			got := nextMove(&v1alpha1.ProxyRollout{Spec: v1alpha1.ProxyRolloutSpec{Steps: tc.steps, ApprovedSteps: tc.approved}, Status: tc.s}, now)
			if !strings.Contains(got, tc.says) || tc.s.Phase == v1alpha1.RolloutPaused && strings.Contains(got, "ends") {
				t.Errorf("%q, want %q", got, tc.says)
			}
		})
	}
}

// A node that joins during the first step takes nothing away from those that take
// part: nothing begins until it has the version, that is all.
func TestRolloutKeepsWhatBegan(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Namespaces: []string{"a", "c"}, Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
	f.want("first step", v1alpha1.RolloutWaiting, "a 50")
	for i := range f.nodes {
		f.nodes[i].Spec.Tenants = append(f.nodes[i].Spec.Tenants, v1alpha1.NodeTenant{Name: "c", Version: oldEnvoy})
	}
	f.nodes = append(f.nodes, v1alpha1.NodeProxy{ObjectMeta: metav1.ObjectMeta{Name: "n3"}, Spec: v1alpha1.NodeProxySpec{
		Tenants: []v1alpha1.NodeTenant{{Name: "b", Version: oldEnvoy}}}})
	f.lacks["n3"] = ""
	f.report()
	f.want("a node without the version", v1alpha1.RolloutProgressing, "a 50")
	f.lacks = map[string]string{}
	f.report()
	f.want("it has it", v1alpha1.RolloutWaiting, "a 50, c 50")
}

// Whoever pauses a rollout keeps everything as it is, also if nothing has begun.
func TestRolloutPausedBeginsNothing(t *testing.T) {
	spec := steps()
	spec.Paused = true
	f := newFleet(t, spec, "a", "b", "c", "d")
	f.want("made with a pause", v1alpha1.RolloutPaused, "")
	f.rollout.Spec.Paused = false
	f.want("resumed", v1alpha1.RolloutWaiting, "a 10")
	f.rollout.Spec.Paused = true
	for i := range f.nodes {
		for _, name := range []string{"e", "f", "g", "h"} {
			f.nodes[i].Spec.Tenants = append(f.nodes[i].Spec.Tenants, v1alpha1.NodeTenant{Name: name, Version: oldEnvoy})
		}
	}
	f.report()
	f.want("more tenants", v1alpha1.RolloutPaused, "a 10")
	f.rollout.Spec.Paused = false
	f.want("and again", v1alpha1.RolloutWaiting, "a 10, b 10")
}

// An image stays where its version is planned, not for as long as anybody remembers
// the rollout: a node takes eight.
func TestRolloutLetsImagesGo(t *testing.T) {
	spec := v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 100}}}
	spec.Target.Image = "registry.example/envoy@sha256:" + strings.Repeat("ab", 32)
	f := newFleet(t, spec, "a")
	s := f.want("done", v1alpha1.RolloutSucceeded, "a promoted")
	images := func(what string, want int) {
		t.Helper()
		f.settle()
		for _, n := range f.nodes {
			if len(n.Spec.Images) != want {
				t.Errorf("%s: %s has the images %+v", what, n.Name, n.Spec.Images)
			}
		}
	}
	images("while the canaries are all that asks for it", 1)
	planned := func(version string) {
		for i := range f.nodes {
			f.nodes[i].Spec.Tenants[0].Version = version
		}
	}
	planned(s.Version)
	images("planned", 1)
	planned("1.41.0")
	images("after another one", 0)
}

// Proxies that run longer than an agent come back to it: that they take some time for
// it says nothing of their version.
func TestRolloutForgivesAgents(t *testing.T) {
	f := newFleet(t, steps(), "a", "b", "c", "d")
	f.want("first step", v1alpha1.RolloutWaiting, "a 10")
	began := metav1.NewTime(f.now)
	f.now = f.now.Add(9 * time.Minute)
	agent := metav1.NewTime(f.now)
	f.broken = func(_, _ string, g *v1alpha1.GenerationStatus) { g.Serving, g.StartedAt = false, &began }
	decide := func() v1alpha1.RolloutPhase {
		t.Helper()
		f.report()
		for i := range f.nodes {
			f.nodes[i].Status.AgentStartedAt = &agent
		}
		return f.step().Phase
	}
	if phase := decide(); phase != v1alpha1.RolloutProgressing {
		t.Errorf("an agent that has just started: %s: %s", phase, f.rollout.Status.Message)
	}
	if f.after <= 0 || f.after > 2*time.Minute+time.Second {
		t.Errorf("it is looked at again after %s", f.after)
	}
	f.now = f.now.Add(2*time.Minute + time.Second)
	if phase := decide(); phase != v1alpha1.RolloutRollingBack || f.rollout.Status.Verdict.Reason != VerdictNotReady {
		t.Errorf("two minutes on: %s: %s", phase, f.rollout.Status.Message)
	}
}
