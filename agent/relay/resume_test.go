package relay

import (
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// The version of the listener outbound has a mark for each of up to 120 chains. A proxy
// brings it back over a new stream, and the operator has to hear it, or the chains end.
func TestRelayResumesChains(t *testing.T) {
	for name, version := range map[string]string{
		"120 chains":        strings.Repeat("f", 24) + "." + strings.Repeat("one-mark", 120),
		"a former operator": strings.Repeat("v", model.MaxVersion),
	} {
		t.Run(name, func(t *testing.T) {
			f := setUp(t, nil)
			p := f.proxy(teamA)
			p.subscribe(TypeListener)
			up := f.op.stream()
			up.await(t, TypeListener, "")
			up.send(t, "1", resource(TypeListener, "outbound", version))
			wantNames(t, p.next(), "outbound@"+version)

			p = connect(t, f.socket(Key{Tenant: teamA}))
			p.send(&discovery.DeltaDiscoveryRequest{Node: envoyNode, TypeUrl: TypeListener, InitialResourceVersions: map[string]string{"outbound": version}})
			up = f.op.stream()
			if r := receive(t, "request", up.requests); r.InitialResourceVersions["outbound"] != version {
				t.Errorf("the operator is told of %v", r.InitialResourceVersions)
			}
			up.send(t, "1", resource(TypeListener, "inbound", "1"))
			wantNames(t, p.next(), "inbound@1")
		})
	}
}
