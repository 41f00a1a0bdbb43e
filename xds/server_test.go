package xds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"

	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	vipName  = "vip|10.96.0.10:80"
	vip6Name = "vip|[fd00:96::10]:80"
)

var staticNames = []string{clusterHBONE, clusterFormerHBONE, clusterDeliver, clusterDeliverNode, clusterDeliverHTTP, clusterPassthrough}

func TestWildcards(t *testing.T) {
	c := newMesh(t, ServerOptions{}).dial(teamA)
	c.subscribe(TypeCluster)
	c.wantAll(TypeCluster, staticNames...)
	c.subscribe(TypeListener, "*")
	c.wantAll(TypeListener, listenerNames...)
	c.settled()
}

func TestOnDemand(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	c := m.dial(teamA)
	c.subscribe(TypeCluster, vipName)
	c.want(TypeCluster, vipName)
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
	c.settled()

	// Asked for again, it is sent again; given back, no more.
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
	c.unsubscribe(TypeEndpoints, vipName)
	c.settled()
	m.must(m.store.SetService(withEndpoint(testService, "10.1.0.77:8080")))
	c.settled()
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
}

func withEndpoint(s model.Service, addr string) model.Service {
	s.Ports = slices.Clone(s.Ports)
	s.Ports[0].Endpoints = append(slices.Clone(s.Ports[0].Endpoints), model.Endpoint{Addr: netip.MustParseAddrPort(addr), Identity: identity("api")})
	return s
}

// A pod that isn't known is refused, and reached as soon as it is.
func TestUnknownPodBecomesKnown(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	c := m.dial(teamA)
	clusterOf := func(r *discoveryv3.DeltaDiscoveryResponse) *clusterv3.Cluster {
		cl := &clusterv3.Cluster{}
		m.must(r.Resources[0].Resource.UnmarshalTo(cl))
		return cl
	}
	name := "pod|10.1.0.50"
	c.subscribe(TypeCluster, name)
	if cl := clusterOf(c.want(TypeCluster, name)); len(cl.LoadAssignment.Endpoints) > 0 {
		t.Fatalf("an unknown pod has endpoints: %v", cl)
	}

	// In plain text first, then of the mesh, which nothing may make plain again.
	m.must(m.store.SetWorkload(plainWorkload("first", "10.1.0.50")))
	if cl := clusterOf(c.want(TypeCluster, name)); cl.TransportSocket.Name == tlsSocket {
		t.Fatalf("a pod outside of the mesh is reached over TLS: %v", cl)
	}
	w := workload("new-0", "new", "10.1.0.50", "fd00:1::50")
	m.must(m.store.SetWorkload(w))
	if cl := clusterOf(c.want(TypeCluster, name)); cl.TransportSocket.Name != tlsSocket {
		t.Fatalf("a pod of the mesh isn't reached over TLS: %v", cl)
	}
	m.must(m.store.SetWorkload(plainWorkload("second", "10.1.0.50")))
	c.settled()
	m.store.DeleteWorkload("uid-first")
	m.store.DeleteWorkload("uid-second")
	c.settled()

	m.store.DeleteWorkload(w.UID)
	if cl := clusterOf(c.want(TypeCluster, name)); len(cl.LoadAssignment.Endpoints) > 0 {
		t.Fatalf("a pod that is gone has endpoints: %v", cl)
	}
}

