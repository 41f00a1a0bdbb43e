package xds

import (
	"context"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// testTime is how long anything may take; only failing tests wait for it.
const testTime = time.Minute

// mesh is a store with two proxies and a server of it.
type mesh struct {
	t          *testing.T
	store      *Store
	server     *Server
	conn       *bufconn.Listener
	rejections chan Rejection
}

var (
	teamA = model.NamespaceTenant("team-a")
	teamB = model.NamespaceTenant("team-b")
)

// authorizeAll believes what a stream says.
func authorizeAll(ctx context.Context) (StreamIdentity, error) {
	tenant, generation, err := ParseStreamMetadata(ctx)
	return StreamIdentity{Node: "node-1", Tenant: tenant, Generation: generation}, err
}

// newMesh serves testProxy, one of team-b, and testService.
func newMesh(t *testing.T, o ServerOptions) *mesh {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	m := &mesh{t: t, conn: bufconn.Listen(1 << 16), rejections: make(chan Rejection, 1024)}
	m.store = NewStore(StoreOptions{Logger: quiet, OnReject: func(r Rejection) { m.rejections <- r }})
	m.must(m.store.SetNetwork(testNetwork))
	m.must(m.store.SetProxy(testProxy))
	m.must(m.store.SetProxy(model.Proxy{Node: "node-1", Tenant: teamB}))
	m.must(m.store.SetService(testService))
	m.store.MarkSynced()
	o.Logger = quiet
	if o.Authorize == nil {
		o.Authorize = authorizeAll
	}
	m.server = NewServer(m.store, o)
	g := grpc.NewServer(GRPCOptions()...)
	m.server.Register(g)
	go g.Serve(m.conn)
	t.Cleanup(g.Stop)
	return m
}

func (m *mesh) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// client is a proxy that says what the test wants.
type client struct {
	t         *testing.T
	stream    discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	responses chan *discoveryv3.DeltaDiscoveryResponse
	ended     chan error
	cancel    context.CancelFunc
}

func (m *mesh) dial(tenant model.Tenant) *client {
	m.t.Helper()
	c := m.open(tenant, "0")
	go c.read()
	return c
}

// open doesn't read what the server sends.
func (m *mesh) open(tenant model.Tenant, generation string) *client {
	m.t.Helper()
	cc, err := grpc.NewClient("passthrough:mesh", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return m.conn.DialContext(ctx) }))
	m.must(err)
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), MetadataTenant, tenant.String(), MetadataGeneration, generation))
	m.t.Cleanup(func() { cancel(); cc.Close() })
	s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	m.must(err)
	return &client{t: m.t, stream: s, responses: make(chan *discoveryv3.DeltaDiscoveryResponse, 1<<16), ended: make(chan error, 1), cancel: cancel}
}

func (c *client) read() {
	for {
		r, err := c.stream.Recv()
		if err != nil {
			c.ended <- err
			return
		}
		c.responses <- r
	}
}

func (c *client) send(r *discoveryv3.DeltaDiscoveryRequest) {
	c.t.Helper()
	if err := c.stream.Send(r); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

func (c *client) subscribe(typeURL string, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names})
}

func (c *client) unsubscribe(typeURL string, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesUnsubscribe: names})
}

// next is the next response, unanswered.
func (c *client) next() *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	select {
	case r := <-c.responses:
		return r
	case err := <-c.ended:
		c.t.Fatalf("the stream ended: %v", err)
	case <-time.After(testTime):
		c.t.Fatal("no response")
	}
	return nil
}

func (c *client) ack(r *discoveryv3.DeltaDiscoveryResponse) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
}

func (c *client) nack(r *discoveryv3.DeltaDiscoveryResponse, message string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce, ErrorDetail: &status.Status{Code: int32(codes.Internal), Message: message}})
}

// want is the next response, which must be about these names and is acknowledged.
func (c *client) want(typeURL string, names ...string) *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	r := c.next()
	if got := resourceNames(r); r.TypeUrl != typeURL || !slices.Equal(got, names) || len(r.RemovedResources) > 0 {
		c.t.Fatalf("got %s %q, removed %q; want %s %q", shortType(r.TypeUrl), got, r.RemovedResources, shortType(typeURL), names)
	}
	c.ack(r)
	return r
}

func resourceNames(r *discoveryv3.DeltaDiscoveryResponse) (names []string) {
	for _, x := range r.Resources {
		names = append(names, x.Name)
	}
	return names
}

// wantAll collects responses of one resource each until all names came.
func (c *client) wantAll(typeURL string, names ...string) map[string]*discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	got := map[string]*discoveryv3.DeltaDiscoveryResponse{}
	for range names {
		r := c.next()
		if r.TypeUrl != typeURL || len(r.Resources) != 1 || !slices.Contains(names, r.Resources[0].Name) || got[r.Resources[0].Name] != nil {
			c.t.Fatalf("got %s %q, removed %q; want %s out of %q, each once", shortType(r.TypeUrl), resourceNames(r), r.RemovedResources, shortType(typeURL), names)
		}
		got[r.Resources[0].Name] = r
		c.ack(r)
	}
	return got
}

// settled makes sure that nothing more was under way: a fence flushes what is
// gathered, and a second one comes when that has been sent.
func (c *client) settled() {
	c.t.Helper()
	c.subscribe(TypeEndpoints, fenceName)
	c.want(TypeEndpoints, fenceName)
	c.unsubscribe(TypeEndpoints, fenceName)
	c.handled()
}

const fenceName = "vip|[fdff::1]:1" // costs one build

// handled makes sure that all former requests have been taken in, and that nothing
// was sent meanwhile.
func (c *client) handled() {
	c.t.Helper()
	fence := "fence|" + c.t.Name()
	c.subscribe(TypeCluster, fence)
	if r := c.next(); !slices.Equal(r.RemovedResources, []string{fence}) {
		c.t.Fatalf("got %s %q, removed %q; want nothing", shortType(r.TypeUrl), resourceNames(r), r.RemovedResources)
	}
}

func (c *client) wantEnd(code codes.Code, about string) {
	c.t.Helper()
	for {
		select {
		case <-c.responses:
		case err := <-c.ended:
			if grpcstatus.Code(err) != code || !strings.Contains(err.Error(), about) {
				c.t.Fatalf("the stream ended with %v; want %v and %q", err, code, about)
			}
			return
		case <-time.After(testTime):
			c.t.Fatal("the stream doesn't end")
		}
	}
}

// eventually waits for a condition that no response tells of.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(testTime); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came true that %s", what)
		}
	}
}

// stacks are those of all goroutines.
func stacks() string {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}
