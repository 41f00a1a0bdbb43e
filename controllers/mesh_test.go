package controllers

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// cluster is a mesh over a fake API server, without controllers: drain does what
// they would.
type cluster struct {
	*mesh
	client.WithWatch
	t       *testing.T
	refused []string
	events  []string
	// about is what the last of events was about.
	about *corev1.ObjectReference
}

var born = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newCluster(t *testing.T, objects ...client.Object) *cluster {
	t.Helper()
	for _, o := range objects {
		if at := o.GetCreationTimestamp(); at.IsZero() {
			o.SetCreationTimestamp(metav1.NewTime(born))
		}
	}
	c := &cluster{t: t}
	c.WithWatch = fake.NewClientBuilder().WithScheme(newScheme()).WithObjects(objects...).WithReturnManagedFields().WithTypeConverters(append(typeConverters(t), managedfields.NewDeducedTypeConverter())...).
		WithStatusSubresource(&v1alpha1.NodeProxy{}, &v1alpha1.TenantProxy{}, &v1alpha1.ProxyRollout{}, &v1alpha1.IsolationPolicy{}, &v1alpha1.MeshTopology{}, &gatewayv1.HTTPRoute{}, &gatewayv1.GRPCRoute{}).
		WithIndex(&discoveryv1.EndpointSlice{}, sliceService, indexSlice).Build()
	c.mesh = newMesh(c.WithWatch, xds.NewStore(xds.StoreOptions{Logger: slog.New(slog.DiscardHandler)}), []string{"bulkhead-system", "kube-system"}, slog.New(slog.DiscardHandler))
	c.event = func(p *corev1.ObjectReference, _, note string) { c.refused = append(c.refused, p.Name+": "+note) }
	tr := &c.triggers
	start(t, &tr.topologies)
	start(t, &tr.namespaces)
	start(t, &tr.network)
	start(t, &tr.pods)
	start(t, &tr.services)
	start(t, &tr.routings)
	tr.routings.delay = 0
	c.routing.served = func(string) bool { return true }
	if err := c.load(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.drain()
	return c
}

func start[K comparable](t *testing.T, tr *trigger[K]) workqueue.TypedRateLimitingInterface[K] {
	q := workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[K]())
	t.Cleanup(q.ShutDown)
	if err := tr.Start(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	return q
}

// drain handles what triggers hold until there is nothing left.
func (c *cluster) drain() {
	c.t.Helper()
	tr := &c.triggers
	for {
		n := handle(c, &tr.topologies, func(ctx context.Context, _ struct{}) error { return c.syncTopologies(ctx) }) +
			handle(c, &tr.namespaces, c.syncNamespace) +
			handle(c, &tr.network, func(ctx context.Context, _ struct{}) error { return c.syncNetwork(ctx) }) +
			handle(c, &tr.pods, func(ctx context.Context, key types.NamespacedName) error { _, err := c.syncPod(ctx, key); return err }) +
			handle(c, &tr.services, c.syncService) +
			handle(c, &tr.routings, c.syncRouting)
		if n == 0 {
			return
		}
	}
}

func handle[K comparable](c *cluster, tr *trigger[K], do func(context.Context, K) error) (n int) {
	for ; tr.queue.Len() > 0; n++ {
		key, _ := tr.queue.Get()
		if err := do(c.t.Context(), key); err != nil {
			c.t.Errorf("%v: %v", key, err)
		}
		tr.queue.Done(key)
	}
	return n
}

func (c *cluster) pod(name string) *podState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pods["uid-"+name]
}

func (c *cluster) syncPodNamed(name string) {
	c.t.Helper()
	if _, err := c.syncPod(c.t.Context(), types.NamespacedName{Namespace: "a", Name: name}); err != nil {
		c.t.Fatal(err)
	}
	c.drain()
}

func newNamespace(name string, labels ...string) *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}}
	for _, l := range labels {
		n.Labels[l] = "1"
	}
	return n
}

func newNode(name string, cidrs ...string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name)}, Spec: corev1.NodeSpec{PodCIDRs: cidrs}}
}

func newPod(name, node string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name, UID: types.UID("uid-" + name)}, Spec: corev1.PodSpec{NodeName: node, ServiceAccountName: "sa-" + name}}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

func newTopology(name, label string) *v1alpha1.MeshTopology {
	return &v1alpha1.MeshTopology{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.MeshTopologySpec{
		TrustDomain: "td", Proxy: v1alpha1.ProxySpec{Version: "1.40.0"},
		Rules: []v1alpha1.TenancyRule{{NamespaceSelector: metav1.LabelSelector{MatchLabels: map[string]string{label: "1"}}}},
	}}
}

func addrs(list ...string) (out []netip.Addr) {
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestAddressesAreTheirHolders(t *testing.T) {
	young := newPod("young", "n1", "10.0.1.1")
	young.CreationTimestamp = metav1.NewTime(born.Add(time.Hour))
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newNode("n2", "10.0.2.0/24"),
		young, newPod("first", "n1", "10.0.1.1"), newPod("thief", "n2", "10.0.1.1"))
	if got := c.pod("first").held; !slices.Equal(got, addrs("10.0.1.1")) {
		t.Errorf("the older pod holds %v", got)
	}
	for name, why := range map[string]string{"young": "held by the live pod a/first", "thief": "isn't in the pod ranges of node n2"} {
		if got := c.pod(name).held; len(got) != 0 {
			t.Errorf("%s holds %v", name, got)
		}
		if !slices.ContainsFunc(c.refused, func(r string) bool { return strings.HasPrefix(r, name+":") && strings.Contains(r, why) }) {
			t.Errorf("events %q don't say of %s: %s", c.refused, name, why)
		}
	}
	// When the holder has gone, who waited gets the address.
	if err := c.Delete(t.Context(), newPod("first", "n1")); err != nil {
		t.Fatal(err)
	}
	c.syncPodNamed("first")
	if got := c.pod("young").held; !slices.Equal(got, addrs("10.0.1.1")) {
		t.Errorf("the pod that waited holds %v", got)
	}
	if len(c.waiting) != 0 {
		t.Errorf("left waiting: %v", c.waiting)
	}
}

