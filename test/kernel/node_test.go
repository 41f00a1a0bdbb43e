package kernel

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"sigs.k8s.io/yaml"

	"github.com/bulkhead-mesh/bulkhead/agent"
	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// operatorPort is where the nodes' agents find the operator, each on its own
// loopback: a node's connection says which node it is.
const operatorPort = 15012

// node is a node with a real agent.
type node struct {
	*host
	l      *lab
	number int
	dir    string
	pods   []*host
	// planned are those of them that the mesh has.
	planned []*host
	// canary is the share of new connections, in percent, that a second generation
	// of each proxy gets; there is none with 0.
	canary int
	// drain is how long one that isn't wanted any more may last; 0 is the default.
	drain time.Duration

	agent *exec.Cmd
	log   *os.File
}

func (l *lab) newNode(name string, router *namespace, number int) *node {
	t := l.t
	t.Helper()
	n := &node{
		host: &host{namespace: l.namespace(name), name: name, pair: addresses(fmt.Sprintf("172.20.%d.2", number), fmt.Sprintf("fd20:%d::2", number))},
		l:    l, number: number, dir: filepath.Join(l.dir, name),
	}
	n.do(t, func() { forward(t) })
	check(t, os.MkdirAll(filepath.Join(n.dir, "bpf"), 0o755))
	check(t, os.WriteFile(filepath.Join(n.dir, "token"), []byte("none"), 0o600))
	var err error
	n.log, err = os.Create(filepath.Join(n.dir, "agent.log"))
	check(t, err)
	n.remove() // of a test that was killed
	check(t, bpf.Mount(filepath.Join(n.dir, "bpf")))
	t.Cleanup(func() {
		n.kill()
		if t.Failed() {
			n.tell()
		}
		n.remove()
		check(t, unix.Unmount(filepath.Join(n.dir, "bpf"), unix.MNT_DETACH))
	})
	return n
}

func (n *node) isolation() isolation.Options {
	return isolation.Options{
		RunDir: filepath.Join(n.dir, "run"), LibDir: filepath.Join(n.dir, "lib"), EnvoyDir: n.l.envoys,
		CgroupName: "bhtest-kernel-" + n.name, Log: slog.New(slog.DiscardHandler),
	}
}

// remove removes what the agent made.
func (n *node) remove() {
	t := n.l.t
	t.Helper()
	n.do(t, func() {
		check(t, errors.Join(isolation.Uninstall(n.isolation()), bpf.Uninstall(n.pinDir()), identity.Uninstall(filepath.Join(n.dir, "run", "keys"))))
	})
}

func (n *node) pinDir() string { return filepath.Join(n.dir, "bpf", "bulkhead") }

// tell shows the ends of the logs of agent and proxies.
func (n *node) tell() {
	files, _ := filepath.Glob(filepath.Join(n.dir, "lib", "log", "*", "*"))
	for _, file := range append(files, n.log.Name()) {
		b, _ := os.ReadFile(file)
		n.l.t.Logf("%s:\n%s", file, b[max(0, len(b)-4<<10):])
	}
}

