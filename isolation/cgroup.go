package isolation

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// hierarchy is one mounted cgroup file system.
type hierarchy struct {
	mount string
	v2    bool
	// controllers that limit something here. A version 1 hierarchy without one is
	// joined all the same: whoever ends the agent's container looks for processes
	// in its cgroup of each hierarchy.
	controllers []string
}

// cgroups are all tenants' cgroups. Plain files: both versions of the interface
// are needed at once here, below a root that can be chosen.
type cgroups struct {
	// name is the path of the folder of all tenants in each hierarchy.
	name        string
	hierarchies []hierarchy
	// quota of all tenants together, in thousandths of a CPU; 0 is none.
	quota atomic.Int64

	// limitingAll orders writes of the limits of all tenants together.
	limitingAll sync.Mutex
	// all are these limits that are wanted, nil before there are any. Who only asks for
	// them doesn't wait for a write, in which the kernel may take memory back for seconds.
	all atomic.Pointer[Limits]
}

var limiting = []string{"cpu", "memory", "pids"}

// openCgroups finds what is mounted at root: version 2, or a folder of version 1
// hierarchies with version 2 beside them. The tenants' folder is in parent.
func openCgroups(root, parent, name string) (*cgroups, error) {
	c := &cgroups{name: filepath.Join(parent, name)}
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, fmt.Errorf("look at cgroups in %s: %w; mount the node's cgroups there", root, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		c.hierarchies = []hierarchy{{mount: root, v2: true}}
	} else if err := c.findHybrid(root); err != nil {
		return nil, err
	}
	if len(c.hierarchies) == 0 {
		return nil, fmt.Errorf("no cgroups in %s; mount the node's cgroups there", root)
	}
	if parent != "" {
		if !c.hierarchies[0].v2 || len(c.hierarchies) > 1 {
			return nil, fmt.Errorf("cgroup parent %s: %s isn't version 2 alone, where that can be; leave it out", parent, root)
		}
		if _, err := os.Stat(filepath.Join(root, parent)); err != nil {
			return nil, fmt.Errorf("look for the cgroup parent %s: %w; start the unit that has it", parent, err)
		}
	}
	for i := range c.hierarchies {
		if err := c.hierarchies[i].prepare(c.name); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *cgroups) findHybrid(root string) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("look at cgroups: %w", err)
	}
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		var st unix.Statfs_t
		// Names that are links to another hierarchy, as cpuacct is to cpu, aren't one.
		if !e.IsDir() || unix.Statfs(dir, &st) != nil {
			continue
		}
		switch st.Type {
		case unix.CGROUP2_SUPER_MAGIC:
			c.hierarchies = append(c.hierarchies, hierarchy{mount: dir, v2: true})
		case unix.CGROUP_SUPER_MAGIC:
			c.hierarchies = append(c.hierarchies, hierarchy{mount: dir})
		}
	}
	return nil
}

// prepare creates the folder of all tenants and learns what limits there are.
func (h *hierarchy) prepare(name string) (err error) {
	h.controllers, err = h.makeFolder(name)
	return err
}

// makeFolder creates the folder of all tenants. It returns the controllers that limit
// something in there.
func (h *hierarchy) makeFolder(name string) (controllers []string, err error) {
	dir := filepath.Join(h.mount, name)
	if err := h.mkdir(dir); err != nil {
		return nil, err
	}
	if !h.v2 {
		for _, controller := range limiting {
			file := map[string]string{"cpu": "cpu.shares", "memory": "memory.limit_in_bytes", "pids": "pids.max"}[controller]
			if _, err := os.Stat(filepath.Join(dir, file)); err == nil {
				controllers = append(controllers, controller)
			}
		}
		return controllers, nil
	}
	// Controllers reach a cgroup when each of its parents hands them down.
	for _, parent := range []string{filepath.Dir(dir), dir} {
		offered, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
		if err != nil {
			return nil, fmt.Errorf("read controllers: %w", err)
		}
		enabled, err := os.ReadFile(filepath.Join(parent, "cgroup.subtree_control"))
		if err != nil {
			return nil, fmt.Errorf("read controllers: %w", err)
		}
		controllers = nil
		for _, controller := range limiting {
			if !slices.Contains(strings.Fields(string(offered)), controller) {
				continue
			}
			if !slices.Contains(strings.Fields(string(enabled)), controller) {
				if err := writeFile(filepath.Join(parent, "cgroup.subtree_control"), "+"+controller); err != nil {
					return nil, fmt.Errorf("enable cgroup controller %s: %w", controller, err)
				}
			}
			controllers = append(controllers, controller)
		}
	}
	return controllers, nil
}

// mkdir creates a cgroup that processes can join, if it isn't there: version 1's cpuset
// begins without CPUs and memory.
func (h *hierarchy) mkdir(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create cgroup: %w", err)
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		have, err := os.ReadFile(filepath.Join(dir, file))
		if h.v2 || err != nil || strings.TrimSpace(string(have)) != "" {
			continue
		}
		parent, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
		if err != nil {
			return fmt.Errorf("read cgroup: %w", err)
		}
		if err := writeFile(filepath.Join(dir, file), strings.TrimSpace(string(parent))); err != nil {
			return fmt.Errorf("set up cgroup: %w", err)
		}
	}
	return nil
}