// What changes goes to those who hold it, once, and costs nobody else anything.
func TestChangeReachesHoldersOnly(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	other := model.Service{Namespace: "team-b", Name: "other", VIPs: addrs("10.96.0.20"), Ports: []model.ServicePort{{Port: 80}}}
	m.must(m.store.SetService(other))
	holder, stranger := m.dial(teamA), m.dial(teamB)
	holder.subscribe(TypeEndpoints, vipName)
	holder.want(TypeEndpoints, vipName)
	stranger.subscribe(TypeEndpoints, "vip|10.96.0.20:80")
	stranger.want(TypeEndpoints, "vip|10.96.0.20:80")
	stranger.subscribe(TypeListener)
	stranger.wantAll(TypeListener, listenerNames...)

	builds := m.builds()
	for i := range 50 {
		m.must(m.store.SetService(withEndpoint(testService, fmt.Sprintf("10.1.0.77:%d", 8000+i))))
		holder.want(TypeEndpoints, vipName) // each waited for, so none is gathered
	}
	m.must(m.store.SetService(withEndpoint(testService, "10.1.0.77:8049"))) // nothing new
	holder.settled()
	stranger.settled()
	if got := m.builds() - builds; got != 50+2 {
		t.Errorf("50 changes of a service that one proxy holds, and 2 fences, took %d builds", got)
	}

	// A pod of team-a changes listeners of team-a only.
	p := testProxy
	p.Workloads = p.Workloads[:2]
	m.must(m.store.SetProxy(p))
	stranger.settled()
	holder.settled() // no listeners asked for
}

func (m *mesh) builds() uint64 {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	return m.store.builds
}

// An address that moves to another service brings that one's endpoints.
func TestAddressMoves(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	c := m.dial(teamA)
	c.subscribe(TypeEndpoints, vipName, vip6Name)
	before := c.wantAll(TypeEndpoints, vipName, vip6Name)
	heir := withEndpoint(testService, "10.1.0.99:8080")
	heir.Name, heir.VIPs = "heir", addrs("10.96.0.10")
	m.must(m.store.SetService(heir))
	if r := c.want(TypeEndpoints, vipName); r.Resources[0].Version == before[vipName].Resources[0].Version {
		t.Error("the endpoints are still the former service's")
	}
	// The former one goes: its other address has no endpoints, this one keeps its own.
	m.store.DeleteService(testService.Namespace, testService.Name)
	c.want(TypeEndpoints, vip6Name)
	c.settled()
}

// A stream that comes back says what it has and gets the rest.
func TestResubscription(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	c := m.dial(teamA)
	c.subscribe(TypeCluster)
	have := versions(c.wantAll(TypeCluster, staticNames...))
	c.subscribe(TypeCluster, vipName, "pod|10.1.0.3")
	maps.Copy(have, versions(c.wantAll(TypeCluster, vipName, "pod|10.1.0.3")))
	c.subscribe(TypeListener)
	listeners := versions(c.wantAll(TypeListener, listenerNames...))
	c.cancel()

	m.must(m.store.SetWorkload(testProxy.Workloads[1])) // pod|10.1.0.3
	have[clusterDeliver] = "from another release"
	have["gone"] = "since this release"
	c = m.dial(teamA)
	c.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: TypeCluster, ResourceNamesSubscribe: []string{"*", vipName, "pod|10.1.0.3"}, InitialResourceVersions: have,
	})
	if r := c.next(); !slices.Equal(r.RemovedResources, []string{"gone"}) {
		t.Fatalf("got %v; want the removal of what is no more", r)
	}
	c.wantAll(TypeCluster, clusterDeliver, "pod|10.1.0.3")
	// Having come back with the newest is as good as having acknowledged it, for those who
	// wait already, and also when it refuses the next.
	ctx, cancel := context.WithTimeout(context.Background(), testTime)
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- m.server.WaitServed(ctx, testProxy.Key(), "uid-web-0") }()
	eventually(t, "it is waited for", func() bool {
		m.store.mu.Lock()
		defer m.store.mu.Unlock()
		return m.store.proxies[testProxy.Key()].waiting != nil
	})
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeListener, InitialResourceVersions: listeners})
	m.must(<-served)
	c.want(TypeListener) // nothing changed, but there must be an answer
	c.settled()
	p := testProxy
	p.Workloads = append(slices.Clone(p.Workloads), workload("web-2", "web", "10.1.0.4"))
	m.must(m.store.SetProxy(p))
	c.nack(c.next(), "no")
	c.nack(c.next(), "no")
	c.settled()
	m.must(m.server.WaitServed(ctx, testProxy.Key(), "uid-web-0"))
}

