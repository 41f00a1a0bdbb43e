package translate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Reasons of the condition VersionAvailable, besides those of NodeImageStatus and
// UnknownProxyVersion.
const (
	ReasonAvailable = "Available"
	ReasonFetching  = "Fetching"
	// ReasonNodesAway is for nodes that say nothing.
	ReasonNodesAway = "NodesAway"
	reasonFailed    = "Failed"
)

// imageReasons are those of NodeImageStatus. What else a node says must not become a
// condition's, which has a syntax: the whole status would be refused.
var imageReasons = []string{"ImageNotFound", "Unauthorized", "RegistryUnreachable", "DigestMismatch", "InvalidImage", "TooOld", "DiskFull", reasonFailed}

// lack is why a node can't run a version: in a word, and for people.
type lack struct{ reason, message string }

// staleReport is why a node that is there isn't counted.
const staleReport = "its agent has said nothing since the node is Ready again"

// isStale reports whether a node's agent hasn't said anything since the node is there
// again: its processes may be others, or none.
func (r *rollout) isStale(n *v1alpha1.NodeProxy) bool {
	return isBefore(n.Status.ReadySince, r.ReadySince[n.Name])
}

// isBefore reports whether what an agent said is about a node that was away since. An
// agent of a version before this doesn't say when it speaks, and is believed.
func isBefore(said *metav1.Time, since time.Time) bool {
	return !since.IsZero() && said != nil && !said.Time.Equal(since)
}

// Unheard says why a node's last word, of when it was Ready since said, isn't about how
// it is: it is away, or its agent has said nothing since it came back. It is "" otherwise.
func Unheard(n Node, said *metav1.Time) string {
	if n.Away == "" && isBefore(said, n.ReadySince) {
		return staleReport
	}
	return n.Away
}

// lackOf is why a node can't run the rollout's version; false if it can.
func (r *rollout) lackOf(n *v1alpha1.NodeProxy) (l lack, lacks bool) {
	if why := r.Away[n.Name]; why != "" {
		return lack{ReasonNodesAway, why}, true
	}
	if r.isStale(n) {
		return lack{ReasonNodesAway, staleReport}, true
	}
	if slices.Contains(n.Status.ProxyVersions, r.version) {
		return l, false
	}
	l = lack{ReasonUnknownProxyVersion, "its agent doesn't have it, but " + strings.Join(n.Status.ProxyVersions, ", ")}
	if r.Rollout.Spec.Target.Image != "" {
		l = lack{ReasonFetching, "is being fetched"}
	}
	if len(n.Status.ProxyVersions) == 0 {
		l = lack{ReasonNodesAway, "its agent says nothing"}
	}
	for _, image := range n.Status.Images {
		if image.Version != r.version || image.Reason == "" {
			continue
		}
		l = lack{image.Reason, image.Reason + ": " + image.Message}
		if !slices.Contains(imageReasons, l.reason) {
			l.reason = reasonFailed
		}
	}
	return l, true
}

// lacks are those of all nodes that have tenants.
func (r *rollout) lacks() map[string]lack {
	out := map[string]lack{}
	for i := range r.Nodes {
		n := &r.Nodes[i]
		if len(n.Spec.Tenants) == 0 {
			continue
		}
		if l, ok := r.lackOf(n); ok {
			out[n.Name] = l
		}
	}
	return out
}

// lacking are the nodes that can't run the version, and why.
func (r *rollout) lacking() map[string]string {
	out := map[string]string{}
	for name, l := range r.lacks() {
		out[name] = l.message
	}
	return out
}

// available says whether nodes can run the version. Of a rollout that is over it stays
// as it was.
func (r *rollout) available() []metav1.Condition {
	if r.status.StartedAt == nil || IsDone(r.status.Phase) {
		return r.status.Conditions
	}
	c := metav1.Condition{Type: v1alpha1.ConditionVersionAvailable, Status: metav1.ConditionTrue, Reason: ReasonAvailable,
		Message: fmt.Sprintf("all nodes can run Envoy %s", r.version), ObservedGeneration: r.Rollout.Generation}
	if lacks := r.lacks(); len(lacks) > 0 {
		messages := map[string]string{}
		for name, l := range lacks {
			messages[name] = l.message
		}
		c.Status, c.Reason = metav1.ConditionFalse, worst(lacks)
		c.Message = fmt.Sprintf("Envoy %s isn't on all nodes (missing: %d): %s; what runs there goes on as it is", r.version, len(lacks), describe(messages))
		if c.Reason == ReasonUnknownProxyVersion {
			c.Message += "; bring agents that have it, or abort and create another ProxyRollout with a version that they have, or with an image"
		}
	}
	return conditions(r.status.Conditions, metav1.NewTime(r.Now), c)
}

// worst is the reason that somebody has to do the most about.
func worst(lacks map[string]lack) string {
	// What an image can't be had for comes before these.
	lesser := []string{ReasonUnknownProxyVersion, ReasonNodesAway, ReasonFetching}
	return lacks[slices.MinFunc(slices.Sorted(maps.Keys(lacks)), func(a, b string) int {
		return cmp.Compare(slices.Index(lesser, lacks[a].reason), slices.Index(lesser, lacks[b].reason))
	})].reason
}
