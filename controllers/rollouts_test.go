package controllers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// rolling is a cluster with a plan and a rollout.
type rolling struct {
	*cluster
	w     *writer
	told  []string
	clock time.Time
}

func newRolling(t *testing.T) *rolling {
	t.Helper()
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("one", "n1", "10.0.1.1"))
	r := &rolling{cluster: c, w: c.writer(), clock: born}
	r.w.Client = interceptor.NewClient(c.WithWatch, interceptor.Funcs{Apply: r.withVersions})
	r.w.now = func() time.Time { return r.clock }
	r.w.events = newTeller(recorder(func(about *corev1.ObjectReference, _ runtime.Object, kind, reason, action, note string) {
		r.told = append(r.told, strings.Join([]string{about.Kind, kind, reason, action}, " ")+": "+note)
	}))
	r.must(r.w.writePlan(t.Context(), "n1"))
	r.must(c.Create(t.Context(), &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r", UID: "uid-r"}, Spec: v1alpha1.ProxyRolloutSpec{
		Target: v1alpha1.RolloutTarget{Version: "1.41.0"}, Steps: []v1alpha1.RolloutStep{{Weight: 10, Approval: true}, {Weight: 100}}}}))
	r.report(func(s *v1alpha1.NodeProxyStatus) {})
	return r
}

// withVersions applies what a rollout wants with the versions that there are: the fake
// API server fills in what an applied object hasn't, as if it were taken away.
func (r *rolling) withVersions(ctx context.Context, c client.WithWatch, o runtime.ApplyConfiguration, options ...client.ApplyOption) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	u := &unstructured.Unstructured{}
	if err := json.Unmarshal(b, &u.Object); err != nil {
		return err
	}
	if !slices.Contains(options, client.ApplyOption(client.FieldOwner(RolloutManager))) {
		return c.Apply(ctx, o, options...)
	}
	tenants, _, _ := unstructured.NestedSlice(u.Object, "spec", "tenants")
	for _, t := range tenants {
		t := t.(map[string]any)
		for _, have := range r.nodeProxy(u.GetName()).Spec.Tenants {
			if have.Name == t["name"] {
				t["version"] = have.Version
			}
		}
	}
	if len(tenants) > 0 {
		if err := unstructured.SetNestedSlice(u.Object, tenants, "spec", "tenants"); err != nil {
			return err
		}
	}
	return c.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), options...)
}

func (r *rolling) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// report has the node's agent say that it has the version, and more.
func (r *rolling) report(change func(*v1alpha1.NodeProxyStatus)) {
	r.t.Helper()
	np := r.nodeProxy("n1")
	np.Status = v1alpha1.NodeProxyStatus{ProxyVersions: []string{"1.40.0", "1.41.0"}}
	change(&np.Status)
	r.must(r.Status().Update(r.t.Context(), np))
}

func (r *rolling) decide() v1alpha1.ProxyRolloutStatus {
	r.t.Helper()
	_, err := r.w.writeRollouts(r.t.Context(), struct{}{})
	r.must(err)
	var got v1alpha1.ProxyRollout
	r.must(r.Get(r.t.Context(), client.ObjectKey{Name: "r"}, &got))
	return got.Status
}

func (r *rolling) canary() *v1alpha1.CanaryGeneration {
	r.t.Helper()
	i := slices.IndexFunc(r.nodeProxy("n1").Spec.Tenants, func(t v1alpha1.NodeTenant) bool { return t.Name == "a" })
	if i < 0 {
		r.t.Fatal("the tenant isn't planned")
	}
	return r.nodeProxy("n1").Spec.Tenants[i].Canary
}

func generation(role v1alpha1.GenerationRole, version string, restarts int32) v1alpha1.GenerationStatus {
	return v1alpha1.GenerationStatus{Version: version, Role: role, Serving: restarts == 0, Restarts: restarts, LastExit: "killed by SIGSEGV"}
}

