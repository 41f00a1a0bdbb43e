package lab

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"sigs.k8s.io/yaml"

	"github.com/bulkhead-mesh/bulkhead/agent"
	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/netfilter"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// operatorPort is where the nodes' agents find the operator, each on its own
// loopback: a node's connection says which node it is.
const operatorPort = 15012

// Node is a node with a real agent.
type Node struct {
	*Host
	l      *Lab
	number int
	// Dir has what the agent keeps.
	Dir  string
	Pods []*Host
	// Planned are those of them that the mesh has.
	Planned []*Host
	// Redirection of its pods.
	Redirection v1alpha1.Redirection
	// Namespaces for which the plan says more.
	Namespaces []v1alpha1.NodeNamespace
	// Exclusions of pods, by name.
	Exclusions map[string][]v1alpha1.Exclusion
	// Version of Envoy. Default the lab's.
	Version string
	// Images that the node is to have.
	Images []v1alpha1.NodeImage
	// Canary is the share of new connections, in percent, that a second generation
	// of each proxy gets; there is none with 0.
	Canary int
	// CanaryVersion of Envoy. Default the lab's.
	CanaryVersion string
	// Promoted has the second generation take over.
	Promoted bool
	// Drain is how long one that isn't wanted any more may last; 0 is the default.
	Drain time.Duration
	// PlanDrain is the same by the plan, in whole seconds; 0 leaves it to Drain.
	PlanDrain time.Duration
	// Standby has each of them a warm standby.
	Standby bool
	// Args are further ones of the agent.
	Args []string
	// Limits of tenants' proxies. Default 1 GiB of memory.
	Limits map[string]v1alpha1.Limits

	// StopOperator ends the operator as this node sees it.
	StopOperator func()

	configuration *xds.Server

	agent *exec.Cmd
	log   *os.File
}

func (l *Lab) newNode(name string, router *Namespace, number int) *Node {
	t := l.t
	t.Helper()
	n := &Node{
		Host: &Host{Namespace: l.namespace(name), Name: name, Pair: Addresses(fmt.Sprintf("172.20.%d.2", number), fmt.Sprintf("fd20:%d::2", number))},
		l:    l, number: number, Dir: filepath.Join(l.dir, name), Redirection: l.o.Redirection,
	}
	n.Do(t, func() { forward(t) })
	Check(t, os.MkdirAll(filepath.Join(n.Dir, "bpf"), 0o755))
	Check(t, os.WriteFile(filepath.Join(n.Dir, "token"), []byte("none"), 0o600))
	var err error
	n.log, err = os.Create(filepath.Join(n.Dir, "agent.log"))
	Check(t, err)
	n.remove() // of a test that was killed
	Check(t, bpf.Mount(filepath.Join(n.Dir, "bpf")))
	t.Cleanup(func() {
		n.Kill()
		if t.Failed() {
			n.tell()
		}
		n.remove()
		Check(t, unix.Unmount(filepath.Join(n.Dir, "bpf"), unix.MNT_DETACH))
	})
	return n
}

// Isolation is how the agent isolates proxies.
func (n *Node) Isolation() isolation.Options {
	return isolation.Options{
		RunDir: filepath.Join(n.Dir, "run"), LibDir: filepath.Join(n.Dir, "lib"), EnvoyDir: n.l.envoys,
		CgroupName: "bhtest-kernel-" + n.Name, Log: slog.New(slog.DiscardHandler),
	}
}

// remove removes what the agent made.
func (n *Node) remove() {
	t := n.l.t
	t.Helper()
	n.Do(t, func() {
		Check(t, errors.Join(isolation.Uninstall(n.Isolation()), bpf.Uninstall(n.PinDir()), netfilter.Uninstall(), identity.Uninstall(filepath.Join(n.Dir, "run", "keys"))))
	})
}

// PinDir has what the agent pins.
func (n *Node) PinDir() string { return filepath.Join(n.Dir, "bpf", "bulkhead") }

// tell shows the ends of the logs of agent and proxies, and the proxies' connections.
func (n *Node) tell() {
	proxies, _ := filepath.Glob(filepath.Join(n.Dir, "run", "netns", "*"))
	for _, path := range proxies {
		sockets, err := describeSockets(path)
		n.l.t.Logf("connections in %s: %v\n%s", path, err, sockets[:min(len(sockets), 4<<10)])
	}
	files, _ := filepath.Glob(filepath.Join(n.Dir, "lib", "log", "*", "*"))
	for _, file := range append(files, n.log.Name()) {
		b, _ := os.ReadFile(file)
		n.l.t.Logf("%s:\n%s", file, b[max(0, len(b)-4<<10):])
	}
}

