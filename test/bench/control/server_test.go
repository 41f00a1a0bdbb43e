package control

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

const trustDomain = "cluster.local"

// world is the objects that the server is fed from.
type world struct {
	store  *xds.Store
	spare  int
	svcs   []*corev1.Service
	slices []*discoveryv1.EndpointSlice
}

func vip(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}) }

func podAddr(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(128 + n>>16), byte(n >> 8), byte(n)})
}

func newWorld(services, endpoints int) (*world, error) {
	w := &world{store: xds.NewStore(xds.StoreOptions{Logger: slog.New(slog.DiscardHandler)}), spare: services * endpoints}
	if err := w.store.SetNetwork(model.Network{
		TrustDomain: trustDomain, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.128.0.0/9")}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
	}); err != nil {
		return nil, err
	}
	yes := true
	port, name := int32(8080), "http"
	for i := range services {
		namespace := fmt.Sprintf("team-%d", i%100)
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("service-%d", i)}}
		s.Spec.ClusterIPs = []string{vip(i).String()}
		s.Spec.Ports = []corev1.ServicePort{{Name: name, Port: 15001}}
		es := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: s.Name + "-x"}, AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}}}
		for e := range endpoints {
			uid := fmt.Sprintf("%08d-pod-of-service", i*endpoints+e)
			es.Endpoints = append(es.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{podAddr(i*endpoints + e).String()}, Conditions: discoveryv1.EndpointConditions{Ready: &yes},
				TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, UID: types.UID(uid)},
			})
		}
		w.svcs, w.slices = append(w.svcs, s), append(w.slices, es)
		if err := w.sync(i); err != nil {
			return nil, err
		}
	}
	w.store.MarkSynced()
	return w, nil
}

// everyone is a workload of its namespace's account.
type everyone struct{ namespace string }

func (e everyone) ByAddr(netip.Addr) (translate.Standing, model.Identity) {
	return translate.Member, model.Identity{TrustDomain: trustDomain, Namespace: e.namespace, ServiceAccount: "default"}
}

func (e everyone) ByUID(string) (translate.Standing, model.Identity) { return e.ByAddr(netip.Addr{}) }

// sync does what the controller of services does with an event.
func (w *world) sync(i int) error {
	svc, _ := translate.Service(w.svcs[i], []discoveryv1.EndpointSlice{*w.slices[i]}, everyone{w.svcs[i].Namespace})
	return w.store.SetService(svc)
}

// change replaces one endpoint of a service, as a rollout does.
func (w *world) change(i int) error {
	w.spare++
	es := w.slices[i].DeepCopy()
	es.Endpoints[w.spare%len(es.Endpoints)].Addresses = []string{podAddr(w.spare % (1 << 22)).String()}
	w.slices[i] = es
	return w.sync(i)
}

func tenantOf(i int) model.Tenant { return model.NamespaceTenant(fmt.Sprintf("team-%d", i)) }

// usage of the server's process.
type usage struct {
	// RSS, and of it what the Go runtime uses for objects, stacks and itself; after
	// collections.
	RSS, Heap, Stacks, Other uint64
	CPU                      float64 // seconds since the start
}

func measure() usage {
	for range 4 { // each takes a stack that was large once to half of it
		runtime.GC()
	}
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	u := usage{Heap: m.HeapInuse, Stacks: m.StackInuse, Other: m.MSpanInuse + m.MCacheInuse + m.BuckHashSys + m.GCSys + m.OtherSys, CPU: cpu()}
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			u.RSS = kb << 10
		}
	}
	return u
}

func cpu() float64 {
	var r syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &r)
	return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
}

// serve is the server's process. Commands are lines: "world SERVICES ENDPOINTS",
// "proxies NODES TENANTS", "change SERVICE", "usage", "cpu". Each is answered with a
// line of JSON.
func serve(path string, in io.Reader, out io.Writer) error {
	var w *world
	g := grpc.NewServer(xds.GRPCOptions()...)
	reply := json.NewEncoder(out)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		n := make([]int, 2)
		for i := range f[1:] {
			n[i], _ = strconv.Atoi(f[i+1])
		}
		var answer any = struct{}{}
		var err error
		switch f[0] {
		case "world":
			if w, err = newWorld(n[0], n[1]); err != nil {
				return err
			}
			server := xds.NewServer(w.store, xds.ServerOptions{Logger: slog.New(slog.DiscardHandler), Authorize: authorize})
			server.Register(g)
			l, err := net.Listen("unix", path)
			if err != nil {
				return err
			}
			go g.Serve(l)
		case "proxies":
			for node := range n[0] {
				for t := range n[1] {
					tenant := tenantOf(t)
					p := model.Proxy{Node: fmt.Sprintf("node-%d", node), Tenant: tenant, Workloads: []model.Workload{{
						UID: fmt.Sprintf("%d-%d", node, t), Namespace: tenant.Namespace, Name: "client", Node: fmt.Sprintf("node-%d", node), Tenant: tenant,
						Identity: model.Identity{TrustDomain: trustDomain, Namespace: tenant.Namespace, ServiceAccount: "default"},
						IPs:      []netip.Addr{podAddr(1<<22 + node*n[1] + t)},
					}}}
					if err := w.store.SetProxy(p); err != nil {
						return err
					}
				}
			}
		case "change":
			err = w.change(n[0])
		case "usage":
			answer = measure()
		case "cpu":
			answer = usage{CPU: cpu()}
		}
		if err != nil {
			return err
		}
		if err := reply.Encode(answer); err != nil {
			return err
		}
	}
	return lines.Err()
}

// authorize believes the node, too: agents' tokens are measured elsewhere.
func authorize(ctx context.Context) (xds.StreamIdentity, error) {
	tenant, generation, err := xds.ParseStreamMetadata(ctx)
	md, _ := metadata.FromIncomingContext(ctx)
	return xds.StreamIdentity{Node: md.Get("node")[0], Tenant: tenant, Generation: generation}, err
}