func TestRolloutsAreWritten(t *testing.T) {
	r := newRolling(t)
	if s := r.decide(); s.Phase != v1alpha1.RolloutProgressing || !slices.Equal(s.From, []string{"1.40.0"}) {
		t.Errorf("%+v", s)
	}
	if c := r.canary(); c == nil || *c != (v1alpha1.CanaryGeneration{Version: "1.41.0", Weight: 10, Rollout: "r", RolloutUID: "uid-r"}) {
		t.Fatalf("the canary is %+v", c)
	}
	r.report(func(s *v1alpha1.NodeProxyStatus) {
		s.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Generations: []v1alpha1.GenerationStatus{generation(v1alpha1.RoleCanary, "1.41.0", 1)}}}
	})
	r.told = nil
	s := r.decide()
	if s.Verdict == nil || s.Verdict.Reason != "Crashed" || r.canary() != nil {
		t.Errorf("after a crash: %+v, canary %+v", s, r.canary())
	}
	if len(r.told) != 1 || !strings.HasPrefix(r.told[0], "ProxyRollout Warning RolloutPhase RollingBack: ") || !strings.Contains(r.told[0], "SIGSEGV") {
		t.Errorf("told is %q", r.told)
	}
	r.report(func(*v1alpha1.NodeProxyStatus) {})
	if s := r.decide(); s.Phase != v1alpha1.RolloutRolledBack || r.canary() != nil {
		t.Errorf("at last: %+v, canary %+v", s, r.canary())
	}
}

// A node that refuses what a rollout wants of it holds up nothing that is due, and is
// tried again.
func TestNodeThatRefusesRollout(t *testing.T) {
	r := newRolling(t)
	refuse := true
	r.w.Client = interceptor.NewClient(r.WithWatch, interceptor.Funcs{Apply: func(ctx context.Context, c client.WithWatch, o runtime.ApplyConfiguration, options ...client.ApplyOption) error {
		if refuse && slices.Contains(options, client.ApplyOption(client.FieldOwner(RolloutManager))) {
			return errors.New("conflict")
		}
		return r.withVersions(ctx, c, o, options...)
	}})
	after, err := r.w.writeRollouts(t.Context(), struct{}{})
	if err != nil || after <= 0 || after > rolloutRetry || r.canary() != nil {
		t.Errorf("again after %s, %v, canary %+v", after, err, r.canary())
	}
	refuse = false
	if r.decide(); r.canary() == nil {
		t.Error("no canary when it doesn't refuse any more")
	}
	if after, err := r.w.writeRollouts(t.Context(), struct{}{}); err != nil || after != 0 {
		t.Errorf("again after %s, %v, though nothing is due", after, err)
	}
}

// A rollout that is deleted leaves nothing, and touches nothing that isn't its own.
func TestRolloutDeleted(t *testing.T) {
	r := newRolling(t)
	r.decide()
	if r.canary() == nil {
		t.Fatal("no canary")
	}
	r.must(r.Delete(t.Context(), &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}}))
	_, err := r.w.writeRollouts(t.Context(), struct{}{})
	r.must(err)
	if c := r.canary(); c != nil {
		t.Errorf("it leaves %+v", c)
	}
	r.must(r.setCanary("n1", "a"))
	_, err = r.w.writeRollouts(t.Context(), struct{}{})
	r.must(err)
	if c := r.canary(); c == nil || c.Version != "1.39.3" {
		t.Errorf("what was made by hand is %+v", c)
	}
}

// A rollout that has begun isn't put off by one of the same second that comes before it
// by name: its canaries would be taken away.
func TestRolloutThatBeganGoesOn(t *testing.T) {
	r := newRolling(t)
	r.decide()
	r.must(r.Create(t.Context(), &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: v1alpha1.ProxyRolloutSpec{
		Target: v1alpha1.RolloutTarget{Version: "1.42.0"}, Steps: []v1alpha1.RolloutStep{{Weight: 100}}}}))
	if s := r.decide(); s.Phase != v1alpha1.RolloutProgressing {
		t.Errorf("%s: %s", s.Phase, s.Message)
	}
	if c := r.canary(); c == nil || c.Rollout != "r" {
		t.Errorf("the canary is %+v", c)
	}
	var other v1alpha1.ProxyRollout
	r.must(r.Get(t.Context(), client.ObjectKey{Name: "a"}, &other))
	if other.Status.Phase != v1alpha1.RolloutPending {
		t.Errorf("the other is %s: %s", other.Status.Phase, other.Status.Message)
	}
}

