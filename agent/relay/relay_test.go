package relay

import (
	"context"
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

const testTime = time.Minute

// soon is when last good is served where a test is about that.
const soon = 200 * time.Millisecond

// operator is a delta ADS server whose every message the test writes and reads.
type operator struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	t       *testing.T
	addr    string
	server  *grpc.Server
	streams chan *operatorStream
}

type operatorStream struct {
	md       metadata.MD
	requests chan *discovery.DeltaDiscoveryRequest
	st       discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	end      chan error
	gone     chan struct{} // closed when the relay has ended the stream
}

func startOperator(t *testing.T, addr string) *operator {
	t.Helper()
	o := &operator{t: t, streams: make(chan *operatorStream, 16)}
	var l net.Listener
	eventually(t, "bind "+addr, func() bool {
		var err error
		l, err = net.Listen("tcp", addr)
		return err == nil
	})
	o.addr, o.server = l.Addr().String(), grpc.NewServer(xds.GRPCOptions()...)
	discovery.RegisterAggregatedDiscoveryServiceServer(o.server, o)
	go o.server.Serve(l)
	t.Cleanup(o.server.Stop)
	return o
}

func (o *operator) DeltaAggregatedResources(st discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	md, _ := metadata.FromIncomingContext(st.Context())
	s := &operatorStream{md: md, st: st, requests: make(chan *discovery.DeltaDiscoveryRequest, 1024), end: make(chan error, 1), gone: make(chan struct{})}
	o.streams <- s
	go func() {
		for {
			r, err := st.Recv()
			if err != nil {
				close(s.gone)
				s.end <- err
				return
			}
			s.requests <- r
		}
	}()
	return <-s.end
}

func (o *operator) stream() *operatorStream {
	return receive(o.t, "a stream from the relay", o.streams)
}

// await reads requests until one asks for name; "" is the implicit wildcard.
func (s *operatorStream) await(t *testing.T, typeURL, name string) {
	t.Helper()
	for {
		r := receive(t, "request for "+name, s.requests)
		if r.TypeUrl == typeURL && (name == "" || slices.Contains(r.ResourceNamesSubscribe, name)) {
			return
		}
	}
}

func (s *operatorStream) send(t *testing.T, nonce string, rs ...*discovery.Resource) {
	t.Helper()
	if err := s.st.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: rs[0].Resource.TypeUrl, Nonce: nonce, Resources: rs}); err != nil {
		t.Fatal(err)
	}
}

func receive[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(testTime):
		t.Fatalf("no %s within %s", what, testTime)
		panic("unreachable")
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(testTime); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", testTime, what)
		}
	}
}

// proxy is the Envoy's side of a stream.
type proxy struct {
	t         *testing.T
	st        discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	responses chan *discovery.DeltaDiscoveryResponse
	err       chan error
}

func connect(t *testing.T, path string) *proxy {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	st, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, st: st, responses: make(chan *discovery.DeltaDiscoveryResponse), err: make(chan error, 1)}
	go func() {
		for {
			r, err := st.Recv()
			if err != nil {
				p.err <- err
				return
			}
			select {
			case p.responses <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	return p
}

func (p *proxy) send(r *discovery.DeltaDiscoveryRequest) {
	p.t.Helper()
	if err := p.st.Send(r); err != nil {
		p.t.Fatal(err)
	}
}

func (p *proxy) subscribe(typeURL string, names ...string) {
	p.t.Helper()
	p.send(&discovery.DeltaDiscoveryRequest{Node: envoyNode, TypeUrl: typeURL, ResourceNamesSubscribe: names})
}

// next returns the next response, which it acknowledges.
func (p *proxy) next() *discovery.DeltaDiscoveryResponse {
	p.t.Helper()
	r := receive(p.t, "response", p.responses)
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
	return r
}

var envoyNode = &core.Node{
	Id: "who-i-say-i-am", Cluster: "x", UserAgentName: "evil\nname",
	UserAgentVersionType: &core.Node_UserAgentBuildVersion{UserAgentBuildVersion: &core.BuildVersion{Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: 40}}},
}

// secrets are what tenants may have, by tenant and name.
type secrets struct {
	mu      sync.Mutex
	version map[string]string
	pending map[string]bool
	signal  chan struct{}
}

func newSecrets() *secrets {
	return &secrets{version: map[string]string{}, pending: map[string]bool{}, signal: make(chan struct{})}
}

func (s *secrets) set(t model.Tenant, name, version string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version[t.String()+" "+name] = version
	close(s.signal)
	s.signal = make(chan struct{})
}

func (s *secrets) Secret(t model.Tenant, name string) (*discovery.Resource, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.version[t.String()+" "+name]
	if v == "" {
		return nil, !s.pending[name]
	}
	return &discovery.Resource{Name: name, Version: v, Resource: &anypb.Any{TypeUrl: TypeSecret, Value: []byte(v)}}, false
}

func (s *secrets) Changed(model.Tenant) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.signal
}

