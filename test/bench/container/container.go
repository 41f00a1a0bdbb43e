// Package container puts the processes of benchmarks where those of pods are.
package container

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// root is where the node's cgroups are.
const root = "/sys/fs/cgroup"

// Limits of a container; 0 is none.
type Limits struct {
	// Memory in bytes.
	Memory int64
	// CPUMillis are thousandths of a CPU.
	CPUMillis int64
}

// Pod is bounded as the lab's proxies are.
var Pod = Limits{Memory: 1 << 30}

// Put puts a process into a cgroup of its own of every hierarchy, as deep as the
// tenants' Envoys are. Without it, the scheduler would give it a larger share than a
// tenant's Envoy, and nothing would count its memory. The process must have ended
// before the benchmark.
func Put(t testing.TB, name string, pid int, l Limits) {
	t.Helper()
	for _, h := range hierarchies(t) {
		parent := filepath.Join(h, "bhtest-bench")
		for _, dir := range []string{parent, filepath.Join(parent, name)} {
			makeCgroup(t, dir)
		}
		for _, controller := range []string{"+cpu", "+memory", "+pids"} {
			// Of version 2, where it has them.
			if f, err := os.OpenFile(filepath.Join(parent, "cgroup.subtree_control"), os.O_WRONLY, 0); err == nil {
				f.WriteString(controller)
				f.Close()
			}
		}
		limit(t, filepath.Join(parent, name), l)
		lab.Check(t, os.WriteFile(filepath.Join(parent, name, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644))
	}
}

func makeCgroup(t testing.TB, dir string) {
	t.Helper()
	err := os.Mkdir(dir, 0o755)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	if err == nil {
		t.Cleanup(func() { removeCgroup(t, dir) })
	}
	// Version 1's begins without CPUs and memory.
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		if have, err := os.ReadFile(filepath.Join(dir, file)); err == nil && len(bytes.TrimSpace(have)) == 0 {
			inherited, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
			lab.Check(t, err)
			lab.Check(t, os.WriteFile(filepath.Join(dir, file), inherited, 0o644))
		}
	}
}

func limit(t testing.TB, dir string, l Limits) {
	t.Helper()
	const period = 100_000
	quota := l.CPUMillis * period / 1000
	files := map[string]string{}
	if l.Memory > 0 {
		files["memory.limit_in_bytes"], files["memory.max"] = strconv.FormatInt(l.Memory, 10), strconv.FormatInt(l.Memory, 10)
	}
	if quota > 0 {
		files["cpu.cfs_quota_us"], files["cpu.max"] = strconv.FormatInt(quota, 10), fmt.Sprintf("%d %d", quota, period)
	}
	for file, value := range files {
		if _, err := os.Stat(filepath.Join(dir, file)); err == nil {
			lab.Check(t, os.WriteFile(filepath.Join(dir, file), []byte(value), 0o644))
		}
	}
}

// hierarchies is the one of version 2, or all of version 1 and version 2 beside them.
func hierarchies(t testing.TB) (dirs []string) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		return []string{root}
	}
	entries, err := os.ReadDir(root)
	lab.Check(t, err)
	for _, e := range entries {
		if dir := filepath.Join(root, e.Name()); e.IsDir() && unix.Statfs(dir, &st) == nil && (st.Type == unix.CGROUP_SUPER_MAGIC || st.Type == unix.CGROUP2_SUPER_MAGIC) {
			dirs = append(dirs, dir)
		}
	}
	if len(dirs) == 0 {
		t.Fatalf("no cgroups in %s", root)
	}
	return dirs
}

func removeCgroup(t testing.TB, dir string) {
	t.Helper()
	deadline := time.Now().Add(lab.Patience)
	for {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return
		}
		// A process is in it until it is reaped, and a little longer.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			t.Error(fmt.Errorf("remove a cgroup: %w", err))
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}