// What succeeded is what plans have, also of pods that come later.
func TestPlanFollowsRollout(t *testing.T) {
	r := newRolling(t)
	var done v1alpha1.ProxyRollout
	r.must(r.Get(t.Context(), client.ObjectKey{Name: "r"}, &done))
	at := metav1.NewTime(born)
	done.Status = v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutSucceeded, Version: "1.41.0", From: []string{"1.40.0"}, FinishedAt: &at}
	r.must(r.Status().Update(t.Context(), &done))
	r.must(r.w.writePlan(t.Context(), "n1"))
	if v := r.nodeProxy("n1").Spec.Tenants[0].Version; v != "1.41.0" {
		t.Errorf("the plan has version %s", v)
	}
}

// A tenant that was held back stays where it was, and the others of its namespace
// don't; the status of nodes reaches who decides.
func TestPlanLeavesTenantsBehind(t *testing.T) {
	r := newRolling(t)
	var done v1alpha1.ProxyRollout
	r.must(r.Get(t.Context(), client.ObjectKey{Name: "r"}, &done))
	at := metav1.NewTime(born)
	done.Status = v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutSucceeded, Version: "1.41.0", From: []string{"1.40.0"}, FinishedAt: &at,
		HeldBack: []v1alpha1.HeldBackTenant{{Tenant: "a", Node: "n1", Reason: "Crashed", Message: "it did", At: at}}}
	r.must(r.Status().Update(t.Context(), &done))
	r.must(r.w.writePlan(t.Context(), "n1"))
	if v := r.nodeProxy("n1").Spec.Tenants[0].Version; v != "1.40.0" {
		t.Errorf("the plan has version %s", v)
	}
	// The next one brings it.
	r.clock = r.clock.Add(time.Hour)
	r.must(r.Create(t.Context(), &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "s", CreationTimestamp: metav1.NewTime(r.clock)}, Spec: v1alpha1.ProxyRolloutSpec{
		Target: v1alpha1.RolloutTarget{Version: "1.41.0"}, Steps: []v1alpha1.RolloutStep{{Weight: 100}}}}))
	r.decide()
	if c := r.canary(); c == nil || c.Rollout != "s" || c.Version != "1.41.0" {
		t.Errorf("the canary is %+v", c)
	}
	var next v1alpha1.ProxyRollout
	r.must(r.Get(t.Context(), client.ObjectKey{Name: "s"}, &next))
	if !slices.Contains(next.Status.From, "1.40.0") {
		t.Errorf("it comes from %v", next.Status.From)
	}
}

