package kernel

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/hack/images/oci"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A real Envoy comes from a registry, over an agent that was killed while it
// fetched, serves, and leaves nothing when nobody wants it any more.
func TestImage(t *testing.T) {
	l := lab.New(t)
	n := l.Node1
	registry := l.NewRegistry(t)
	img, err := oci.Proxy(t.Context(), olderEnvoy)
	lab.Check(t, err)
	image := registry.Push(t, olderEnvoy, img)

	fetching, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var killed atomic.Bool
	registry.Hold = func(r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") && !killed.Load() {
			once.Do(func() { close(fetching) })
			<-goOn
		}
	}
	images := filepath.Join(n.Isolation().LibDir, "images")
	n.Images, n.Version = []v1alpha1.NodeImage{image}, image.Version
	n.WritePlan()
	select {
	case <-fetching:
	case <-time.After(lab.Patience):
		t.Fatal("the image isn't fetched")
	}
	// What isn't there yet changes nothing.
	flow{from: l.A1, to: l.B2}.check(t, 4)
	if g := serving(n, "team-a"); g.Version != dist.Default {
		t.Errorf("while it is fetched, %s serves", g.Version)
	}
	n.Kill()
	killed.Store(true)
	close(goOn)
	if left, _ := filepath.Glob(filepath.Join(images, ".pull-*")); len(left) == 0 {
		t.Error("the agent wasn't killed in the middle of it")
	}
	n.Start()
	n.WaitServing(image.Version)
	if left, _ := filepath.Glob(filepath.Join(images, ".pull-*")); len(left) > 0 {
		t.Errorf("what was half fetched is there: %q", left)
	}
	flow{from: l.A1, to: l.B2}.check(t, 4)

	// The registry is not needed any more.
	registry.Hold = func(r *http.Request) { t.Errorf("the registry is asked for %s", r.URL.Path) }
	n.Kill()
	n.Start()
	n.WaitServing(image.Version)

	n.Images, n.Version = nil, ""
	n.WritePlan()
	n.WaitServing(dist.Default)
	lab.Eventually(t, "the end of the image", func() error {
		left, err := filepath.Glob(filepath.Join(n.Isolation().LibDir, "envoy", "*+*"))
		entries, readErr := os.ReadDir(images)
		if err != nil || readErr != nil || len(left) > 0 || len(entries) > 0 {
			return fmt.Errorf("%q, %d records", left, len(entries))
		}
		return nil
	})
}

// An image that holds something else than a working Envoy, as canary and as the
// version itself, takes no connection.
func TestBrokenImage(t *testing.T) {
	l := lab.New(t)
	n := l.Node1
	registry := l.NewRegistry(t)
	broken := filepath.Join(t.TempDir(), "envoy")
	lab.Check(t, os.WriteFile(broken, []byte("no program"), 0o755))
	img, err := oci.ProxyOf("1.41.0", []oci.File{{Source: broken, Path: "/envoy"}})
	lab.Check(t, err)
	image := registry.Push(t, "1.41.0", img)
	before := serving(n, "team-a")
	n.Images = []v1alpha1.NodeImage{image}
	for _, promoted := range []bool{false, true} {
		n.Canary, n.CanaryVersion, n.Promoted = 100, image.Version, promoted
		n.WritePlan()
		lab.Eventually(t, "an attempt to run it", func() error {
			for _, g := range n.Tenant("team-a").Generations {
				if g.Version == image.Version && g.Restarts > 0 {
					return nil
				}
			}
			return fmt.Errorf("%+v", n.Tenant("team-a"))
		})
		for range 20 {
			flow{from: l.A1, to: l.B2}.check(t, 4)
		}
		if now := serving(n, "team-a"); now.PID != before.PID {
			t.Errorf("promoted %t: %+v serves, before %+v", promoted, now, before)
		}
	}
	n.Images, n.Canary, n.Promoted = nil, 0, false
	n.WritePlan()
	n.WaitReady()
	if now := serving(n, "team-a"); now.PID != before.PID {
		t.Errorf("%+v serves, before %+v", now, before)
	}
}

// serving is the process that connections are led to.
func serving(n *lab.Node, tenant string) agent.InspectedGeneration {
	for _, g := range n.Tenant(tenant).Generations {
		if g.Serving {
			return g
		}
	}
	return agent.InspectedGeneration{}
}
