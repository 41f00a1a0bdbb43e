package translate

import (
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// What is said doesn't depend on the order in which nodes are listed: a status that
// reads otherwise would be written, and have all decided again, for ever.
func TestRolloutSaysTheSameInAnyOrder(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}, "a", "b")
	f.step()
	until := metav1.NewTime(f.now)
	var views []NodeView
	for i := range f.nodes {
		for k := range f.nodes[i].Status.Tenants {
			s := &f.nodes[i].Status.Tenants[k]
			s.Waits = "an image"
			for g := range s.Generations {
				s.Generations[g].Serving, s.Generations[g].Restarts = false, 1
			}
			of := *s.DeepCopy()
			of.Generations[0].Role, of.Generations[0].DrainUntil = v1alpha1.RoleLeaving, &metav1.Time{Time: until.Add(time.Duration(i) * time.Hour)}
			if s.Name == "a" {
				views = append(views, NodeView{Node: f.nodes[i].Name, Tenant: model.NamespaceTenant("a"), Reported: true, Status: of})
			}
		}
	}
	said := func() (judged, waiting, owner string) {
		in := RolloutInput{Rollout: &f.rollout, From: []string{oldEnvoy}, Nodes: f.nodes, Now: f.now}
		judged = DecideRollout(in).Status.Message
		in.Rollout = f.rollout.DeepCopy()
		in.Rollout.Spec.Abort = true
		return judged, DecideRollout(in).Status.Message, Upgrade(UpgradeInput{Version: oldEnvoy, Nodes: views, Rollouts: []v1alpha1.ProxyRollout{f.rollout}, Now: f.now}).Message
	}
	judged, waiting, owner := said()
	slices.Reverse(f.nodes)
	slices.Reverse(views)
	if j, w, o := said(); j != judged || w != waiting || o != owner {
		t.Errorf("%q, %q and %q; in another order %q, %q and %q", judged, waiting, owner, j, w, o)
	}
	if !strings.Contains(waiting, "a on n1, a on n2") || !strings.Contains(owner, "n2: an image") || !strings.Contains(owner, "until 2001-09-09T01:46:40Z") {
		t.Errorf("%q and %q prove nothing", waiting, owner)
	}
}

// Who sees nothing but a rollout's message can say since when it is, how it goes, when
// it ends and how it is stopped, however long the rest of it is.
func TestRolloutSaysWhatPeopleAsk(t *testing.T) {
	const stop = `kubectl patch proxyrollout r --type=merge -p '{"spec":{"abort":true}}'`
	spec := steps()
	spec.Deadline = "24h"
	f := newFleet(t, spec, "a", "b", "c", "d")
	says := func(s v1alpha1.ProxyRolloutStatus, words ...string) {
		t.Helper()
		for _, w := range append(words, "it began at 2001-09-09T01:46:40Z", "what isn't done by 2001-09-10T01:46:40Z is taken back") {
			if !strings.Contains(s.Message, w) {
				t.Errorf("%s: %q doesn't say %q", s.Phase, s.Message, w)
			}
		}
		if !strings.HasSuffix(s.Message, stop) || len(s.Message) > maxRolloutMessage {
			t.Errorf("%s: %q doesn't end with %q", s.Phase, s.Message, stop)
		}
		if note := EventNote(string(s.Phase) + ": " + s.Message); len(note) > maxNote || !strings.HasPrefix(note, string(s.Phase)+": step ") || !strings.Contains(note, "it began at ") || !strings.HasSuffix(note, stop) {
			t.Errorf("%s: the event says %q", s.Phase, note)
		}
	}
	says(f.step(), "step 1 of 3", "waiting for a on n1", "it ends with step 3; approvals that it still needs: 1")
	says(f.want("reached", v1alpha1.RolloutWaiting, "a 10"), "goes on at ", "fares no worse")
	f.rollout.Spec.Paused = true
	s := f.want("paused", v1alpha1.RolloutPaused, "a 10")
	says(s, "set spec.paused to false to go on", "fares no worse")
	if strings.Contains(s.Message, "it ends") {
		t.Errorf("%q", s.Message)
	}
	f.rollout.Spec.Paused = false
	f.now = f.now.Add(time.Hour)
	f.want("the second step", v1alpha1.RolloutWaiting, "a 50, d 50")
	f.rollout.Spec.ApprovedSteps = 2
	f.away = map[string]string{"n1": strings.Repeat("x", 3000)}
	says(f.step(), "step 2 of 3", "nodes that lack it or say nothing", "it ends when all tenants have followed")
	f.away = nil
	f.report()
	if s := f.want("done", v1alpha1.RolloutSucceeded, "a promoted, b promoted, c promoted, d promoted"); strings.Contains(s.Message, "abort") {
		t.Errorf("%q", s.Message)
	}
}

// So can the owner of a tenant, whatever the agent says that it waits for.
func TestUpgradeSaysHowItIsStopped(t *testing.T) {
	const stop = `; who runs the mesh can stop it: kubectl patch proxyrollout r --type=merge -p '{"spec":{"abort":true}}'`
	rollout := v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r"}, Spec: v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 100}}},
		Status: v1alpha1.ProxyRolloutStatus{Phase: v1alpha1.RolloutProgressing, Version: newEnvoy, Step: 1}}
	at := metav1.NewTime(time.Unix(1e9, 0))
	for _, waits := range []string{"", "an image", strings.Repeat("x", 3000)} {
		u := Upgrade(UpgradeInput{Version: oldEnvoy, Rollouts: []v1alpha1.ProxyRollout{rollout}, Nodes: []NodeView{
			{Node: "n1", Tenant: model.NamespaceTenant("a"), Reported: true, Status: v1alpha1.NodeTenantStatus{Name: "a", Waits: waits,
				Generations: []v1alpha1.GenerationStatus{{Version: oldEnvoy, Role: v1alpha1.RoleLeaving, DrainUntil: &at}}}},
			{Node: "n2", Tenant: model.NamespaceTenant("a"), Unheard: goneSince}}})
		for kind, says := range map[string]string{"status": u.Message, "event": EventNote(u.Message)} {
			if len(says) > 2048 || kind == "event" && len(says) > maxNote || !strings.HasPrefix(says, "an upgrade from Envoy 1.39.3 to 1.40.0") || !strings.HasSuffix(says, stop) {
				t.Errorf("waits for %.10q: the %s says %q", waits, kind, says)
			}
		}
	}
}

// What has no room in an event is left out of its middle, and never a part of a
// character.
func TestEventNote(t *testing.T) {
	stop := "; to take it back: " + abortBy(strings.Repeat("n", 253))
	for name, tc := range map[string]struct{ message, begins, ends string }{
		"short":        {"step 1" + stop, "step 1; ", stop},
		"just fits":    {strings.Repeat("x", maxNote), "xxx", "xxx"},
		"long":         {"step 1 " + strings.Repeat("x", 3000) + stop, "step 1 xxx", "x…" + stop},
		"wide":         {"step 1 " + strings.Repeat("ä", 3000) + stop, "step 1 äää", "ä…" + stop},
		"in one piece": {"step 1 " + strings.Repeat("€", 3000), "step 1 €€€", "€…"},
	} {
		note := EventNote(tc.message)
		if len(note) > maxNote || len(tc.message) <= maxNote && note != tc.message || !utf8.ValidString(note) || !strings.HasPrefix(note, tc.begins) || !strings.HasSuffix(note, tc.ends) {
			t.Errorf("%s: %d bytes: %q", name, len(note), note)
		}
	}
}
