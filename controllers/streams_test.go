package controllers

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// From objects to what proxies get: the mesh over a fake API server, a real store and
// server, and real delta streams.

// serve serves what the cluster's mesh puts into its store to proxies of node n1.
func (c *cluster) serve() *grpc.ClientConn {
	c.t.Helper()
	l := bufconn.Listen(1 << 16)
	g := grpc.NewServer(xds.GRPCOptions()...)
	xds.NewServer(c.store, xds.ServerOptions{Logger: slog.New(slog.DiscardHandler), Authorize: func(ctx context.Context) (xds.StreamIdentity, error) {
		tenant, generation, err := xds.ParseStreamMetadata(ctx)
		return xds.StreamIdentity{Node: "n1", Tenant: tenant, Generation: generation}, err
	}}).Register(g)
	go g.Serve(l)
	c.t.Cleanup(g.Stop)
	cc, err := grpc.NewClient("passthrough:operator", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { cc.Close() })
	return cc
}

// proxy is one that acknowledges all that it gets.
type proxy struct {
	t      *testing.T
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

	mu        sync.Mutex                       // also of Send
	has       map[string]*discoveryv3.Resource // by type and name
	responses int
	fences    int // of these
	err       error
}

func openProxy(t *testing.T, cc *grpc.ClientConn, tenant model.Tenant) *proxy {
	t.Helper()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), xds.MetadataTenant, tenant.String(), xds.MetadataGeneration, "0"))
	t.Cleanup(cancel)
	s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, stream: s, has: map[string]*discoveryv3.Resource{}}
	go func() {
		for {
			r, err := s.Recv()
			p.mu.Lock()
			if err == nil {
				p.responses++
				for _, x := range r.Resources {
					p.has[r.TypeUrl+" "+x.Name] = x
				}
				for _, name := range r.RemovedResources {
					p.has[r.TypeUrl+" "+name] = nil
				}
				err = s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
			}
			p.err = err
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return p
}

func (p *proxy) subscribe(typeURL string, names ...string) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names}); err != nil {
		p.t.Fatal(err)
	}
}

// until waits until what the proxy has of a name is as it should be.
func (p *proxy) until(what, typeURL, name string, ok func(value []byte) bool) {
	p.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		r, err := p.has[typeURL+" "+name], p.err
		p.mu.Unlock()
		if r != nil && ok(r.Resource.GetValue()) {
			return
		}
		if err != nil || time.Now().After(end) {
			p.t.Fatalf("it never came true that %s; %s is %q, %v", what, name, r.GetResource().GetValue(), err)
		}
	}
}

func (p *proxy) untilHas(typeURL, name, text string) {
	p.t.Helper()
	p.until(text+" is there", typeURL, name, func(v []byte) bool { return bytes.Contains(v, []byte(text)) })
}

func (p *proxy) resource(typeURL, name string) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.has[typeURL+" "+name].GetResource().GetValue()
}

// seen counts the responses so far. What was sent before is among them: an answer
// that comes after it is waited for.
func (p *proxy) seen() int {
	p.t.Helper()
	p.subscribe(xds.TypeEndpoints, fence)
	p.until("the fence is answered", xds.TypeEndpoints, fence, func([]byte) bool { return true })
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.has, xds.TypeEndpoints+" "+fence)
	p.fences++
	return p.responses - p.fences
}

// A name without endpoints: when it is asked for again, it is sent again, after
// all that has been gathered before.
const fence = "vip|[fdff::1]:1"

func identityOf(namespace, account string) string {
	return "spiffe://td/ns/" + namespace + "/sa/" + account
}

func sliceOf(es *discoveryv1.EndpointSlice, uid string) *discoveryv1.EndpointSlice {
	for i := range es.Endpoints {
		es.Endpoints[i].TargetRef = &corev1.ObjectReference{Kind: "Pod", UID: types.UID(uid)}
	}
	return es
}

func in[T client.Object](namespace string, o T) T {
	o.SetNamespace(namespace)
	return o
}