type fixture struct {
	t       *testing.T
	op      *operator
	relay   *Relay
	secrets *secrets
	dir     string
}

var teamA, teamB = model.NamespaceTenant("team-a"), model.NamespaceTenant("team-b")

func setUp(t *testing.T, change func(*Options)) *fixture {
	f := &fixture{t: t, op: startOperator(t, "127.0.0.1:0"), secrets: newSecrets(), dir: t.TempDir()}
	f.relay = f.start(change)
	return f
}

func (f *fixture) start(change func(*Options)) *Relay {
	conn, err := grpc.NewClient(f.op.addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.2, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: time.Second}))
	if err != nil {
		f.t.Fatal(err)
	}
	o := Options{Operator: conn, Secrets: f.secrets, Patience: testTime, Backoff: Backoff{Min: 5 * time.Millisecond, Max: 20 * time.Millisecond}}
	if change != nil {
		change(&o)
	}
	r := New(o)
	f.t.Cleanup(func() { r.Shutdown(); conn.Close() })
	return r
}

func (f *fixture) proxy(tenant model.Tenant) *proxy {
	f.t.Helper()
	return f.proxyOf(Key{Tenant: tenant})
}

func (f *fixture) socket(key Key) string {
	h := fnv.New32a() // tenants' names are longer than sockets' may be
	fmt.Fprint(h, key)
	return filepath.Join(f.dir, fmt.Sprintf("%08x.sock", h.Sum32()))
}

func (f *fixture) proxyOf(key Key) *proxy {
	f.t.Helper()
	return connect(f.t, f.listen(key))
}

// listen makes the proxy's socket.
func (f *fixture) listen(key Key) (path string) {
	f.t.Helper()
	path = f.socket(key)
	if err := f.relay.Listen(key, Socket{Path: path, UID: uint32(os.Getuid()), Version: "1.40.0"}); err != nil {
		f.t.Fatal(err)
	}
	return path
}

// dial connects to the proxy's socket.
func (f *fixture) dial(key Key) *grpc.ClientConn {
	f.t.Helper()
	conn, err := grpc.NewClient("unix:"+f.listen(key), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { conn.Close() })
	return conn
}

// settled: the relay, who answers this itself, has handled all that the proxy of team A sent.
func (f *fixture) settled(p *proxy) {
	f.secrets.set(teamA, "fence", "1")
	p.subscribe(TypeSecret, "fence")
	wantNames(f.t, p.next(), "fence@1")
}

func resource(typeURL, name, version string) *discovery.Resource {
	return &discovery.Resource{Name: name, Version: version, Resource: &anypb.Any{TypeUrl: typeURL, Value: []byte(name + version)}}
}

func names(r *discovery.DeltaDiscoveryResponse) []string {
	var out []string
	for _, x := range r.Resources {
		out = append(out, x.Name+"@"+x.Version)
	}
	return out
}

func wantNames(t *testing.T, r *discovery.DeltaDiscoveryResponse, want ...string) {
	t.Helper()
	if got := names(r); !slices.Equal(got, want) {
		t.Errorf("response has %v, want %v", got, want)
	}
}

