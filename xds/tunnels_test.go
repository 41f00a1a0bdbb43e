package xds

import (
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	dnscachev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/dynamic_forward_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Connections to an address that nobody has dialled yet, all at once, share a tunnel:
// one for each source, identity and worker, as later ones do.
func TestFirstConnectionsShareATunnel(t *testing.T) {
	for _, version := range dist.Versions() {
		for _, workers := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s/workers=%d", version, workers), func(t *testing.T) { testFirstConnections(t, version, workers) })
		}
	}
}

func testFirstConnections(t *testing.T, version string, workers int) {
	enterNetns(t)
	store, server, rejections := envoyStore(t)
	e := startEnvoyWith(t, version, workers, server, newAuthority(t))
	const far = "10.1.0.77"
	servePeer(t, e.ca, identity("web").String(), far)
	if err := store.SetService(endpointService("far", "10.96.1.1", model.Endpoint{Addr: netip.MustParseAddrPort(far + ":8080"), Identity: identity("web")})); err != nil {
		t.Fatal(err)
	}
	waitServed(t, store, "uid-web-0")

	// As many as one tunnel takes. All wait for the service's cluster, and then begin
	// together.
	const each = 64
	var wg sync.WaitGroup
	tunnels := make([][each]int64, len(senders))
	for i, s := range senders {
		for j := range each {
			p := newHTTPPod(t, s.source, false)
			wg.Go(func() { tunnels[i][j] = s.ask(t, p, "/first", true).Tunnel })
		}
	}
	wg.Wait()
	users := map[int64]string{}
	for i, s := range senders {
		own := map[int64]bool{}
		for _, tunnel := range tunnels[i] {
			own[tunnel] = true
			if user, ok := users[tunnel]; ok && user != s.source {
				t.Errorf("%s and %s share a tunnel", user, s.source)
			}
			users[tunnel] = s.source
		}
		if len(own) > workers {
			t.Errorf("%d connections of %s at once made %d tunnels; want one for each of %d workers", each, s.source, len(own), workers)
		}
	}
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
}

// Of a process's hosts for tunnels there are so many and no more; connections to those
// that it has go on being taken. They are of all who share the process: what one took, the
// other lacks.
func TestTunnelHostsAreBounded(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			e, ask := farServices(t, version, tunnelAge)
			for _, sender := range []sender{senders[0], senders[2]} {
				for i := range mostHosts + 1 {
					err := ask(newHTTPPod(t, sender.source, false), i)
					if i < mostHosts && err != nil || i == mostHosts && err == nil {
						t.Errorf("endpoint %d, with room for %d: %v", i+1, mostHosts, err)
					}
				}
			}
			if n, refusals := e.tunnelHosts("num_hosts"), e.tunnelHosts("host_overflow"); n != mostHosts || refusals == 0 {
				t.Errorf("%d hosts for tunnels, %d refusals; want %d, and some", n, refusals, mostHosts)
			}
		})
	}
}

// A host for tunnels that nobody has connected to for its time goes, and makes room;
// connections in its tunnels don't notice.
func TestTunnelHostsAreLetGo(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			e, ask := farServices(t, version, 4*time.Second)
			stays := make([]*httpPod, mostHosts)
			for i := range stays {
				stays[i] = newHTTPPod(t, senders[0].source, true)
				if err := ask(stays[i], i); err != nil {
					t.Fatalf("endpoint %d of %d: %v", i+1, mostHosts, err)
				}
			}
			// However long that took: the first may be gone when the last one comes.
			eventually(t, "hosts go", func() bool { return e.tunnelHosts("host_removed") == mostHosts && e.tunnelHosts("num_hosts") == 0 })
			for i, p := range stays {
				if err := ask(p, i); err != nil || p.dials != 1 {
					t.Errorf("a connection whose host went: %v, after %d dials", err, p.dials)
				}
			}
			for _, i := range []int{mostHosts, 0} {
				if err := ask(newHTTPPod(t, senders[0].source, false), i); err != nil {
					t.Errorf("a new connection to endpoint %d after hosts went: %v", i+1, err)
				}
			}
		})
	}
}

// mostHosts is how many hosts for tunnels a process of farServices has room for.
const mostHosts = 3

// farServices runs a process that keeps hosts for tunnels for ttl, and one service more
// than it has room for, each with an endpoint of its own. ask makes a request to the i-th,
// over p's connection if it has one. In the end it looks whether Envoy took everything.
func farServices(t *testing.T, version string, ttl time.Duration) (e *envoy, ask func(p *httpPod, i int) error) {
	t.Helper()
	store, server, rejections := envoyStore(t)
	e = startEnvoyEdited(t, version, 1, server, newAuthority(t), editing(func(c *dnscachev3.DnsCacheConfig) {
		c.MaxHosts, c.HostTtl = wrapperspb.UInt32(mostHosts), durationpb.New(ttl)
		c.DnsRefreshRate, c.DnsMinRefreshRate = durationpb.New(time.Second), durationpb.New(time.Second)
	}))
	t.Cleanup(func() {
		if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
			t.Errorf("Envoy refused something: %+v %v", rs, refused)
		}
	})
	for i := range mostHosts + 1 {
		far := fmt.Sprintf("10.1.0.%d", 80+i)
		servePeer(t, e.ca, identity("web").String(), far)
		if err := store.SetService(endpointService(fmt.Sprint("far-", i), fmt.Sprint("10.96.1.", 10+i),
			model.Endpoint{Addr: netip.MustParseAddrPort(far + ":8080"), Identity: identity("web")})); err != nil {
			t.Fatal(err)
		}
	}
	waitServed(t, store, "uid-web-0")
	return e, func(p *httpPod, i int) error {
		r, err := p.Get(fmt.Sprintf("http://10.96.1.%d:15001/", 10+i))
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if to := fmt.Sprintf("10.1.0.%d", 80+i); r.StatusCode != http.StatusOK || r.Header.Get("X-App") != to {
			return fmt.Errorf("%s from %q, want %s", r.Status, r.Header.Get("X-App"), to)
		}
		return nil
	}
}

// tunnelHosts is a figure of the cache of hosts for tunnels.
func (e *envoy) tunnelHosts(figure string) int {
	return e.count(`^dns_cache\.tunnels\.` + figure + `$`)
}

// editing changes each message of type M in another one, however deep it is packed.
func editing[M proto.Message](edit func(M)) func(proto.Message) error {
	var walk func(proto.Message) error
	walk = func(m proto.Message) (err error) {
		switch m := m.(type) {
		case M:
			edit(m)
			return nil
		case *anypb.Any:
			inner, err := m.UnmarshalNew()
			if err != nil {
				return err
			}
			if err := walk(inner); err != nil {
				return err
			}
			return m.MarshalFrom(inner)
		}
		m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			switch {
			case f.IsMap() || f.Message() == nil:
			case f.IsList():
				for i := range v.List().Len() {
					if err == nil {
						err = walk(v.List().Get(i).Message().Interface())
					}
				}
			default:
				err = walk(v.Message().Interface())
			}
			return err == nil
		})
		return err
	}
	return walk
}