// An operator whose cache is behind serves what was, or refuses; never somebody
// else. It comes to the right state when the cache does, in whatever order, and who
// doesn't use what changed gets nothing.
func TestStaleCache(t *testing.T) {
	http := corev1.ServicePort{Name: "http", Port: 80}
	httpOf := discoveryv1.EndpointPort{Name: new("http"), Port: new(int32(8080))}
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNamespace("b", "mesh"), newNode("n1", "10.0.1.0/24"), newNode("n2", "10.0.2.0/24"),
		newPod("client", "n1", "10.0.1.10"), newPod("old", "n2", "10.0.2.1"), in("b", newPod("steady", "n1", "10.0.1.20")),
		newService("shop", "10.96.0.1", http), sliceOf(newSlice("shop", httpOf, "10.0.2.1"), "uid-old"),
		newService("fresh", "10.96.0.3", http),
		in("b", newService("steady", "10.96.0.9", http)), in("b", newSlice("steady", httpOf, "10.0.1.20")))
	cc := c.serve()
	a, b := openProxy(t, cc, model.NamespaceTenant("a")), openProxy(t, cc, model.NamespaceTenant("b"))
	const shop, moved, fresh, steady, pod = "vip|10.96.0.1:80", "vip|10.96.0.2:80", "vip|10.96.0.3:80", "vip|10.96.0.9:80", "pod|10.0.2.1"
	a.subscribe(xds.TypeCluster, shop, moved, fresh, pod)
	a.subscribe(xds.TypeEndpoints, shop, moved, fresh)
	a.untilHas(xds.TypeCluster, pod, identityOf("a", "sa-old"))
	a.untilHas(xds.TypeEndpoints, shop, identityOf("a", "sa-old"))
	b.subscribe(xds.TypeCluster, steady, "pod|10.0.1.20")
	b.subscribe(xds.TypeEndpoints, steady)
	b.subscribe(xds.TypeListener, "*")
	b.untilHas(xds.TypeEndpoints, steady, identityOf("b", "sa-steady"))
	b.untilHas(xds.TypeListener, "inbound", identityOf("b", "sa-steady"))
	before := b.seen()
	sync := func(keys ...string) {
		t.Helper()
		for _, key := range keys {
			namespace, name, _ := strings.Cut(key, "/")
			if err := c.syncService(t.Context(), types.NamespacedName{Namespace: namespace, Name: name}); err != nil {
				t.Fatal(err)
			}
		}
		c.drain()
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	// The old pod is gone and a new one has its address. Only the agent of its node and
	// the EndpointSlices say so yet.
	heir := newPod("heir", "n2")
	if err := c.Announce("n2", heir, addrs("10.0.2.1")); err == nil || !strings.Contains(err.Error(), "held by the live pod a/old") {
		t.Errorf("an address that the old pod still has, as far as is known: %v", err)
	}
	must(c.Create(t.Context(), sliceOf(newSlice("fresh", httpOf, "10.0.2.1"), "uid-heir")))
	sync("a/fresh")
	a.untilHas(xds.TypeEndpoints, fresh, identityOf("a", "sa-old")) // refused by the heir, which isn't it
	if r := a.resource(xds.TypeCluster, pod); !bytes.Contains(r, []byte(identityOf("a", "sa-old"))) || bytes.Contains(r, []byte("sa-heir")) {
		t.Errorf("%s is %q", pod, r)
	}
	// The cache comes, the new pod before the old one's end.
	heir = newPod("heir", "n2", "10.0.2.1")
	must(c.Create(t.Context(), heir))
	c.syncPodNamed("heir")
	must(c.Delete(t.Context(), newPod("old", "n2")))
	c.syncPodNamed("old")
	a.untilHas(xds.TypeCluster, pod, identityOf("a", "sa-heir"))
	a.untilHas(xds.TypeEndpoints, fresh, identityOf("a", "sa-heir"))
	must(c.Announce("n2", heir, addrs("10.0.2.1")))

	// A Service was deleted and made again with another address, and somebody else's has
	// the former one. First its EndpointSlices come.
	es := sliceOf(newSlice("shop", httpOf, "10.0.2.2"), "uid-next")
	must(c.Create(t.Context(), newPod("next", "n2", "10.0.2.2")))
	c.syncPodNamed("next")
	must(c.Delete(t.Context(), newSlice("shop", httpOf)))
	must(c.Create(t.Context(), es))
	sync("a/shop")
	a.untilHas(xds.TypeEndpoints, shop, identityOf("a", "sa-next"))
	must(c.Delete(t.Context(), newService("shop", "10.96.0.1", http)))
	again := newService("shop", "10.96.0.2", http)
	again.UID = "uid-again"
	must(c.Create(t.Context(), again))
	must(c.Create(t.Context(), newService("other", "10.96.0.1", http)))
	must(c.Create(t.Context(), sliceOf(newSlice("other", httpOf, "10.0.1.10"), "uid-client")))
	sync("a/other", "a/shop") // whose address it is now before whose it was
	a.untilHas(xds.TypeEndpoints, moved, identityOf("a", "sa-next"))
	a.untilHas(xds.TypeEndpoints, shop, identityOf("a", "sa-client"))
	// What comes late changes nothing any more.
	done := a.seen()
	sync("a/shop", "a/other", "a/fresh")
	c.syncPodNamed("old")
	if n := a.seen(); n != done {
		t.Errorf("%d responses for what had happened already", n-done)
	}
	if n := b.seen(); n != before {
		t.Errorf("a stream that uses none of it got %d responses", n-before)
	}
}

