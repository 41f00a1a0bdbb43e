package translate

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Node is what the mesh knows of a node.
type Node struct {
	Name string
	// UID of the Node object.
	UID string
	// Linux nodes can run proxies.
	Linux bool
	// Away says why the node does nothing that it is told, "" if it does.
	Away string
	// ReadySince is since when it does, zero if nobody says.
	ReadySince time.Time
	// Labels are the Node's, all of them: selectors may name any.
	Labels map[string]string
	// PodCIDRs are its pod ranges; none if Kubernetes doesn't assign them.
	PodCIDRs []netip.Prefix
}

// Zone that the node is in; "" if its labels don't say.
func (n Node) Zone() string { return n.Labels[corev1.LabelTopologyZone] }

// NewNode reads a Node. Ranges that aren't any are left out.
func NewNode(n *corev1.Node) Node {
	cidrs := n.Spec.PodCIDRs
	if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
		cidrs = []string{n.Spec.PodCIDR}
	}
	os := n.Labels[corev1.LabelOSStable]
	away, readySince := away(n)
	return Node{Name: n.Name, UID: string(n.UID), Linux: os == "" || os == "linux", Away: away, ReadySince: readySince, Labels: n.Labels, PodCIDRs: prefixes(cidrs)}
}

// away says why a node does nothing that it is told, or since when it does. One that
// nobody has said anything of is taken to be there.
func away(n *corev1.Node) (why string, readySince time.Time) {
	for _, c := range n.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		if c.Status == corev1.ConditionTrue {
			return "", c.LastTransitionTime.Time
		}
		return "the node isn't Ready since " + c.LastTransitionTime.UTC().Format(time.RFC3339), time.Time{}
	}
	return "", time.Time{}
}

// Network is what every proxy has to know.
func Network(t Topologies, nodes []Node, services []networkingv1.ServiceCIDR) model.Network {
	n := model.Network{TrustDomain: t.TrustDomain(), TunnelAge: t.ShortestTTL() / 2}
	for _, node := range nodes {
		n.PodCIDRs = append(n.PodCIDRs, node.PodCIDRs...)
	}
	for _, s := range services {
		n.ServiceCIDRs = append(n.ServiceCIDRs, prefixes(s.Spec.CIDRs)...)
	}
	n.PodCIDRs, n.ServiceCIDRs = sorted(n.PodCIDRs), sorted(n.ServiceCIDRs)
	return n
}

// WithoutRanges reports whether pods of the mesh on the node are dialled in the clear by
// their own addresses: it runs pods, and proxies know a pod's address by the ranges alone.
func (n Node) WithoutRanges() bool { return n.Away == "" && len(n.PodCIDRs) == 0 }

// rangesCondition tells of nodes without ranges that have pods of a topology.
func rangesCondition(without []string) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionPodRangesKnown, Status: metav1.ConditionTrue, Reason: ReasonKnown, Message: "all nodes with pods of the mesh have podCIDRs"}
	if len(without) > 0 {
		c.Status, c.Reason = metav1.ConditionFalse, ReasonNodesWithoutRanges
		c.Message = fmt.Sprintf("connections to pods by their own addresses, and by headless services, are in plain text, or closed where egress is Reject, for these Nodes have no spec.podCIDRs: %s", listed(slices.Sorted(slices.Values(without))))
	}
	return c
}

func prefixes(list []string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		if p, err := netip.ParsePrefix(s); err == nil && !p.Addr().Is4In6() {
			out = append(out, p.Masked())
		}
	}
	return sorted(out)
}

func sorted(list []netip.Prefix) []netip.Prefix {
	slices.SortFunc(list, netip.Prefix.Compare)
	return slices.Compact(list)
}
