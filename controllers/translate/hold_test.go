package translate

import (
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

func upgrades(u ...v1alpha1.UpgradePolicy) (out []v1alpha1.IsolationPolicy) {
	for i := range u {
		out = append(out, v1alpha1.IsolationPolicy{Spec: v1alpha1.IsolationPolicySpec{Upgrades: &u[i]}})
	}
	return append(out, v1alpha1.IsolationPolicy{})
}

func TestMayBegin(t *testing.T) {
	// A Thursday.
	at := func(s string) time.Time {
		v, err := time.Parse("2006-01-02 15:04", s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	now := at("2026-11-26 12:00")
	until := func(s string) *metav1.Time { v := metav1.NewTime(at(s)); return &v }
	window := func(start, duration string, days ...v1alpha1.Weekday) v1alpha1.UpgradePolicy {
		return v1alpha1.UpgradePolicy{Windows: []v1alpha1.UpgradeWindow{{Start: start, Duration: duration, Days: days}}}
	}
	for name, tc := range map[string]struct {
		policies []v1alpha1.IsolationPolicy
		want     string
	}{
		"nothing said":             {upgrades(), "2026-11-26 12:00"},
		"only how long to drain":   {upgrades(v1alpha1.UpgradePolicy{Drain: "1h"}), "2026-11-26 12:00"},
		"held back":                {upgrades(v1alpha1.UpgradePolicy{NotBefore: until("2026-11-27 09:30")}), "2026-11-27 09:30"},
		"held back no more":        {upgrades(v1alpha1.UpgradePolicy{NotBefore: until("2026-11-25 09:30")}), "2026-11-26 12:00"},
		"in a window":              {upgrades(window("11:00", "2h")), "2026-11-26 12:00"},
		"at its very end":          {upgrades(window("10:00", "2h")), "2026-11-27 10:00"},
		"before it":                {upgrades(window("22:30", "2h")), "2026-11-26 22:30"},
		"in yesterday's":           {upgrades(window("22:00", "15h", "Wednesday")), "2026-11-26 12:00"},
		"on another day":           {upgrades(window("02:00", "2h", "Sunday", "Tuesday")), "2026-11-29 02:00"},
		"next week":                {upgrades(window("02:00", "2h", "Thursday")), "2026-12-03 02:00"},
		"held back, then a window": {upgrades(v1alpha1.UpgradePolicy{NotBefore: until("2026-11-27 09:30"), Windows: window("02:00", "2h").Windows}), "2026-11-28 02:00"},
		"two that both must agree": {upgrades(window("02:00", "4h"), window("05:00", "4h")), "2026-11-27 05:00"},
	} {
		if got := MayBegin(tc.policies, now); !got.Equal(at(tc.want)) {
			t.Errorf("%s: %s, want %s", name, got.Format(time.RFC3339), tc.want)
		}
	}
	if d := Drain(upgrades(v1alpha1.UpgradePolicy{Drain: "1h"}, v1alpha1.UpgradePolicy{Drain: "90m"})); d != 90*time.Minute {
		t.Errorf("of two the drain is %s", d)
	}
}

// Namespaces hold a rollout back, but not for ever, and not what has begun.
func TestRolloutHeldBack(t *testing.T) {
	spec := steps()
	spec.MaxHold = "48h"
	f := newFleet(t, spec, "a", "b", "c", "d")
	late := metav1.NewTime(f.now.Add(24 * time.Hour))
	never := metav1.NewTime(f.now.Add(1000 * time.Hour))
	f.policies = map[string][]v1alpha1.IsolationPolicy{"a": upgrades(v1alpha1.UpgradePolicy{NotBefore: &late}), "d": upgrades(v1alpha1.UpgradePolicy{NotBefore: &never})}
	f.want("another in the place of a", v1alpha1.RolloutWaiting, "b 10")
	f.now = f.now.Add(10 * time.Minute)
	if s := f.want("held back by d", v1alpha1.RolloutProgressing, "b 50"); !strings.Contains(s.Message, "d, which its namespace holds back until 2001-09-11T01:46:40Z") {
		t.Errorf("%s", s.Message)
	}
	if f.after < 47*time.Hour || f.after > 48*time.Hour {
		t.Errorf("it looks again after %s", f.after)
	}
	f.now = time.Unix(1e9, 0).Add(48 * time.Hour)
	f.want("for as long as it may", v1alpha1.RolloutWaiting, "b 50, d 50")
	f.policies["b"] = f.policies["d"]
	f.want("what has begun goes on", v1alpha1.RolloutWaiting, "b 50, d 50")
}
