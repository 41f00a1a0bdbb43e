package relay

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// The longest tenants have files too, each its own.
func TestLastGoodOfLongNames(t *testing.T) {
	good := t.TempDir()
	longest := func(last string) model.Tenant {
		return model.Tenant{Scope: model.ScopePod, Namespace: strings.Repeat("n", 63), Name: strings.Repeat("p", 252) + last}
	}
	tenants := []model.Tenant{longest("a"), longest("b")}
	f := setUp(t, func(o *Options) { o.LastGoodDir = good })
	for i, tenant := range tenants {
		p := f.proxyOf(Key{Tenant: tenant})
		p.subscribe(TypeCluster, "vip|a")
		up := f.op.stream()
		up.await(t, TypeCluster, "vip|a")
		up.send(t, "1", resource(TypeCluster, "vip|a", string(rune('1'+i))))
		p.next()
		eventually(t, "it is acknowledged", func() bool {
			return f.relay.good.set(tenant, "1.40.0").get(TypeCluster, "vip|a") != nil
		})
	}
	f.op.server.Stop()
	f.relay.Shutdown()

	f.relay = f.start(func(o *Options) { o.LastGoodDir, o.Patience = good, soon })
	for i, tenant := range tenants {
		p := f.proxyOf(Key{Tenant: tenant})
		p.subscribe(TypeCluster, "vip|a")
		wantNames(t, p.next(), "vip|a@"+string(rune('1'+i)))
	}
	for kept := 2; kept >= 0; kept-- {
		if err := f.relay.KeepLastGood(tenants[:kept]); err != nil {
			t.Fatal(err)
		}
		if files := must(os.ReadDir(good)); len(files) != kept {
			t.Errorf("%d files of %d tenants", len(files), kept)
		}
	}
}

// An operator that answers late learns which listeners a proxy got of last good before
// it sends any: of what it knew nothing about, it would take the chains away. A proxy that
// refuses last good gets the operator's, too.
func TestLateOperatorHearsOfLastGood(t *testing.T) {
	for name, answer := range map[string]*status.Status{"taken": nil, "refused": {Code: 13, Message: "bad"}} {
		t.Run(name, func(t *testing.T) {
			f := setUp(t, func(o *Options) { o.Patience = soon })
			f.takeOutbound("chains")

			fresh := connect(t, f.socket(Key{Tenant: teamA}))
			fresh.subscribe(TypeListener)
			late := f.op.stream()
			late.await(t, TypeListener, "")
			good := receive(t, "last good", fresh.responses)
			wantNames(t, good, "outbound@chains")
			fresh.subscribe(TypeCluster, "vip|a")
			late.await(t, TypeCluster, "vip|a")

			// It sends listeners, and a cluster after some of them, until it is told to end.
			done := make(chan struct{})
			go func() {
				defer close(done)
				for i := 0; ; i++ {
					r := resource(TypeListener, "outbound", fmt.Sprint("late-", i))
					if i == 50 {
						r = resource(TypeCluster, "vip|a", "1")
					}
					if late.st.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: r.Resource.TypeUrl, Nonce: fmt.Sprint(i), Resources: []*discovery.Resource{r}}) != nil {
						return
					}
				}
			}()
			wantNames(t, fresh.next(), "vip|a@1") // and nothing before it
			fresh.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeListener, ResponseNonce: good.Nonce, ErrorDetail: answer})
			receive(t, "end of the stream", late.gone)
			receive(t, "end of what it sends", done)
			again := f.op.stream()
			var told *discovery.DeltaDiscoveryRequest
			for told == nil {
				if r := receive(t, "request", again.requests); r.TypeUrl == TypeListener {
					told = r
				}
			}
			if has := told.InitialResourceVersions["outbound"] == "chains"; has != (answer == nil) {
				t.Errorf("the next stream is told of %v", told.InitialResourceVersions)
			}
			again.send(t, "1", resource(TypeListener, "outbound", "new"))
			for r := fresh.next(); !slices.Equal(names(r), []string{"outbound@new"}); r = fresh.next() {
				if r.TypeUrl == TypeListener {
					t.Fatalf("it got %v of a stream that knew nothing of last good", names(r))
				}
			}
		})
	}
}

// A proxy that has run on while the agent was killed keeps what it has, if that is newer
// than what was written out or another generation's: an older listener would end the
// connections in its chains. It gets what it lacks.
func TestLastGoodReplacesNothing(t *testing.T) {
	good := t.TempDir()
	f := setUp(t, func(o *Options) { o.LastGoodDir = good })
	p := f.proxy(teamA)
	p.subscribe(TypeListener)
	up := f.op.stream()
	up.await(t, TypeListener, "")
	up.send(t, "1", resource(TypeListener, "outbound", "old"), resource(TypeListener, "inbound", "1"))
	p.next()
	p.subscribe(TypeRoute, "l7|a", "l7|b")
	up.await(t, TypeRoute, "l7|b")
	up.send(t, "2", resource(TypeRoute, "l7|a", "old"), resource(TypeRoute, "l7|b", "1"))
	p.next()
	eventually(t, "it is acknowledged", func() bool {
		return f.relay.good.set(teamA, "1.40.0").get(TypeRoute, "l7|b") != nil
	})
	f.op.server.Stop()
	f.relay.Shutdown()

	f.relay = f.start(func(o *Options) { o.LastGoodDir, o.Patience = good, soon })
	p = f.proxy(teamA)
	p.send(&discovery.DeltaDiscoveryRequest{Node: envoyNode, TypeUrl: TypeListener, InitialResourceVersions: map[string]string{"outbound": "new"}})
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeRoute, ResourceNamesSubscribe: []string{"l7|a", "l7|b"}, InitialResourceVersions: map[string]string{"l7|a": "new"}})
	wantNames(t, p.next(), "inbound@1")
	wantNames(t, p.next(), "l7|b@1")
}

