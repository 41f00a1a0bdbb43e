// Package conformance runs the Gateway API's own suite for meshes against the
// product on the cluster of KUBECONFIG, unmodified. `make conformance` sees to the
// cluster and the images. It is a module of its own: what the suite needs isn't
// what the product needs.
package conformance

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/gateway-api/conformance"
	confv1 "sigs.k8s.io/gateway-api/conformance/apis/v1"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"

	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

const (
	label = "conformance.bulkhead.dev/mesh"
	// topology takes the suite's namespaces in. One mesh has one trust domain, and the
	// demo may have run before.
	topology = `apiVersion: mesh.bulkhead.dev/v1alpha1
kind: MeshTopology
metadata: {name: conformance}
spec:
  trustDomain: demo.bulkhead
  rules:
  - namespaceSelector: {matchLabels: {` + label + `: "true"}}
`
)

// supported are all features that the suite has tests of for meshes.
var supported = []features.FeatureName{
	features.SupportMesh, features.SupportHTTPRoute, features.SupportGRPCRoute,
	features.SupportMeshClusterIPMatching,
	features.SupportMeshConsumerRoute,
	features.SupportMeshHTTPRouteRewritePath,
	features.SupportMeshHTTPRouteSchemeRedirect,
	features.SupportMeshHTTPRouteRedirectPort,
	features.SupportMeshHTTPRouteRedirectPath,
	features.SupportMeshHTTPRouteBackendRequestHeaderModification,
	features.SupportMeshHTTPRouteQueryParamMatching,
	features.SupportMeshHTTPRouteNamedRouteRule,
	features.SupportHTTPRouteParentRefPort,
	features.SupportHTTPRouteResponseHeaderModification,
	features.SupportHTTPRoute303RedirectStatusCode,
	features.SupportHTTPRoute307RedirectStatusCode,
	features.SupportHTTPRoute308RedirectStatusCode,
}

func TestMeshConformance(t *testing.T) {
	ctx := t.Context()
	cluster, err := harness.Connect()
	check(t, err)
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	check(t, err)
	crds := filepath.Join(strings.TrimSpace(string(out)), "config", "crd", "standard")
	// The product first: that it takes up CRDs which come later is part of the test.
	root, err := filepath.Abs("../..")
	check(t, err)
	check(t, cluster.Install(ctx, root, 5*time.Minute))
	_, err = cluster.Kubectl(ctx, "", "apply", "--server-side", "--force-conflicts", "-f", crds)
	check(t, err)
	check(t, cluster.Apply(ctx, topology))
	t.Cleanup(func() {
		if _, err := cluster.Kubectl(context.WithoutCancel(ctx), "", "delete", "meshtopology", "conformance"); err != nil {
			t.Error(err)
		}
	})

	o := conformance.DefaultOptions(t)
	o.GatewayClassName = ""
	o.NamespaceLabels = map[string]string{label: "true"}
	o.ConformanceProfiles = []suite.ConformanceProfileName{suite.MeshHTTPConformanceProfileName, suite.MeshGRPCConformanceProfileName}
	o.SupportedFeatures = supported
	// What the suite doesn't bound takes what it takes on a busy machine.
	for _, timeout := range []*time.Duration{&o.TimeoutConfig.CreateTimeout, &o.TimeoutConfig.DeleteTimeout, &o.TimeoutConfig.GetTimeout,
		&o.TimeoutConfig.HTTPRouteMustHaveCondition, &o.TimeoutConfig.RouteMustHaveParents, &o.TimeoutConfig.LatestObservedGenerationSet,
		&o.TimeoutConfig.DefaultTestTimeout} {
		*timeout = max(*timeout, 3*time.Minute)
	}
	o.Implementation = confv1.Implementation{
		Organization: "bulkhead-mesh", Project: "bulkhead", URL: "https://github.com/bulkhead-mesh/bulkhead", Version: "dev",
		Contact: []string{"https://github.com/bulkhead-mesh/bulkhead/issues"},
	}
	began := time.Now()
	conformance.RunConformanceWithOptions(t, o)
	fmt.Printf("the suite took %s\n", time.Since(began).Round(time.Second))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
