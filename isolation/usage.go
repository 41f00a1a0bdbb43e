package isolation

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Usage is what a tenant has cost since its cgroup was made.
type Usage struct {
	CPU time.Duration
	// Throttled is for how long threads had to wait for the quota, summed up.
	Throttled time.Duration
	// Memory in bytes that is charged to it now, page cache included, and the most
	// that ever was.
	Memory, MemoryPeak int64
	// PSS in bytes of its processes: pages that several share count in parts, so
	// that all tenants' PSS add up to what they take together.
	PSS      int64
	OOMKills uint64
	// Threads now.
	Threads int64
}

// Usage reads a tenant's figures; 0 for what this node's cgroups don't count. The
// error wraps fs.ErrNotExist if there is no such tenant.
func (m *Manager) Usage(name model.Tenant) (Usage, error) {
	t := m.tenant(name)
	if t == nil {
		return Usage{}, fmt.Errorf("read usage of %s: %w", name, fs.ErrNotExist)
	}
	u := m.cgroups.usage(t.file)
	for _, pid := range m.cgroups.pids(t.file) {
		pss, err := readPSS(pid)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return u, fmt.Errorf("read usage of %s: %w", name, err)
		}
		u.PSS += pss
	}
	return u, nil
}

func (c *cgroups) usage(tenant string) Usage {
	u := Usage{OOMKills: c.oomKills(tenant)}
	if dir, v2 := c.dir(tenant, "cpu"); dir != "" {
		stat := readTable(dir, "cpu.stat")
		if v2 {
			u.CPU = time.Duration(stat["usage_usec"]) * time.Microsecond
			u.Throttled = time.Duration(stat["throttled_usec"]) * time.Microsecond
		} else {
			u.Throttled = time.Duration(stat["throttled_time"])
		}
	}
	for _, dir := range c.dirs(tenant) {
		// Version 1 counts in a hierarchy that may be another than cpu's.
		if ns := readInt(dir, "cpuacct.usage"); ns > 0 {
			u.CPU = time.Duration(ns)
		}
	}
	if dir, v2 := c.dir(tenant, "memory"); dir != "" {
		if v2 {
			u.Memory, u.MemoryPeak = readInt(dir, "memory.current"), readInt(dir, "memory.peak")
		} else {
			u.Memory, u.MemoryPeak = readInt(dir, "memory.usage_in_bytes"), readInt(dir, "memory.max_usage_in_bytes")
		}
	}
	if dir, _ := c.dir(tenant, "pids"); dir != "" {
		u.Threads = readInt(dir, "pids.current")
	}
	return u
}

func (c *cgroups) oomKills(tenant string) uint64 {
	dir, v2 := c.dir(tenant, "memory")
	if dir == "" {
		return 0
	}
	file := "memory.oom_control"
	if v2 {
		file = "memory.events"
	}
	return uint64(readTable(dir, file)["oom_kill"])
}

// readTable reads a control file of lines with a key and a number.
func readTable(dir, file string) map[string]int64 {
	table := map[string]int64{}
	data, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return table
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) == 2 {
			table[f[0]] = parseInt(f[1])
		}
	}
	return table
}

func readPSS(pid int) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) == 3 && f[0] == "Pss:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			return kib << 10, err
		}
	}
	// A process that has just ended reads as nothing.
	return 0, nil
}
