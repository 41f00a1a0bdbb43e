package isolation

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

func TestMain(m *testing.M) {
	// The test binary is its own launcher.
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "sandbox-init":
			SandboxInit()
		case "manage":
			manage(os.Args[2])
		case "churn":
			churn(os.Args[2])
		case "filtered":
			filtered(os.Args[2])
		case "burn":
			burning()
		}
	}
	os.Exit(m.Run())
}

var tenantA, tenantB = model.NamespaceTenant("bhi-a"), model.NamespaceTenant("bhi-b")

// node is a place for managers, which must be empty at the end of the test.
type node struct {
	t *testing.T
	o Options
}

func newNode(t *testing.T) *node {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root and a real Envoy: make test-kernel")
	}
	envoy, err := dist.Fetch(t.Context(), dist.Default)
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir itself: tenants' uids need no way to it, but a long path shows
	// what breaks with sockets.
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
		t.Fatal(err)
	}
	n := &node{t, Options{
		RunDir: filepath.Join(dir, "run"), LibDir: filepath.Join(dir, "lib"), EnvoyDir: filepath.Dir(envoy.Dir),
		// Another run of these tests, or an agent, may be on this machine.
		CgroupName: fmt.Sprintf("bhtest-%d", os.Getpid()), LinkPrefix: "b" + strconv.FormatInt(int64(os.Getpid()), 36) + "x",
		UIDBase: uint32(1_000_000_000 + os.Getpid()%100_000*8192), Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}}
	t.Cleanup(func() {
		if err := Uninstall(n.o); err != nil {
			t.Error(err)
		}
		n.wantNothingLeft()
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return n
}

func (n *node) open() *Manager {
	n.t.Helper()
	m, err := Open(n.o)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(m.Close)
	return m
}

// wantNothingLeft looks at the kernel for what a bulkhead is made of.
func (n *node) wantNothingLeft() {
	n.t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, n.o.LinkPrefix) {
			n.t.Errorf("link %s is left", l.Attrs().Name)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		n.t.Fatal(err)
	}
	if strings.Contains(string(mounts), n.o.RunDir+"/netns") {
		n.t.Error("network namespaces are left mounted")
	}
	cgroups, err := filepath.Glob("/sys/fs/cgroup/*/" + n.o.CgroupName)
	if err != nil || len(cgroups) > 0 {
		n.t.Errorf("cgroups are left: %v %v", cgroups, err)
	}
	for _, dir := range []string{n.o.RunDir, n.o.LibDir} {
		if _, err := os.Stat(dir); err == nil {
			n.t.Errorf("%s is left", dir)
		}
	}
	for _, pid := range n.processes() {
		n.t.Errorf("process %d is left", pid)
	}
}

// processes are those that run with a uid of the node's tenants.
func (n *node) processes() (pids []int) {
	n.t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		n.t.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		var uid uint32
		for line := range strings.Lines(string(data)) {
			fmt.Sscanf(line, "Uid:\t%d", &uid)
		}
		// A child of a closed manager stays a zombie of this program.
		if err == nil && uid > n.o.UIDBase && uid <= n.o.UIDBase+maxIndex && !strings.Contains(string(data), "State:\tZ") {
			var pid int
			fmt.Sscanf(file, "/proc/%d", &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}

// serveXDS answers on the generation's socket with these resources, by their names.
func (n *node) serveXDS(m *Manager, name model.Tenant, generation int, resources map[string]proto.Message) {
	n.t.Helper()
	b, err := m.Prepare(n.t.Context(), name, 1400)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := m.MakeXDSDir(name, generation); err != nil {
		n.t.Fatal(err)
	}
	path := b.XDSSocket(generation)
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		n.t.Fatal(err)
	}
	defer dir.Close()
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/xds.sock", dir.Fd()))
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.Chown(path, int(b.UID), int(b.UID)); err != nil {
		n.t.Fatal(err)
	}
	s := grpc.NewServer()
	clusterservice.RegisterAggregatedDiscoveryServiceServer(s, fixedADS{resources: resources})
	go s.Serve(l)
	n.t.Cleanup(s.Stop)
}

type fixedADS struct {
	clusterservice.UnimplementedAggregatedDiscoveryServiceServer
	resources map[string]proto.Message
}

// DeltaAggregatedResources sends all of a type when it is first asked for.
func (a fixedADS) DeltaAggregatedResources(stream clusterservice.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		if req.ErrorDetail != nil {
			return fmt.Errorf("%s was rejected: %s", req.TypeUrl, req.ErrorDetail.Message)
		}
		if req.ResponseNonce != "" {
			continue
		}
		res := &clusterservice.DeltaDiscoveryResponse{TypeUrl: req.TypeUrl, Nonce: "1"}
		for name, message := range a.resources {
			packed, err := anypb.New(message)
			if err != nil {
				return err
			}
			if packed.TypeUrl == req.TypeUrl {
				res.Resources = append(res.Resources, &clusterservice.Resource{Name: name, Version: "1", Resource: packed})
			}
		}
		if err := stream.Send(res); err != nil {
			return err
		}
	}
}

// run starts generation 1 of the tenant and returns its live process.
func (n *node) run(m *Manager, name model.Tenant, l Limits) Process {
	n.t.Helper()
	n.serveXDS(m, name, 1, nil)
	err := m.Update(n.t.Context(), Spec{Tenant: name, MTU: 1400, Limits: l, Generations: []Generation{{1, dist.Default}}})
	if err != nil {
		n.t.Fatal(err, n.logs(m, name))
	}
	return n.waitLive(m, name, 0)
}

// waitLive waits for a live process of generation 1 with another pid.
func (n *node) waitLive(m *Manager, name model.Tenant, other int) Process {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), patience())
	defer cancel()
	for {
		s, _ := m.State(name)
		if len(s.Processes) == 1 && s.Processes[0].Live && s.Processes[0].PID != other {
			return s.Processes[0]
		}
		select {
		case <-ctx.Done():
			n.t.Fatalf("tenant %s isn't live: %+v\n%s", name, s, n.logs(m, name))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (n *node) logs(m *Manager, name model.Tenant) string {
	data, _ := os.ReadFile(m.LogFile(name, 1))
	return string(data)
}

func alive(pid int) bool { return unix.Kill(pid, 0) == nil }
