package translate

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// The condition has the reason of the node that somebody has to do the most about, and
// names all.
func TestVersionAvailable(t *testing.T) {
	for name, c := range map[string]struct {
		lacks, away map[string]string
		reason      string
		says        []string
	}{
		"everywhere":          {reason: ReasonAvailable, says: []string{"1.40.0+aaaaaaaaaaaa"}},
		"one fetches it":      {lacks: map[string]string{"n1": ""}, reason: ReasonFetching, says: []string{"n1"}},
		"the disk is full":    {lacks: map[string]string{"n1": "", "n2": "DiskFull"}, reason: "DiskFull", says: []string{"n1", "n2 (DiskFull: "}},
		"one is away":         {lacks: map[string]string{"n1": ""}, away: map[string]string{"n2": "isn't Ready"}, reason: ReasonNodesAway, says: []string{"n2 (isn't Ready)"}},
		"one away, one can't": {lacks: map[string]string{"n1": "DigestMismatch"}, away: map[string]string{"n2": "isn't Ready"}, reason: "DigestMismatch", says: []string{"n1", "n2"}},
		"a node that lies":    {lacks: map[string]string{"n1": "no reason at all!"}, reason: reasonFailed, says: []string{"no reason at all!"}},
	} {
		t.Run(name, func(t *testing.T) {
			spec := v1alpha1.ProxyRolloutSpec{Target: v1alpha1.RolloutTarget{Version: newEnvoy, Image: "registry.example/envoy@sha256:" + strings.Repeat("a", 64)}, Steps: []v1alpha1.RolloutStep{{Weight: 50, Approval: true}, {Weight: 100}}}
			f := newFleet(t, spec, "a")
			if c.lacks != nil {
				f.lacks = c.lacks
			}
			f.report()
			f.away = c.away
			got := meta.FindStatusCondition(f.step().Conditions, v1alpha1.ConditionVersionAvailable)
			if got == nil || got.Reason != c.reason || (got.Status == metav1.ConditionTrue) != (c.reason == ReasonAvailable) {
				t.Fatalf("%+v, want %s", got, c.reason)
			}
			for _, says := range c.says {
				if !strings.Contains(got.Message, says) {
					t.Errorf("%q doesn't say %q", got.Message, says)
				}
			}
		})
	}
}

// Of a rollout that is over the condition tells why, whatever nodes have since.
func TestVersionAvailableStays(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 100}}}, "a")
	f.lacks["n1"] = "DiskFull"
	f.report()
	f.step()
	f.rollout.Spec.Abort = true
	for range 3 {
		f.step()
	}
	delete(f.lacks, "n1")
	f.report()
	s := f.step()
	if c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionVersionAvailable); s.Phase != v1alpha1.RolloutAborted || c == nil || c.Reason != "DiskFull" {
		t.Errorf("%s, %+v", s.Phase, c)
	}
}