func TestRelayForwards(t *testing.T) {
	f := setUp(t, nil)
	p := f.proxy(teamA)
	p.subscribe(TypeListener)
	up := f.op.stream()
	if got := up.md.Get(MetadataTenant); !slices.Equal(got, []string{"team-a"}) {
		t.Errorf("tenant in metadata: %v", got)
	}
	r := receive(t, "request", up.requests)
	if r.TypeUrl != TypeListener || len(r.ResourceNamesSubscribe) != 0 {
		t.Errorf("first request: %v", r)
	}
	if r.Node.GetId() != "team-a/0" || r.Node.GetUserAgentBuildVersion().GetVersion().GetMinorNumber() != 40 || strings.Contains(r.Node.String(), "evil") {
		t.Errorf("node: %v", r.Node)
	}
	up.send(t, "op-1", resource(TypeListener, "outbound", "1"))
	wantNames(t, p.next(), "outbound@1")
	if r := receive(t, "ACK", up.requests); r.ResponseNonce != "op-1" || r.ErrorDetail != nil || r.Node != nil {
		t.Errorf("ACK: %v", r)
	}
	eventually(t, "state", func() bool {
		return reflect.DeepEqual(f.relay.State(Key{Tenant: teamA}), State{Connected: true, Listeners: 1})
	})

	p.subscribe(TypeCluster, wildcard)
	p.subscribe(TypeCluster, "vip|10.0.0.1:80")
	for _, want := range []string{wildcard, "vip|10.0.0.1:80"} {
		r := receive(t, "request", up.requests)
		if r.TypeUrl != TypeCluster || !(slices.Equal(r.ResourceNamesSubscribe, []string{want}) || want == wildcard && len(r.ResourceNamesSubscribe) == 0) {
			t.Errorf("request: %v, want names %q", r, want)
		}
	}
	up.send(t, "op-2", resource(TypeCluster, "deliver", "1"))
	nack := receive(t, "response", p.responses)
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResponseNonce: nack.Nonce, ErrorDetail: &status.Status{Code: 13, Message: "bad\ncluster"}})
	if r := receive(t, "NACK", up.requests); r.ResponseNonce != "op-2" || r.ErrorDetail.GetMessage() != "bad cluster" {
		t.Errorf("NACK: %v", r)
	}
	if s := f.relay.State(Key{Tenant: teamA}); len(s.Rejections) != 1 || s.Rejections[0].String() != "CDS deliver: bad cluster" {
		t.Errorf("state after NACK: %+v", s)
	}
	up.send(t, "op-3", resource(TypeCluster, "deliver", "2"))
	p.next()
	eventually(t, "rejection is over", func() bool { return len(f.relay.State(Key{Tenant: teamA}).Rejections) == 0 })
}

func TestRelaySurvivesOperator(t *testing.T) {
	f := setUp(t, nil)
	p := f.proxy(teamA)
	p.subscribe(TypeCluster)
	up := f.op.stream()
	up.await(t, TypeCluster, "")
	up.send(t, "1", resource(TypeCluster, "deliver", "1"), resource(TypeCluster, "passthrough", "1"))
	p.next()
	p.subscribe(TypeCluster, "vip|a")
	up.await(t, TypeCluster, "vip|a")
	up.send(t, "2", resource(TypeCluster, "vip|a", "7"))
	p.next()
	p.subscribe(TypeEndpoints, "vip|a")
	up.await(t, TypeEndpoints, "vip|a")
	up.send(t, "3", resource(TypeEndpoints, "vip|a", "9"))
	unacked := receive(t, "endpoints", p.responses)

	f.op.server.Stop()
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeEndpoints, ResponseNonce: unacked.Nonce})
	p.subscribe(TypeCluster, "vip|b") // asked for while nobody is there
	f.settled(p)
	f.op = startOperator(t, f.op.addr)

	up = f.op.stream()
	got := map[string]*discovery.DeltaDiscoveryRequest{}
	for range 2 {
		r := receive(t, "request", up.requests)
		got[r.TypeUrl] = r
	}
	c := got[TypeCluster]
	if want := []string{wildcard, "vip|a", "vip|b"}; !slices.Equal(c.GetResourceNamesSubscribe(), want) {
		t.Errorf("clusters resubscribed: %v, want %v", c.GetResourceNamesSubscribe(), want)
	}
	if v := c.GetInitialResourceVersions(); len(v) != 3 || v["deliver"] != "1" || v["vip|a"] != "7" {
		t.Errorf("versions held: %v", v)
	}
	if v := got[TypeEndpoints].GetInitialResourceVersions(); v["vip|a"] != "9" {
		t.Errorf("an ACK of the former stream's response isn't counted: %v", v)
	}
	nodes := 0
	for _, r := range got {
		if r.ResponseNonce != "" {
			t.Errorf("the new operator got the old one's nonce: %v", r)
		}
		if r.Node != nil {
			nodes++
		}
	}
	if nodes != 1 {
		t.Errorf("%d requests carry the node, want the first", nodes)
	}
	up.send(t, "1", resource(TypeCluster, "vip|b", "1"))
	wantNames(t, p.next(), "vip|b@1")
	if r := receive(t, "ACK", up.requests); r.ResponseNonce != "1" {
		t.Errorf("ACK: %v", r)
	}
}

