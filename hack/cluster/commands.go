package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/cluster/build"
	"github.com/bulkhead-mesh/bulkhead/hack/cluster/machine"
)

// errNotUp tells how to get a cluster.
var errNotUp = errors.New("there is no cluster; start one: go run ./hack/cluster up")

// status prints one line a machine.
func status(c cluster) error {
	for n := 0; n <= c.Nodes; n++ {
		m, ok, err := machine.Find(c.machineDir(n))
		if err != nil {
			return err
		}
		state := "doesn't run"
		if ok {
			state = fmt.Sprintf("runs as process %d", m.PID)
		}
		fmt.Printf("%-15s %s\n", filepath.Base(c.machineDir(n)), state)
	}
	if !c.running() {
		return errors.New("the cluster is not whole; end it: go run ./hack/cluster down")
	}
	fmt.Printf("%-15s %s\n%-15s %s\n%-15s %s\n", "server", c.server(), "kubeconfig", c.kubeconfig(), "logs", c.path("*", "log"))
	return nil
}

// binaries are the cluster's programs, built if they aren't in the cache.
func binaries(ctx context.Context) (build.Binaries, error) {
	cache, err := cacheDir()
	if err != nil {
		return build.Binaries{}, err
	}
	return build.Ensure(ctx, cache, say)
}

// load imports image archives into a node's containerd.
func (c cluster) load(ctx context.Context, bin build.Binaries, n int, archives ...string) error {
	m, ok, err := machine.Find(c.machineDir(n))
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%s doesn't run", nodeName(n))
	}
	root := fmt.Sprintf("/proc/%d/root", m.PID)
	socket := root + containerdSocket
	ctr := func(ctx context.Context, what string, args ...string) error {
		cmd := exec.CommandContext(ctx, bin.Path("ctr"), append([]string{"--address", socket, "--namespace", "k8s.io"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", what, err, strings.TrimSpace(string(out)))
		}
		return nil
	}
	if err := wait(ctx, patience, "containerd of "+nodeName(n), func(ctx context.Context) error {
		if _, err := os.Stat(socket); err != nil {
			return err
		}
		return ctr(ctx, "ask for its version", "version") // its socket is there before it serves
	}); err != nil {
		return err
	}
	for _, archive := range archives {
		// All layers, whatever the platform: the archives hold one. It takes as long as
		// the disk does.
		if err := ctr(ctx, "load "+archive+" into "+nodeName(n), "images", "import", "--local", archive); err != nil {
			return err
		}
	}
	return nil
}

// kubectl runs the cluster's own kubectl and shows its output only if it fails.
func (c cluster) kubectl(ctx context.Context, bin build.Binaries, stdin string, args ...string) error {
	cmd := exec.CommandContext(ctx, bin.Path("kubectl"), append([]string{"--kubeconfig", c.kubeconfig()}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// become replaces this process, with one variable of the environment set.
func become(path string, args []string, key, value string) error {
	// Not appended: of two of one name, Go's programs take the first.
	if err := os.Setenv(key, value); err != nil {
		return err
	}
	return fmt.Errorf("run %s: %w", path, unix.Exec(path, append([]string{path}, args...), os.Environ()))
}

// execKubectl becomes the cluster's kubectl.
func execKubectl(ctx context.Context, c cluster, args []string) error {
	bin, err := binaries(ctx)
	if err != nil {
		return err
	}
	return become(bin.Path("kubectl"), args, "KUBECONFIG", c.kubeconfig())
}

// printEnv prints shell commands that make a shell use the cluster.
func printEnv(ctx context.Context, c cluster) error {
	bin, err := binaries(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("export KUBECONFIG='%s' PATH='%s':\"$PATH\"\n", c.kubeconfig(), filepath.Dir(bin.Path("kubectl")))
	return nil
}

// execNode becomes a command in a node's namespaces.
func execNode(c cluster, args []string) error {
	if len(args) < 2 {
		return errors.New("usage: exec NODE -- COMMAND [ARGUMENT…]")
	}
	for n := 0; n <= c.Nodes; n++ {
		if filepath.Base(c.machineDir(n)) != args[0] {
			continue
		}
		m, ok, err := machine.Find(c.machineDir(n))
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%s doesn't run", args[0])
		}
		nsenter, err := exec.LookPath("nsenter")
		if err != nil {
			return err
		}
		command := args[1:]
		if command[0] == "--" {
			command = command[1:]
		}
		enter := []string{"--target", fmt.Sprint(m.PID), "--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--root", "--wd=/", "--"}
		return become(nsenter, append(enter, command...), "PATH", binDir+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	return fmt.Errorf("no machine %q; there are control-plane and node1 to node%d", args[0], c.Nodes)
}

// checkFree refuses to start on a disk that would fill up.
func checkFree(dir string, min uint64) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return fmt.Errorf("statfs %s: %w", dir, err)
	}
	if free := s.Bavail * uint64(s.Bsize); free < min {
		return fmt.Errorf("%s has %.1f GiB free and %d are needed: free some, or set BULKHEAD_STATE and BULKHEAD_CACHE to folders on another disk",
			dir, float64(free)/(1<<30), min>>30)
	}
	return nil
}
