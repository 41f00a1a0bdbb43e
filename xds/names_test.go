package xds

import (
	"net/netip"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Whatever a service's address, port and routes are made into leads back to it, as long
// as it is there.
func TestServiceOf(t *testing.T) {
	store := NewStore(StoreOptions{})
	svc := model.Service{Namespace: "team-a", Name: "web", VIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00::1")}, Ports: []model.ServicePort{{Port: 80}}}
	if err := store.SetService(svc); err != nil {
		t.Fatal(err)
	}
	for _, vip := range []string{"10.96.0.1:80", "[fd00::1]:80"} {
		for _, name := range []string{VIPName(netip.MustParseAddrPort(vip)), HTTPName(netip.MustParseAddrPort(vip))} {
			if namespace, service, ok := store.ServiceOf(name); !ok || namespace != "team-a" || service != "web" {
				t.Errorf("%s is of %s/%s, %t", name, namespace, service, ok)
			}
		}
	}
	backend := Backend{ServicePortKey: model.ServicePortKey{ServiceKey: model.ServiceKey{Namespace: "team-a", Name: "web"}, Port: 80}}.String()
	if namespace, service, ok := store.ServiceOf(backend); !ok || namespace != "team-a" || service != "web" {
		t.Errorf("%s is of %s/%s, %t", backend, namespace, service, ok)
	}
	for _, name := range []string{"", "vip|10.96.0.2:80", "l7|10.96.0.1:81", "l7|10.96.0.1", "be|4|team-a", "pod|10.96.0.1", "outbound"} {
		if namespace, service, ok := store.ServiceOf(name); ok {
			t.Errorf("%q is of %s/%s", name, namespace, service)
		}
	}
}