// PlanFile is where the agent reads its plan.
func (n *Node) PlanFile() string { return filepath.Join(n.Dir, "plan.yaml") }

// AgentLog is what the node's agents have said so far.
func (n *Node) AgentLog(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(n.log.Name())
	Check(t, err)
	return string(b)
}

// WritePlan writes the plan of the node's tenants and pods.
func (n *Node) WritePlan() string {
	t := n.l.t
	t.Helper()
	var roots bytes.Buffer
	for _, der := range n.l.Authority.Roots() {
		Check(t, pem.Encode(&roots, &pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	type object map[string]any
	var tenants, pods []object
	seen := map[string]bool{}
	for _, p := range n.Planned {
		if name := p.Tenant.String(); !seen[name] {
			seen[name] = true
			tenant := object{"name": name, "version": cmp.Or(n.Version, n.l.o.Envoy), "limits": cmp.Or(n.Limits[name], v1alpha1.Limits{MemoryMax: 1 << 30})}
			tenant["standby"] = n.Standby
			if n.PlanDrain > 0 {
				tenant["drainSeconds"] = int(n.PlanDrain / time.Second)
			}
			if n.Canary > 0 {
				tenant["canary"] = object{"version": cmp.Or(n.CanaryVersion, n.l.o.Envoy), "weight": n.Canary, "promoted": n.Promoted}
			}
			tenants = append(tenants, tenant)
		}
		pods = append(pods, object{"uid": p.Name, "namespace": p.Identity.Namespace, "name": p.Name,
			"serviceAccount": p.Identity.ServiceAccount, "tenant": p.Tenant.String(), "netns": p.Path, "exclusions": n.Exclusions[p.Name]})
	}
	b, err := yaml.Marshal(object{"trustDomain": TrustDomain, "redirection": n.Redirection, "trustBundle": roots.String(), "tenants": tenants, "images": n.Images, "namespaces": n.Namespaces, "pods": pods})
	Check(t, err)
	// In one step: the agent may be reading it.
	file := n.PlanFile()
	Check(t, os.WriteFile(file+".new", b, 0o600))
	Check(t, os.Rename(file+".new", file))
	return file
}

// Start starts the agent.
func (n *Node) Start() {
	t := n.l.t
	t.Helper()
	o := n.Isolation()
	cmd := exec.Command(filepath.Join(os.Getenv(dirVariable), "agent"), "run", "--plan", n.WritePlan(),
		"--run-dir", o.RunDir, "--lib-dir", o.LibDir, "--envoy-dir", o.EnvoyDir, "--cgroup-name", o.CgroupName,
		"--pin-dir", n.PinDir(), "--linger", "100ms", "--drain", n.Drain.String(), "--token-file", filepath.Join(n.Dir, "token"), "--operator", fmt.Sprintf("localhost:%d", operatorPort))
	cmd.Args = append(cmd.Args, n.Args...)
	cmd.Env = append(os.Environ(), "NODE_NAME="+n.Name)
	cmd.Stdout, cmd.Stderr = n.log, n.log
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	n.Do(t, func() { Check(t, cmd.Start()) })
	n.agent = cmd
	t.Cleanup(n.Kill) // before the pods' namespaces go
}

// Kill kills the agent and waits for its end.
func (n *Node) Kill() {
	if n.agent != nil {
		n.agent.Process.Kill()
		n.agent.Wait()
		n.agent = nil
	}
}

// Configuration is the server of configuration as this node sees it.
func (n *Node) Configuration() *xds.Server { return n.configuration }

// AgentPID is the agent's process.
func (n *Node) AgentPID() int { return n.agent.Process.Pid }

// AgentTime is the CPU time that the agent has used.
func (n *Node) AgentTime(t testing.TB) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.AgentPID()))
	Check(t, err)
	// After the command in parentheses: fields 14 and 15 are in hundredths of a second.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	var user, system int64
	_, err = fmt.Sscan(fields[11]+" "+fields[12], &user, &system)
	Check(t, err)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// CLI runs the agent's command line, as root of the node would.
func (n *Node) CLI(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(os.Getenv(dirVariable), "agent"), append(args, "--run-dir", n.Isolation().RunDir)...)
	var messages bytes.Buffer
	cmd.Stderr = &messages
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("agent %s: %w: %s", args[0], err, messages.String())
	}
	return out, nil
}