func TestRelayReopensStreamThatOperatorEnds(t *testing.T) {
	f := setUp(t, nil)
	p := f.proxy(teamA)
	p.subscribe(TypeListener)
	for range 3 {
		up := f.op.stream()
		receive(t, "request", up.requests)
		up.end <- grpcstatus.Error(codes.PermissionDenied, "no pod yet")
	}
	up := f.op.stream()
	up.await(t, TypeListener, "")
	up.send(t, "1", resource(TypeListener, "outbound", "1"))
	wantNames(t, p.next(), "outbound@1")
}

func TestRelaySecrets(t *testing.T) {
	const id, other, soon = "spiffe://cluster.local/ns/team-a/sa/web", "spiffe://cluster.local/ns/team-b/sa/db", "spiffe://cluster.local/ns/team-a/sa/soon"
	f := setUp(t, nil)
	f.secrets.set(teamA, id, "1")
	f.secrets.set(teamB, other, "1")
	f.secrets.pending[soon] = true
	p := f.proxy(teamA)
	p.subscribe(TypeSecret, id)
	wantNames(t, p.next(), id+"@1")
	f.secrets.set(teamA, id, "2")
	wantNames(t, p.next(), id+"@2")

	p.subscribe(TypeSecret, other)
	if r := p.next(); len(r.Resources) != 0 || !slices.Equal(r.RemovedResources, []string{other}) {
		t.Errorf("another tenant's secret: %v", r)
	}
	p.subscribe(TypeSecret, soon)
	f.secrets.set(teamA, soon, "1") // the first answer about it, or a removal came before
	wantNames(t, p.next(), soon+"@1")
	f.secrets.set(teamA, id, "")
	if r := p.next(); !slices.Equal(r.RemovedResources, []string{id}) {
		t.Errorf("after the workload left: %v", r)
	}

	p.subscribe(TypeListener)
	up := f.op.stream()
	if r := receive(t, "request", up.requests); r.TypeUrl != TypeListener {
		t.Errorf("the operator was asked for %s", r.TypeUrl)
	}
}

