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
	backend := func(service string) string {
		return Backend{ServicePortKey: model.ServicePortKey{ServiceKey: model.ServiceKey{Namespace: "team-a", Name: service}, Port: 80}}.String()
	}
	names := []string{backend("web")}
	for _, vip := range []string{"10.96.0.1:80", "[fd00::1]:80"} {
		names = append(names, VIPName(netip.MustParseAddrPort(vip)), HTTPName(netip.MustParseAddrPort(vip)))
	}
	for _, name := range names {
		if namespace, service, ok := store.ServiceOf(name); !ok || namespace != "team-a" || service != "web" {
			t.Errorf("%s is of %s/%s, %t", name, namespace, service, ok)
		}
	}
	for _, name := range []string{"", backend("webs"), "vip|10.96.0.2:80", "l7|10.96.0.1:81", "l7|10.96.0.1", "be|4|team-a", "pod|10.96.0.1", "outbound"} {
		if namespace, service, ok := store.ServiceOf(name); ok {
			t.Errorf("%q is of %s/%s", name, namespace, service)
		}
	}
	store.DeleteService("team-a", "web")
	for _, name := range names {
		if namespace, service, ok := store.ServiceOf(name); ok {
			t.Errorf("%s is of %s/%s, which is gone", name, namespace, service)
		}
	}
}