func TestAnnounce(t *testing.T) {
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newNode("n2", "10.0.2.0/24"), newPod("old", "n1", "10.0.1.9"))
	now := born
	c.now = func() time.Time { return now }
	p := newPod("new", "n1")
	for name, test := range map[string]struct {
		node string
		ips  []netip.Addr
	}{
		"another node's pod":   {"n2", addrs("10.0.2.1")},
		"outside of the range": {"n1", addrs("10.0.2.1")},
		"another pod's":        {"n1", addrs("10.0.1.5", "10.0.1.9")},
		"none":                 {"n1", nil},
		"loopback":             {"n1", addrs("127.0.0.1")},
	} {
		if err := c.Announce(test.node, p, test.ips); err == nil || c.pod("new") != nil {
			t.Errorf("%s: %v, pod %+v", name, err, c.pod("new"))
		}
	}
	if err := c.Announce("n1", p, addrs("10.0.1.1")); err != nil {
		t.Fatal(err)
	}
	c.drain()
	if got := c.pod("new"); got == nil || !slices.Equal(got.held, addrs("10.0.1.1")) {
		t.Fatalf("announced pod: %+v", got)
	}
	if c.proxies[model.NamespaceTenant("a")]["n1"]["uid-new"] == nil {
		t.Error("the pod isn't at its proxy")
	}
	// The informer shows the pod, without addresses: they stay. Then with: it counts.
	if err := c.Create(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	c.syncPodNamed("new")
	if got := c.pod("new").held; !slices.Equal(got, addrs("10.0.1.1")) {
		t.Errorf("seen without addresses: %v", got)
	}
	p.Status.PodIPs = []corev1.PodIP{{IP: "10.0.1.2"}}
	if err := c.Status().Update(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	c.syncPodNamed("new")
	if got := c.pod("new").held; !slices.Equal(got, addrs("10.0.1.2")) {
		t.Errorf("seen with another address: %v", got)
	}
	// Its sandbox is made anew, while the status still shows the old address.
	if err := c.Announce("n1", p, addrs("10.0.1.3")); err != nil {
		t.Error(err)
	}
	c.syncPodNamed("new")
	if got := c.pod("new").held; !slices.Equal(got, addrs("10.0.1.3")) {
		t.Errorf("after a new sandbox: %v", got)
	}
	// One that never shows is forgotten.
	ghost := newPod("ghost", "n1")
	if err := c.Announce("n1", ghost, addrs("10.0.1.4")); err != nil {
		t.Fatal(err)
	}
	if after, err := c.syncPod(t.Context(), types.NamespacedName{Namespace: "a", Name: "ghost"}); err != nil || after == 0 || c.pod("ghost") == nil {
		t.Errorf("at once: %v, %v, %v", after, err, c.pod("ghost"))
	}
	now = now.Add(announcedFor)
	c.syncPodNamed("ghost")
	if c.pod("ghost") != nil || c.holders[netip.MustParseAddr("10.0.1.4")] != "" {
		t.Error("a pod that never showed is still there")
	}
}

func TestMembershipFollowsLabels(t *testing.T) {
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "web-x", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: new(int32(8080))}},
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.1.1"}, TargetRef: &corev1.ObjectReference{Kind: "Pod", UID: "uid-web"}}}}
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "web"}, Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.96.0.1"}, Ports: []corev1.ServicePort{{Port: 80}}}}
	ns := newNamespace("a")
	c := newCluster(t, newTopology("t", "mesh"), ns, newNode("n1", "10.0.1.0/24"), newPod("web", "n1", "10.0.1.1"), svc, slice)
	if p := c.pod("web"); p.Standing != translate.Outside || len(p.held) != 1 {
		t.Fatalf("before: %+v", p)
	}
	ns.Labels = map[string]string{"mesh": "1"}
	if err := c.Update(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	serviced := false
	if err := c.syncNamespace(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	handle(c, &c.triggers.pods, func(ctx context.Context, key types.NamespacedName) error { _, err := c.syncPod(ctx, key); return err })
	serviced = handle(c, &c.triggers.services, c.syncService) == 1
	if p := c.pod("web"); p.Standing != translate.Member || p.Identity.String() != "spiffe://td/ns/a/sa/sa-web" || !serviced {
		t.Errorf("after: %+v, service looked at again: %t", p, serviced)
	}
	if _, namespaces := c.membership(); !slices.Equal(namespaces, []string{"a"}) {
		t.Errorf("membership %v", namespaces)
	}
	if err := c.Delete(t.Context(), newTopology("t", "mesh")); err != nil {
		t.Fatal(err)
	}
	if err := c.syncTopologies(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.drain()
	if p := c.pod("web"); p.Standing != translate.Outside || len(c.proxiesOf("a")) != 0 {
		t.Errorf("without the topology: %+v, proxies %v", p, c.proxies)
	}
}
