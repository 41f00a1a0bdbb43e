package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/hack/cluster/build"
	"github.com/bulkhead-mesh/bulkhead/hack/cluster/machine"
)

func TestBadInput(t *testing.T) {
	t.Setenv("BULKHEAD_STATE", filepath.Join(t.TempDir(), "state"))
	for _, tc := range []struct {
		args []string
		says string
		root bool // it is looked at after root was asked for
	}{
		{nil, "usage: cluster", false},
		{[]string{"start"}, `unknown command "start"; usage`, false},
		{[]string{"--what", "up"}, "usage: cluster", false},
		{[]string{"--name", "../x", "status"}, "cluster name", true},
		{[]string{"up", "--nodes", "0"}, "N from 1 to", true},
		{[]string{"up", "now"}, "usage: up", true},
		{[]string{"status"}, "start one: go run ./hack/cluster up", true},
		{[]string{"load", "/none.tar"}, "start one: go run ./hack/cluster up", true},
		{[]string{"kubectl", "get", "nodes"}, "start one: go run ./hack/cluster up", true},
	} {
		err := run(t.Context(), tc.args)
		says := tc.says
		if tc.root && os.Geteuid() != 0 {
			says = "run this as root"
		}
		if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want one line with %q", tc.args, err, says)
		}
	}
	err := checkFree(t.TempDir(), math.MaxUint64)
	if err == nil || !strings.Contains(err.Error(), "free some") || strings.Contains(err.Error(), "\n") {
		t.Errorf("a disk that is too small: %v", err)
	}
}

// asChild runs the real command in a process of its own, which can be killed.
const asChild = "BULKHEAD_CLUSTER_TEST"

func TestMain(m *testing.M) {
	if os.Getenv(asChild) != "" || len(os.Args) > 1 && os.Args[1] == machine.InitArg {
		main()
		return
	}
	os.Exit(m.Run())
}

// traces of a cluster on this machine, whether it runs or was left.
func traces(t *testing.T, name string) []string {
	t.Helper()
	var found []string
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Name == "bh-"+name {
			found = append(found, "link "+l.Name)
		}
	}
	groups, err := filepath.Glob("/sys/fs/cgroup/*/bulkhead-" + name + "*")
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		found = append(found, "cgroup "+g)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), stateDir()) {
		found = append(found, "a mount below "+stateDir())
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range commands {
		if b, err := os.ReadFile(c); err == nil && strings.Contains(string(b), stateDir()) {
			found = append(found, "process "+string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
		}
	}
	if _, err := os.Stat(filepath.Join(stateDir(), name)); err == nil {
		found = append(found, "state "+filepath.Join(stateDir(), name))
	}
	return found
}

// TestUpKilledAndDown kills up -9 at random moments; the next up cleans up after
// it and comes up, and down leaves nothing.
func TestUpKilledAndDown(t *testing.T) {
	if testing.Short() {
		t.Skip("starts clusters")
	}
	const name = "test"
	// Or up would only be killed while it builds.
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := build.Ensure(t.Context(), cache, t.Logf); err != nil {
		t.Fatal(err)
	}
	t.Setenv("BULKHEAD_STATE", t.TempDir()+"/state")
	t.Setenv("KUBECONFIG", filepath.Join(t.TempDir(), "kubeconfig")) // the user's stays as it is
	cluster := func(ctx context.Context, args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"--name", name}, args...)...)
		cmd.Env = append(os.Environ(), asChild+"=1")
		cmd.WaitDelay = 5 * time.Second // what it started may hold its output
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return cmd
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := cluster(t.Context(), args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	t.Cleanup(func() {
		out, err := cluster(context.Background(), "down").CombinedOutput()
		if err != nil {
			t.Errorf("down: %v\n%s", err, out)
		}
	})
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(500+rand.IntN(9000))*time.Millisecond)
		out, err := cluster(ctx, "up", "--nodes", "1").CombinedOutput()
		t.Logf("killed: %v: %v\n%s", ctx.Err(), err, out)
		cancel()
	}
	must("up", "--nodes", "1")
	if again := must("up", "--nodes", "1"); !strings.Contains(again, "is up already") {
		t.Errorf("up again: %s", again)
	}
	if err := cluster(t.Context(), "up", "--nodes", "3").Run(); err == nil {
		t.Error("another number of nodes was accepted while it runs")
	}
	must("status")
	var nodes struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				Conditions []struct{ Type, Status string }
			}
		}
	}
	if err := json.Unmarshal([]byte(must("kubectl", "get", "nodes", "-o", "json")), &nodes); err != nil {
		t.Fatal(err)
	}
	if len(nodes.Items) != 1 || !slices.ContainsFunc(nodes.Items[0].Status.Conditions, func(c struct{ Type, Status string }) bool {
		return c.Type == "Ready" && c.Status == "True"
	}) {
		t.Errorf("nodes: %+v", nodes)
	}
	if found := traces(t, name); len(found) < 4 {
		t.Errorf("it runs, and there is only %q: looking there proves nothing", found)
	}
	must("down")
	for _, f := range traces(t, name) {
		t.Errorf("left: %s", f)
	}
	if again := must("down"); !strings.Contains(again, "there is no cluster "+name) {
		t.Errorf("down again: %s", again)
	}
}

// What failed is told when the time is over, also by what was cut off at once.
func TestWaitTellsWhy(t *testing.T) {
	broken := errors.New("no space left")
	for name, f := range map[string]func(context.Context) error{
		"once and again": func(context.Context) error { return broken },
		"cut off":        func(ctx context.Context) error { <-ctx.Done(); return broken },
		"then cut off": func() func(context.Context) error {
			asked := false
			return func(ctx context.Context) error {
				if asked {
					<-ctx.Done()
					return ctx.Err()
				}
				asked = true
				return broken
			}
		}(),
	} {
		if err := wait(t.Context(), 300*time.Millisecond, name, f); !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
