package xds

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// wantRemoved is the next response, which must take these names back.
func (c *client) wantRemoved(typeURL string, names ...string) {
	c.t.Helper()
	if r := c.next(); r.TypeUrl != typeURL || len(r.Resources) > 0 || !slices.Equal(r.RemovedResources, names) {
		c.t.Fatalf("got %s %q, removed %q; want %q removed", shortType(r.TypeUrl), resourceNames(r), r.RemovedResources, names)
	}
}

// Addresses that nobody has are let go after a while, and come unasked when they
// are somebody's.
func TestUnknownIsLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const wait = 5 * time.Second
		m := newMesh(t, ServerOptions{UnknownFor: wait})
		c := m.dial(teamA)
		const pod, vip = "pod|10.1.0.50", "vip|10.96.0.99:80"
		letGo := func(names ...string) {
			t.Helper()
			began := time.Now()
			c.wantRemoved(TypeCluster, names...)
			if took := time.Since(began); took < wait || took > wait+time.Second {
				t.Errorf("%q were let go after %s", names, took)
			}
		}
		for range 2 { // it may go and come as often as it likes
			c.subscribe(TypeCluster, pod, vip, vipName)
			c.wantAll(TypeCluster, pod, vip, vipName)
			letGo(pod, vip)

			w := workload("late-0", "late", "10.1.0.50")
			m.must(m.store.SetWorkload(w))
			c.want(TypeCluster, pod)
			late := model.Service{Namespace: "team-b", Name: "late", VIPs: addrs("10.96.0.99"), Ports: []model.ServicePort{{Port: 80}}}
			m.must(m.store.SetService(late))
			c.want(TypeCluster, vip)
			time.Sleep(2 * wait)
			c.settled() // somebody's, it stays

			m.store.DeleteWorkload(w.UID)
			c.want(TypeCluster, pod) // refuses now
			letGo(pod)
			m.store.DeleteService("team-b", "late")
			letGo(vip)
			c.unsubscribe(TypeCluster, pod, vip, vipName)
		}
		c.handled()
		c.cancel()
		m.forgotten()
	})
}

func TestUnknownNamesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, ServerOptions{MaxUnknown: 10, UnknownFor: 5 * time.Second})
		c := m.dial(teamA)
		var names []string
		for i := range 30 {
			names = append(names, fmt.Sprintf("pod|10.1.9.%02d", i+10))
		}
		c.subscribe(TypeCluster, names...)
		got, refused := 0, 0
		for got < 10 || refused == 0 {
			r := c.next()
			got += len(r.Resources)
			if n := len(r.RemovedResources); n > 0 {
				refused += n
				if n != 20 || r.RemovedResources[0] != names[10] {
					t.Fatalf("%d names refused from %s on", n, r.RemovedResources[0])
				}
			}
			c.ack(r)
		}
		// What somebody has isn't bounded by that, and once what nobody has is let go,
		// there is room for other names that nobody has.
		c.subscribe(TypeCluster, vipName)
		c.want(TypeCluster, vipName)
		held := func() int {
			m.store.mu.Lock()
			defer m.store.mu.Unlock()
			return len(m.store.shared)
		}
		if n := held(); n != 11 {
			t.Errorf("%d names are held", n)
		}
		c.wantRemoved(TypeCluster, names[:10]...)
		c.subscribe(TypeCluster, "pod|10.1.9.99")
		c.want(TypeCluster, "pod|10.1.9.99")
		if n := held(); n != 11 {
			t.Errorf("%d names are held after one more", n)
		}
	})
}