func versions(rs map[string]*discoveryv3.DeltaDiscoveryResponse) map[string]string {
	out := map[string]string{}
	for name, r := range rs {
		out[name] = r.Resources[0].Version
	}
	return out
}

// A refusal is told of the object behind the resource, leaves everything else as it
// is, and the next content is tried again.
func TestRejection(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	c := m.dial(teamA)
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
	m.must(m.store.SetService(withEndpoint(testService, "10.1.0.77:1")))
	c.nack(c.next(), "bad endpoint")
	got := <-m.rejections
	want := Rejection{Proxy: testProxy.Key(), Type: TypeEndpoints, Resource: vipName, Source: Source{"Service", "team-a", "api"}, Message: "bad endpoint"}
	if got != want {
		t.Fatalf("got %+v; want %+v", got, want)
	}
	c.settled() // what was refused isn't sent again and again
	m.must(m.store.SetService(testService))
	c.want(TypeEndpoints, vipName)

	// An object that fails validation never gets as far, and the former one stays.
	bad := withEndpoint(testService, "10.1.0.77:2")
	bad.Ports[0].Endpoints[0].Identity.ServiceAccount = "x/../y"
	var oe *ObjectError
	if err := m.store.SetService(bad); !errors.As(err, &oe) || oe.Source != want.Source {
		t.Errorf("a service with a wrong identity: %v", err)
	}
	c.settled()
}

func TestWaitServed(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	key := testProxy.Key()
	waiting := func(uid string) chan error {
		done := make(chan error, 1)
		ctx, cancel := context.WithTimeout(context.Background(), testTime)
		t.Cleanup(cancel)
		go func() { done <- m.server.WaitServed(ctx, key, uid) }()
		return done
	}
	missing := func(about string, uid string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		if err := m.server.WaitServed(ctx, key, uid); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), about) {
			t.Fatalf("got %v; want that %q", err, about)
		}
	}
	missing("isn't connected", "uid-web-0")
	missing("isn't among the workloads", "uid-nobody")

	stable, canary := m.dial(teamA), m.open(teamA, "1")
	go canary.read()
	for _, c := range []*client{stable, canary} {
		c.subscribe(TypeListener)
	}
	stable.wantAll(TypeListener, listenerNames...)
	eventually(t, "both streams are attached", func() bool {
		m.store.mu.Lock()
		defer m.store.mu.Unlock()
		return len(m.store.proxies[key].streams) == 2
	})
	missing("hasn't acknowledged", "uid-web-0") // the canary hasn't
	canary.wantAll(TypeListener, listenerNames...)
	m.must(<-waiting("uid-web-0"))

	// A new pod: served once both have acknowledged both listeners that changed.
	p := testProxy
	p.Workloads = append(slices.Clone(p.Workloads), workload("web-2", "web", "10.1.0.4"))
	m.must(m.store.SetProxy(p))
	done := waiting("uid-web-2")
	stable.wantAll(TypeListener, listenerInbound, listenerOutbound)
	canary.want(TypeListener, listenerInbound)
	outbound := canary.next()
	canary.settled() // the server has taken in the first answer
	missing("hasn't acknowledged the listener outbound", "uid-web-2")
	select {
	case err := <-done:
		t.Fatalf("WaitServed returned before the proxy acknowledged: %v", err)
	default:
	}
	canary.nack(outbound, "no more memory")
	eventually(t, "the refusal is taken in", func() bool { return len(m.rejections) == 1 })
	missing("no more memory", "uid-web-2")
	missing("no more memory", "uid-web-2")

	// Two pods with one address and different identities are both not served.
	p.Workloads = append(slices.Clone(p.Workloads), workload("thief", "api", "10.1.0.4"))
	if err := m.store.SetProxy(p); err == nil {
		t.Error("no error about two identities with one address")
	}
	stable.wantAll(TypeListener, listenerInbound, listenerOutbound)
	canary.wantAll(TypeListener, listenerInbound, listenerOutbound)
	missing("isn't among the workloads", "uid-web-2")
	missing("isn't among the workloads", "uid-thief")

	p.Workloads = p.Workloads[:len(p.Workloads)-1]
	m.must(m.store.SetProxy(p))
	stable.wantAll(TypeListener, listenerInbound, listenerOutbound)
	canary.wantAll(TypeListener, listenerInbound, listenerOutbound)
	m.must(<-done)
}

