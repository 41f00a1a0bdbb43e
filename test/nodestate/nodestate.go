// Package nodestate looks at a node for what a mesh on it could leave behind.
package nodestate

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// folders of a node that a mesh puts files into.
var folders = []string{"run", "run/netns", "var/lib", "var/log", "opt", "opt/cni/bin", "etc/cni/net.d", "sys/fs/bpf"}

// name is in the names of all that Bulkhead makes on a node.
const name = "bulkhead"

// Find returns what is on the node of whom host is the root directory, one line
// a finding, sorted. The caller must be in the node's network and pid namespace.
// Files elsewhere than in the usual folders are not looked for.
func Find(host string) ([]string, error) {
	var all []string
	for _, find := range []func(string) ([]string, error){files, cgroups, mounts, processes, links} {
		found, err := find(host)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	slices.Sort(all)
	return all, nil
}

func files(host string) ([]string, error) {
	var found []string
	for _, folder := range folders {
		entries, err := os.ReadDir(filepath.Join(host, folder))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, entry := range entries {
			path := "/" + filepath.Join(folder, entry.Name())
			inner, err := os.ReadDir(filepath.Join(host, path))
			switch {
			case strings.Contains(entry.Name(), name) && (err != nil || len(inner) > 0):
				// An empty folder may be a mount point that was there before.
				found = append(found, "file "+path)
			case folder == "etc/cni/net.d" && !entry.IsDir():
				content, err := os.ReadFile(filepath.Join(host, path))
				if err != nil {
					return nil, err
				}
				if bytes.Contains(content, []byte(name)) {
					found = append(found, "CNI configuration "+path)
				}
			}
		}
	}
	return found, nil
}

func cgroups(host string) ([]string, error) {
	var found []string
	root := filepath.Join(host, "sys/fs/cgroup")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // pods come and go
		}
		if err == nil && d.IsDir() && d.Name() == name {
			found = append(found, "cgroup "+strings.TrimPrefix(path, root))
			return fs.SkipDir
		}
		return err
	})
	return found, err
}

// Mounts returns the node's mount points, but for those of its pods, sorted.
func Mounts() ([]string, error) {
	all, err := mountPoints()
	all = slices.DeleteFunc(all, func(m string) bool {
		return strings.HasPrefix(m, "/run/") || strings.HasPrefix(m, "/var/lib/kubelet/") || strings.HasPrefix(m, "/var/lib/containerd/")
	})
	slices.Sort(all)
	return slices.Compact(all), err
}

// mountPoints of the node's first process, whose namespace is the node's own.
func mountPoints() ([]string, error) {
	table, err := os.ReadFile("/proc/1/mountinfo")
	if err != nil {
		return nil, err
	}
	var all []string
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 4 {
			all = append(all, f[4])
		}
	}
	return all, nil
}

func mounts(string) ([]string, error) {
	all, err := mountPoints()
	var found []string
	for _, m := range all {
		if strings.HasPrefix(m, "/run/"+name+"/") || strings.HasPrefix(m, "/sys/fs/bpf/"+name) {
			found = append(found, "mount "+m)
		}
	}
	return found, err
}

func processes(string) ([]string, error) {
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, path := range commands {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, err
		}
		program, _, _ := strings.Cut(string(b), "\x00")
		if base := filepath.Base(program); base == "envoy" || base == "agent" && strings.Contains(program, name) {
			found = append(found, fmt.Sprintf("process %s: %s", filepath.Base(filepath.Dir(path)), program))
		}
	}
	return found, nil
}

// links are network devices of tenants, and programs on any device.
func links(string) ([]string, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var found []string
	for _, l := range all {
		a := l.Attrs()
		if strings.HasPrefix(a.Name, "bh") {
			found = append(found, "link "+a.Name)
		}
		for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			r, err := link.QueryPrograms(link.QueryOptions{Target: a.Index, Attach: at})
			if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
				continue // gone meanwhile
			}
			if err != nil {
				return nil, fmt.Errorf("programs on %s: %w", a.Name, err)
			}
			if len(r.Programs) > 0 {
				found = append(found, fmt.Sprintf("%d programs at %v of %s", len(r.Programs), at, a.Name))
			}
		}
	}
	return found, nil
}
