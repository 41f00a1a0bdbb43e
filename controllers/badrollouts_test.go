package controllers

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// fetching are the events about a rollout's version that have been told.
func (r *rolling) fetching() (told []string) {
	for _, line := range r.told {
		if strings.Contains(line, " FetchVersion: ") {
			told = append(told, line)
		}
	}
	return told
}

// lacks has the node's agent say why it hasn't the version.
func (r *rolling) lacks(reason, message string) v1alpha1.ProxyRolloutStatus {
	r.t.Helper()
	r.report(func(s *v1alpha1.NodeProxyStatus) {
		s.ProxyVersions = []string{"1.40.0"}
		if reason != "" {
			s.Images = []v1alpha1.NodeImageStatus{{Version: "1.41.0", Reason: reason, Message: message}}
		}
	})
	return r.decide()
}

// Whatever keeps a version from nodes, the rollout has a condition and an event with the
// reason, and nothing is changed on any node. What nodes can't be asked for isn't among
// these: the API refuses it.
func TestBadVersionsChangeNothing(t *testing.T) {
	for what, reason := range map[string]string{
		"an image that isn't there":           "ImageNotFound",
		"a registry that wants other secrets": "Unauthorized",
		"a registry that doesn't answer":      "RegistryUnreachable",
		"a wrong digest or a tampered layer":  "DigestMismatch",
		"an image without an Envoy":           "InvalidImage",
		"an older version than supported":     "TooOld",
		"a full disk":                         "DiskFull",
		"anything else":                       "Failed",
		"a version that no agent brings":      "UnknownProxyVersion",
	} {
		t.Run(what, func(t *testing.T) {
			r := newRolling(t)
			says, told := "why it is so", reason
			if reason == "UnknownProxyVersion" {
				says, told = "its agent doesn't have it, but 1.40.0", ""
			}
			before := r.nodeProxy("n1").Spec
			s := r.lacks(told, says)
			c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionVersionAvailable)
			if c == nil || c.Status != metav1.ConditionFalse || c.Reason != reason || !strings.Contains(c.Message, says) || !strings.Contains(c.Message, "n1 (") {
				t.Errorf("the condition is %+v", c)
			} else if toDo := strings.Contains(c.Message, "with a version that they have"); toDo != (reason == "UnknownProxyVersion") {
				t.Errorf("it says what to do, %t: %s", toDo, c.Message)
			}
			if events := r.fetching(); len(events) != 1 || !strings.HasPrefix(events[0], "ProxyRollout Warning "+reason+" FetchVersion: ") || !strings.Contains(events[0], says) {
				t.Errorf("told is %q", events)
			}
			if s.Phase != v1alpha1.RolloutProgressing || !strings.Contains(s.Message, says) {
				t.Errorf("%s: %s", s.Phase, s.Message)
			}
			if after := r.nodeProxy("n1").Spec; r.canary() != nil || len(after.Tenants) != len(before.Tenants) || after.Tenants[0].Version != before.Tenants[0].Version {
				t.Errorf("the node's plan was %+v, is %+v", before, after)
			}
		})
	}
}

// What keeps a version from nodes is told once, and when they have it.
func TestUnavailableVersionIsTold(t *testing.T) {
	r := newRolling(t)
	r.lacks("DiskFull", "511 MiB are free")
	r.lacks("DiskFull", "510 MiB are free")
	r.lacks("DigestMismatch", "layer")
	if r.canary() != nil {
		t.Errorf("it begins all the same: %+v", r.canary())
	}
	r.report(func(*v1alpha1.NodeProxyStatus) {})
	r.decide()
	told := r.fetching()
	want := []string{"ProxyRollout Warning DiskFull FetchVersion: ", "ProxyRollout Warning DigestMismatch FetchVersion: ", "ProxyRollout Normal Available FetchVersion: "}
	if len(told) != len(want) {
		t.Fatalf("told is %q", told)
	}
	for i, begins := range want {
		if !strings.HasPrefix(told[i], begins) {
			t.Errorf("told is %q, want %q…", told[i], begins)
		}
	}
	if !strings.Contains(told[0], "n1 (DiskFull: 511 MiB are free)") {
		t.Errorf("%q", told[0])
	}
}

// However much nodes say, the event that tells of a rollout says how it is stopped.
func TestEventsSayHowItIsStopped(t *testing.T) {
	r := newRolling(t)
	r.lacks("Failed", strings.Repeat("x", 3000))
	const begins, ends = "ProxyRollout Normal RolloutPhase Progressing: Progressing: step 1 of 2", `{"spec":{"abort":true}}'`
	if len(r.told) == 0 {
		t.Fatal("nothing is told")
	}
	last := r.told[len(r.told)-1]
	if !strings.HasPrefix(last, begins) || !strings.HasSuffix(last, ends) {
		t.Errorf("told is %q", r.told)
	}
	for _, line := range r.told {
		if _, note, _ := strings.Cut(line, ": "); len(note) > 1024 {
			t.Errorf("%d bytes: %q", len(note), note)
		}
	}
}