// A node that comes back is asked to say so, whichever controller has the Node's event
// first, and rollouts are decided anew.
func TestNodesAway(t *testing.T) {
	r := newRolling(t)
	r.triggers.plans.delay, r.triggers.rollouts.delay = 0, 0
	start(t, &r.triggers.plans)
	start(t, &r.triggers.rollouts)
	var n corev1.Node
	r.must(r.Get(t.Context(), client.ObjectKey{Name: "n1"}, &n))
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeDiskPressure, Status: corev1.ConditionFalse}, {Type: corev1.NodeReady}}
	stripped, err := stripNode(&n)
	r.must(err)
	node := stripped.(*corev1.Node)
	becomes := func(ready corev1.ConditionStatus, at, asked time.Time) {
		t.Helper()
		c := &node.Status.Conditions[0]
		c.Status, c.LastTransitionTime = ready, metav1.NewTime(at)
		r.must(r.Status().Update(t.Context(), node))
		r.must(r.w.writePlan(t.Context(), "n1")) // with what the mesh knew before
		r.must(r.syncNode(t.Context(), "n1"))
		handle(r.cluster, &r.triggers.plans, r.w.writePlan)
		if got := r.nodeProxy("n1").Spec.ReadySince; (got == nil) != asked.IsZero() || got != nil && !got.Time.Equal(asked) {
			t.Errorf("Ready is %s since %s: asked to say since %s, want %s", ready, at, got, asked)
		}
		if handle(r.cluster, &r.triggers.rollouts, func(context.Context, struct{}) error { return nil }) == 0 {
			t.Errorf("Ready is %s since %s: rollouts aren't decided anew", ready, at)
		}
	}
	becomes(corev1.ConditionUnknown, born, time.Time{})
	if away, _ := r.w.mesh.away(); len(away) != 1 || !strings.Contains(away["n1"], "isn't Ready since "+born.UTC().Format(time.RFC3339)) {
		t.Errorf("away are %v", away)
	}
	if s := r.decide(); !strings.Contains(s.Message, "n1 (the node isn't Ready") {
		t.Errorf("%s", s.Message)
	}
	becomes(corev1.ConditionTrue, born, born)
	becomes(corev1.ConditionFalse, born.Add(time.Minute), born)
	becomes(corev1.ConditionTrue, born.Add(time.Hour), born.Add(time.Hour))
	becomes(corev1.ConditionTrue, born.Add(2*time.Hour), born.Add(2*time.Hour)) // nobody saw that it was away
	if away, since := r.w.mesh.away(); len(away) != 0 || !since["n1"].Equal(born.Add(2*time.Hour)) {
		t.Errorf("away are %v, n1 is there since %v", away, since)
	}
}

// The owner of a namespace is told that an upgrade of its proxies goes on, and that it
// is done: once, if it is, and where it isn't.
func TestOwnersAreToldTheEnd(t *testing.T) {
	const done = "the upgrade from Envoy 1.40.0 to 1.41.0 by ProxyRollout r is done: all new connections go to the new one"
	succeeded := func(s *v1alpha1.ProxyRolloutStatus) { s.Phase = v1alpha1.RolloutSucceeded }
	for name, tc := range map[string]struct {
		first string // the version that the node has in the end
		end   func(*v1alpha1.ProxyRolloutStatus)
		after func(*rolling)
		want  []string
	}{
		"it succeeded":            {"1.41.0", succeeded, nil, []string{done}},
		"a node is behind":        {"1.40.0", succeeded, nil, []string{done + ", but on nodes that haven't said so yet: n1"}},
		"another takes its place": {"1.41.0", succeeded, func(r *rolling) { r.begun("s", "1.42.0") }, []string{done}},
		// What was taken back is asked for by the mesh itself, later.
		"it was taken back": {"1.41.0", func(s *v1alpha1.ProxyRolloutStatus) { s.Phase = v1alpha1.RolloutRolledBack }, func(r *rolling) {
			r.must(r.w.writeTenant(r.t.Context(), "a"))
			var topology v1alpha1.MeshTopology
			r.must(r.Get(r.t.Context(), client.ObjectKey{Name: "t"}, &topology))
			topology.Spec.Proxy.Version = "1.41.0"
			r.must(r.Update(r.t.Context(), &topology))
			r.must(r.syncTopologies(r.t.Context()))
			r.must(r.syncNamespace(r.t.Context(), "a"))
			r.must(r.Delete(r.t.Context(), &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}}))
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRolling(t)
			r.report(func(s *v1alpha1.NodeProxyStatus) {
				s.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Ready: true, Weight: 10, Generations: []v1alpha1.GenerationStatus{
					generation(v1alpha1.RoleFirst, "1.40.0", 0), {Generation: 1, Version: "1.41.0", Role: v1alpha1.RoleCanary, Serving: true}}}}
			})
			r.decide()
			r.must(r.syncReport(t.Context(), "n1"))
			r.must(r.w.writeTenant(t.Context(), "a"))
			if last := r.told[len(r.told)-1]; !strings.HasPrefix(last, "TenantProxy Normal UpgradeHealthy ") {
				t.Fatalf("told is %q", r.told)
			}
			r.report(func(s *v1alpha1.NodeProxyStatus) {
				s.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Ready: true, Generations: []v1alpha1.GenerationStatus{generation(v1alpha1.RoleFirst, tc.first, 0)}}}
			})
			r.must(r.syncReport(t.Context(), "n1"))
			var rollout v1alpha1.ProxyRollout
			r.must(r.Get(t.Context(), client.ObjectKey{Name: "r"}, &rollout))
			at := metav1.NewTime(r.clock)
			rollout.Status.FinishedAt = &at
			tc.end(&rollout.Status)
			r.must(r.Status().Update(t.Context(), &rollout))
			if tc.after != nil {
				tc.after(r)
			}
			for range 2 {
				r.must(r.w.writeTenant(t.Context(), "a"))
			}
			var got []string
			for _, line := range r.told {
				if _, note, ok := strings.Cut(line, "TenantProxy Normal UpgradeSucceeded Finish: "); ok {
					got = append(got, note)
				}
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("told is %q, want %q, of %q", got, tc.want, r.told)
			}
		})
	}
}