// A proxy that answers more slowly than pods come and go still serves what it
// acknowledged.
func TestWaitServedWhileListenersChange(t *testing.T) {
	m := newMesh(t, ServerOptions{Coalesce: time.Millisecond})
	c := m.dial(teamA)
	c.subscribe(TypeListener)
	c.wantAll(TypeListener, listenerNames...)
	var late []*discoveryv3.DeltaDiscoveryResponse
	for i := range 3 {
		p := testProxy
		p.Workloads = append(slices.Clone(p.Workloads), workload("new", "web", "10.1.0.4"), workload("churn", "web", fmt.Sprintf("10.1.1.%d", i+1)))
		m.must(m.store.SetProxy(p))
		late = append(late, c.next(), c.next())
	}
	c.ack(late[0])
	c.ack(late[1])
	ctx, cancel := context.WithTimeout(context.Background(), testTime)
	defer cancel()
	m.must(m.server.WaitServed(ctx, testProxy.Key(), "uid-new"))
}

func TestStreamEnds(t *testing.T) {
	m := newMesh(t, ServerOptions{ProxyWait: time.Millisecond})
	c := m.dial(teamA)
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
	again := m.dial(teamA)
	c.wantEnd(codes.Unavailable, "took its place")
	other := m.dial(teamB)
	other.settled()
	m.server.Disconnect(func(id StreamIdentity) bool { return id.Tenant == teamA })
	again.wantEnd(codes.Unavailable, "authorise again")
	other.settled()
	other.cancel()

	c = m.dial(teamA)
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
	m.store.DeleteProxy(testProxy.Key())
	c.wantEnd(codes.Unavailable, "no pods on this node")
	m.dial(teamA).wantEnd(codes.Unavailable, "isn't known here")
	m.forgotten()
}

// A stream that is authorised while others are disconnected may rest on what is no
// longer so.
func TestDisconnectWhileAuthorizing(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	authorize := m.server.opts.Authorize
	m.server.opts.Authorize = func(ctx context.Context) (StreamIdentity, error) {
		m.server.Disconnect(func(StreamIdentity) bool { return false })
		return authorize(ctx)
	}
	m.dial(teamA).wantEnd(codes.Unavailable, "authorise again")
}

// forgotten waits until no stream is left and with them all that they held.
func (m *mesh) forgotten() {
	m.t.Helper()
	eventually(m.t, "nothing is kept of streams that ended", func() bool {
		m.server.mu.Lock()
		streams := len(m.server.streams)
		m.server.mu.Unlock()
		m.store.mu.Lock()
		defer m.store.mu.Unlock()
		for _, p := range m.store.proxies {
			streams += len(p.streams)
		}
		return streams == 0 && len(m.store.shared) == 0 && len(m.store.reading) == 0
	})
}

func TestUnsyncedStoreServesNothing(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	m.store.mu.Lock()
	m.store.synced = false
	m.store.mu.Unlock()
	c := m.dial(teamA)
	c.subscribe(TypeEndpoints, vipName)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	select {
	case r := <-c.responses:
		t.Fatalf("got %v before the store was synced", r)
	case <-ctx.Done():
	}
	m.store.MarkSynced()
	c.want(TypeEndpoints, vipName)
}
