package attest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// PodCgroups is where a node's kubelet keeps the cgroups of its pods. The zero
// value has no pods.
type PodCgroups struct {
	// root is the cgroup of all pods, "/kubepods" or "/kubepods.slice" mostly; two
	// where nobody can tell which.
	roots []string
}

// NewPodCgroups takes the cgroup of all pods as told: absolute, its last element
// "kubepods", or "kubepods.slice" or "…-kubepods.slice" of the kubelet's systemd
// driver.
func NewPodCgroups(root string) (PodCgroups, error) {
	if !path.IsAbs(root) || path.Clean(root) != root || !isPodsRoot(path.Base(root)) {
		return PodCgroups{}, fmt.Errorf("cgroup of all pods %q: must be an absolute path that ends in kubepods or kubepods.slice", root)
	}
	return PodCgroups{[]string{root}}, nil
}

// OwnPodCgroups finds them by this process, which must be in a pod itself or, if
// it isn't in one, on a node whose kubelet has its cgroups at the root.
func OwnPodCgroups() (PodCgroups, error) {
	f, err := os.Open("/proc/self/cgroup")
	if err != nil {
		return PodCgroups{}, fmt.Errorf("find the pods' cgroups: %w", err)
	}
	defer f.Close()
	return podCgroupsOf(f)
}

func podCgroupsOf(cgroups io.Reader) (PodCgroups, error) {
	var found PodCgroups
	err := eachPath(cgroups, func(p string) error {
		for i, element := range strings.Split(p, "/") {
			if !isPodsRoot(element) {
				continue
			}
			root := strings.Join(strings.Split(p, "/")[:i+1], "/")
			if len(found.roots) > 0 && found.roots[0] != root {
				return fmt.Errorf("this process is in the pods' cgroups %s and %s", found.roots[0], root)
			}
			found.roots = []string{root}
			break // what is below is the pods' own
		}
		return nil
	})
	if err != nil {
		return PodCgroups{}, fmt.Errorf("find the pods' cgroups: %w", err)
	}
	if len(found.roots) == 0 {
		found.roots = []string{"/kubepods", "/kubepods.slice"}
	}
	return found, nil
}

// isPodsRoot recognises the name of the cgroup of all pods.
func isPodsRoot(element string) bool {
	return element == "kubepods" || element == "kubepods.slice" || strings.HasSuffix(element, "-kubepods.slice")
}

// errHidden: the paths are relative to a cgroup namespace, so what they begin with
// isn't where the kubelet put the process.
var errHidden = errors.New("this process doesn't see the whole path of cgroups: it must be in the node's cgroup namespace")

// eachPath calls f with the path of each line of a /proc/PID/cgroup.
func eachPath(cgroups io.Reader, f func(path string) error) error {
	lines := bufio.NewScanner(io.LimitReader(cgroups, 1<<20))
	for lines.Scan() {
		// hierarchy:controllers:path; no cgroup has a line feed in its name.
		parts := strings.SplitN(lines.Text(), ":", 3)
		if len(parts) != 3 || !strings.HasPrefix(parts[2], "/") {
			return errors.New("a line of its cgroups has an unknown format")
		}
		for element := range strings.SplitSeq(parts[2], "/") {
			if element == ".." {
				return errHidden
			}
		}
		if err := f(parts[2]); err != nil {
			return err
		}
	}
	return lines.Err()
}

// pod returns the pod whose cgroup a process is in, by its /proc/PID/cgroup.
//
// Only what the kubelet made counts: the elements right below the cgroup of all
// pods, which nobody but it and root can change. What a container makes below its
// own cgroup, whatever its name, is further down; what a user of the node makes is
// elsewhere. All hierarchies that name a pod must name the same one.
func (c PodCgroups) pod(cgroups io.Reader) (uid string, err error) {
	err = eachPath(cgroups, func(p string) error {
		for _, root := range c.roots {
			below, ok := strings.CutPrefix(p, root+"/")
			if !ok {
				continue
			}
			found := podBelow(path.Base(root), strings.Split(below, "/"))
			if found == "" {
				return errors.New("it is among the pods' cgroups and in none of a pod")
			}
			if uid != "" && found != uid {
				return fmt.Errorf("its cgroups are of two pods, %s and %s", uid, found)
			}
			uid = found
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if uid == "" {
		return "", errors.New("it isn't in a pod's cgroup")
	}
	return uid, nil
}

// podBelow returns the pod of a cgroup's elements below the cgroup of all pods,
// which is named root: "pod<uid>" or "<root>-pod<uid>.slice", itself below
// "burstable" or "<root>-burstable.slice" of the pods that aren't guaranteed.
func podBelow(root string, elements []string) string {
	base, systemd := strings.CutSuffix(root, ".slice")
	for _, qos := range []string{"burstable", "besteffort"} {
		class := qos
		if systemd {
			class = base + "-" + qos + ".slice"
		}
		if elements[0] != class {
			continue
		}
		elements, base = elements[1:], base+"-"+qos
		break
	}
	if len(elements) == 0 {
		return ""
	}
	uid := elements[0]
	ok := true
	if systemd {
		if uid, ok = strings.CutSuffix(uid, ".slice"); ok {
			uid, ok = strings.CutPrefix(uid, base+"-pod")
		}
		uid = strings.ReplaceAll(uid, "_", "-") // "-" is between a slice and those below
	} else {
		uid, ok = strings.CutPrefix(uid, "pod")
	}
	if !ok || !isUID(uid) {
		return ""
	}
	return uid
}

func isUID(s string) bool {
	if s == "" || len(s) > 128 {
		return false
	}
	for _, r := range s {
		if (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && r != '-' {
			return false
		}
	}
	return true
}
