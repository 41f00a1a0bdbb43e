// Package container puts the ends of a benchmark's load where pods have theirs.
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

// cgroupRoot is where the node's cgroups are.
const cgroupRoot = "/sys/fs/cgroup"

// Put puts a process into a cgroup of its own of every hierarchy, as deep
// as the tenants' Envoys are and with the same limits: what runs in pods does so.
// Without it, the scheduler would give it a larger share than a tenant's Envoy, and
// nothing would count its memory. The process must have ended before the benchmark.
func Put(b *testing.B, name string, pid int) {
	b.Helper()
	for _, h := range hierarchies(b) {
		parent := filepath.Join(h, "bhtest-bench")
		for _, dir := range []string{parent, filepath.Join(parent, name)} {
			err := os.Mkdir(dir, 0o755)
			if err != nil && !errors.Is(err, fs.ErrExist) {
				b.Fatal(err)
			}
			if err == nil {
				b.Cleanup(func() { removeCgroup(b, dir) })
			}
			// Version 1's begins without CPUs and memory.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				if have, err := os.ReadFile(filepath.Join(dir, file)); err == nil && len(bytes.TrimSpace(have)) == 0 {
					inherited, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
					lab.Check(b, err)
					lab.Check(b, os.WriteFile(filepath.Join(dir, file), inherited, 0o644))
				}
			}
			for file, value := range map[string]string{"memory.limit_in_bytes": "1073741824", "memory.max": "1073741824"} {
				if _, err := os.Stat(filepath.Join(dir, file)); err == nil && dir != parent {
					lab.Check(b, os.WriteFile(filepath.Join(dir, file), []byte(value), 0o644))
				}
			}
		}
		for _, controller := range []string{"+cpu", "+memory", "+pids"} {
			// Of version 2, where it has them.
			if f, err := os.OpenFile(filepath.Join(parent, "cgroup.subtree_control"), os.O_WRONLY, 0); err == nil {
				f.WriteString(controller)
				f.Close()
			}
		}
		lab.Check(b, os.WriteFile(filepath.Join(parent, name, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644))
	}
}

// hierarchies is the one of version 2, or all of version 1 and version 2 beside them.
func hierarchies(b *testing.B) (dirs []string) {
	b.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		return []string{cgroupRoot}
	}
	entries, err := os.ReadDir(cgroupRoot)
	lab.Check(b, err)
	for _, e := range entries {
		if dir := filepath.Join(cgroupRoot, e.Name()); e.IsDir() && unix.Statfs(dir, &st) == nil && (st.Type == unix.CGROUP_SUPER_MAGIC || st.Type == unix.CGROUP2_SUPER_MAGIC) {
			dirs = append(dirs, dir)
		}
	}
	if len(dirs) == 0 {
		b.Fatalf("no cgroups in %s", cgroupRoot)
	}
	return dirs
}

func removeCgroup(b *testing.B, dir string) {
	b.Helper()
	deadline := time.Now().Add(lab.Patience)
	for {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return
		}
		// A process is in it until it is reaped, and a little longer.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			b.Error(fmt.Errorf("remove a cgroup: %w", err))
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}
