package xds

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// These are what a tenant's Envoy could send once it is somebody else's.

func TestNamesThatNeverExist(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	c := m.dial(teamA)
	long := strings.Repeat("x", 1<<20)
	for _, names := range [][]string{
		{"", " ", "vip|", "pod|", "vip", "10.96.0.10:80", "secret"},
		{"vip|10.96.0.10", "vip|10.96.0.10:0", "vip|10.96.0.10:080", "vip|10.96.0.10:65536", "vip|10.96.000.10:80", "vip|api:80"},
		{"pod|10.1.0.3:80", "pod|::ffff:10.1.0.3", "pod|fd00:1:0::3", "pod|FD00:1::3", "pod|fe80::1%eth0", "pod|[fd00:1::3]"},
		{"pod|127.0.0.1", "pod|0.0.0.0", "pod|::1", "pod|::", "pod|224.0.0.1", "vip|127.0.0.1:80", "vip|[::ffff:10.96.0.10]:80"},
		{long, "vip|" + long, "pod|" + long},
	} {
		c.subscribe(TypeCluster, names...)
		if r := c.next(); !slices.Equal(r.RemovedResources, names) {
			t.Errorf("got %q for names that never exist", resourceNames(r))
		}
	}
	// Names of one type aren't those of another.
	for typeURL, name := range map[string]string{TypeEndpoints: "pod|10.1.0.3", TypeListener: vipName, TypeCluster: listenerOutbound} {
		c.subscribe(typeURL, name)
		r := c.next()
		for len(r.RemovedResources) == 0 {
			r = c.next() // an only name isn't a wildcard: nothing else may come
			t.Errorf("got %s %q", shortType(r.TypeUrl), resourceNames(r))
		}
	}
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	if n := len(m.store.shared); n > 0 {
		t.Errorf("%d names that never exist are remembered", n)
	}
}

func TestOtherTypesEndTheStream(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	for _, typeURL := range []string{
		"", "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
		"type.googleapis.com/envoy.service.runtime.v3.Runtime", strings.Repeat("x", 1<<20),
	} {
		c := m.dial(teamA)
		c.subscribe(typeURL, "ROOTCA")
		c.wantEnd(codes.InvalidArgument, "isn't served")
	}
	c := m.dial(teamB)
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
}

func TestNameCap(t *testing.T) {
	m := newMesh(t, ServerOptions{MaxNames: 10})
	c := m.dial(teamA)
	var names []string
	for i := range 12 {
		names = append(names, fmt.Sprintf("pod|10.1.9.%d", i+1))
	}
	c.subscribe(TypeCluster, names...)
	got := map[string]bool{}
	for range 11 { // ten of one resource each and, at any time, the two that are too many
		r := c.next()
		for _, n := range resourceNames(r) {
			got[n] = true
		}
		if len(r.RemovedResources) > 0 && !slices.Equal(r.RemovedResources, names[10:]) {
			t.Errorf("refused %q; want %q", r.RemovedResources, names[10:])
		}
		c.ack(r)
	}
	if len(got) != 10 {
		t.Errorf("got %v", got)
	}
	// One given back makes room for another, and types have caps of their own.
	c.unsubscribe(TypeCluster, names[0], names[0], "never held")
	c.subscribe(TypeCluster, names[11])
	c.want(TypeCluster, names[11])
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
	c.settled()
	c.cancel()
	m.forgotten()
}

// One proxy that asks for as many names as it can must not keep others waiting,
// and what it isn't entitled to isn't even looked at.
func TestNameFlood(t *testing.T) {
	m := newMesh(t, ServerOptions{MaxNames: 100, NamesPerSecond: 1})
	flood := m.dial(teamA)
	names := make([]string, 100_000)
	for i := range names {
		names[i] = fmt.Sprintf("vip|10.%d.%d.%d:80", i>>16, i>>8&255, i&255)
	}
	for range 3 {
		flood.subscribe(TypeEndpoints, names...)
	}
	other := m.dial(teamB)
	for i := range 50 {
		name := fmt.Sprintf("vip|10.96.0.10:%d", i+1)
		other.subscribe(TypeEndpoints, name)
		other.want(TypeEndpoints, name)
	}
	m.store.mu.Lock()
	n := len(m.store.shared)
	m.store.mu.Unlock()
	if n > 150 {
		t.Errorf("%d names are held, 150 may be", n)
	}
	flood.cancel()
	other.cancel()
	m.forgotten() // also what waits for its turn ends with the stream
}

