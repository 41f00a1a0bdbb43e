package controllers

import (
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
)

// A rollout that was deleted and made again under its name while no operator ran isn't
// the one whose canary crashed.
func TestRolloutMadeAgain(t *testing.T) {
	r := newRolling(t)
	r.decide()
	crashed := func() {
		r.report(func(s *v1alpha1.NodeProxyStatus) {
			s.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Generations: []v1alpha1.GenerationStatus{generation(v1alpha1.RoleCanary, "1.41.0", 1)}}}
		})
	}
	crashed()
	var old v1alpha1.ProxyRollout
	r.must(r.Get(t.Context(), client.ObjectKey{Name: "r"}, &old))
	r.must(r.Delete(t.Context(), &old))
	r.must(r.Create(t.Context(), &v1alpha1.ProxyRollout{ObjectMeta: metav1.ObjectMeta{Name: "r", UID: "uid-again"}, Spec: old.Spec}))
	if s := r.decide(); s.Verdict != nil || s.Phase != v1alpha1.RolloutProgressing || r.canary() != nil {
		t.Errorf("%s, %+v with %+v: %s", s.Phase, s.Verdict, r.canary(), s.Message)
	}
	r.report(func(*v1alpha1.NodeProxyStatus) {})
	if s, c := r.decide(), r.canary(); s.Verdict != nil || c == nil || c.RolloutUID != "uid-again" {
		t.Errorf("the node has let go of it: %+v with %+v", s.Verdict, c)
	}
	crashed()
	if s := r.decide(); s.Verdict == nil || r.canary() != nil {
		t.Errorf("its own has crashed: %s with %+v", s.Phase, r.canary())
	}
}

// Owners are told of it as of another one.
func TestOwnersAreToldOfRolloutMadeAgain(t *testing.T) {
	began, again := metav1.NewTime(born), metav1.NewTime(born.Add(time.Hour))
	status := func(since metav1.Time, paused bool) (s v1alpha1.TenantProxyStatus) {
		s.Upgrade = &v1alpha1.TenantUpgrade{Rollout: "r", Verdict: translate.UpgradeInProgress, Weight: 10, Since: &since, Paused: paused}
		for _, kind := range []string{v1alpha1.ConditionEmergencyBypass, v1alpha1.ConditionStable, v1alpha1.ConditionConfigured} {
			c := metav1.Condition{Type: kind, Status: metav1.ConditionTrue}
			s.Conditions = append(s.Conditions, c)
		}
		return s
	}
	for name, tc := range map[string]struct {
		had, now v1alpha1.TenantProxyStatus
		want     []string
	}{
		"the same":          {status(began, false), status(began, false), nil},
		"it goes on":        {status(began, true), status(began, false), []string{"UpgradeResumed"}},
		"made again":        {status(began, false), status(again, false), []string{"UpgradeInProgress"}},
		"made while paused": {status(began, true), status(again, false), []string{"UpgradeInProgress"}},
	} {
		var told []string
		for _, n := range newsOfTenant(tc.had, tc.now, nil, nil) {
			told = append(told, n.reason)
		}
		if !slices.Equal(told, tc.want) {
			t.Errorf("%s: told is %q, want %q", name, told, tc.want)
		}
	}
}
