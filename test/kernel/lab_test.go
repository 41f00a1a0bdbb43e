package kernel

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

const (
	trustDomain = "cluster.local"
	// patience with what takes milliseconds on an idle machine.
	patience = 30 * time.Second
)

// host is anything with an application on it.
type host struct {
	*namespace
	pair
	name string
	// Of pods only.
	node     *node
	tenant   model.Tenant
	identity model.Identity
	// vip is the service whose only endpoint this is.
	vip pair
	// halfClosed is told how much serveHalfClose got after its own end.
	halfClosed chan int64
}

// lab is all of it.
type lab struct {
	t         *testing.T
	dir       string
	envoys    string
	authority *identity.Authority
	store     *xds.Store

	router, router2 *namespace
	outside         *host
	node1, node2    *node
	a1, a2, a3      *host
	b1, b2          *host
	pods            []*host
}

func newLab(t *testing.T) *lab {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	envoy, err := dist.Fetch(t.Context(), dist.Default)
	check(t, err)
	check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	// Keys, state and copies of Envoy: nothing of it on a disk.
	dir := filepath.Join(os.Getenv(dirVariable), "lab")
	check(t, os.MkdirAll(dir, 0o755))
	check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"))
	t.Cleanup(func() { check(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	l := &lab{t: t, dir: dir, envoys: filepath.Dir(envoy.Dir)}
	l.authority, err = identity.NewAuthority(trustDomain, time.Now())
	check(t, err)
	l.store = xds.NewStore(xds.StoreOptions{OnReject: func(r xds.Rejection) { t.Errorf("Envoy refused %+v", r) }})

	l.router, l.router2 = l.namespace("router"), l.namespace("router2")
	l.node1 = l.newNode("node1", l.router, 1)
	l.node2 = l.newNode("node2", l.router2, 2)
	l.outside = &host{namespace: l.namespace("outside"), name: "outside", pair: addresses("172.20.9.2", "fd20:9::2")}
	l.connect()
	l.a1 = l.pod(l.node1, "a1", "team-a", "web", 11)
	l.a2 = l.pod(l.node1, "a2", "team-a", "api", 12)
	l.b1 = l.pod(l.node1, "b1", "team-b", "db", 13)
	l.a3 = l.pod(l.node2, "a3", "team-a", "api", 14)
	l.b2 = l.pod(l.node2, "b2", "team-b", "db", 15)
	for _, h := range append([]*host{l.outside, l.node1.host, l.node2.host}, l.pods...) {
		l.serve(h)
	}
	l.publish()
	for _, n := range []*node{l.node1, l.node2} {
		n.serveConfiguration()
		n.start()
	}
	l.node1.waitReady()
	l.node2.waitReady()
	return l
}

func (l *lab) namespace(name string) *namespace {
	return newNamespace(l.t, filepath.Join(l.dir, "netns", name))
}

// connect joins nodes and the host outside by two routers, whose path takes 1300
// bytes.
func (l *lab) connect() {
	t := l.t
	t.Helper()
	for _, c := range []struct {
		router  *namespace
		to      *namespace
		ip, via pair
		name    string
	}{
		{l.router, l.node1.namespace, l.node1.pair, addresses("172.20.1.1", "fd20:1::1"), "node1"},
		{l.router2, l.node2.namespace, l.node2.pair, addresses("172.20.2.1", "fd20:2::1"), "node2"},
		{l.router, l.outside.namespace, l.outside.pair, addresses("172.20.9.1", "fd20:9::1"), "outside"},
	} {
		veth(t, c.router, c.name, c.to, "eth0")
		c.router.do(t, func() { forward(t); address(t, c.name, c.via, 24, 64) })
		c.to.do(t, func() {
			address(t, "eth0", c.ip, 24, 64)
			route(t, "eth0", "0.0.0.0/0", c.via.v4)
			route(t, "eth0", "::/0", c.via.v6)
		})
	}
	first, second := addresses("172.20.0.1", "fd20::1"), addresses("172.20.0.2", "fd20::2")
	veth(t, l.router, "narrow", l.router2, "narrow")
	l.router.do(t, func() {
		setMTU(t, "narrow", 1300)
		address(t, "narrow", first, 24, 64)
		for _, to := range []string{"172.20.2.0/24", "10.77.2.0/24"} {
			route(t, "narrow", to, second.v4)
		}
		for _, to := range []string{"fd20:2::/64", "fd77:2::/64"} {
			route(t, "narrow", to, second.v6)
		}
		route(t, "node1", "10.77.1.0/24", l.node1.v4)
		route(t, "node1", "fd77:1::/64", l.node1.v6)
	})
	l.router2.do(t, func() {
		setMTU(t, "narrow", 1300)
		address(t, "narrow", second, 24, 64)
		route(t, "narrow", "0.0.0.0/0", first.v4)
		route(t, "narrow", "::/0", first.v6)
		route(t, "node2", "10.77.2.0/24", l.node2.v4)
		route(t, "node2", "fd77:2::/64", l.node2.v6)
	})
}

var gateway = addresses("169.254.1.1", "fe80::1")

// pod makes a pod as a point-to-point CNI plugin does.
func (l *lab) pod(n *node, name, namespace, account string, number int) *host {
	t := l.t
	t.Helper()
	p := &host{
		namespace: l.namespace(name), name: name, node: n,
		pair:     addresses(fmt.Sprintf("10.77.%d.%d", n.number, number), fmt.Sprintf("fd77:%d::%d", n.number, number)),
		vip:      addresses(fmt.Sprintf("10.96.0.%d", number), fmt.Sprintf("fd96::%d", number)),
		tenant:   model.NamespaceTenant(namespace),
		identity: model.Identity{TrustDomain: trustDomain, Namespace: namespace, ServiceAccount: account},
	}
	veth(t, n.namespace, "pod"+name, p.namespace, "eth0")
	n.do(t, func() {
		address(t, "pod"+name, gateway, 32, 64)
		route(t, "pod"+name, p.v4.String()+"/32", netip.Addr{})
		route(t, "pod"+name, p.v6.String()+"/128", netip.Addr{})
	})
	p.do(t, func() {
		address(t, "eth0", p.pair, 32, 128)
		route(t, "eth0", "169.254.1.1/32", netip.Addr{})
		route(t, "eth0", "0.0.0.0/0", gateway.v4)
		route(t, "eth0", "::/0", gateway.v6)
	})
	l.pods, n.pods, n.planned = append(l.pods, p), append(n.pods, p), append(n.planned, p)
	return p
}

// publish tells the configuration's server of the mesh.
func (l *lab) publish() {
	t := l.t
	t.Helper()
	prefixes := func(p ...string) (out []netip.Prefix) {
		for _, s := range p {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	check(t, l.store.SetNetwork(model.Network{TrustDomain: trustDomain,
		PodCIDRs: prefixes("10.77.0.0/16", "fd77::/16"), ServiceCIDRs: prefixes("10.96.0.0/16", "fd96::/16")}))
	proxies := map[model.ProxyKey]*model.Proxy{}
	for _, p := range l.pods {
		w := model.Workload{UID: p.name, Namespace: p.identity.Namespace, Name: p.name, Node: p.node.name,
			Identity: p.identity, Tenant: p.tenant, IPs: p.both()}
		check(t, l.store.SetWorkload(w))
		key := model.ProxyKey{Node: p.node.name, Tenant: p.tenant}
		if proxies[key] == nil {
			proxies[key] = &model.Proxy{Node: key.Node, Tenant: key.Tenant, AccessLog: true}
		}
		proxies[key].Workloads = append(proxies[key].Workloads, w)
		s := model.Service{Namespace: p.identity.Namespace, Name: p.name, VIPs: p.vip.both(),
			Ports: []model.ServicePort{{Port: app.GreetPort}}}
		for _, ip := range p.both() {
			s.Ports[0].Endpoints = append(s.Ports[0].Endpoints, model.Endpoint{Addr: at(ip, app.GreetPort), Identity: p.identity})
		}
		check(t, l.store.SetService(s))
	}
	for _, p := range proxies {
		check(t, l.store.SetProxy(*p))
	}
	l.store.MarkSynced()
}

// command is the test application on a host.
func (h *host) command(t *testing.T, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVariable+"=app", "POD_NAME="+h.name)
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return cmd
}

// start starts it; it ends with the test at the latest.
func (h *host) start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	h.do(t, func() { check(t, cmd.Start()) })
}

// serve runs the application's server.
func (l *lab) serve(h *host) {
	cmd := h.command(l.t, "serve")
	messages := &bytes.Buffer{}
	cmd.Stderr = messages
	h.start(l.t, cmd)
	l.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	eventually(l.t, h.name+" serves", func() error {
		r := h.call(l.t, "tcp", "--timeout", "1s", at(netip.MustParseAddr("::1"), app.GreetPort).String())
		if !r.OK {
			return fmt.Errorf("%+v", r.Failure)
		}
		return nil
	})
}

// call runs a client to its end.
func (h *host) call(t *testing.T, args ...string) (r app.CallResult) {
	t.Helper()
	h.run(t, &r, args...)
	return r
}

// run runs a client to its end, whose last line is the result.
func (h *host) run(t *testing.T, result any, args ...string) {
	t.Helper()
	h.begin(t, args...)(result)
}

// begin runs a client; the function waits for its end.
func (h *host) begin(t *testing.T, args ...string) (wait func(result any)) {
	t.Helper()
	cmd := h.command(t, args...)
	var out, messages bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &messages
	h.start(t, cmd)
	return func(result any) {
		t.Helper()
		cmd.Wait() // that it failed is in the result
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), result); err != nil {
			t.Fatalf("%s on %s: %v: %s%s", args, h.name, err, out.String(), messages.String())
		}
	}
}

// eventually waits for a condition, which may call t.Fatal.
func eventually(t *testing.T, what string, f func() error) {
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