// A proxy that never answers gets no more than so many responses, and what is kept
// of it is bounded.
func TestNeverAcknowledging(t *testing.T) {
	m := newMesh(t, ServerOptions{NamesPerSecond: 1e6})
	c := m.dial(teamA)
	var names []string
	for i := range 1000 {
		names = append(names, fmt.Sprintf("pod|10.1.%d.%d", i/250, i%250+1))
	}
	c.subscribe(TypeCluster, names[:600]...)
	var got []*discoveryv3.DeltaDiscoveryResponse
	for range maxUnanswered {
		got = append(got, c.next())
	}
	for i := range 400 { // removals and empty answers don't pile up
		c.subscribe(TypeListener, fmt.Sprintf("never-%d", i))
		if r := c.next(); len(r.RemovedResources) != 1 {
			t.Fatalf("got %v beyond the limit", r)
		}
	}
	if st := m.stream(teamA); len(st.unanswered) != maxUnanswered {
		t.Errorf("%d responses without an answer are remembered", len(st.unanswered))
	}
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResponseNonce: "no such nonce"})
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeEndpoints, ResponseNonce: got[0].Nonce}) // of another type
	c.handled()

	// Once it answers, it gets the rest.
	for range 600 - maxUnanswered {
		c.ack(got[0])
		got = append(got[1:], c.next())
	}
	for _, r := range got {
		c.ack(r)
	}
	c.settled()
}

func (m *mesh) stream(tenant model.Tenant) *stream {
	m.server.mu.Lock()
	defer m.server.mu.Unlock()
	for st := range m.server.streams {
		if st.key.Tenant == tenant {
			return st
		}
	}
	m.t.Fatalf("no stream of %s", tenant)
	return nil
}

// A proxy that doesn't read holds up its stream's sender. The stream can be ended
// all the same, and others notice nothing.
func TestNeverReading(t *testing.T) {
	m := newMesh(t, ServerOptions{NamesPerSecond: 1e6})
	stuck := m.open(teamA, "0")
	var names []string
	for i := range 250 { // more than flow control lets through
		w := workload(fmt.Sprint("pod-", i), "web", fmt.Sprintf("10.1.9.%d", i+1))
		m.must(m.store.SetWorkload(w))
		names = append(names, PodName(w.IPs[0]))
	}
	stuck.subscribe(TypeCluster, names...)
	eventually(t, "the sender is stuck", func() bool {
		buf := stacks()
		return strings.Contains(buf, "(*stream).respond") && strings.Contains(buf, "writeQuota")
	})
	m.must(m.store.SetService(withEndpoint(testService, "10.1.0.77:1")))
	other := m.dial(teamB)
	other.subscribe(TypeEndpoints, vipName)
	other.want(TypeEndpoints, vipName)

	m.store.DeleteProxy(testProxy.Key())
	other.cancel()
	m.forgotten()
	eventually(t, "the sender is gone", func() bool { return !strings.Contains(stacks(), "(*stream).respond") })
}

// Refusals are told at a bounded rate: each is a line in a log and maybe a write to
// the API server.
func TestRejectionFlood(t *testing.T) {
	m := newMesh(t, ServerOptions{NamesPerSecond: 1e6})
	c := m.dial(teamA)
	for range 500 {
		c.subscribe(TypeEndpoints, vipName)
		c.nack(c.next(), strings.Repeat("no", 1<<13))
	}
	c.settled()
	n := len(m.rejections)
	if n == 0 || n > 100 {
		t.Errorf("500 refusals were told %d times", n)
	}
	if r := <-m.rejections; len(r.Message) > 4096 {
		t.Errorf("a message of %d bytes was passed on", len(r.Message))
	}
}

// What a proxy claims to have costs no more than what it may have.
func TestInitialVersionsFlood(t *testing.T) {
	m := newMesh(t, ServerOptions{MaxNames: 10})
	c := m.dial(teamA)
	claims := map[string]string{strings.Repeat("x", 1<<20): "1", vipName: strings.Repeat("x", 1<<20)}
	for i := range 10_000 {
		claims[fmt.Sprint("claim-", i)] = "1"
	}
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeEndpoints, ResourceNamesSubscribe: []string{vipName}, InitialResourceVersions: claims})
	c.want(TypeEndpoints, vipName)
	st := m.stream(teamA)
	st.mu.Lock()
	defer st.mu.Unlock()
	if n := len(st.types[TypeEndpoints].held); n > 20 {
		t.Errorf("%d claims are remembered", n)
	}
}

func TestStreamMetadata(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	for _, generation := range []string{"", "-1", "2", "x"} {
		c := m.open(teamA, generation)
		go c.read()
		c.wantEnd(codes.InvalidArgument, MetadataGeneration)
	}
	c := m.open(model.Tenant{Scope: model.ScopeNamespace, Namespace: "../a"}, "0")
	go c.read()
	c.wantEnd(codes.InvalidArgument, MetadataTenant)
}
