package translate

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/bulkhead-mesh/bulkhead/model"
)

type known struct {
	standing Standing
	identity model.Identity
}

type directory struct {
	addrs map[string]known
	uids  map[string]known
}

func (d directory) ByAddr(a netip.Addr) (Standing, model.Identity) {
	k := d.addrs[a.String()]
	return k.standing, k.identity
}

func (d directory) ByUID(uid string) (Standing, model.Identity) {
	k := d.uids[uid]
	return k.standing, k.identity
}

func TestServiceEndpoints(t *testing.T) {
	web := model.Identity{TrustDomain: "td", Namespace: "a", ServiceAccount: "web"}
	other := model.Identity{TrustDomain: "td", Namespace: "b", ServiceAccount: "other"}
	d := directory{
		addrs: map[string]known{"10.1.0.1": {Member, web}, "10.1.0.2": {Outside, model.Identity{}}, "10.1.0.9": {Member, other}, "fd00::1": {Member, web}},
		uids:  map[string]known{"web": {Member, web}, "plain": {Outside, model.Identity{}}, "host": {Host, model.Identity{}}},
	}
	yes, no := true, false
	ready := discoveryv1.EndpointConditions{Ready: &yes}
	draining := discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}
	pod := func(uid string) *corev1.ObjectReference {
		return &corev1.ObjectReference{Kind: "Pod", UID: types.UID(uid)}
	}
	ep := func(addr string, i model.Identity, draining bool) model.Endpoint {
		return model.Endpoint{Addr: netip.MustParseAddrPort(addr), Identity: i, Draining: draining}
	}
	tests := []struct {
		name     string
		endpoint discoveryv1.Endpoint
		want     []model.Endpoint
	}{
		{"a member by its address", discoveryv1.Endpoint{Addresses: []string{"10.1.0.1"}, Conditions: ready}, []model.Endpoint{ep("10.1.0.1:8080", web, false)}},
		{"a member whose address isn't seen yet", discoveryv1.Endpoint{Addresses: []string{"10.1.0.7"}, Conditions: ready, TargetRef: pod("web")}, []model.Endpoint{ep("10.1.0.7:8080", web, false)}},
		{"a pod outside", discoveryv1.Endpoint{Addresses: []string{"10.1.0.2"}, TargetRef: pod("plain")}, []model.Endpoint{ep("10.1.0.2:8080", model.Identity{}, false)}},
		{"a pod of the host network", discoveryv1.Endpoint{Addresses: []string{"192.0.2.1"}, TargetRef: pod("host")}, []model.Endpoint{ep("192.0.2.1:8080", model.Identity{}, false)}},
		{"no pod", discoveryv1.Endpoint{Addresses: []string{"192.0.2.2"}}, []model.Endpoint{ep("192.0.2.2:8080", model.Identity{}, false)}},
		{"a pod that isn't seen yet", discoveryv1.Endpoint{Addresses: []string{"10.1.0.7"}, TargetRef: pod("new")}, nil},
		{"another's address under a false name", discoveryv1.Endpoint{Addresses: []string{"10.1.0.9"}, TargetRef: pod("plain")}, []model.Endpoint{ep("10.1.0.9:8080", other, false)}},
		{"terminating and serving", discoveryv1.Endpoint{Addresses: []string{"10.1.0.1"}, Conditions: draining}, []model.Endpoint{ep("10.1.0.1:8080", web, true)}},
		{"not ready", discoveryv1.Endpoint{Addresses: []string{"10.1.0.1"}, Conditions: discoveryv1.EndpointConditions{Ready: &no, Serving: &yes}}, nil},
		{"loopback", discoveryv1.Endpoint{Addresses: []string{"127.0.0.1"}}, nil},
	}
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "web"}, Spec: corev1.ServiceSpec{
		ClusterIPs: []string{"10.96.0.1", "fd01::1"},
		Ports:      []corev1.ServicePort{{Name: "http", Port: 80}, {Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}},
	}}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, refs := Service(svc, []discoveryv1.EndpointSlice{slice("web-1", test.endpoint)}, d)
			want := model.Service{Namespace: "a", Name: "web", VIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd01::1")},
				Ports: []model.ServicePort{{Name: "http", Port: 80, Protocol: model.ProtocolHTTP, Endpoints: test.want}}}
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Error(diff)
			}
			if test.name == "a pod that isn't seen yet" && len(refs) != 2 {
				t.Errorf("it asked for %v, want the address and the pod", refs)
			}
		})
	}
	t.Run("ready in one slice counts", func(t *testing.T) {
		one := discoveryv1.Endpoint{Addresses: []string{"10.1.0.1"}, Conditions: draining}
		two := discoveryv1.Endpoint{Addresses: []string{"10.1.0.1"}, Conditions: ready}
		got, _ := Service(svc, []discoveryv1.EndpointSlice{slice("web-1", one), slice("web-2", two)}, d)
		if e := got.Ports[0].Endpoints; len(e) != 1 || e[0].Draining {
			t.Errorf("endpoints %+v", e)
		}
	})
	t.Run("headless", func(t *testing.T) {
		headless := svc.DeepCopy()
		headless.Spec.ClusterIPs = []string{"None"}
		got, _ := Service(headless, []discoveryv1.EndpointSlice{slice("web-1", discoveryv1.Endpoint{Addresses: []string{"10.1.0.1"}})}, d)
		if len(got.VIPs) != 0 || len(got.Ports) != 1 || len(got.Ports[0].Endpoints) != 1 {
			t.Errorf("%+v has VIPs, or no endpoint for routes", got)
		}
	})
}

func slice(name string, endpoints ...discoveryv1.Endpoint) discoveryv1.EndpointSlice {
	port, http := int32(8080), "http"
	return discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name}, AddressType: discoveryv1.AddressTypeIPv4,
		Ports: []discoveryv1.EndpointPort{{Name: &http, Port: &port}}, Endpoints: endpoints,
	}
}
