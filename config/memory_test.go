// Package config holds the manifests, which kustomize puts together.
package config

import (
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"
)

// Go's collector keeps below the container's limit, with room for what else is charged to
// it, and doesn't begin to struggle long before.
func TestGoMemoryIsBelowTheLimit(t *testing.T) {
	for _, file := range []string{"agent/daemonset.yaml", "operator/deployment.yaml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var workload struct {
			Spec struct{ Template corev1.PodTemplateSpec }
		}
		if err := yaml.Unmarshal(text, &workload); err != nil {
			t.Fatal(err)
		}
		if n := len(workload.Spec.Template.Spec.Containers); n != 1 {
			t.Fatalf("%s has %d containers", file, n)
		}
		c := workload.Spec.Template.Spec.Containers[0]
		limit, golang := c.Resources.Limits.Memory().Value(), int64(0)
		for _, e := range c.Env {
			if e.Name == "GOMEMLIMIT" {
				q, err := resource.ParseQuantity(strings.TrimSuffix(e.Value, "B"))
				if err != nil {
					t.Errorf("%s: GOMEMLIMIT %q: %v", file, e.Value, err)
				}
				golang = q.Value()
			}
		}
		if golang < limit*3/4 || golang > limit*4/5 {
			t.Errorf("%s: GOMEMLIMIT is %d of %d bytes", file, golang, limit)
		}
	}
}