func TestRelayServesLastGood(t *testing.T) {
	good := t.TempDir()
	f := setUp(t, func(o *Options) { o.LastGoodDir = good })
	p := f.proxy(teamA)
	p.subscribe(TypeCluster)
	up := f.op.stream()
	up.await(t, TypeCluster, "")
	up.send(t, "1", resource(TypeCluster, "deliver", "1"), resource(TypeCluster, "passthrough", "1"))
	p.next()
	p.subscribe(TypeCluster, "vip|a")
	up.await(t, TypeCluster, "vip|a")
	up.send(t, "2", resource(TypeCluster, "vip|a", "1"))
	p.next()
	p.subscribe(TypeListener)
	up.await(t, TypeListener, "")
	up.send(t, "3", resource(TypeListener, "outbound", "5"))
	p.next()
	up.send(t, "4", resource(TypeListener, "broken", "1"))
	nack := receive(t, "response", p.responses)
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeListener, ResponseNonce: nack.Nonce, ErrorDetail: &status.Status{Code: 13}})
	eventually(t, "rejection", func() bool { return len(f.relay.State(Key{Tenant: teamA}).Rejections) > 0 })
	f.secrets.set(teamA, "ROOTCA", "top-secret")
	p.subscribe(TypeSecret, "ROOTCA")
	p.next()
	eventually(t, "secret's ACK", func() bool { return f.relay.State(Key{Tenant: teamA}).Listeners == 1 })

	f.op.server.Stop()
	f.relay.Shutdown()
	for _, e := range must(os.ReadDir(good)) {
		info := must(e.Info())
		b := must(os.ReadFile(filepath.Join(good, e.Name())))
		if info.Mode().Perm() != 0o600 || strings.Contains(string(b), "top-secret") || e.Name() != "team-a@1.40.0" {
			t.Errorf("%s: mode %o, %d bytes", e.Name(), info.Mode().Perm(), len(b))
		}
	}

	f.relay = f.start(func(o *Options) { o.LastGoodDir, o.Patience = good, soon })
	p = f.proxy(teamA)
	p.subscribe(TypeCluster)
	wantNames(t, p.next(), "deliver@1", "passthrough@1")
	p.subscribe(TypeListener)
	wantNames(t, p.next(), "outbound@5")
	p.subscribe(TypeCluster, "vip|a")
	wantNames(t, p.next(), "vip|a@1")
	p.subscribe(TypeCluster, "vip|never-seen")
	f.settled(p)

	// The other tenant gets nothing of it.
	q := f.proxy(teamB)
	q.subscribe(TypeCluster)

	f.op = startOperator(t, f.op.addr)
	for range 2 {
		up := f.op.stream()
		r := receive(t, "request", up.requests)
		for r.TypeUrl != TypeCluster {
			r = receive(t, "request", up.requests)
		}
		switch tenant := up.md.Get(MetadataTenant)[0]; tenant {
		case "team-a":
			if v := r.InitialResourceVersions; len(v) != 3 || v["vip|a"] != "1" {
				t.Errorf("last good isn't told to the operator: %v", v)
			}
			up.send(t, "1", resource(TypeCluster, "vip|never-seen", "1"))
			wantNames(t, p.next(), "vip|never-seen@1")
		case "team-b":
			if len(r.InitialResourceVersions) != 0 {
				t.Errorf("team-b holds %v", r.InitialResourceVersions)
			}
		}
	}

	f.relay.Shutdown()
	if err := f.relay.KeepLastGood([]model.Tenant{teamB}); err != nil {
		t.Fatal(err)
	}
	for _, e := range must(os.ReadDir(good)) {
		if !strings.HasPrefix(e.Name(), "team-b@") {
			t.Errorf("%s is left", e.Name())
		}
	}
}

// TestRelayReplacesWhatIsRefused: an Envoy that starts anew and refuses what the
// operator has now gets what its predecessor took; one that has a version keeps it.
func TestRelayReplacesWhatIsRefused(t *testing.T) {
	f := setUp(t, nil)
	p := f.proxy(teamA)
	p.subscribe(TypeCluster, "vip|a", "vip|b")
	up := f.op.stream()
	up.await(t, TypeCluster, "vip|a")
	up.send(t, "1", resource(TypeCluster, "vip|a", "1"))
	p.next()
	nack := func(p *proxy, version string) {
		t.Helper()
		r := receive(t, "response", p.responses)
		wantNames(t, r, "vip|a@"+version)
		p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResponseNonce: r.Nonce, ErrorDetail: &status.Status{Code: 13, Message: "bad"}})
	}
	up.send(t, "2", resource(TypeCluster, "vip|a", "2"))
	nack(p, "2")
	eventually(t, "rejection", func() bool { return len(f.relay.State(Key{Tenant: teamA}).Rejections) > 0 })
	up.send(t, "3", resource(TypeCluster, "vip|b", "1"))
	wantNames(t, p.next(), "vip|b@1") // and nothing before it: it has vip|a

	fresh := connect(t, f.socket(Key{Tenant: teamA}))
	fresh.subscribe(TypeCluster, "vip|a")
	up = f.op.stream()
	up.await(t, TypeCluster, "vip|a")
	up.send(t, "1", resource(TypeCluster, "vip|a", "2"))
	nack(fresh, "2")
	wantNames(t, fresh.next(), "vip|a@1")
	fresh.subscribe(TypeCluster, "vip|c")
	up.await(t, TypeCluster, "vip|c") // so that the ACK has been handled
	if s := f.relay.State(Key{Tenant: teamA}); len(s.Rejections) != 1 {
		t.Errorf("the rejection is told no more: %+v", s)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