// A service whose EndpointSlices change a thousand times a second reaches its
// subscribers gathered, and nobody else.
func TestUpdateFlood(t *testing.T) {
	const many = 3000
	http := corev1.ServicePort{Name: "http", Port: 80}
	httpOf := discoveryv1.EndpointPort{Name: new("http"), Port: new(int32(8080))}
	flood := newSlice("flood", httpOf, "10.0.2.1")
	steady := in("b", newSlice("steady", httpOf, "10.0.1.20"))
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNamespace("b", "mesh"), newNode("n1", "10.0.1.0/24"), newNode("n2", "10.0.2.0/24"),
		newPod("client", "n1", "10.0.1.10"), in("b", newPod("steady", "n1", "10.0.1.20")),
		newService("flood", "10.96.0.1", http), flood,
		in("b", newService("steady", "10.96.0.9", http)), steady)
	cc := c.serve()
	a, b := openProxy(t, cc, model.NamespaceTenant("a")), openProxy(t, cc, model.NamespaceTenant("b"))
	a.subscribe(xds.TypeEndpoints, "vip|10.96.0.1:80")
	a.untilHas(xds.TypeEndpoints, "vip|10.96.0.1:80", "10.0.2.1")
	b.subscribe(xds.TypeEndpoints, "vip|10.96.0.9:80")
	b.untilHas(xds.TypeEndpoints, "vip|10.96.0.9:80", "10.0.1.20")
	hadA, hadB := a.seen(), b.seen()
	// The fake API server takes no thousand updates a second; informers do.
	c.reader = interceptor.NewClient(c.WithWatch, interceptor.Funcs{List: func(ctx context.Context, api client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
		var o client.ListOptions
		o.ApplyOptions(opts)
		if es, ok := list.(*discoveryv1.EndpointSliceList); ok && o.Namespace == "a" {
			es.Items = []discoveryv1.EndpointSlice{*flood.DeepCopy()}
			return nil
		}
		return api.List(ctx, list, opts...)
	}})
	changes := 0
	change := func() {
		t.Helper()
		changes++
		flood.Endpoints[0].Addresses[0] = fmt.Sprintf("10.0.2.%d", 1+changes%250)
		if err := c.syncService(t.Context(), serviceOf(flood)); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	changeUntil := func(n int) {
		t.Helper()
		for changes < n {
			time.Sleep(time.Until(began.Add(time.Duration(changes) * time.Millisecond)))
			change()
		}
	}
	changeUntil(many / 2)
	// Meanwhile, who uses another service hears of it as ever.
	steady.Endpoints[0].Addresses[0] = "10.0.1.21"
	if err := c.Update(t.Context(), steady); err != nil {
		t.Fatal(err)
	}
	asked := time.Now()
	if err := c.syncService(t.Context(), serviceOf(steady)); err != nil {
		t.Fatal(err)
	}
	told := make(chan time.Duration, 1)
	go func() {
		b.untilHas(xds.TypeEndpoints, "vip|10.96.0.9:80", "10.0.1.21")
		told <- time.Since(asked)
	}()
	changeUntil(many)
	took := time.Since(began)
	last := flood.Endpoints[0].Addresses[0]
	a.untilHas(xds.TypeEndpoints, "vip|10.96.0.1:80", last)
	pushes := a.seen() - hadA
	t.Logf("%d changes in %s were %d pushes; another service's took %s", changes, took, pushes, <-told)
	// A busy machine may make fewer changes a second than that are a flood.
	if most := int(time.Since(began)/(10*time.Millisecond)) + 2; pushes > most || pushes == 0 {
		t.Errorf("%d pushes; at most %d are 10 ms apart", pushes, most)
	}
	if n := b.seen() - hadB; n != 1 {
		t.Errorf("the other tenant's stream got %d responses for the one change that it uses", n)
	}
}