// The owner of a namespace is told that an upgrade was paused, goes on and was aborted,
// each once.
func TestOwnersAreToldOfPauses(t *testing.T) {
	r := newRolling(t)
	r.decide() // the canary is written, and then there
	r.report(func(s *v1alpha1.NodeProxyStatus) {
		s.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Ready: true, Weight: 10, Generations: []v1alpha1.GenerationStatus{
			generation(v1alpha1.RoleFirst, "1.40.0", 0), {Generation: 1, Version: "1.41.0", Role: v1alpha1.RoleCanary, Serving: true}}}}
	})
	r.must(r.syncReport(t.Context(), "n1"))
	told := func(what string, change func(*v1alpha1.ProxyRolloutSpec), want ...string) {
		t.Helper()
		var rollout v1alpha1.ProxyRollout
		r.must(r.Get(t.Context(), client.ObjectKey{Name: "r"}, &rollout))
		change(&rollout.Spec)
		r.must(r.Update(t.Context(), &rollout))
		r.told = nil
		for range 2 {
			r.decide()
			r.must(r.w.writeTenant(t.Context(), "a"))
		}
		var got []string
		for _, line := range r.told {
			if strings.HasPrefix(line, "TenantProxy ") {
				got = append(got, line)
			}
		}
		if !slices.EqualFunc(got, want, strings.HasPrefix) {
			t.Errorf("%s: told is %q, want %q", what, got, want)
		}
		if what == "goes on" && !slices.ContainsFunc(r.told, func(line string) bool {
			return strings.HasPrefix(line, "ProxyRollout Normal RolloutPhase Waiting: ")
		}) {
			t.Errorf("who runs the mesh is told %q", r.told)
		}
	}
	r.decide()
	told("begun", func(*v1alpha1.ProxyRolloutSpec) {}, "TenantProxy Normal UpgradeHealthy Shift10Percent: ")
	told("paused", func(s *v1alpha1.ProxyRolloutSpec) { s.Paused = true },
		"TenantProxy Normal UpgradePaused PauseAt10Percent: paused by who runs the mesh: what has begun stays as it is, and what goes wrong is still taken back. from Envoy 1.40.0 to 1.41.0 by ProxyRollout r, step 1/2")
	told("goes on", func(s *v1alpha1.ProxyRolloutSpec) { s.Paused = false },
		"TenantProxy Normal UpgradeResumed ResumeAt10Percent: goes on after a pause. from Envoy 1.40.0 to 1.41.0 by ProxyRollout r, step 1/2")
	told("paused again", func(s *v1alpha1.ProxyRolloutSpec) { s.Paused = true }, "TenantProxy Normal UpgradePaused ")
	told("aborted", func(s *v1alpha1.ProxyRolloutSpec) { s.Abort = true }, "TenantProxy Normal UpgradeAborted ")
}