// Inspect is what the agent says of the node.
func (n *Node) Inspect() (i agent.Inspection, err error) {
	var out bytes.Buffer
	o := agent.Options{RunDir: filepath.Join(n.Dir, "run")}
	if err := agent.Control(context.Background(), o.ControlSocket(), "GET", "/inspect", nil, &out); err != nil {
		return i, err
	}
	return i, json.Unmarshal(out.Bytes(), &i)
}

// Metrics is what the agent serves for Prometheus.
func (n *Node) Metrics(t testing.TB) string {
	t.Helper()
	var c net.Conn
	var err error
	n.Do(t, func() { c, err = net.DialTimeout("tcp", "127.0.0.1:15021", Patience) })
	Check(t, err)
	defer c.Close()
	_, err = io.WriteString(c, "GET /metrics HTTP/1.0\r\n\r\n")
	Check(t, err)
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	Check(t, err)
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	Check(t, err)
	return string(body)
}

// WaitReady waits until all of the plan is so.
func (n *Node) WaitReady() {
	t := n.l.t
	t.Helper()
	Eventually(t, "the plan of "+n.Name, func() error {
		i, err := n.Inspect()
		if err != nil {
			return err
		}
		steered := 0
		for _, tenant := range i.Tenants {
			if !tenant.Ready {
				return fmt.Errorf("tenant %s: %s", tenant.Name, tenant.Reason)
			}
			if tenant.Weight != n.Canary && !n.Promoted {
				return fmt.Errorf("the canary of %s has weight %d", tenant.Name, tenant.Weight)
			}
			steered += len(tenant.Pods)
		}
		if i.Problem != "" || steered != len(n.Planned) {
			return fmt.Errorf("%d of %d pods are steered: %s", steered, len(n.Planned), i.Problem)
		}
		return nil
	})
}

// waitAlone waits until there are no other tenants than those of the planned pods.
func (n *Node) waitAlone() {
	t := n.l.t
	t.Helper()
	wanted := map[string]bool{}
	for _, p := range n.Planned {
		wanted[p.Tenant.String()] = true
	}
	Eventually(t, "the end of the former tenants of "+n.Name, func() error {
		i, err := n.Inspect()
		for _, tenant := range i.Tenants {
			if !wanted[tenant.Name] {
				err = errors.Join(err, fmt.Errorf("tenant %s: %s, %+v", tenant.Name, tenant.Reason, tenant.Generations))
			}
		}
		return err
	})
}

// WaitServing waits until new connections of all tenants are led to processes of this
// version alone.
func (n *Node) WaitServing(version string) {
	t := n.l.t
	t.Helper()
	Eventually(t, "version "+version+" on "+n.Name, func() error {
		i, err := n.Inspect()
		if err != nil {
			return err
		}
		for _, tenant := range i.Tenants {
			serves := false
			for _, g := range tenant.Generations {
				if g.Serving && g.Version != version {
					return fmt.Errorf("%s: version %s serves: %s", tenant.Name, g.Version, tenant.Reason)
				}
				serves = serves || g.Serving
			}
			if !serves || !tenant.Ready {
				return fmt.Errorf("%s: %s", tenant.Name, tenant.Reason)
			}
		}
		return nil
	})
}

// Tenant is one tenant's part of what the agent says.
func (n *Node) Tenant(name string) agent.InspectedTenant {
	t := n.l.t
	t.Helper()
	i, err := n.Inspect()
	Check(t, err)
	k := slices.IndexFunc(i.Tenants, func(t agent.InspectedTenant) bool { return t.Name == name })
	if k < 0 {
		t.Fatalf("%s has no tenant %s", n.Name, name)
	}
	return i.Tenants[k]
}

// First is the first process of a tenant's proxy; one that is zero while there is none.
func First(t agent.InspectedTenant) (first agent.InspectedGeneration) {
	if len(t.Generations) > 0 {
		first = t.Generations[0]
	}
	return first
}

// Running waits until a tenant's proxy runs, and returns its first process.
func (n *Node) Running(name string) (first agent.InspectedGeneration) {
	t := n.l.t
	t.Helper()
	Eventually(t, "a process of "+name+" on "+n.Name, func() error {
		b := n.Tenant(name)
		if first = First(b); first.PID == 0 {
			return fmt.Errorf("%s, %+v", b.Reason, b.Generations)
		}
		return nil
	})
	return first
}

