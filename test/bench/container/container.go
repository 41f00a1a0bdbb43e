// Package container puts the processes of benchmarks where those of pods are.
package container

import (
	"bytes"
	"cmp"
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
	// Group is the cgroup that it is in, one of the root's, which all of a group share
	// the CPUs of. Default "bench".
	Group string
	// Memory in bytes.
	Memory int64
	// CPUMillis are thousandths of a CPU.
	CPUMillis int64
	// CPUWeight in version 2's terms; 0 is the normal 100.
	CPUWeight int64
	// CPUs that it may use; nil is all.
	CPUs []int
	// Prompt has what measures wait for nobody: it asks for the shortest slices of a
	// CPU, so that with a large CPUWeight it runs as soon as it is woken.
	Prompt bool
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
		parent := filepath.Join(h, "bhtest-"+cmp.Or(l.Group, "bench"))
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
	if l.CPUs != nil {
		Pin(t, pid, l.CPUs...)
	}
	if l.Prompt {
		shortSlices(t, pid)
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
	// Short, or a bounded load comes in bursts as long as the quota lasts.
	const period = 10_000
	quota := l.CPUMillis * period / 1000
	files := map[string]string{}
	if l.Memory > 0 {
		files["memory.limit_in_bytes"], files["memory.max"] = strconv.FormatInt(l.Memory, 10), strconv.FormatInt(l.Memory, 10)
	}
	if quota > 0 {
		files["cpu.max"] = fmt.Sprintf("%d %d", quota, period)
		if _, err := os.Stat(filepath.Join(dir, "cpu.cfs_quota_us")); err == nil {
			lab.Check(t, os.WriteFile(filepath.Join(dir, "cpu.cfs_period_us"), []byte(strconv.Itoa(period)), 0o644))
			lab.Check(t, os.WriteFile(filepath.Join(dir, "cpu.cfs_quota_us"), []byte(strconv.FormatInt(quota, 10)), 0o644))
		}
	}
	if l.CPUWeight > 0 {
		files["cpu.shares"], files["cpu.weight"] = strconv.FormatInt(l.CPUWeight*1024/100, 10), strconv.FormatInt(l.CPUWeight, 10)
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

func shortSlices(t testing.TB, pid int) {
	t.Helper()
	eachThread(t, pid, func(tid int) error {
		attr, err := unix.SchedGetAttr(tid, 0)
		if err == nil {
			attr.Runtime = uint64(100 * time.Microsecond)
			err = unix.SchedSetAttr(tid, attr, 0)
		}
		return err
	})
}

// Pin has a process run on these CPUs alone.
func Pin(t testing.TB, pid int, cpus ...int) {
	t.Helper()
	var set unix.CPUSet
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	eachThread(t, pid, func(tid int) error { return unix.SchedSetaffinity(tid, &set) })
}

// eachThread calls f for all threads, until no new ones are found; those to come inherit
// what theirs have.
func eachThread(t testing.TB, pid int, f func(tid int) error) {
	t.Helper()
	done := map[string]bool{}
	for found := true; found; {
		found = false
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		lab.Check(t, err)
		for _, thread := range threads {
			if done[thread.Name()] {
				continue
			}
			done[thread.Name()], found = true, true
			tid, err := strconv.Atoi(thread.Name())
			lab.Check(t, err)
			if err := f(tid); err != nil && !errors.Is(err, unix.ESRCH) {
				t.Fatal(err)
			}
		}
	}
}
