package rollout

import (
	"bytes"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Figures of both versions stand side by side, added up over nodes.
func TestFigures(t *testing.T) {
	node := func(name, tenant, canary string) *v1alpha1.NodeProxy {
		return &v1alpha1.NodeProxy{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: v1alpha1.NodeProxyStatus{Tenants: []v1alpha1.NodeTenantStatus{{Name: tenant, Generations: []v1alpha1.GenerationStatus{
			{Role: v1alpha1.RoleFirst, Version: "1.39.3", Figures: &v1alpha1.GenerationFigures{Connections: 40, Resets: 1, PrivateBytes: 10 << 20}},
			{Role: v1alpha1.RoleCanary, Version: canary, Figures: &v1alpha1.GenerationFigures{Connections: 10, Resets: 7, PrivateBytes: 30 << 20}},
		}}}}}
	}
	c := server(t, rollout("now", time.Hour, v1alpha1.RolloutWaiting), node("n1", "team-a", "1.40.0"), node("n2", "team-a", "1.40.0"),
		node("n3", "team-b", "1.40.0"), node("n4", "team-c", "1.40.9"))
	var out bytes.Buffer
	if err := Status(t.Context(), c, "", "team-a", &out); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "2 of 80 | 14 of 20") || !strings.Contains(s, "20 MiB | 60 MiB") || strings.Contains(s, "team-b") {
		t.Error(s)
	}
	out.Reset()
	if err := Status(t.Context(), c, "", "", &out); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "team-b") || strings.Contains(s, "team-c") {
		t.Error(s)
	}
}
