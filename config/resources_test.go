// Package config holds the manifests, which kustomize puts together.
package config

import (
	"os"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"
)

// container is the only one of a workload.
func container(t *testing.T, file string) corev1.Container {
	t.Helper()
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
	return workload.Spec.Template.Spec.Containers[0]
}

func variable(c corev1.Container, name string) string {
	for _, e := range c.Env {
		if e.Name == name {
			return e.Value
		}
	}
	return ""
}

// Go's collector keeps below the container's limit, with room for what else is charged to
// it, and doesn't begin to struggle long before.
func TestGoMemoryIsBelowTheLimit(t *testing.T) {
	for _, file := range []string{"agent/daemonset.yaml", "operator/deployment.yaml"} {
		c := container(t, file)
		limit, value := c.Resources.Limits.Memory().Value(), variable(c, "GOMEMLIMIT")
		golang, err := resource.ParseQuantity(strings.TrimSuffix(value, "B"))
		if err != nil || golang.Value() < limit*3/4 || golang.Value() > limit*4/5 {
			t.Errorf("%s: GOMEMLIMIT is %q of %d bytes, %v", file, value, limit, err)
		}
	}
}

// Go runs as many threads as the agent's CPU limit lets it, which is one that threads can
// match; and it has its share of a node that is busy.
func TestAgentThreadsMatchItsLimit(t *testing.T) {
	c := container(t, "agent/daemonset.yaml")
	limit, threads := c.Resources.Limits.Cpu(), variable(c, "GOMAXPROCS")
	if limit.IsZero() || threads != strconv.FormatInt(limit.Value(), 10) || limit.MilliValue()%1000 != 0 {
		t.Errorf("GOMAXPROCS is %q with a limit of %s", threads, limit)
	}
	if share := c.Resources.Requests.Cpu(); share.MilliValue() < 100 {
		t.Errorf("it asks for %s of a CPU", share)
	}
}