// A proxy that refuses an operator's listener and takes last good instead may have
// another process's chains then. The operator hears of it before it sends another.
func TestOperatorHearsOfReplacedListeners(t *testing.T) {
	f := setUp(t, nil)
	f.takeOutbound("chains")

	fresh := connect(t, f.socket(Key{Tenant: teamA}))
	fresh.subscribe(TypeListener)
	up := f.op.stream()
	up.await(t, TypeListener, "")
	up.send(t, "1", resource(TypeListener, "outbound", "bad"))
	refused := receive(t, "response", fresh.responses)
	fresh.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeListener, ResponseNonce: refused.Nonce, ErrorDetail: &status.Status{Code: 13, Message: "bad"}})
	good := receive(t, "last good", fresh.responses)
	wantNames(t, good, "outbound@chains")
	up.send(t, "2", resource(TypeListener, "outbound", "without chains"))
	fresh.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeListener, ResponseNonce: good.Nonce})
	receive(t, "end of the stream", up.gone)
	up = f.op.stream()
	told := receive(t, "request", up.requests)
	if told.InitialResourceVersions["outbound"] != "chains" {
		t.Errorf("the next stream is told of %v", told.InitialResourceVersions)
	}
	up.send(t, "1", resource(TypeListener, "outbound", "with chains"))
	wantNames(t, fresh.next(), "outbound@with chains")
}

// A proxy that refuses what the operator has, and last good as well, settles: each time it
// is offered last good, the operator's stream ends and it is sent the other again.
func TestRefusedListenersAreNotOfferedAgain(t *testing.T) {
	for name, late := range map[string]bool{"instead of the operator's": false, "before the operator's": true} {
		t.Run(name, func(t *testing.T) {
			f := setUp(t, func(o *Options) {
				if late {
					o.Patience = soon
				}
			})
			f.takeOutbound("good")

			fresh := connect(t, f.socket(Key{Tenant: teamA}))
			refuse := func(version string) {
				t.Helper()
				r := receive(t, "response", fresh.responses)
				wantNames(t, r, "outbound@"+version)
				fresh.send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce, ErrorDetail: &status.Status{Code: 13, Message: "bad"}})
			}
			fresh.subscribe(TypeListener)
			up := f.op.stream()
			up.await(t, TypeListener, "")
			if !late {
				up.send(t, "1", resource(TypeListener, "outbound", "bad"))
				refuse("bad")
			}
			refuse("good")
			receive(t, "end of the stream", up.gone)

			up = f.op.stream()
			up.await(t, TypeListener, "")
			up.send(t, "1", resource(TypeListener, "outbound", "bad"))
			refuse("bad")
			if r := receive(t, "NACK", up.requests); r.ErrorDetail == nil {
				t.Errorf("the operator is told %v", r)
			}
			fresh.subscribe(TypeCluster, "vip|a")
			up.await(t, TypeCluster, "vip|a")
			up.send(t, "2", resource(TypeCluster, "vip|a", "1"))
			wantNames(t, fresh.next(), "vip|a@1") // and nothing before it
			receive(t, "ACK", up.requests)
			if n := len(f.op.streams); n > 0 {
				t.Errorf("%d more streams to the operator", n)
			}
		})
	}
}

// A proxy that asks again for what it has refused of last good doesn't get it again; other
// names and other versions it gets.
func TestRefusedLastGoodIsNotServedAgain(t *testing.T) {
	f := setUp(t, func(o *Options) { o.Patience = soon })
	p := f.proxy(teamA)
	p.subscribe(TypeCluster, "vip|a", "vip|b")
	up := f.op.stream()
	up.await(t, TypeCluster, "vip|a")
	up.send(t, "1", resource(TypeCluster, "vip|a", "1"), resource(TypeCluster, "vip|b", "1"))
	p.next()
	receive(t, "ACK", up.requests)

	fresh := connect(t, f.socket(Key{Tenant: teamA})) // and the operator keeps silent
	fresh.subscribe(TypeCluster, "vip|a")
	r := receive(t, "last good", fresh.responses)
	wantNames(t, r, "vip|a@1")
	fresh.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResponseNonce: r.Nonce, ErrorDetail: &status.Status{Code: 13, Message: "bad"}})
	fresh.subscribe(TypeCluster, "vip|a", "vip|b")
	wantNames(t, fresh.next(), "vip|b@1")

	f.op.stream()
	canary := f.proxyOf(Key{Tenant: teamA, Generation: 1})
	canary.subscribe(TypeCluster, "vip|a")
	up = f.op.stream()
	up.await(t, TypeCluster, "vip|a")
	up.send(t, "1", resource(TypeCluster, "vip|a", "2"))
	for !slices.Equal(names(canary.next()), []string{"vip|a@2"}) {
	} // last good first, if that took long
	receive(t, "ACK", up.requests)
	fresh.subscribe(TypeCluster, "vip|a")
	wantNames(t, fresh.next(), "vip|a@2")
}

// takeOutbound has a proxy of team A acknowledge a listener, which is last good then.
func (f *fixture) takeOutbound(version string) {
	f.t.Helper()
	p := f.proxy(teamA)
	p.subscribe(TypeListener)
	up := f.op.stream()
	up.await(f.t, TypeListener, "")
	up.send(f.t, "1", resource(TypeListener, "outbound", version))
	p.next()
	receive(f.t, "ACK", up.requests)
}
