package relay

import (
	"os"
	"strings"
	"testing"

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

	f.relay = f.start(func(o *Options) { o.LastGoodDir = good })
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