// The owner of a namespace is told once that an upgrade is taken back, though the share
// of new connections follows later.
func TestOwnersAreToldOfTheWayBackOnce(t *testing.T) {
	for name, tc := range map[string]struct {
		abort    bool
		restarts int32
		want     string
	}{
		"it crashed":     {false, 1, "TenantProxy Warning UpgradeRolledBack "},
		"it was aborted": {true, 0, "TenantProxy Normal UpgradeAborted "},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRolling(t)
			says := func(generations ...v1alpha1.GenerationStatus) {
				t.Helper()
				weight := int32(0)
				if len(generations) > 1 {
					weight = 10
				}
				r.report(func(s *v1alpha1.NodeProxyStatus) {
					s.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Ready: true, Weight: weight, Generations: generations}}
				})
				r.must(r.syncReport(t.Context(), "n1"))
				r.decide()
				r.must(r.w.writeTenant(t.Context(), "a"))
			}
			first := generation(v1alpha1.RoleFirst, "1.40.0", 0)
			canary := v1alpha1.GenerationStatus{Generation: 1, Version: "1.41.0", Role: v1alpha1.RoleCanary, Serving: true}
			r.decide()
			says(first, canary)
			r.told = nil
			var rollout v1alpha1.ProxyRollout
			r.must(r.Get(t.Context(), client.ObjectKey{Name: "r"}, &rollout))
			rollout.Spec.Abort = tc.abort
			r.must(r.Update(t.Context(), &rollout))
			canary.Restarts = tc.restarts // it serves again already
			says(first, canary)
			says(first)
			var got []string
			for _, line := range r.told {
				if strings.HasPrefix(line, "TenantProxy ") {
					got = append(got, line)
				}
			}
			if len(got) != 1 || !strings.HasPrefix(got[0], tc.want) {
				t.Errorf("told is %q, want %q once", got, tc.want)
			}
		})
	}
}

// begun makes a younger rollout that is at work.
func (r *rolling) begun(name, version string) {
	r.t.Helper()
	next := &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(r.clock.Add(time.Hour))}, Spec: v1alpha1.ProxyRolloutSpec{
		Target: v1alpha1.RolloutTarget{Version: version}, Steps: []v1alpha1.RolloutStep{{Weight: 100}}}}
	r.must(r.Create(r.t.Context(), next))
	next.Status = v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Version: version, From: []string{"1.41.0"}, Step: 1}
	r.must(r.Status().Update(r.t.Context(), next))
}

// Rollouts are decided anew by what they depend on, not whenever a node says anything.
func TestReportsThatRolloutsReadAlone(t *testing.T) {
	r := newRolling(t)
	r.triggers.rollouts.delay = 0
	decisions := start(t, &r.triggers.rollouts)
	r.rollingOut.Store(true)
	tenant := v1alpha1.NodeTenantStatus{Name: "a", Generations: []v1alpha1.GenerationStatus{generation(v1alpha1.RoleCanary, "1.41.0", 0)}}
	minute := 0
	want := func(what string, decided bool, change func()) {
		t.Helper()
		change()
		r.report(func(s *v1alpha1.NodeProxyStatus) { s.Tenants = []v1alpha1.NodeTenantStatus{*tenant.DeepCopy()} })
		r.must(r.syncReport(t.Context(), "n1"))
		if got := decisions.Len() > 0; got != decided {
			t.Errorf("%s: decided anew is %v", what, got)
		}
		for decisions.Len() > 0 {
			key, _ := decisions.Get()
			decisions.Done(key)
		}
	}
	figures := func() {
		minute++
		tenant.Generations[0].Figures = &v1alpha1.GenerationFigures{At: metav1.NewTime(born.Add(time.Duration(minute) * time.Minute))}
	}
	want("a canary", true, func() {})
	want("nothing new", false, func() {})
	want("what it costs", false, func() { tenant.Cost = &v1alpha1.NodeCost{At: metav1.NewTime(born)} })
	want("pods", false, func() { tenant.Pods = 7 })
	want("how it fares", true, figures)
	want("its weight", true, func() { tenant.Weight = 10 })
	want("an end", true, func() { tenant.Generations[0].Restarts = 1 })
	// A plan that is another is another place for tenants.
	r.must(r.setCanary("n1", "a"))
	want("the plan", true, func() {})
}

