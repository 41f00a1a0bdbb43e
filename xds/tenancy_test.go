package xds

import (
	"slices"
	"strings"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// A proxy that two namespaces share has a chain for each of their service
// accounts, also of the same name, each with its own identity and nobody else's.
func TestSharedProxyKeepsIdentities(t *testing.T) {
	a, b := workload("web-0", "web", "10.1.0.2"), workload("web-1", "web", "10.1.0.3")
	b.Namespace, b.Identity.Namespace = "team-b", "team-b"
	shared := model.Tenant{Scope: model.ScopeNode}
	a.Tenant, b.Tenant = shared, shared
	listeners, err := Listeners(testNetwork, model.Proxy{Node: "node-1", Tenant: shared, Workloads: []model.Workload{a, b}})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{listenerInbound, listenerOutbound} {
		i := slices.IndexFunc(listeners, func(l *listenerv3.Listener) bool { return l.Name == name })
		if i < 0 {
			t.Fatalf("no listener %s", name)
		}
		names := map[string]bool{}
		found := map[string]int{}
		for _, c := range listeners[i].FilterChains {
			if names[c.Name] {
				t.Errorf("%s: two chains %s", name, c.Name)
			}
			names[c.Name] = true
			text := c.String()
			var of []string
			for _, w := range []model.Workload{a, b} {
				if id := w.Identity.String(); strings.Contains(text, id) {
					of = append(of, id)
				}
			}
			if len(of) > 1 {
				t.Errorf("%s: chain %s speaks as %v", name, c.Name, of)
			}
			for _, id := range of {
				found[id]++
			}
		}
		for _, w := range []model.Workload{a, b} {
			if found[w.Identity.String()] == 0 {
				t.Errorf("%s: no chain of %s", name, w.Identity)
			}
		}
	}
}
