package relay

import (
	"bytes"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

// Each generation has ports of its own; the operator, and what is kept as last
// good, know of the first one's.
func TestPortsOfGenerations(t *testing.T) {
	f := setUp(t, nil)
	wrap := func(l *listenerv3.Listener) *discovery.Resource {
		return &discovery.Resource{Name: l.Name, Version: "1", Resource: must(anypb.New(l))}
	}
	outbound := wrap(&listenerv3.Listener{Name: "outbound", Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
		SocketAddress: &corev3.SocketAddress{Address: "::", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 15001}}}}})
	sent := []*discovery.Resource{outbound, wrap(&listenerv3.Listener{Name: "hbone"}), resource(TypeListener, "broken", "1")}
	for generation, port := range []uint32{15001, 15101} {
		p := f.proxyOf(Key{Tenant: teamA, Generation: generation})
		p.subscribe(TypeListener)
		up := f.op.stream()
		up.await(t, TypeListener, "")
		up.send(t, "1", sent...)
		got := p.next()
		wantNames(t, got, "outbound@1", "hbone@1", "broken@1")
		var l listenerv3.Listener
		if err := got.Resources[0].Resource.UnmarshalTo(&l); err != nil {
			t.Fatal(err)
		}
		if n := l.Address.GetSocketAddress().GetPortValue(); n != port {
			t.Errorf("generation %d listens on %d, want %d", generation, n, port)
		}
		for i := range 2 {
			if !bytes.Equal(got.Resources[1+i].Resource.Value, sent[1+i].Resource.Value) {
				t.Errorf("generation %d got another %s", generation, sent[1+i].Name)
			}
		}
	}
	f.relay.good.set(teamA, "1.40.0").mu.Lock()
	kept := f.relay.good.set(teamA, "1.40.0").types[TypeListener]["outbound"]
	f.relay.good.set(teamA, "1.40.0").mu.Unlock()
	if !bytes.Equal(kept.resource.GetResource().GetValue(), outbound.Resource.Value) {
		t.Error("what is kept as last good isn't what the operator sent")
	}
}
