package nodestate

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Count says how much of a mesh is on the node of whom host is the root directory:
// files, cgroups, mounts, proxies, entries of BPF maps, and of agent and operator
// the open files and the private memory in KiB. The caller must be in the node's
// network and pid namespace.
func Count(host string) (map[string]int, error) {
	counts := map[string]int{}
	for _, count := range []func(string, map[string]int) error{countTrees, countProcesses, countMaps} {
		if err := count(host, counts); err != nil {
			return nil, err
		}
	}
	found, err := mounts(host)
	counts["mounts"] = len(found)
	return counts, err
}

// countTrees counts files, and the folders of cgroups.
func countTrees(host string, counts map[string]int) error {
	walk := func(root string, inside bool, of string) error {
		return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil // what is gone isn't there
			}
			if err == nil && d.IsDir() == (of == "cgroups") && (inside || strings.Contains(path+"/", "/"+name+"/")) {
				counts[of]++
			}
			return err
		})
	}
	return errors.Join(walk(filepath.Join(host, "var/lib", name), true, "files"), walk(filepath.Join(host, "run", name), true, "files"),
		walk(filepath.Join(host, "sys/fs/cgroup"), false, "cgroups"))
}

// Processes are those that were started by a path, but for an agent's commands that
// look at a node.
func Processes(program string) (pids []int, err error) {
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, path := range commands {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, err
		}
		args := strings.Split(string(b), "\x00")
		if args[0] != program || filepath.Base(program) == "agent" && (len(args) < 2 || args[1] != "run") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

func countProcesses(host string, counts map[string]int) error {
	all, err := processes(host)
	if err != nil {
		return err
	}
	for _, p := range all {
		if strings.HasSuffix(p, "envoy") {
			counts["proxies"]++
		}
	}
	for _, program := range []string{"agent", "operator"} {
		pids, err := Processes("/" + name + "/" + program)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			dir := filepath.Join("/proc", strconv.Itoa(pid))
			open, err := os.ReadDir(filepath.Join(dir, "fd"))
			if err != nil {
				return err
			}
			memory, err := privateMemory(dir)
			if err != nil {
				return err
			}
			counts["open files of the "+program] += len(open)
			counts["KiB of the "+program] += memory
		}
	}
	return nil
}

func privateMemory(dir string) (kib int, err error) {
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return 0, err
	}
	_, rest, _ := bytes.Cut(status, []byte("RssAnon:"))
	if _, err := fmt.Sscan(string(rest), &kib); err != nil {
		return 0, fmt.Errorf("read the memory of %s: %w", dir, err)
	}
	return kib, nil
}

// countMaps counts the entries of maps.
func countMaps(host string, counts map[string]int) error {
	entries, err := MapEntries(filepath.Join(host, "sys/fs/bpf", name, "maps"))
	for name, n := range entries {
		counts["entries of "+name] = n
	}
	return err
}

// MapEntries says how many entries the BPF maps have that are pinned in a folder, by name:
// but for arrays, and for those of which the kernel drops the oldest when they are full.
// A folder that isn't there has none.
func MapEntries(dir string) (map[string]int, error) {
	pins, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a node without eBPF
	}
	if err != nil {
		return nil, err
	}
	entries := map[string]int{}
	hashes := []ebpf.MapType{ebpf.Hash, ebpf.PerCPUHash, ebpf.LPMTrie, ebpf.HashOfMaps}
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, pin.Name()), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return nil, fmt.Errorf("open map %s: %w", pin.Name(), err)
		}
		if slices.Contains(hashes, m.Type()) {
			entries[pin.Name()], err = countKeys(m)
		}
		m.Close()
		if err != nil {
			return nil, fmt.Errorf("count map %s: %w", pin.Name(), err)
		}
	}
	return entries, nil
}

func countKeys(m *ebpf.Map) (n int, err error) {
	var key any // nil is before the first
	for ; n <= int(m.MaxEntries()); n++ {
		next, err := m.NextKeyBytes(key)
		if err != nil || next == nil {
			return n, err
		}
		key = next
	}
	return n, nil
}