// What Envoy does with a cluster that is let go and wanted again.
func TestEnvoyForgetsUnknownAddresses(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			store, _, rejections := envoyStore(t)
			server := NewServer(store, ServerOptions{MaxUnknown: 50, UnknownFor: 4 * time.Second, Logger: slog.New(slog.DiscardHandler), Authorize: func(context.Context) (StreamIdentity, error) {
				return StreamIdentity{Node: testProxy.Node, Tenant: testProxy.Tenant}, nil
			}})
			services := []model.Service{
				endpointService("api", "10.96.1.1", model.Endpoint{Addr: netip.MustParseAddrPort("10.1.0.3:8080"), Identity: identity("api")}),
				endpointService("plain", "10.96.1.2", model.Endpoint{Addr: netip.MustParseAddrPort("10.9.0.9:8080")}),
			}
			for _, s := range services {
				if err := store.SetService(s); err != nil {
					t.Fatal(err)
				}
			}
			serveApp(t, "10.1.0.3:8080")
			serveApp(t, "10.9.0.9:8080")
			e := startEnvoy(t, version, server, newAuthority(t))
			if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-web-0"); err != nil {
				t.Fatal(err)
			}
			has := func(cluster string) bool { return slices.Contains(e.clusters(), cluster) }
			refused := func(to string) time.Duration {
				t.Helper()
				began := time.Now()
				if got, err := talk("10.1.0.2", to); err == nil {
					t.Errorf("%s answers %q", to, got)
				}
				return time.Since(began)
			}
			const name = "vip|10.96.1.77:15001"
			if d := refused("10.96.1.77:15001"); d >= odcdsTimeout {
				t.Errorf("an address that nobody has is refused after %s", d)
			}
			if !has(name) {
				t.Errorf("clusters %q", e.clusters())
			}
			eventually(t, "it is let go", func() bool { return !has(name) })
			if d := refused("10.96.1.77:15001"); d > testTime/2 {
				t.Errorf("what was let go is refused after %s, not after %s", d, odcdsTimeout)
			}
			if has(name) {
				t.Error("Envoy asked for it again: then it can be let go for good")
			}
			// It becomes somebody's, while a connection waits for it.
			late := endpointService("late", "10.96.1.77", model.Endpoint{Addr: netip.MustParseAddrPort("10.1.0.3:8080"), Identity: identity("api")})
			waiting, err := dialFrom("10.1.0.2", "10.96.1.77:15001")
			if err != nil {
				t.Fatal(err)
			}
			defer waiting.Close()
			if err := store.SetService(late); err != nil {
				t.Fatal(err)
			}
			if g, err := bufio.NewReader(waiting).ReadString('\n'); !strings.HasPrefix(g, "10.1.0.3:8080") {
				t.Errorf("the waiting connection got %q, %v", g, err)
			}

			// Connections outlive the service, and the cluster.
			var held []*bufio.ReadWriter
			for _, vip := range []string{"10.96.1.1", "10.96.1.2"} {
				c, err := dialFrom("10.1.0.2", vip+":15001")
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				rw := bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c))
				if g, err := rw.ReadString('\n'); err != nil {
					t.Fatalf("%q %v", g, err)
				}
				held = append(held, rw)
			}
			store.DeleteService("team-a", "api")
			store.DeleteService("team-a", "plain")
			eventually(t, "the services' clusters are let go", func() bool { return !has("vip|10.96.1.1:15001") && !has("vip|10.96.1.2:15001") })
			for _, rw := range held {
				rw.WriteString("still here\n")
				rw.Flush()
				if echo, err := rw.ReadString('\n'); echo != "still here\n" {
					t.Errorf("a held connection: %q %v", echo, err)
				}
			}

			// A pod that dials whatever there is costs no more than so many clusters, and
			// the others of its tenant nothing.
			before := len(e.clusters())
			for i := range 2000 {
				c, err := dialFrom("10.1.0.3", fmt.Sprintf("10.96.%d.%d:15001", 10+i/250, i%250+1))
				if err != nil {
					t.Fatal(err)
				}
				c.Close()
				if i%200 == 0 {
					if got, err := talk("10.1.0.2", "10.96.1.77:15001"); err != nil {
						t.Errorf("after %d dials: %q, %v", i, got, err)
					}
				}
			}
			if n := len(e.clusters()); n > before+50 {
				t.Errorf("%d clusters, %d before", n, before)
			}
			if rs := rejections(); len(rs) > 0 {
				t.Errorf("Envoy refused %+v", rs)
			}
		})
	}
}
