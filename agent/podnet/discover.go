// Package podnet finds out what a pod's network is: the processes of a pod that
// ran before its namespace joined the mesh, its addresses, and the node's end of
// its veth.
package podnet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Process is one process of a pod, of another network namespace than the node's.
type Process struct {
	PID int
	// Netns is the path of its network namespace, good while it lives.
	Netns string
	// NetnsInode identifies the namespace.
	NetnsInode uint64
}

// Find returns the oldest process of each of the pods (by UID) that has one. Pods
// whose processes all use the node's own network are left out. proc is where
// procfs is mounted, of the node's own process namespace.
func Find(proc string, uids []string) (map[string]Process, error) {
	if len(uids) == 0 {
		return nil, nil
	}
	host, err := netnsInode(filepath.Join(proc, "self/ns/net"))
	if err != nil {
		return nil, fmt.Errorf("find pods' processes: %w", err)
	}
	wanted := map[string]string{} // path element of a cgroup → UID
	for _, uid := range uids {
		wanted["pod"+uid] = uid
		wanted["pod"+strings.ReplaceAll(uid, "-", "_")] = uid
	}
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, fmt.Errorf("find pods' processes: %w", err)
	}
	pids := make([]int, 0, len(entries))
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	type candidate struct {
		Process
		started uint64
	}
	oldest := map[string]candidate{}
	for _, pid := range pids {
		dir := filepath.Join(proc, strconv.Itoa(pid))
		b, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err != nil {
			continue // it has ended
		}
		uid := podOf(string(b), wanted)
		if uid == "" {
			continue
		}
		started, err := startTime(dir)
		if err != nil {
			continue
		}
		if old, ok := oldest[uid]; ok && old.started <= started {
			continue
		}
		ns := filepath.Join(dir, "ns/net")
		inode, err := netnsInode(ns)
		if err != nil || inode == host {
			continue
		}
		oldest[uid] = candidate{Process{pid, ns, inode}, started}
	}
	found := make(map[string]Process, len(oldest))
	for uid, c := range oldest {
		found[uid] = c.Process
	}
	return found, nil
}

// podOf returns the wanted pod whose cgroup a process is in, by the content of
// its /proc/PID/cgroup. The kubelet's cgroupfs driver names a pod's cgroup
// "pod<uid>", its systemd driver "kubepods-burstable-pod<uid with _>.slice". The
// outermost of these counts: who may make cgroups in a pod's can give them the name
// of another pod's.
func podOf(cgroups string, wanted map[string]string) string {
	for line := range strings.Lines(cgroups) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		pods := false
		for element := range strings.SplitSeq(parts[2], "/") {
			element = strings.TrimSuffix(element, ".slice")
			// Below a cgroup root other than "/", systemd's names begin with that one's:
			// "kubelet-kubepods-…" in kind.
			if i := strings.Index(element, "kubepods"); i == 0 || i > 0 && element[i-1] == '-' {
				pods = true
				if j := strings.LastIndex(element, "-pod"); j > i {
					element = element[j+1:]
				}
			}
			if pods && strings.HasPrefix(element, "pod") {
				return wanted[element]
			}
		}
	}
	return ""
}

// startTime returns when a process started, in clock ticks since boot.
func startTime(dir string) (uint64, error) {
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return 0, err
	}
	// The command, in parentheses, may hold anything.
	i := strings.LastIndexByte(string(b), ')')
	fields := strings.Fields(string(b[i+1:]))
	if i < 0 || len(fields) < 20 {
		return 0, errors.New("unknown format")
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// netnsInode returns the inode that "net:[…]" names.
func netnsInode(path string) (uint64, error) {
	link, err := os.Readlink(path)
	if err != nil {
		return 0, err
	}
	n, ok := strings.CutPrefix(link, "net:[")
	if !ok {
		return 0, fmt.Errorf("%s: %w", path, fs.ErrInvalid)
	}
	return strconv.ParseUint(strings.TrimSuffix(n, "]"), 10, 64)
}
