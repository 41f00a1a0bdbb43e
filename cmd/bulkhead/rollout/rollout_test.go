package rollout

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

var born = time.Date(2026, 11, 26, 1, 0, 0, 0, time.UTC)

func rollout(name string, age time.Duration, phase v1alpha1.RolloutPhase) *v1alpha1.ProxyRollout {
	at := metav1.NewTime(born)
	return &v1alpha1.ProxyRollout{
		ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(born.Add(-age))},
		Spec:       v1alpha1.ProxyRolloutSpec{Target: v1alpha1.RolloutTarget{Version: "1.40.0"}, Steps: []v1alpha1.RolloutStep{{Weight: 10, Approval: true}, {Weight: 100}}},
		Status:     v1alpha1.ProxyRolloutStatus{Phase: phase, Version: "1.40.0", Step: 1, Weight: 10, Tenants: 2, ReachedTenants: 1, StartedAt: &at, Message: "as I said"},
	}
}

func server(t *testing.T, objects ...client.Object) client.WithWatch {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).Build()
}

func TestStatus(t *testing.T) {
	done := rollout("done", 3*time.Hour, v1alpha1.RolloutSucceeded)
	waiting := rollout("pending", time.Hour, v1alpha1.RolloutPending)
	proxy := &v1alpha1.TenantProxy{ObjectMeta: metav1.ObjectMeta{Namespace: "team-a", Name: "team-a"},
		Status: v1alpha1.TenantProxyStatus{Tenant: "team-a", Upgrade: &v1alpha1.TenantUpgrade{Rollout: "now", From: "1.39.3", To: "1.40.0", Weight: 10, Verdict: "Healthy"}}}
	other := proxy.DeepCopy()
	other.Namespace, other.Name, other.Status.Upgrade.Rollout = "team-b", "team-b", "done"
	c := server(t, done, waiting, rollout("now", 2*time.Hour, v1alpha1.RolloutWaiting), proxy, other)
	var out bytes.Buffer
	if err := Status(t.Context(), c, "", "", &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Rollout:  now", "1 of 2, 10 % of new connections, reached by tenants: 1 of 2", "Now:      as I said", "2026-11-26T01:00:00Z",
		"team-a     team-a  1.39.3  1.40.0  10 %    Healthy"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
	if strings.Contains(out.String(), "team-b") {
		t.Errorf("a tenant of another rollout in\n%s", &out)
	}
	if err := Status(t.Context(), c, "nobody", "", &out); !errors.Is(err, ErrNone) {
		t.Errorf("one that isn't there: %v", err)
	}
	if err := Status(t.Context(), server(t), "", "", &out); !errors.Is(err, ErrNone) {
		t.Errorf("none at all: %v", err)
	}
}

// Where a rollout stood tells nothing once it is over, or on its way back.
func TestStatusWithoutStep(t *testing.T) {
	at := metav1.NewTime(born)
	for phase, step := range map[v1alpha1.RolloutPhase]bool{v1alpha1.RolloutProgressing: true, v1alpha1.RolloutPaused: true, v1alpha1.RolloutRollingBack: false,
		v1alpha1.RolloutRolledBack: false, v1alpha1.RolloutAborting: false, v1alpha1.RolloutAborted: false, v1alpha1.RolloutSucceeded: false} {
		r := rollout("r", time.Hour, phase)
		switch phase {
		case v1alpha1.RolloutRollingBack, v1alpha1.RolloutRolledBack, v1alpha1.RolloutAborting, v1alpha1.RolloutAborted:
			r.Status.StoppedAt = &at
		}
		var out bytes.Buffer
		if err := Status(t.Context(), server(t, r), "", "", &out); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out.String(), "Step:") != step {
			t.Errorf("%s: it must tell its step: %t, and is\n%s", phase, step, &out)
		}
	}
}

