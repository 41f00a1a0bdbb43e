package relay

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
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

// A pod may have made its proxy ask for 130,000 names, most of them in vain. The proxy tells
// of all of them, and of the versions that it has, in one message when it comes back.
func TestProxyAskedForTooMuchComesBack(t *testing.T) {
	f := setUp(t, func(o *Options) { o.NamesPerSecond = 1e6 })
	p := f.proxy(teamA)
	names, held := make([]string, 130_000), map[string]string{}
	for i := range names {
		names[i] = fmt.Sprintf("vip|10.%d.%d.%d:80", i>>16, i>>8&255, i&255)
		if i < maxNames {
			held[names[i]] = strings.Repeat("f", 24)
		}
	}
	p.send(&discovery.DeltaDiscoveryRequest{Node: envoyNode, TypeUrl: TypeCluster, ResourceNamesSubscribe: names, InitialResourceVersions: held})
	if n := len(p.next().RemovedResources); n != len(names)-maxNames {
		t.Errorf("%d names don't exist", n)
	}
	up := f.op.stream()
	if r := receive(t, "request", up.requests); len(r.ResourceNamesSubscribe) != maxNames || len(r.InitialResourceVersions) != maxNames {
		t.Errorf("the operator is told of %d names and %d versions", len(r.ResourceNamesSubscribe), len(r.InitialResourceVersions))
	}
}

// An operator takes the first message of a proxy that has all that it may have, or says that
// it has: else that proxy's streams would end as they begin.
func TestFullSubscriptionIsResumed(t *testing.T) {
	for name, test := range map[string]struct {
		version int // its length
		all     bool
	}{"of operators": {24, true}, "of others": {300, false}} {
		t.Run(name, func(t *testing.T) {
			f := setUp(t, func(o *Options) { o.NamesPerSecond = 1e6 })
			p := f.proxy(teamA)
			r := &discovery.DeltaDiscoveryRequest{Node: envoyNode, TypeUrl: TypeCluster, InitialResourceVersions: map[string]string{}}
			for i := range maxNames {
				name := fmt.Sprintf("%0*d", maxNameBytes/maxNames, i)
				r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, name)
				r.InitialResourceVersions[name] = strings.Repeat("v", test.version)
			}
			p.send(r)
			up := f.op.stream()
			got := receive(t, "request", up.requests)
			names, told := len(got.ResourceNamesSubscribe), len(got.InitialResourceVersions)
			t.Logf("%d names and %d versions are %d bytes", names, told, proto.Size(got))
			if names != maxNames || told == 0 || (told == maxNames) != test.all {
				t.Errorf("the operator is told of %d names and %d versions", names, told)
			}
		})
	}
}

// The longest names that pods can dial are held, as many as there may be.
func TestLongestDialledNamesAreHeld(t *testing.T) {
	s := newSubscription()
	var names []string
	for i := range maxNames {
		ip := netip.MustParseAddr(fmt.Sprintf("fdff:ffff:ffff:ffff:ffff:ffff:ffff:%x", 0xffff-i))
		names = append(names, xds.VIPName(netip.AddrPortFrom(ip, 65535)))
	}
	c, err := s.apply(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResourceNamesSubscribe: names}, true)
	if err != nil || len(c.subscribe) != maxNames {
		t.Errorf("%d of %d are held: %v", len(c.subscribe), maxNames, err)
	}
}
