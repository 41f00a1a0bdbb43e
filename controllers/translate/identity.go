package translate

import (
	"fmt"
	"maps"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Reasons of the condition IdentityReady, as the API types list them.
const (
	ReasonChangingRoots      = "ChangingRoots"
	ReasonInvalidAuthority   = "InvalidAuthority"
	ReasonAuthorityExpired   = "AuthorityExpired"
	ReasonNoRootKey          = "NoRootKey"
	ReasonInvalidIssuer      = "InvalidIssuer"
	ReasonInvalidTrustDomain = "InvalidTrustDomain"
	ReasonNotRenewed         = "NotRenewed"
)

// AuthorityView is how the authority is, for people.
type AuthorityView struct {
	// Reason and Message of what is wrong; "" if nothing is.
	Reason, Message string
	// State is what it does, if nothing is wrong: who signs.
	State string
	// Changing says how far a change of roots is; "" if none is under way.
	Changing string
}

// identityCondition tells whether a topology's workloads can prove who they are.
func identityCondition(t *v1alpha1.MeshTopology, all Topologies, in TopologyInput) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionIdentityReady, Status: metav1.ConditionFalse}
	issuer, decides := all.Issuer()
	switch {
	case in.Authority.Reason != "":
		c.Reason, c.Message = in.Authority.Reason, in.Authority.Message
	case len(in.NotRenewed) > 0:
		var list []string
		for _, node := range slices.Sorted(maps.Keys(in.NotRenewed)) {
			list = append(list, node+": "+in.NotRenewed[node])
		}
		c.Reason, c.Message = ReasonNotRenewed, listed(list)
	case decides != "" && decides != t.Name && t.Spec.Identity.IssuerSecret != issuer:
		c.Reason = ReasonOlderDecides
		c.Message = fmt.Sprintf("spec.identity.issuerSecret %q isn't in force: the mesh has one issuer, and the older MeshTopology %s says %q", t.Spec.Identity.IssuerSecret, decides, issuer)
	case in.Authority.Changing != "":
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, ReasonChangingRoots, in.Authority.Changing
	default:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, ReasonReady, in.Authority.State
	}
	return c
}