// plan writes the plan of the node's tenants and pods.
func (n *node) plan() string {
	t := n.l.t
	t.Helper()
	var roots bytes.Buffer
	for _, der := range n.l.authority.Roots() {
		check(t, pem.Encode(&roots, &pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	type object map[string]any
	var tenants, pods []object
	seen := map[string]bool{}
	for _, p := range n.planned {
		if name := p.tenant.String(); !seen[name] {
			seen[name] = true
			tenant := object{"name": name, "version": dist.Default, "limits": object{"memoryMax": int64(1 << 30)}}
			if n.canary > 0 {
				tenant["canary"] = object{"version": dist.Default, "weight": n.canary}
			}
			tenants = append(tenants, tenant)
		}
		pods = append(pods, object{"uid": p.name, "namespace": p.identity.Namespace, "name": p.name,
			"serviceAccount": p.identity.ServiceAccount, "tenant": p.tenant.String(), "netns": p.path})
	}
	b, err := yaml.Marshal(object{"trustDomain": trustDomain, "trustBundle": roots.String(), "tenants": tenants, "pods": pods})
	check(t, err)
	file := filepath.Join(n.dir, "plan.yaml")
	check(t, os.WriteFile(file, b, 0o600))
	return file
}

// start starts the agent.
func (n *node) start() {
	t := n.l.t
	t.Helper()
	o := n.isolation()
	cmd := exec.Command(filepath.Join(os.Getenv(dirVariable), "agent"), "run", "--plan", n.plan(),
		"--run-dir", o.RunDir, "--lib-dir", o.LibDir, "--envoy-dir", o.EnvoyDir, "--cgroup-name", o.CgroupName,
		"--pin-dir", n.pinDir(), "--linger", "100ms", "--drain", n.drain.String(), "--token-file", filepath.Join(n.dir, "token"), "--operator", fmt.Sprintf("localhost:%d", operatorPort))
	cmd.Env = append(os.Environ(), "NODE_NAME="+n.name)
	cmd.Stdout, cmd.Stderr = n.log, n.log
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	n.do(t, func() { check(t, cmd.Start()) })
	n.agent = cmd
	t.Cleanup(n.kill) // before the pods' namespaces go
}

// kill kills the agent and waits for its end.
func (n *node) kill() {
	if n.agent != nil {
		n.agent.Process.Kill()
		n.agent.Wait()
		n.agent = nil
	}
}

// agentTime is the CPU time that the agent has used.
func (n *node) agentTime(t *testing.T) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.agent.Process.Pid))
	check(t, err)
	// After the command in parentheses: fields 14 and 15 are in hundredths of a second.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	var user, system int64
	_, err = fmt.Sscan(fields[11]+" "+fields[12], &user, &system)
	check(t, err)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// inspect is what the agent says of the node.
func (n *node) inspect() (i agent.Inspection, err error) {
	var out bytes.Buffer
	o := agent.Options{RunDir: filepath.Join(n.dir, "run")}
	if err := agent.Control(context.Background(), o.ControlSocket(), "GET", "/inspect", nil, &out); err != nil {
		return i, err
	}
	return i, json.Unmarshal(out.Bytes(), &i)
}

// waitReady waits until all of the plan is so.
func (n *node) waitReady() {
	t := n.l.t
	t.Helper()
	eventually(t, "the plan of "+n.name, func() error {
		i, err := n.inspect()
		if err != nil {
			return err
		}
		steered := 0
		for _, tenant := range i.Tenants {
			if !tenant.Ready {
				return fmt.Errorf("tenant %s: %s", tenant.Name, tenant.Reason)
			}
			if tenant.Weight != n.canary {
				return fmt.Errorf("the canary of %s has weight %d", tenant.Name, tenant.Weight)
			}
			steered += len(tenant.Pods)
		}
		if i.Problem != "" || steered != len(n.planned) {
			return fmt.Errorf("%d of %d pods are steered: %s", steered, len(n.planned), i.Problem)
		}
		return nil
	})
}

// tenant is one tenant's part of what the agent says.
func (n *node) tenant(name string) agent.InspectedTenant {
	t := n.l.t
	t.Helper()
	i, err := n.inspect()
	check(t, err)
	k := slices.IndexFunc(i.Tenants, func(t agent.InspectedTenant) bool { return t.Name == name })
	if k < 0 {
		t.Fatalf("%s has no tenant %s", n.name, name)
	}
	return i.Tenants[k]
}

// memory is what the kernel charges a tenant's proxy, in bytes.
func (n *node) memory(t *testing.T, tenant string) (bytes int64) {
	t.Helper()
	for _, file := range []string{
		"/sys/fs/cgroup/memory/" + n.isolation().CgroupName + "/" + tenant + "/memory.usage_in_bytes",
		"/sys/fs/cgroup/" + n.isolation().CgroupName + "/" + tenant + "/memory.current",
	} {
		if b, err := os.ReadFile(file); err == nil {
			_, err = fmt.Sscan(string(b), &bytes)
			check(t, err)
			return bytes
		}
	}
	t.Fatalf("the node has no cgroup controller for the memory of %s", tenant)
	return 0
}

// proxy is a tenant's network namespace.
func (n *node) proxy(name string) *namespace {
	return enter(n.l.t, filepath.Join(n.dir, "run", "netns", name))
}

// accessLog is what a tenant's proxy has written so far, one connection a line.
func (n *node) accessLog(tenant string) (lines []map[string]string) {
	b, _ := os.ReadFile(filepath.Join(n.dir, "lib", "log", tenant, "envoy0.log"))
	for line := range strings.Lines(string(b)) {
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
func (n *node) serveConfiguration() {
	t := n.l.t
	t.Helper()
	certificate, err := n.l.authority.ServerCertificate([]string{"localhost"}, time.Hour, time.Now())
	check(t, err)
	var listener net.Listener
	n.do(t, func() {
		listener, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", operatorPort))
		check(t, err)
	})
	g := grpc.NewServer(append(xds.GRPCOptions(), grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{certificate}})))...)
	xds.NewServer(n.l.store, xds.ServerOptions{
		Logger: slog.New(slog.DiscardHandler),
		Authorize: func(ctx context.Context) (xds.StreamIdentity, error) {
			tenant, generation, err := xds.ParseStreamMetadata(ctx)
			return xds.StreamIdentity{Node: n.name, Tenant: tenant, Generation: generation}, err
		},
	}).Register(g)
	nodev1alpha1.RegisterNodeServiceServer(g, &signer{node: n})
	go g.Serve(listener)
	t.Cleanup(g.Stop)
}

// signer signs for the node's own pods.
type signer struct {
	nodev1alpha1.UnimplementedNodeServiceServer
	node *node
}

func (s *signer) SignCertificate(_ context.Context, r *nodev1alpha1.SignCertificateRequest) (*nodev1alpha1.SignCertificateResponse, error) {
	i := slices.IndexFunc(s.node.pods, func(p *host) bool { return p.name == r.PodUid })
	if i < 0 {
		return nil, status.Errorf(codes.PermissionDenied, "%s has no pod %s", s.node.name, r.PodUid)
	}
	chain, err := s.node.l.authority.Sign(r.Csr, s.node.pods[i].identity, time.Hour, time.Now())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &nodev1alpha1.SignCertificateResponse{Chain: chain}, nil
}
