package lab

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

const (
	// TrustDomain is the mesh's.
	TrustDomain = "cluster.local"
	// Patience with what takes milliseconds on an idle machine, and with what takes half a
	// minute on any: word of a silence.
	Patience = time.Minute
)

// Host is anything with an application on it.
type Host struct {
	*Namespace
	Pair
	Name string
	// Of pods only.
	Node     *Node
	Tenant   model.Tenant
	Identity model.Identity
	// VIP is the service whose only endpoint this is.
	VIP Pair
}

// Lab is all of it. It ends with the test.
type Lab struct {
	t         testing.TB
	o         Options
	dir       string
	envoys    string
	Authority *identity.Authority
	signing   atomic.Pointer[identity.Authority]
	Store     *xds.Store

	router, router2 *Namespace
	Outside         *Host
	Node1, Node2    *Node
	A1, A2, A3      *Host
	B1, B2          *Host
	Pods            []*Host
}

// Options of a lab. The zero value is what the tests use.
type Options struct {
	// PathMTU is the bytes that the path between the nodes takes, below what either
	// end thinks. Default 1300.
	PathMTU int
	// Redirection of both nodes. Default EBPF.
	Redirection v1alpha1.Redirection
	// Envoy is the version of all proxies. Default dist.Default.
	Envoy string
	// NoAccessLog has the proxies write none.
	NoAccessLog bool
	// Pairs are so many further pods on each node, of a service account each: those
	// of team-a on the first node and of team-b on the second, without applications.
	Pairs int
	// Tenants are so many further ones, with a pod each on the first node, without
	// applications.
	Tenants int
	// Behind is by how much the authority's clock is, and with it the certificates'
	// ends: the shortest that it signs for is five minutes.
	Behind time.Duration
	// TunnelAge is the model's.
	TunnelAge time.Duration
	// Rewrite changes what a node's proxies of a tenant get of the configuration, each
	// resource when it is sent. Default: nothing.
	Rewrite func(node string, tenant model.Tenant, r *discoveryv3.Resource)
	// OnReject is told what a proxy refused. Default: the test fails.
	OnReject func(xds.Rejection)
}

// SetAuthority has another authority sign and nodes' next plans trust its roots.
func (l *Lab) SetAuthority(a *identity.Authority) {
	l.Authority = a
	l.signing.Store(a)
}

// New makes a lab, and waits until all of its pods are steered.
func New(t testing.TB) *Lab {
	t.Helper()
	return NewWith(t, Options{})
}