// Memory is what the kernel charges a tenant's proxy, in bytes.
func (n *Node) Memory(t testing.TB, tenant string) (bytes int64) {
	t.Helper()
	for _, file := range []string{
		"/sys/fs/cgroup/memory/" + n.Isolation().CgroupName + "/" + tenant + "/memory.usage_in_bytes",
		"/sys/fs/cgroup/" + n.Isolation().CgroupName + "/" + tenant + "/memory.current",
	} {
		if b, err := os.ReadFile(file); err == nil {
			_, err = fmt.Sscan(string(b), &bytes)
			Check(t, err)
			return bytes
		}
	}
	t.Fatalf("the node has no cgroup controller for the memory of %s", tenant)
	return 0
}

// Proxy is a tenant's network namespace.
func (n *Node) Proxy(name string) *Namespace {
	return Enter(n.l.t, filepath.Join(n.Dir, "run", "netns", name))
}

// AccessLog is what a tenant's proxy has written so far, one connection a line, as far as
// it is kept: a log that is large is begun anew.
func (n *Node) AccessLog(tenant string) (lines []map[string]string) {
	path := filepath.Join(n.Dir, "lib", "log", tenant, "envoy0.log")
	turned, _ := os.ReadFile(path + ".1")
	b, _ := os.ReadFile(path)
	for line := range strings.Lines(string(turned) + string(b)) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) != nil || fields[xds.LogKey] == nil {
			continue // Envoy's own messages
		}
		text := map[string]string{}
		for k, v := range fields {
			text[k] = fmt.Sprint(v)
		}
		lines = append(lines, text)
	}
	return lines
}

// serveConfiguration is the operator as this node sees it: the real server of
// configuration, and the real authority.
func (n *Node) serveConfiguration() {
	t := n.l.t
	t.Helper()
	var listener net.Listener
	var err error
	n.Do(t, func() {
		listener, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", operatorPort))
		Check(t, err)
	})
	g := grpc.NewServer(append(xds.GRPCOptions(), grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, err := n.l.signing.Load().ServerCertificate([]string{"localhost"}, time.Hour, time.Now())
			return &c, err
		}})))...)
	n.configuration = xds.NewServer(n.l.Store, xds.ServerOptions{
		Logger: slog.New(slog.DiscardHandler),
		Authorize: func(ctx context.Context) (xds.StreamIdentity, error) {
			tenant, generation, err := xds.ParseStreamMetadata(ctx)
			return xds.StreamIdentity{Node: n.Name, Tenant: tenant, Generation: generation}, err
		},
	})
	if n.l.o.Rewrite == nil {
		n.configuration.Register(g)
	} else {
		discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, &rewriting{server: n.configuration, node: n})
	}
	nodev1alpha1.RegisterNodeServiceServer(g, &signer{node: n})
	go g.Serve(listener)
	n.StopOperator = g.Stop
	t.Cleanup(g.Stop)
}

// AttachPod waits for the pod's proxy.
func (s *signer) AttachPod(ctx context.Context, r *nodev1alpha1.AttachPodRequest) (*nodev1alpha1.AttachPodResponse, error) {
	i := slices.IndexFunc(s.node.Pods, func(p *Host) bool { return p.Name == r.PodUid })
	if i < 0 {
		return nil, status.Errorf(codes.PermissionDenied, "%s has no pod %s", s.node.Name, r.PodUid)
	}
	tenant := s.node.Pods[i].Tenant
	if err := s.node.configuration.WaitServed(ctx, model.ProxyKey{Node: s.node.Name, Tenant: tenant}, r.PodUid); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &nodev1alpha1.AttachPodResponse{Tenant: tenant.String()}, nil
}

// signer signs for the node's own pods.
type signer struct {
	nodev1alpha1.UnimplementedNodeServiceServer
	node *Node
}

func (s *signer) SignCertificate(_ context.Context, r *nodev1alpha1.SignCertificateRequest) (*nodev1alpha1.SignCertificateResponse, error) {
	i := slices.IndexFunc(s.node.Pods, func(p *Host) bool { return p.Name == r.PodUid })
	if i < 0 {
		return nil, status.Errorf(codes.PermissionDenied, "%s has no pod %s", s.node.Name, r.PodUid)
	}
	ttl := time.Hour
	if s.node.l.o.Behind > 0 {
		ttl = identity.MinTTL
	}
	chain, err := s.node.l.signing.Load().Sign(r.Csr, s.node.Pods[i].Identity, ttl, time.Now().Add(-s.node.l.o.Behind))
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &nodev1alpha1.SignCertificateResponse{Chain: chain}, nil
}
