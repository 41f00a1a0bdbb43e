package agent

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent/image"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// authority is an operator without a network.
type authority struct{ *identity.Authority }

func (a authority) Sign(_ context.Context, csr []byte, p identity.Pod) ([][]byte, error) {
	return a.Authority.Sign(csr, p.Identity, time.Hour, time.Now())
}

// A pod that is planned has its certificate signed at once, whatever the round that is
// under way has to do, and that one, which goes by a former plan, doesn't take it away: the
// pod's CNI plugin waits for it as soon as the pod is planned.
func TestPlannedPodIsSignedFor(t *testing.T) {
	if testing.Short() {
		t.Skip("mounting a tmpfs needs root: make test-kernel")
	}
	log := slog.New(slog.DiscardHandler)
	a, err := newAgent(Options{Node: "n", Operator: "localhost:1", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := identity.NewAuthority("cluster.local", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	keys := filepath.Join(t.TempDir(), "keys")
	t.Cleanup(func() {
		if err := identity.Uninstall(keys); err != nil {
			t.Error(err)
		}
	})
	if a.identities, err = identity.OpenStore(identity.StoreOptions{Dir: keys, Signer: authority{ca}, Log: log}); err != nil {
		t.Fatal(err)
	}
	if err := a.identities.SetBundle("cluster.local", ca.Roots()); err != nil {
		t.Fatal(err)
	}
	if a.images, err = image.Open(image.Options{Dir: t.TempDir(), Log: log}); err != nil {
		t.Fatal(err)
	}
	a.bulkheads = &isolation.Manager{}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- a.identities.Run(running) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()

	pod := func(uid string) identity.Pod {
		return identity.Pod{UID: uid, Namespace: "team-a", Name: uid, Tenant: model.NamespaceTenant("team-a"),
			Identity: model.Identity{TrustDomain: "cluster.local", Namespace: "team-a", ServiceAccount: uid}}
	}
	ready := func(when, uid string) {
		t.Helper()
		if _, ok := a.planned(uid); !ok {
			t.Fatalf("%s pod %s isn't planned", when, uid)
		}
		if err := a.identities.WaitReady(ctx, uid); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	a.setPlan(plan{pods: []identity.Pod{pod("web")}}, "")
	ready("before any round", "web")
	a.setPlan(plan{pods: []identity.Pod{pod("api"), pod("web")}}, "")
	ready("in a round", "api")
	a.setIdentities(nil) // of that round
	ready("after it", "api")
	a.setPlan(plan{pods: []identity.Pod{pod("api")}}, "")
	a.setIdentities(nil)
	if err := a.identities.WaitReady(ctx, "web"); !errors.Is(err, identity.ErrUnknownPod) {
		t.Errorf("a pod that isn't planned any more: %v", err)
	}
	ready("when another one has gone", "api")
}
