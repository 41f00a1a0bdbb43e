package isolation

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// standinVersion is the version of Envoy that is no Envoy.
const standinVersion = "0.0.0-standin"

// buildStandin takes the program that is there already where no compiler is.
var buildStandin = sync.OnceValues(func() ([]byte, error) {
	if path := os.Getenv("BULKHEAD_TEST_STANDIN"); path != "" {
		return os.ReadFile(path)
	}
	dir, err := os.MkdirTemp("", "standin")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "standin")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./testdata/standin")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build standin: %w: %s", err, out)
	}
	return os.ReadFile(path)
})

// standinTargets are what the program is told to attack.
type standinTargets struct {
	PID                              int
	Folder, Socket, Abstract         string
	Node, Node6, Loopback, Loopback6 string
}

// useStandin makes the program the only version of Envoy, with an order for each
// generation; without one it serves. It returns the program's path.
func (n *node) useStandin(orders map[int]string, targets standinTargets) string {
	n.t.Helper()
	program, err := buildStandin()
	if err != nil {
		n.t.Fatal(err)
	}
	generations := map[string]string{}
	for generation, order := range orders {
		generations[strconv.Itoa(generation)] = order
	}
	data, err := json.Marshal(map[string]any{"Generations": generations, "Targets": targets})
	if err != nil {
		n.t.Fatal(err)
	}
	n.o.EnvoyDir = n.t.TempDir()
	tree := filepath.Join(n.o.EnvoyDir, standinVersion)
	if err := os.Mkdir(tree, 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "orders.json"), data, 0o644); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "envoy"), program, 0o755); err != nil {
		n.t.Fatal(err)
	}
	return filepath.Join(tree, "envoy")
}

// patience is more where the processor is software.
func patience() time.Duration {
	if os.Getenv("BULKHEAD_TEST_STANDIN") != "" {
		return 2 * time.Minute
	}
	return time.Minute
}

// await waits until the state of a tenant is as it should be.
func (n *node) await(m *Manager, name model.Tenant, what string, ok func(State) bool) State {
	n.t.Helper()
	for deadline := time.Now().Add(patience()); ; {
		s, _ := m.State(name)
		if ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("tenant %s: %s: %+v", name, what, s)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// A program that means harm gets nowhere, and what stopped it was the bulkhead:
// outside, the same calls succeed.
func TestSandboxHoldsAProbe(t *testing.T) {
	n := newNode(t)
	sleeper := exec.Command("sleep", "300")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sleeper.Process.Kill(); sleeper.Wait() })
	targets := standinTargets{PID: sleeper.Process.Pid, Folder: t.TempDir(), Abstract: "@bulkhead-admin-77"}
	targets.Loopback, targets.Loopback6 = listenTCP(t, "127.0.0.1"), listenTCP(t, "::1")
	nodeAddress(t, n.o.LinkPrefix+"n", "198.51.100.7/32", "2001:db8:7::7/128")
	targets.Node, targets.Node6 = listenTCP(t, "198.51.100.7"), listenTCP(t, "2001:db8:7::7")
	o := n.o.mustDefault(t)
	targets.Socket = filepath.Join(o.xdsDir(tenantB, 77), "xds.sock")

	const killed = "killed"
	probes := []struct {
		order string
		// want is what it is told inside, or killed. Outside it succeeds.
		want string
	}{
		{"ptrace", killed}, {"mount", killed}, {"bpf", killed}, {"userns", killed},
		{"raw", "operation not permitted"}, {"raw6", "operation not permitted"},
		{"packet", "address family not supported"}, {"netlink", "address family not supported"},
		{"transparent", "it is 0"}, // answered, not done
		{"xds", "no such file"}, {"admin", "connection refused"}, {"processes", "there are 0"},
		{"signal", "no such process"}, {"file", "no such file"},
		// Nothing answers a tenant: not even the node knows a way to its address.
		{"node", "timeout"}, {"node6", "timeout"},
		{"loopback", "connection refused"}, {"loopback6", "timeout"},
	}
	orders := map[int]string{}
	var generations []Generation
	for i, p := range probes {
		orders[i] = p.order
		generations = append(generations, Generation{i, standinVersion})
	}
	program := n.useStandin(orders, targets)
	m := n.open()
	n.serveXDS(m, tenantB, 77, nil)
	if err := m.Update(t.Context(), Spec{Tenant: tenantB, Generations: []Generation{{77, standinVersion}}}); err != nil {
		t.Fatal(err)
	}
	other := n.await(m, tenantB, "isn't live", func(s State) bool { return len(s.Processes) == 1 && s.Processes[0].Live })
	// One after the other: all at once are too many to start in time where the processor
	// is software.
	for i := range generations {
		if err := m.Update(t.Context(), Spec{Tenant: tenantA, Generations: generations[:i+1]}); err != nil {
			t.Fatal(err)
		}
	}
	arguments, err := json.Marshal(targets)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range probes {
		t.Run(p.order, func(t *testing.T) {
			inside := func() string {
				data, _ := os.ReadFile(m.LogFile(tenantA, i))
				return string(data)
			}
			if p.want == killed {
				s := n.await(m, tenantA, p.order+" wasn't killed", func(s State) bool { return s.Processes[i].Exit.Cause != "" })
				if e := s.Processes[i].Exit; e.Cause != CauseForbiddenCall || e.Log != "trying "+p.order {
					t.Errorf("inside: %+v", e)
				}
			} else {
				n.await(m, tenantA, p.order+" came to no end", func(State) bool { return strings.Count(inside(), "\n") >= 2 })
				if got := inside(); !strings.HasPrefix(got, "trying "+p.order+"\nrefused "+p.order+":") || !strings.Contains(got, p.want) {
					t.Errorf("inside: %s, want %s", got, p.want)
				}
			}
			command := []string{program, "try", p.order, string(arguments)}
			if p.order == "admin" {
				command = append([]string{"nsenter", "--net=" + other.Netns}, command...)
			}
			out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
			if err != nil || !strings.HasSuffix(string(out), "done "+p.order+"\n") {
				t.Errorf("outside: %v %s", err, out)
			}
			unix.Unmount(targets.Folder, 0)
		})
	}
}

// mustDefault fills in the defaults, for paths that no manager is there for yet.
func (o Options) mustDefault(t *testing.T) Options {
	o, err := o.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func listenTCP(t *testing.T, ip string) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// nodeAddress gives the node a link with addresses of its own.
func nodeAddress(t *testing.T, name string, cidrs ...string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	// Kernels that lack dummy links have these: bulkheads are made with them.
	link := &netlink.Veth{LinkAttrs: attrs, PeerName: name + "p"}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(link) })
	for _, cidr := range cidrs {
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			t.Fatal(err)
		}
		a.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
}
