package translate

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

func TestRedirection(t *testing.T) {
	const ebpf, netfilter = v1alpha1.RedirectionEBPF, v1alpha1.RedirectionNetfilter
	byKernel := func(r v1alpha1.Redirection) v1alpha1.NodeRedirection {
		return v1alpha1.NodeRedirection{NodeSelector: metav1.LabelSelector{MatchLabels: map[string]string{"kernel": "old"}}, Redirection: r}
	}
	old := newTopology("old", time.Hour, "td", "a")
	old.Spec.NodeRedirections = []v1alpha1.NodeRedirection{
		{NodeSelector: metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "x", Operator: "Maybe"}}}, Redirection: netfilter},
		byKernel(netfilter), byKernel(ebpf),
	}
	young := newTopology("young", 0, "td", "b")
	other := newTopology("other", 2*time.Hour, "td2", "c")
	other.Spec.Redirection = netfilter
	all := NewTopologies([]v1alpha1.MeshTopology{young, other, old}, "td", nil)
	node := func(name, kernel string, have v1alpha1.Redirection, why string) NodeRedirectionView {
		return NodeRedirectionView{Node: name, Labels: map[string]string{"kernel": kernel}, Have: have, Why: why}
	}
	for kernel, want := range map[string]v1alpha1.Redirection{"new": ebpf, "old": netfilter} {
		if got, by := all.Redirection(map[string]string{"kernel": kernel}); got != want || by != "old" {
			t.Errorf("%s kernel: %s by %s, want %s by the oldest of the trust domain", kernel, got, by, want)
		}
	}
	if got, _ := NewTopologies(nil, "td", nil).Redirection(nil); got != "" {
		t.Errorf("without a topology: %q", got)
	}
	for _, test := range []struct {
		name, topology, reason, message string
		nodes                           []NodeRedirectionView
	}{
		{"as specified", "old", ReasonAsSpecified, "nodes with EBPF: 1, with Netfilter: 1", []NodeRedirectionView{node("n1", "new", ebpf, ""), node("n2", "old", netfilter, "")}},
		{"can't", "old", ReasonNodesDiffer, "n2 has EBPF instead of Netfilter: no nftables", []NodeRedirectionView{node("n1", "new", ebpf, ""), node("n2", "old", ebpf, "no nftables")}},
		{"not yet", "old", ReasonProgressing, "n2", []NodeRedirectionView{node("n1", "new", ebpf, ""), node("n2", "old", ebpf, "")}},
		{"not reported", "old", ReasonProgressing, "n1", []NodeRedirectionView{node("n1", "new", "", "")}},
		{"the younger says the same", "young", ReasonAsSpecified, "", []NodeRedirectionView{node("n1", "new", ebpf, "")}},
		{"the younger says another", "young", ReasonOlderDecides, "MeshTopology old, which is older, has another one for n2", []NodeRedirectionView{node("n1", "new", ebpf, ""), node("n2", "old", netfilter, "")}},
		{"no nodes", "old", ReasonAsSpecified, "", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			topology := newTopology(test.topology, 0, "td")
			s := MeshTopologyStatus(&topology, all, TopologyInput{TrustDomain: "td", Namespaces: 1, Nodes: test.nodes}, metav1.NewTime(born))
			status := metav1.ConditionFalse
			if test.reason == ReasonAsSpecified {
				status = metav1.ConditionTrue
			}
			wantCondition(t, s.Conditions, v1alpha1.ConditionRedirected, status, test.reason, test.message)
		})
	}
	wantCondition(t, MeshTopologyStatus(&old, all, TopologyInput{TrustDomain: "td", Namespaces: 1}, metav1.NewTime(born)).Conditions,
		v1alpha1.ConditionAccepted, metav1.ConditionFalse, ReasonInvalidSelector, "spec.nodeRedirections[0]")
}
