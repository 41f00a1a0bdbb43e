package relay

import (
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"

	"github.com/bulkhead-mesh/bulkhead/identity"
)

// A node trusts a new root when the last of its proxies has said so.
func TestRelayTrusts(t *testing.T) {
	f := setUp(t, nil)
	if !f.relay.Trusts("1") {
		t.Error("without proxies there is nobody to trust anything else")
	}
	f.secrets.set(teamA, identity.RootCA, "1")
	f.secrets.set(teamB, identity.RootCA, "1")
	p, q := f.proxy(teamA), f.proxy(teamB)
	p.subscribe(TypeSecret, identity.RootCA)
	p.next()
	q.subscribe(TypeCluster) // verifies nothing yet
	eventually(t, "version 1", func() bool { return f.relay.Trusts("1") })
	q.subscribe(TypeSecret, identity.RootCA)
	q.next()
	eventually(t, "version 1", func() bool { return f.relay.Trusts("1") })

	f.secrets.set(teamA, identity.RootCA, "2")
	f.secrets.set(teamB, identity.RootCA, "2")
	p.next()
	r := receive(t, "version 2", q.responses)
	eventually(t, "what the first proxy acknowledged", func() bool {
		f.relay.mu.Lock()
		defer f.relay.mu.Unlock()
		e := f.relay.endpoints[Key{Tenant: teamA}]
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.roots == "2"
	})
	if f.relay.Trusts("2") {
		t.Error("one proxy hasn't acknowledged")
	}
	q.send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce, ErrorDetail: &status.Status{Code: 13}})
	q.subscribe(TypeSecret, identity.RootCA) // once more
	r = receive(t, "version 2", q.responses)
	if f.relay.Trusts("2") {
		t.Error("one proxy refused it")
	}
	q.send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
	eventually(t, "version 2", func() bool { return f.relay.Trusts("2") })

	// One that has gone, and will come back with what it has.
	if err := q.st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of its stream", func() bool { return !f.relay.State(Key{Tenant: teamB}).Connected })
	if f.relay.Trusts("2") {
		t.Error("nobody knows what a proxy trusts that isn't connected")
	}
	f.relay.Close(Key{Tenant: teamB})
	if !f.relay.Trusts("2") {
		t.Error("a proxy that isn't there any more counts")
	}
}