func TestChanges(t *testing.T) {
	ctx := t.Context()
	c := server(t, rollout("old", 2*time.Hour, v1alpha1.RolloutSucceeded), rollout("now", time.Hour, v1alpha1.RolloutWaiting))
	get := func() v1alpha1.ProxyRolloutSpec {
		t.Helper()
		var r v1alpha1.ProxyRollout
		if err := c.Get(ctx, client.ObjectKey{Name: "now"}, &r); err != nil {
			t.Fatal(err)
		}
		return r.Spec
	}
	var out bytes.Buffer
	for _, step := range []struct {
		do    func(context.Context) error
		check func(v1alpha1.ProxyRolloutSpec) bool
	}{
		{func(ctx context.Context) error { return Pause(ctx, c, "", true, &out) }, func(s v1alpha1.ProxyRolloutSpec) bool { return s.Paused }},
		{func(ctx context.Context) error { return Pause(ctx, c, "now", false, &out) }, func(s v1alpha1.ProxyRolloutSpec) bool { return !s.Paused }},
		{func(ctx context.Context) error { return Approve(ctx, c, "", &out) }, func(s v1alpha1.ProxyRolloutSpec) bool { return s.ApprovedSteps == 1 && !s.Abort }},
		{func(ctx context.Context) error { return Abort(ctx, c, "", &out) }, func(s v1alpha1.ProxyRolloutSpec) bool { return s.Abort && len(s.Steps) == 2 }},
	} {
		if err := step.do(ctx); err != nil {
			t.Fatal(err)
		}
		if s := get(); !step.check(s) {
			t.Errorf("it is %+v after\n%s", s, &out)
		}
	}
	if err := Abort(ctx, c, "old", &out); err == nil || !strings.Contains(err.Error(), "create another") {
		t.Errorf("one that is done: %v", err)
	}
	if err := Approve(ctx, c, "old", &out); err == nil || !strings.Contains(err.Error(), "doesn't wait") {
		t.Errorf("approval of one that is done: %v", err)
	}
}

// What waits because nobody is there to try a step is approved, what only pauses isn't.
func TestApproveUntried(t *testing.T) {
	pausing, untried := rollout("pausing", time.Hour, v1alpha1.RolloutWaiting), rollout("untried", time.Hour, v1alpha1.RolloutWaiting)
	at := metav1.NewTime(born)
	for _, r := range []*v1alpha1.ProxyRollout{pausing, untried} {
		r.Spec.Steps = []v1alpha1.RolloutStep{{Weight: 10, Pause: "1h"}, {Weight: 100}}
		r.Status.Step = 1
	}
	pausing.Status.ReachedAt = &at
	c := server(t, pausing, untried)
	var out bytes.Buffer
	if err := Approve(t.Context(), c, "untried", &out); err != nil {
		t.Error(err)
	}
	if err := Approve(t.Context(), c, "pausing", &out); err == nil || !strings.Contains(err.Error(), "doesn't wait for approval") {
		t.Errorf("one that pauses: %v", err)
	}
}

// What people edit and operators haven't seen yet ends in words, not in a panic.
func TestOddRollouts(t *testing.T) {
	short := rollout("short", time.Hour, v1alpha1.RolloutWaiting)
	short.Status.Step = 7
	none := rollout("none", time.Hour, v1alpha1.RolloutWaiting)
	none.Status.Step, none.Spec.Steps = 0, nil
	bare := &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "bare"}}
	approved := rollout("approved", time.Hour, v1alpha1.RolloutWaiting)
	approved.Spec.ApprovedSteps = 2
	c := server(t, short, none, bare, approved)
	var out bytes.Buffer
	for _, name := range []string{"short", "none", "bare", "approved"} {
		if err := Approve(t.Context(), c, name, &out); err == nil || !strings.Contains(err.Error(), "doesn't wait for approval") {
			t.Errorf("approve %s: %v", name, err)
		}
		if err := Status(t.Context(), c, name, "", &out); err != nil {
			t.Errorf("status %s: %v", name, err)
		}
		if err := Pause(t.Context(), c, name, true, &out); err != nil {
			t.Errorf("pause %s: %v", name, err)
		}
		if err := Abort(t.Context(), c, name, &out); err != nil {
			t.Errorf("abort %s: %v", name, err)
		}
	}
	for do, err := range map[string]error{"approve": Approve(t.Context(), c, "nobody", &out), "pause": Pause(t.Context(), c, "nobody", true, &out), "abort": Abort(t.Context(), c, "nobody", &out)} {
		if !errors.Is(err, ErrNone) {
			t.Errorf("%s of none: %v", do, err)
		}
	}
	if err := History(t.Context(), c, born, &out); err != nil {
		t.Error(err)
	}
}

func TestHistory(t *testing.T) {
	failed := rollout("failed", 2*time.Hour, v1alpha1.RolloutRolledBack)
	end := metav1.NewTime(born.Add(5 * time.Minute))
	failed.Status.FinishedAt = &end
	failed.Status.Verdict = &v1alpha1.RolloutVerdict{Reason: "Crashed", Tenant: "team-a", Node: "n1"}
	var out bytes.Buffer
	if err := History(t.Context(), server(t, failed, rollout("newer", time.Hour, v1alpha1.RolloutSucceeded)), born, &out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 || !strings.HasPrefix(lines[1], "newer") || !strings.Contains(lines[2], "failed") ||
		!strings.Contains(lines[2], "5m") || !strings.Contains(lines[2], "Crashed (team-a on n1)") {
		t.Errorf("%s", &out)
	}
	if err := History(t.Context(), server(t), born, &out); !errors.Is(err, ErrNone) {
		t.Errorf("without any: %v", err)
	}
}