// The longest names that Kubernetes takes come through whole.
func TestLongestNames(t *testing.T) {
	long := func(c string, n int) string { return strings.Repeat(c, n) }
	namespace, service, backend, port := long("n", 63), long("s", 63), long("b", 63), long("p", 63)
	pod := newPod(long("w", 253), "n1", "10.0.1.1")
	pod.Spec.ServiceAccountName = long("i", 253)
	ns := newNamespace(namespace, "mesh")
	http := corev1.ServicePort{Name: port, Port: 65535, AppProtocol: new("http")}
	httpOf := discoveryv1.EndpointPort{Name: &port, Port: new(int32(8080))}
	route := in(namespace, newHTTPRoute(long("r", 253), service, backend))
	*route.Spec.Rules[0].BackendRefs[0].Port = gatewayv1.PortNumber(65535)
	topology := newTopology("t", "mesh")
	topology.Spec.Rules[0].Isolation = "Pod"
	c := newCluster(t, topology, ns, newNode("n1", "10.0.1.0/24"), in(namespace, pod), route,
		in(namespace, newService(service, "10.96.0.1", http)), in(namespace, newSlice(service, httpOf, "10.0.1.1")),
		in(namespace, newService(backend, "10.96.0.2", http)), in(namespace, newSlice(backend, httpOf, "10.0.1.1")))
	tenant := model.Tenant{Scope: model.ScopePod, Namespace: namespace, Name: pod.Name}
	p := openProxy(t, c.serve(), tenant)
	p.subscribe(xds.TypeListener, "*")
	vip, l7, be := "vip|10.96.0.1:65535", "l7|10.96.0.1:65535", "be|4|"+namespace+"/"+backend+":65535"
	p.subscribe(xds.TypeCluster, vip, "vip|10.96.0.2:65535")
	p.subscribe(xds.TypeEndpoints, vip, "vip|10.96.0.2:65535", be)
	p.subscribe(xds.TypeRoutes, l7)
	id := identityOf(namespace, pod.Spec.ServiceAccountName)
	for _, listener := range []string{"inbound", "outbound"} {
		p.untilHas(xds.TypeListener, listener, id)
	}
	p.untilHas(xds.TypeEndpoints, "vip|10.96.0.2:65535", id)
	p.untilHas(xds.TypeEndpoints, be, id)
	p.untilHas(xds.TypeRoutes, l7, be)
	if accepted, resolved := said(t, c, namespace, route.Name); accepted != "Accepted" || resolved != "ResolvedRefs" {
		t.Errorf("the route is told %q, %q", accepted, resolved)
	}
	spec := c.plan1(c.writer())
	if len(spec.Tenants) != 1 || spec.Tenants[0].Name != tenant.String() {
		t.Errorf("planned %+v", spec.Tenants)
	}
}
