package isolation

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Usage is what a tenant has cost since its cgroup was made.
type Usage struct {
	CPU time.Duration
	// Throttled is for how long threads had to wait for the quota, summed up.
	Throttled time.Duration
	// Memory in bytes that is charged to it now, page cache and the kernel's socket
	// buffers included, and the most that ever was.
	Memory, MemoryPeak int64
	// Private memory in bytes: what its processes wrote to and share with nobody.
	Private int64
	// PSS in bytes of its processes: pages that several share count in parts, so
	// that all tenants' PSS add up to what they take together.
	PSS      int64
	OOMKills uint64
	// Threads now.
	Threads int64
	// Pressure is nil where the kernel doesn't measure it: it wants CONFIG_PSI
	// without psi=0, and cgroup version 2 mounted.
	Pressure *Pressure
}

// Pressure is for how long threads of a tenant had to wait.
type Pressure struct{ CPU, Memory, IO Stall }

// Stall is the time that at least one thread waited, and that all did.
type Stall struct{ Some, Full time.Duration }

// Usage reads a tenant's figures; 0 for what this node's cgroups don't count. The
// error wraps fs.ErrNotExist if there is no such tenant. It reads the tables of
// each process: some milliseconds of the caller's CPU.
func (m *Manager) Usage(name model.Tenant) (Usage, error) {
	t := m.tenant(name)
	if t == nil {
		return Usage{}, fmt.Errorf("read usage of %s: %w", name, fs.ErrNotExist)
	}
	u := m.cgroups.usage(t.file)
	for _, pid := range m.cgroups.pids(t.file) {
		pss, private, err := readMemory(pid)
		// A process that has just ended has no table, or an empty one.
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
			return u, fmt.Errorf("read usage of %s: %w", name, err)
		}
		u.PSS += pss
		u.Private += private
	}
	return u, nil
}

// ProcessUsage is what one generation's process took of the CPU since it began, to the
// hundredth of a second, and its private memory now. The error wraps ErrNoProcess if it
// doesn't run.
func (m *Manager) ProcessUsage(name model.Tenant, generation int) (cpu time.Duration, private int64, err error) {
	failed := func(err error) (time.Duration, int64, error) {
		return 0, 0, fmt.Errorf("read usage of generation %d of %s: %w", generation, name, err)
	}
	t := m.tenant(name)
	if t == nil {
		return failed(ErrNoProcess)
	}
	p := t.process(generation)
	if p == nil {
		return failed(ErrNoProcess)
	}
	state, _, _ := p.snapshot()
	if state.PID == 0 {
		return failed(ErrNoProcess)
	}
	if cpu, err = readCPU(state.PID); err != nil {
		return failed(err)
	}
	if _, private, err = readMemory(state.PID); err != nil {
		return failed(err)
	}
	return cpu, private, nil
}

// readCPU returns what a process's threads took, those that have ended included.
func readCPU(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name, in brackets, may hold anything.
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const user, system = 14 - 3, 15 - 3 // of proc(5), from the third on
	if len(f) <= system {
		return 0, fmt.Errorf("read CPU of process %d: %q", pid, stat)
	}
	const tick = time.Second / 100 // USER_HZ, the same everywhere
	return time.Duration(parseInt(f[user])+parseInt(f[system])) * tick, nil
}

// SharedUsage is what all tenants share and nobody pays for: Envoy's text, and
// the CPU that reading it took.
func (m *Manager) SharedUsage() Usage { return m.cgroups.usage(textCgroup) }

func (c *cgroups) usage(tenant string) Usage {
	u := Usage{OOMKills: c.oomKills(tenant)}
	unified := c.unified(tenant)
	if dir, v2 := c.dir(tenant, "cpu"); dir != "" {
		u.Throttled = throttled(readTable(dir, "cpu.stat"), v2)
	}
	for _, dir := range c.dirs(tenant) {
		// Version 1 counts in a hierarchy that may be another than cpu's.
		if ns := readInt(dir, "cpuacct.usage"); ns > 0 {
			u.CPU = time.Duration(ns)
		}
	}
	if u.CPU == 0 && unified != "" {
		// Version 2 counts in every cgroup, with the controller or without.
		u.CPU = time.Duration(readTable(unified, "cpu.stat")["usage_usec"]) * time.Microsecond
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
	} else if unified != "" {
		u.Threads = int64(len(readFields(unified, "cgroup.threads")))
	}
	if unified != "" {
		u.Pressure = readPressure(unified)
	}
	return u
}

// readPressure reads what every cgroup of version 2 has, controllers or not. A
// kernel that doesn't measure has no such files, or refuses to read them.
func readPressure(dir string) *Pressure {
	var p Pressure
	for file, stall := range map[string]*Stall{"cpu.pressure": &p.CPU, "memory.pressure": &p.Memory, "io.pressure": &p.IO} {
		data, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return nil
		}
		for line := range strings.Lines(string(data)) {
			f := strings.Fields(line)
			if len(f) == 0 {
				continue
			}
			total, _ := strings.CutPrefix(f[len(f)-1], "total=")
			d := time.Duration(parseInt(total)) * time.Microsecond
			switch f[0] {
			case "some":
				stall.Some = d
			case "full":
				stall.Full = d
			}
		}
	}
	return &p
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

// readMemory returns a process's shares of memory, in bytes.
func readMemory(pid int) (pss, private int64, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		switch bytes := parseInt(f[1]) << 10; f[0] {
		case "Pss:":
			pss = bytes
		case "Private_Dirty:", "Private_Hugetlb:":
			private += bytes
		}
	}
	return pss, private, lines.Err()
}