// limitsOfAll are those of all tenants together that are wanted.
func (c *cgroups) limitsOfAll() Limits {
	if all := c.all.Load(); all != nil {
		return *all
	}
	return Limits{}
}

func (c *cgroups) dirs(tenant string) (dirs []string) {
	for _, h := range c.hierarchies {
		dirs = append(dirs, filepath.Join(h.mount, c.name, tenant))
	}
	return dirs
}

// unified is the tenant's folder in version 2, "" without one.
func (c *cgroups) unified(tenant string) string {
	for _, h := range c.hierarchies {
		if h.v2 {
			return filepath.Join(h.mount, c.name, tenant)
		}
	}
	return ""
}

// dir is the tenant's folder that has the controller.
func (c *cgroups) dir(tenant, controller string) (dir string, v2 bool) {
	for _, h := range c.hierarchies {
		if slices.Contains(h.controllers, controller) {
			return filepath.Join(h.mount, c.name, tenant), h.v2
		}
	}
	return "", false
}

// ensure creates the tenant's cgroups that aren't there, without limits of its own, and
// has those of all tenants together in force. systemd takes cgroups without a process
// away when the unit is stopped that they are in.
func (c *cgroups) ensure(tenant string) error {
	for i := range c.hierarchies {
		h := &c.hierarchies[i]
		dir := filepath.Join(h.mount, c.name, tenant)
		err := h.mkdir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			if _, err = h.makeFolder(c.name); err == nil {
				err = h.mkdir(dir)
			}
		}
		if err != nil {
			return err
		}
	}
	c.limitingAll.Lock()
	defer c.limitingAll.Unlock()
	all := c.all.Load()
	if all == nil {
		return nil
	}
	// Each time: whoever made the folder may have failed then.
	_, err := c.write(everyone, *all)
	return err
}

// join moves a process, as the manager sees its pid.
func (c *cgroups) join(tenant string, pid int) error {
	for _, dir := range c.dirs(tenant) {
		if err := writeFile(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("join cgroup of %s: %w", tenant, err)
		}
	}
	return nil
}

// has reports whether the process is in the tenant's cgroup of every hierarchy.
func (c *cgroups) has(tenant string, pid int) bool {
	for _, dir := range c.dirs(tenant) {
		pids, err := procs(dir)
		if err != nil || !slices.Contains(pids, pid) {
			return false
		}
	}
	return true
}

// pids are all processes in any of the tenant's cgroups.
func (c *cgroups) pids(tenant string) (all []int) {
	for _, dir := range c.dirs(tenant) {
		pids, err := procs(dir)
		if err != nil {
			continue
		}
		for _, pid := range pids {
			if !slices.Contains(all, pid) {
				all = append(all, pid)
			}
		}
	}
	return all
}

func procs(dir string) ([]int, error) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, s := range strings.Fields(string(data)) {
		// 0 is a process that this pid namespace can't see.
		if pid, err := strconv.Atoi(s); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// killOthers ends processes of the tenant's cgroups that aren't among keep.
func (c *cgroups) killOthers(tenant string, keep []int) error {
	var errs []error
	for _, pid := range c.pids(tenant) {
		if slices.Contains(keep, pid) {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("open process %d: %w", pid, err))
			continue
		}
		// Looked up again: before the pidfd was there the pid could change hands.
		if slices.Contains(c.pids(tenant), pid) {
			if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("kill process %d of %s: %w", pid, tenant, err))
			}
		}
		unix.Close(fd)
	}
	return errors.Join(errs...)
}

// remove ends whatever is in the tenant's cgroups and removes them.
func (c *cgroups) remove(tenant string) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := c.killOthers(tenant, nil)
		for _, dir := range c.dirs(tenant) {
			if e := unix.Rmdir(dir); e != nil && !errors.Is(e, unix.ENOENT) {
				err = errors.Join(err, fmt.Errorf("remove cgroup %s: %w", dir, e))
			}
		}
		if err == nil || time.Now().After(deadline) {
			return err
		}
		// The kernel tells nobody when the last process has left.
		time.Sleep(5 * time.Millisecond)
	}
}

// tenants lists whose cgroups exist, as file names.
func (c *cgroups) tenants() []string {
	var names []string
	for _, h := range c.hierarchies {
		entries, err := os.ReadDir(filepath.Join(h.mount, c.name))
		if err != nil {
			continue
		}
		for _, e := range entries {
			if e.IsDir() && e.Name() != textCgroup && !slices.Contains(names, e.Name()) {
				names = append(names, e.Name())
			}
		}
	}
	return names
}

// removeAll removes the folder of all tenants, once they are gone.
func (c *cgroups) removeAll() error {
	if err := c.remove(textCgroup); err != nil {
		return err
	}
	var errs []error
	for _, h := range c.hierarchies {
		dir := filepath.Join(h.mount, c.name)
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// writeFile writes a control file with one write, as the kernel wants it.
func writeFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
