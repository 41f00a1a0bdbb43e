package translate

import (
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// NodeRedirectionView is a node that can run proxies and what its agent says of
// its redirection.
type NodeRedirectionView struct {
	Node   string
	Labels map[string]string
	// Have is "" if the agent hasn't said.
	Have v1alpha1.Redirection
	// Why it isn't the planned one, for people.
	Why string
}

// redirectedCondition tells whether nodes are redirected as a topology says.
func redirectedCondition(name string, all Topologies, nodes []NodeRedirectionView) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionRedirected, Status: metav1.ConditionFalse}
	decider := ""
	count := map[v1alpha1.Redirection]int{}
	var overruled, differ, waiting []string
	for _, n := range nodes {
		want, by := all.Redirection(n.Labels)
		decider = by
		switch own := all.own(name, n.Labels); {
		case own != want:
			overruled = append(overruled, n.Node)
		case n.Have == "":
			waiting = append(waiting, n.Node)
		case n.Have != want && n.Why != "":
			differ = append(differ, fmt.Sprintf("%s has %s instead of %s: %s", n.Node, n.Have, want, n.Why))
		case n.Have != want:
			waiting = append(waiting, n.Node)
		default:
			count[n.Have]++
		}
	}
	for _, l := range [][]string{overruled, differ, waiting} {
		slices.Sort(l)
	}
	switch {
	case len(overruled) > 0:
		c.Reason = ReasonOlderDecides
		c.Message = fmt.Sprintf("a node has one redirection, and MeshTopology %s, which is older, has another one for %s", decider, listed(overruled))
	case len(differ) > 0:
		c.Reason, c.Message = ReasonNodesDiffer, listed(differ)
	case len(waiting) > 0:
		c.Reason, c.Message = ReasonProgressing, "waiting for the agents of "+listed(waiting)
	default:
		c.Status, c.Reason = metav1.ConditionTrue, ReasonAsSpecified
		c.Message = fmt.Sprintf("nodes with %s: %d, with %s: %d", v1alpha1.RedirectionEBPF, count[v1alpha1.RedirectionEBPF], v1alpha1.RedirectionNetfilter, count[v1alpha1.RedirectionNetfilter])
	}
	return c
}
