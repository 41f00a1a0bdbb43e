package translate

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Servers let go of tunnels by the shortest-lived certificate that may be in one.
func TestTunnelAgeFollowsTTL(t *testing.T) {
	topology := func(name, trustDomain, ttl string) v1alpha1.MeshTopology {
		return v1alpha1.MeshTopology{ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: v1alpha1.MeshTopologySpec{TrustDomain: trustDomain, Identity: v1alpha1.IdentitySpec{CertificateTTL: ttl}}}
	}
	for name, c := range map[string]struct {
		topologies []v1alpha1.MeshTopology
		want       time.Duration
	}{
		"none":                {nil, 30 * time.Minute},
		"the default":         {[]v1alpha1.MeshTopology{topology("a", "td", "")}, 30 * time.Minute},
		"the shortest of two": {[]v1alpha1.MeshTopology{topology("a", "td", "6h"), topology("b", "td", "5m")}, 150 * time.Second},
		"longer":              {[]v1alpha1.MeshTopology{topology("a", "td", "6h")}, 3 * time.Hour},
		"not the mesh's":      {[]v1alpha1.MeshTopology{topology("a", "td", "6h"), topology("b", "other", "5m")}, 3 * time.Hour},
	} {
		if got := Network(NewTopologies(c.topologies, "td", nil), nil, nil).TunnelAge; got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}
