package e2e

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/rollout"
	"github.com/bulkhead-mesh/bulkhead/hack/images/oci"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// smallDisk gives the agents a disk for images that is as good as full, until the test
// ends.
func smallDisk(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		if _, err := e.Kubectl(context.Background(), "", "rollout", "undo", "--namespace", harness.SystemNamespace, "daemonset/bulkhead-agent"); err != nil {
			t.Error(err)
		}
		if err := e.WaitInstalled(context.Background(), patience); err != nil {
			t.Error(err)
		}
	})
	if _, err := e.Kubectl(t.Context(), "", "patch", "--namespace", harness.SystemNamespace, "daemonset/bulkhead-agent", "--patch", `{"spec": {"template": {"spec": {
		"volumes": [{"name": "small", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}],
		"containers": [{"name": "agent", "volumeMounts": [{"name": "small", "mountPath": "/var/lib/bulkhead/images"}]}]}}}}`); err != nil {
		t.Fatal(err)
	}
	if err := e.WaitInstalled(t.Context(), patience); err != nil {
		t.Fatal(err)
	}
}

// smallImage is an image without an Envoy that could run: none of these comes as far.
func smallImage(t *testing.T, version string) v1.Image {
	t.Helper()
	img, err := oci.ProxyOf(version, []oci.File{{Source: "testdata/broken.c", Path: "/envoy"}})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestBadImages asks for images that no node can have: the rollout's condition and an
// event have the reason, and nothing changes on any node.
func TestBadImages(t *testing.T) {
	allServe(t)
	registry := startRegistry(t)
	const version = "1.40.9"
	push := func(t *testing.T, version string) string {
		t.Helper()
		image, err := registry.Push(smallImage(t, version))
		if err != nil {
			t.Fatal(err)
		}
		return image
	}
	// altered has the registry serve something else of an image.
	altered := func(t *testing.T, what string) string {
		t.Helper()
		image := push(t, version)
		layers, err := smallImage(t, version).Layers()
		if err != nil {
			t.Fatal(err)
		}
		layer, err := layers[0].Digest()
		if err != nil {
			t.Fatal(err)
		}
		_, digest, _ := strings.Cut(image, "@")
		registry.alter(map[string]string{"manifests": digest, "blobs": layer.String()}[what])
		t.Cleanup(func() { registry.alter("") })
		return image
	}
	for _, c := range []struct {
		what, reason, says string
		image              func(t *testing.T) string
	}{
		{"an image that isn't there", "ImageNotFound", "ask for", func(*testing.T) string { return registry.Name("sha256:" + strings.Repeat("0", 64)) }},
		{"another image than the digest says", "DigestMismatch", "digest", func(t *testing.T) string { return altered(t, "manifests") }},
		{"a tampered layer", "DigestMismatch", "layer", func(t *testing.T) string { return altered(t, "blobs") }},
		{"an older Envoy under another's name", "InvalidImage", "1.38.0", func(t *testing.T) string { return push(t, "1.38.0") }},
		{"a full disk", "DiskFull", "MiB are free", func(t *testing.T) string {
			smallDisk(t)
			return push(t, version)
		}},
	} {
		t.Run(c.what, func(t *testing.T) {
			image := c.image(t)
			name := "e2e-bad-" + strings.ToLower(c.reason)
			rollOut(t, name, fmt.Sprintf("version: %s, image: %q", version, image), "{weight: 100}")
			var uid string
			err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "the condition "+c.reason, func(ctx context.Context) error {
				var r v1alpha1.ProxyRollout
				if err := e.Client.Get(ctx, client.ObjectKey{Name: name}, &r); err != nil {
					return err
				}
				uid = string(r.UID)
				has := meta.FindStatusCondition(r.Status.Conditions, v1alpha1.ConditionVersionAvailable)
				if has == nil || has.Status != metav1.ConditionFalse || has.Reason != c.reason || !strings.Contains(has.Message, c.says) {
					return fmt.Errorf("%+v", has)
				}
				for _, node := range e.nodes {
					if !strings.Contains(has.Message, node+" ("+c.reason) {
						return fmt.Errorf("%s isn't told of: %s", node, has.Message)
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			err = harness.Wait(t.Context(), patience, 200*time.Millisecond, "the event "+c.reason, func(ctx context.Context) error {
				// Of an object without a namespace they are in the default one.
				list, err := e.Kube.CoreV1().Events(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + uid})
				if err != nil {
					return err
				}
				for _, ev := range list.Items {
					if ev.Reason == c.reason && ev.Type == corev1.EventTypeWarning && strings.Contains(ev.Message, e.nodes[0]) {
						return nil
					}
				}
				return fmt.Errorf("none of %d", len(list.Items))
			})
			if err != nil {
				t.Error(err)
			}
			planned(t, newEnvoy)
			servingVersions(t, "e2e-a", newEnvoy)
			servingVersions(t, "e2e-b", newEnvoy)
			var out bytes.Buffer
			if err := rollout.Abort(t.Context(), e.Client, name, &out); err != nil {
				t.Fatal(err)
			}
			phase(t, name, v1alpha1.RolloutAborted)
			err = harness.Wait(t.Context(), patience, 200*time.Millisecond, "nodes to forget the image", func(ctx context.Context) error {
				for _, node := range e.nodes {
					var np v1alpha1.NodeProxy
					if err := e.Client.Get(ctx, client.ObjectKey{Name: node}, &np); err != nil {
						return err
					}
					if len(np.Spec.Images) > 0 || len(np.Status.Images) > 0 {
						return fmt.Errorf("%s: %+v, %+v", node, np.Spec.Images, np.Status.Images)
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	// The agents have been started anew: they see all of it again.
	for _, tenant := range tenants {
		onlyVersion(t, tenant, newEnvoy)
	}
}