// NewWith is New with options.
func NewWith(t testing.TB, o Options) *Lab {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	o.Envoy = cmp.Or(o.Envoy, dist.Default)
	envoy, err := dist.Fetch(t.Context(), o.Envoy)
	Check(t, err)
	Check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	// Keys, state and copies of Envoy: nothing of it on a disk.
	dir := filepath.Join(os.Getenv(dirVariable), "lab")
	Check(t, os.MkdirAll(dir, 0o755))
	Check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"))
	t.Cleanup(func() { Check(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	if o.PathMTU == 0 {
		o.PathMTU = 1300
	}
	if o.Redirection == "" {
		o.Redirection = v1alpha1.RedirectionEBPF
	}
	if o.OnReject == nil {
		o.OnReject = func(r xds.Rejection) { t.Errorf("Envoy refused %+v", r) }
	}
	l := &Lab{t: t, o: o, dir: dir, envoys: filepath.Dir(envoy.Dir)}
	l.Authority, err = identity.NewAuthority(TrustDomain, time.Now())
	Check(t, err)
	l.signing.Store(l.Authority)
	l.Store = xds.NewStore(xds.StoreOptions{OnReject: o.OnReject})

	l.router, l.router2 = l.namespace("router"), l.namespace("router2")
	l.Node1 = l.newNode("node1", l.router, 1)
	l.Node2 = l.newNode("node2", l.router2, 2)
	l.Outside = &Host{Namespace: l.namespace("outside"), Name: "outside", Pair: Addresses("172.20.9.2", "fd20:9::2")}
	l.connect()
	l.A1 = l.pod(l.Node1, "a1", "team-a", "web", 11)
	l.A2 = l.pod(l.Node1, "a2", "team-a", "api", 12)
	l.B1 = l.pod(l.Node1, "b1", "team-b", "db", 13)
	l.A3 = l.pod(l.Node2, "a3", "team-a", "api", 14)
	l.B2 = l.pod(l.Node2, "b2", "team-b", "db", 15)
	served := slices.Clone(l.Pods)
	for i := range o.Pairs {
		l.pod(l.Node1, fmt.Sprint("c", i), "team-a", fmt.Sprint("client-", i), 20+i)
		l.pod(l.Node2, fmt.Sprint("s", i), "team-b", fmt.Sprint("server-", i), 20+i)
	}
	for i := range o.Tenants {
		l.pod(l.Node1, fmt.Sprint("t", i), fmt.Sprint("tenant-", i), "app", 60+i)
	}
	for _, h := range append([]*Host{l.Outside, l.Node1.Host, l.Node2.Host}, served...) {
		l.Serve(h)
	}
	l.Publish()
	for _, n := range []*Node{l.Node1, l.Node2} {
		n.serveConfiguration()
		n.Start()
	}
	l.Node1.WaitReady()
	l.Node2.WaitReady()
	return l
}

func (l *Lab) namespace(name string) *Namespace {
	return newNamespace(l.t, filepath.Join(l.dir, "netns", name))
}

// connect joins nodes and the host outside by two routers, whose path is narrow.
func (l *Lab) connect() {
	t := l.t
	t.Helper()
	for _, c := range []struct {
		router  *Namespace
		to      *Namespace
		ip, via Pair
		name    string
	}{
		{l.router, l.Node1.Namespace, l.Node1.Pair, Addresses("172.20.1.1", "fd20:1::1"), "node1"},
		{l.router2, l.Node2.Namespace, l.Node2.Pair, Addresses("172.20.2.1", "fd20:2::1"), "node2"},
		{l.router, l.Outside.Namespace, l.Outside.Pair, Addresses("172.20.9.1", "fd20:9::1"), "outside"},
	} {
		veth(t, c.router, c.name, c.to, "eth0")
		c.router.Do(t, func() { forward(t); address(t, c.name, c.via, 24, 64) })
		c.to.Do(t, func() {
			address(t, "eth0", c.ip, 24, 64)
			route(t, "eth0", "0.0.0.0/0", c.via.V4)
			route(t, "eth0", "::/0", c.via.V6)
		})
	}
	first, second := Addresses("172.20.0.1", "fd20::1"), Addresses("172.20.0.2", "fd20::2")
	veth(t, l.router, "narrow", l.router2, "narrow")
	l.router.Do(t, func() {
		setMTU(t, "narrow", l.o.PathMTU)
		address(t, "narrow", first, 24, 64)
		for _, to := range []string{"172.20.2.0/24", "10.77.2.0/24"} {
			route(t, "narrow", to, second.V4)
		}
		for _, to := range []string{"fd20:2::/64", "fd77:2::/64"} {
			route(t, "narrow", to, second.V6)
		}
		route(t, "node1", "10.77.1.0/24", l.Node1.V4)
		route(t, "node1", "fd77:1::/64", l.Node1.V6)
	})
	l.router2.Do(t, func() {
		setMTU(t, "narrow", l.o.PathMTU)
		address(t, "narrow", second, 24, 64)
		route(t, "narrow", "0.0.0.0/0", first.V4)
		route(t, "narrow", "::/0", first.V6)
		route(t, "node2", "10.77.2.0/24", l.Node2.V4)
		route(t, "node2", "fd77:2::/64", l.Node2.V6)
	})
}

var gateway = Addresses("169.254.1.1", "fe80::1")

// pod makes a pod of the mesh.
func (l *Lab) pod(n *Node, name, namespace, account string, number int) *Host {
	l.t.Helper()
	p := l.AddPod(n, name, number)
	p.VIP = Addresses(fmt.Sprintf("10.96.0.%d", number), fmt.Sprintf("fd96::%d", number))
	p.Tenant = model.NamespaceTenant(namespace)
	p.Identity = model.Identity{TrustDomain: TrustDomain, Namespace: namespace, ServiceAccount: account}
	l.Pods, n.Pods, n.Planned = append(l.Pods, p), append(n.Pods, p), append(n.Planned, p)
	return p
}

// AddPod makes a pod outside of the mesh, as a point-to-point CNI plugin does, with
// nothing on it. number is 1 to 254, and another one for each pod.
func (l *Lab) AddPod(n *Node, name string, number int) *Host {
	t := l.t
	t.Helper()
	p := &Host{
		Namespace: l.namespace(name), Name: name, Node: n,
		Pair: Addresses(fmt.Sprintf("10.77.%d.%d", n.number, number), fmt.Sprintf("fd77:%d::%d", n.number, number)),
	}
	veth(t, n.Namespace, "pod"+name, p.Namespace, "eth0")
	n.Do(t, func() {
		address(t, "pod"+name, gateway, 32, 64)
		route(t, "pod"+name, p.V4.String()+"/32", netip.Addr{})
		route(t, "pod"+name, p.V6.String()+"/128", netip.Addr{})
	})
	p.Do(t, func() {
		address(t, "eth0", p.Pair, 32, 128)
		route(t, "eth0", "169.254.1.1/32", netip.Addr{})
		route(t, "eth0", "0.0.0.0/0", gateway.V4)
		route(t, "eth0", "::/0", gateway.V6)
	})
	return p
}

// ReplacePod has a pod's network end, and another pod of its tenant come at once with
// its addresses: one of another name, UID and service account, with nothing on it. As
// with the CNI plugin, its network begins when its proxy has what serves it; steered it
// is a moment later.
func (l *Lab) ReplacePod(old *Host, name, account string) *Host {
	t, n := l.t, old.Node
	t.Helper()
	n.Do(t, func() {
		veth, err := netlink.LinkByName("pod" + old.Name)
		Check(t, err)
		Check(t, netlink.LinkDel(veth))
	})
	for _, pods := range []*[]*Host{&l.Pods, &n.Pods, &n.Planned} {
		*pods = slices.DeleteFunc(slices.Clone(*pods), func(p *Host) bool { return p == old })
	}
	l.Store.DeleteService(old.Identity.Namespace, old.Name)
	l.Store.DeleteWorkload(old.Name)
	p := l.pod(n, name, old.Identity.Namespace, account, int(old.V4.As4()[3]))
	p.Tenant = old.Tenant
	l.Publish()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	Check(t, n.configuration.WaitServed(ctx, model.ProxyKey{Node: n.Name, Tenant: p.Tenant}, p.Name))
	n.WritePlan()
	return p
}

// Publish tells the configuration's server of the mesh, again after a pod has another
// tenant; its former proxy keeps what it had.
func (l *Lab) Publish() {
	t := l.t
	t.Helper()
	prefixes := func(p ...string) (out []netip.Prefix) {
		for _, s := range p {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	Check(t, l.Store.SetNetwork(model.Network{TrustDomain: TrustDomain,
		PodCIDRs: prefixes("10.77.0.0/16", "fd77::/16"), ServiceCIDRs: prefixes("10.96.0.0/16", "fd96::/16"), TunnelAge: l.o.TunnelAge}))
	proxies := map[model.ProxyKey]*model.Proxy{}
	for _, p := range l.Pods {
		w := model.Workload{UID: p.Name, Namespace: p.Identity.Namespace, Name: p.Name, Node: p.Node.Name,
			Identity: p.Identity, Tenant: p.Tenant, IPs: p.Both()}
		Check(t, l.Store.SetWorkload(w))
		key := model.ProxyKey{Node: p.Node.Name, Tenant: p.Tenant}
		if proxies[key] == nil {
			proxies[key] = &model.Proxy{Node: key.Node, Tenant: key.Tenant, AccessLog: !l.o.NoAccessLog}
		}
		proxies[key].Workloads = append(proxies[key].Workloads, w)
		s := model.Service{Namespace: p.Identity.Namespace, Name: p.Name, VIPs: p.VIP.Both(),
			Ports: []model.ServicePort{{Port: app.GreetPort}}}
		for _, ip := range p.Both() {
			s.Ports[0].Endpoints = append(s.Ports[0].Endpoints, model.Endpoint{Addr: At(ip, app.GreetPort), Identity: p.Identity})
		}
		Check(t, l.Store.SetService(s))
	}
	for _, p := range proxies {
		Check(t, l.Store.SetProxy(*p))
	}
	l.Store.MarkSynced()
}

// SetTenants gives all pods the tenants that they are to have, and waits until both nodes
// have those alone and they serve.
func (l *Lab) SetTenants(tenant func(*Host) model.Tenant) {
	t := l.t
	t.Helper()
	for _, p := range l.Pods {
		p.Tenant = tenant(p)
	}
	l.Publish()
	for _, n := range []*Node{l.Node1, l.Node2} {
		n.WritePlan()
		n.waitAlone()
		n.WaitReady()
	}
}

// command is the test application on a host.
func (h *Host) command(t testing.TB, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVariable+"=app", "POD_NAME="+h.Name)
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return cmd
}

// start starts it; it ends with the test at the latest.
func (h *Host) start(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	h.Do(t, func() { Check(t, cmd.Start()) })
}

// Serve runs the application's server.
func (l *Lab) Serve(h *Host) { l.serve(h, app.GreetPort) }

// ServeGreeting runs another one, of the protocol in which the server speaks first only.
func (l *Lab) ServeGreeting(h *Host, port uint16) {
	l.serve(h, port, "--http=", "--grpc=", "--bulk=", fmt.Sprint("--tcp=:", port))
}

func (l *Lab) serve(h *Host, greets uint16, args ...string) {
	cmd := h.command(l.t, append([]string{"serve"}, args...)...)
	messages := &bytes.Buffer{}
	cmd.Stderr = messages
	h.start(l.t, cmd)
	l.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	Eventually(l.t, h.Name+" serves", func() error {
		r := h.Call(l.t, "tcp", "--timeout", "1s", At(netip.MustParseAddr("::1"), greets).String())
		if !r.OK {
			return fmt.Errorf("%+v", r.Failure)
		}
		return nil
	})
}

// Call runs a client to its end.
func (h *Host) Call(t testing.TB, args ...string) (r app.CallResult) {
	t.Helper()
	h.Run(t, &r, args...)
	return r
}

// Run runs a client to its end, whose last line is the result.
func (h *Host) Run(t testing.TB, result any, args ...string) {
	t.Helper()
	h.Begin(t, args...)(result)
}

// Begin runs a client; the function waits for its end.
func (h *Host) Begin(t testing.TB, args ...string) (wait func(result any)) {
	t.Helper()
	return h.begin(t, h.command(t, args...), args)
}

// longest is for how long a client works that nobody tells to end.
const longest = 30 * time.Minute

// BeginUntil runs a client of load or hold for as long as it is needed: a test can't know
// how long a busy machine takes for the rest. stop has it end, and waits for that. One
// that has ended by itself fails the test.
func (h *Host) BeginUntil(t testing.TB, args ...string) (stop func(result any)) {
	t.Helper()
	args = append([]string{args[0], "--until-stdin", fmt.Sprint("--duration=", longest)}, args[1:]...)
	cmd := h.command(t, args...)
	stdin, err := cmd.StdinPipe()
	Check(t, err)
	wait := h.begin(t, cmd, args)
	return func(result any) {
		t.Helper()
		if _, err := io.WriteString(stdin, "\n"); err != nil {
			t.Errorf("%s on %s has ended before it was told to: %v", args, h.Name, err)
		}
		wait(result)
	}
}

func (h *Host) begin(t testing.TB, cmd *exec.Cmd, args []string) (wait func(result any)) {
	t.Helper()
	var out, messages bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &messages
	h.start(t, cmd)
	return func(result any) {
		t.Helper()
		cmd.Wait() // that it failed is in the result
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), result); err != nil {
			t.Fatalf("%s on %s: %v: %s%s", args, h.Name, err, out.String(), messages.String())
		}
	}
}

// Eventually waits for a condition, which may call t.Fatal.
func Eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	EventuallyWithin(t, Patience, what, f)
}

// EventuallyWithin is Eventually with more patience, for what takes long on any machine.
func EventuallyWithin(t testing.TB, patience time.Duration, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