// Plans and owners follow what a rollout does, not each word of it.
func TestRolloutsThatAreFollowed(t *testing.T) {
	at := metav1.NewTime(born)
	for name, tc := range map[string]struct {
		change func(*v1alpha1.ProxyRollout)
		want   bool
	}{
		"the same":         {func(*v1alpha1.ProxyRollout) {}, false},
		"its message":      {func(r *v1alpha1.ProxyRollout) { r.Status.Message = "waiting for a on n1" }, false},
		"how many reached": {func(r *v1alpha1.ProxyRollout) { r.Status.Tenants, r.Status.ReachedTenants = 2, 1 }, false},
		"who lacks it":     {func(r *v1alpha1.ProxyRollout) { r.Status.Conditions = []metav1.Condition{{Type: "VersionAvailable"}} }, false},
		"its spec":         {func(r *v1alpha1.ProxyRollout) { r.Generation++ }, true},
		"its phase":        {func(r *v1alpha1.ProxyRollout) { r.Status.Phase = v1alpha1.RolloutWaiting }, true},
		"its step":         {func(r *v1alpha1.ProxyRollout) { r.Status.Step++ }, true},
		"its step's end":   {func(r *v1alpha1.ProxyRollout) { r.Status.ReachedAt = &at }, true},
		"a tenant is left": {func(r *v1alpha1.ProxyRollout) { r.Status.HeldBack = []v1alpha1.HeldBackTenant{{Tenant: "a"}} }, true},
		"a verdict":        {func(r *v1alpha1.ProxyRollout) { r.Status.Verdict = &v1alpha1.RolloutVerdict{Reason: "Crashed"} }, true},
		"its end":          {func(r *v1alpha1.ProxyRollout) { r.Status.FinishedAt = &at }, true},
	} {
		had := &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}, Status: v1alpha1.ProxyRolloutStatus{Message: "step 1", Tenants: 2}}
		now := had.DeepCopy()
		tc.change(now)
		if got := changedRollout.Update(event.TypedUpdateEvent[*v1alpha1.ProxyRollout]{ObjectOld: had, ObjectNew: now}); got != tc.want {
			t.Errorf("%s: followed is %v", name, got)
		}
		if had.Status.Message != "step 1" || had.Status.Tenants != 2 {
			t.Errorf("%s: the cache's object is another: %+v", name, had.Status)
		}
	}
}

// While there is no rollout reports have nothing decided, but for a node that has
// something of one.
func TestReportsWithoutRollouts(t *testing.T) {
	r := newRolling(t)
	r.triggers.rollouts.delay = 0
	decisions := start(t, &r.triggers.rollouts)
	versions := []string{"1.40.0"}
	report := func(what string, decided bool) {
		t.Helper()
		versions = append(versions, fmt.Sprint("1.42.", len(versions)))
		r.report(func(s *v1alpha1.NodeProxyStatus) { s.ProxyVersions = versions })
		r.must(r.syncReport(t.Context(), "n1"))
		if got := decisions.Len() > 0; got != decided {
			t.Errorf("%s: decided anew is %v", what, got)
		}
		for decisions.Len() > 0 {
			key, _ := decisions.Get()
			decisions.Done(key)
		}
	}
	report("at a replica that doesn't decide", false)
	r.report(func(s *v1alpha1.NodeProxyStatus) { s.ProxyVersions = versions })
	r.decide()
	versions = append(versions, "1.41.0")
	report("with a rollout whose version it hasn't", true)
	r.decide()
	r.must(r.Delete(t.Context(), &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}}))
	r.rollingOut.Store(false) // another operator
	report("with a canary that is left of it", true)
	_, err := r.w.writeRollouts(t.Context(), struct{}{})
	r.must(err)
	report("when it is gone", true)
	report("without", false)
}
