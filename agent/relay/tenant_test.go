package relay

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// authority signs whatever the store asks for.
type authority struct{ *identity.Authority }

func (a authority) Sign(_ context.Context, csr []byte, pod identity.Pod) ([][]byte, error) {
	return a.Authority.Sign(csr, pod.Identity, time.Hour, time.Now())
}

// A tenant's proxy that was taken over asks, on its own socket, for the identity of
// another tenant: it is told that there is none, and gets no byte of it.
func TestSecretOfAnotherTenant(t *testing.T) {
	if testing.Short() {
		t.Skip("mounting a tmpfs needs root: make test-kernel")
	}
	id := func(namespace string) model.Identity {
		return model.Identity{TrustDomain: "cluster.local", Namespace: namespace, ServiceAccount: "web"}
	}
	a := must(identity.NewAuthority("cluster.local", time.Now()))
	dir := filepath.Join(t.TempDir(), "keys")
	t.Cleanup(func() {
		if err := identity.Uninstall(dir); err != nil {
			t.Error(err)
		}
	})
	store := must(identity.OpenStore(identity.StoreOptions{Dir: dir, Signer: authority{a}}))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- store.Run(ctx) }()
	defer func() { cancel(); <-done }()
	if err := store.SetBundle("cluster.local", a.Roots()); err != nil {
		t.Fatal(err)
	}
	store.SetPods([]identity.Pod{
		{UID: "1", Namespace: "team-a", Name: "a", Identity: id("team-a"), Tenant: teamA},
		{UID: "2", Namespace: "team-b", Name: "b", Identity: id("team-b"), Tenant: teamB},
	})
	for _, uid := range []string{"1", "2"} {
		if err := store.WaitReady(ctx, uid); err != nil {
			t.Fatal(err)
		}
	}
	f := setUp(t, func(o *Options) { o.Secrets = store })
	p := f.proxy(teamA)
	p.subscribe(TypeSecret, id("team-b").String())
	r := p.next()
	if len(r.Resources) != 0 || len(r.RemovedResources) != 1 || r.RemovedResources[0] != id("team-b").String() || strings.Contains(r.String(), "PRIVATE KEY") {
		t.Fatalf("team-a got %v of team-b", names(r))
	}
	p.subscribe(TypeSecret, id("team-a").String())
	if r := p.next(); len(r.Resources) != 1 || r.Resources[0].Name != id("team-a").String() {
		t.Errorf("its own: %v", names(r))
	}
	q := f.proxy(teamB)
	q.subscribe(TypeSecret, id("team-b").String())
	if r := q.next(); len(r.Resources) != 1 {
		t.Errorf("team-b's own: %v", names(r))
	}
}
