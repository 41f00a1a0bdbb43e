package isolation

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits of a tenant, over all its generations. 0 is no limit.
type Limits struct {
	// CPUWeight against other tenants when CPU is short, 1 to 10000; 100 is normal.
	CPUWeight int64
	// CPUMillis is the quota in thousandths of a CPU; at least 10.
	CPUMillis int64
	// MemoryHigh in bytes: beyond it the kernel takes memory back and slows the
	// tenant. Version 1 has only the wish for it (memory.soft_limit_in_bytes): State
	// says so in Unenforced.
	MemoryHigh int64
	// MemoryMax in bytes: beyond it the kernel kills.
	MemoryMax int64
	// Pids is the most threads. 0 is 256, never without limit.
	Pids int64
}

const (
	defaultPids = 256
	// cpuPeriod of the quota, in microseconds.
	cpuPeriod     = 100_000
	defaultWeight = 100
	// defaultShares are version 1's name for the normal weight.
	defaultShares = 1024
)

func (l Limits) validate() error {
	switch {
	case l.CPUWeight < 0 || l.CPUWeight > 10000:
		return fmt.Errorf("cpu weight %d: 1 to 10000", l.CPUWeight)
	case l.CPUMillis < 0 || (l.CPUMillis > 0 && l.CPUMillis < 10):
		return fmt.Errorf("cpu quota %dm: at least 10m", l.CPUMillis)
	case l.MemoryHigh < 0 || l.MemoryMax < 0:
		return errors.New("memory limits can't be negative")
	case l.Pids < 0:
		return errors.New("pids can't be negative")
	}
	return nil
}

// everyone is, in place of a tenant's folder, that of all tenants.
const everyone = ""

// setting is a control file and its value. A file that the kernel may lack is
// optional.
type setting struct {
	file, value string
	optional    bool
}

func (l Limits) settings(controller, tenant string, v2 bool) []setting {
	orMax := func(n int64, none string) string {
		if n == 0 {
			return none
		}
		return strconv.FormatInt(n, 10)
	}
	weight := l.CPUWeight
	if weight == 0 {
		weight = defaultWeight
	}
	pids := l.Pids
	if pids == 0 && tenant != everyone {
		pids = defaultPids
	}
	switch {
	case controller == "cpu" && v2:
		return []setting{
			{file: "cpu.weight", value: strconv.FormatInt(weight, 10)},
			{file: "cpu.max", value: orMax(l.CPUMillis*cpuPeriod/1000, "max") + " " + strconv.Itoa(cpuPeriod)},
		}
	case controller == "cpu":
		return []setting{
			{file: "cpu.shares", value: strconv.FormatInt(max(2, (weight*defaultShares+defaultWeight/2)/defaultWeight), 10)},
			{file: "cpu.cfs_period_us", value: strconv.Itoa(cpuPeriod), optional: l.CPUMillis == 0},
			{file: "cpu.cfs_quota_us", value: orMax(l.CPUMillis*cpuPeriod/1000, "-1"), optional: l.CPUMillis == 0},
		}
	case controller == "memory" && v2:
		return []setting{
			{file: "memory.high", value: orMax(l.MemoryHigh, "max")},
			{file: "memory.max", value: orMax(l.MemoryMax, "max")},
			// Keys are in this memory: never on a swap device.
			{file: "memory.swap.max", value: "0", optional: true},
		}
	case controller == "memory":
		return []setting{
			{file: "memory.soft_limit_in_bytes", value: orMax(l.MemoryHigh, "-1"), optional: true},
			{file: "memory.limit_in_bytes", value: orMax(l.MemoryMax, "-1")},
			{file: "memory.swappiness", value: "0", optional: true},
		}
	default:
		return []setting{{file: "pids.max", value: orMax(pids, "max")}}
	}
}

func (l Limits) wants(controller string) bool {
	switch controller {
	case "cpu":
		return l.CPUWeight != 0 || l.CPUMillis != 0
	case "memory":
		return l.MemoryHigh != 0 || l.MemoryMax != 0
	default:
		return true
	}
}

// limit applies all that it can, and says what it couldn't.
func (c *cgroups) limit(tenant string, l Limits) error {
	var errs []error
	for _, controller := range limiting {
		if dir, _ := c.dir(tenant, controller); dir == "" && l.wants(controller) {
			errs = append(errs, fmt.Errorf("limit %s of %s: the node has no cgroup controller for it", controller, whose(tenant)))
		}
	}
	refused, failed := c.write(tenant, l)
	return errors.Join(append(errs, refused, failed)...)
}

// limitAll does so for all tenants together, and ensure from then on.
func (c *cgroups) limitAll(l Limits) error {
	c.limitingAll.Lock()
	defer c.limitingAll.Unlock()
	c.all.Store(&l)
	return c.limit(everyone, l)
}

func whose(tenant string) string {
	if tenant == everyone {
		return "all tenants"
	}
	return tenant
}

// write applies all that the node has a controller for. It tells values that the kernel
// refuses, which keeps those that it had, from what else failed.
func (c *cgroups) write(tenant string, l Limits) (refused, failed error) {
	for _, controller := range limiting {
		dir, v2 := c.dir(tenant, controller)
		if dir == "" {
			continue
		}
		own := l
		if most := c.quota.Load(); controller == "cpu" && !v2 && tenant != everyone && most > 0 {
			// Version 1 refuses a quota above that of the folder of all tenants, which
			// is what the tenant gets at most either way.
			if own.CPUMillis > most {
				own.CPUMillis = most
			}
		}
		for _, s := range own.settings(controller, tenant, v2) {
			err := s.apply(dir)
			if err == nil || s.optional && notThere(err) {
				continue
			}
			told := fmt.Errorf("limit %s of %s to %s: %w", controller, whose(tenant), s.value, err)
			if errors.Is(err, unix.EBUSY) {
				told = fmt.Errorf("%w: more is in use than that, and what was in force stays; set a higher limit, or use less", told)
			}
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ERANGE) || errors.Is(err, unix.EBUSY) {
				refused = errors.Join(refused, told)
			} else {
				failed = errors.Join(failed, told)
			}
		}
	}
	return refused, failed
}

// apply writes what isn't in force yet. With each write of memory.high, the kernel takes
// back from the tenant what it has beyond that, and the writer waits for it.
func (s setting) apply(dir string) error {
	path := filepath.Join(dir, s.file)
	if has, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(has)) == s.value {
		return nil
	}
	return writeFile(path, s.value)
}

// notThere reports whether a kernel says with err that it lacks a control file.
func notThere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EOPNOTSUPP)
}

// unenforced says which of the limits this node's cgroups don't hold as they are
// meant.
func (c *cgroups) unenforced(tenant string, l Limits) (told []string) {
	for _, controller := range limiting {
		if dir, _ := c.dir(tenant, controller); dir == "" && l.wants(controller) {
			told = append(told, controller+": the node has no cgroup controller for it")
		}
	}
	if dir, v2 := c.dir(tenant, "memory"); dir != "" && !v2 && l.MemoryHigh != 0 {
		told = append(told, "memory high: cgroup version 1 takes it only for a wish, when the whole node is short; "+
			"boot with cgroup version 2 to have it, or set a lower memory max")
	}
	all := Limits{}
	if tenant != everyone {
		all = c.limitsOfAll()
	}
	const noBound = "so that it bounds nothing"
	if cpus := int64(runtime.NumCPU()) * 1000; l.CPUMillis > cpus {
		told = append(told, fmt.Sprintf("cpu limit %dm: the node has only %dm, %s", l.CPUMillis, cpus, noBound))
	} else if all.CPUMillis > 0 && l.CPUMillis > all.CPUMillis {
		told = append(told, fmt.Sprintf("cpu limit %dm: all proxies of the node have only %dm together, %s", l.CPUMillis, all.CPUMillis, noBound))
	}
	if total := memoryOfNode(); total > 0 && l.MemoryMax > total {
		told = append(told, fmt.Sprintf("memory max %d: the node has only %d bytes, %s", l.MemoryMax, total, noBound))
	} else if all.MemoryMax > 0 && l.MemoryMax > all.MemoryMax {
		told = append(told, fmt.Sprintf("memory max %d: all proxies of the node have only %d bytes together, %s", l.MemoryMax, all.MemoryMax, noBound))
	}
	if all.Pids > 0 && l.Pids > all.Pids {
		told = append(told, fmt.Sprintf("pids %d: all proxies of the node have only %d together, %s", l.Pids, all.Pids, noBound))
	}
	return told
}

func memoryOfNode() int64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit)
}

// limits reads back what the kernel enforces.
func (c *cgroups) limits(tenant string) Limits {
	var l Limits
	if dir, v2 := c.dir(tenant, "cpu"); dir != "" {
		if v2 {
			l.CPUWeight = readInt(dir, "cpu.weight")
			if f := readFields(dir, "cpu.max"); len(f) == 2 {
				l.CPUMillis = millis(parseInt(f[0]), parseInt(f[1]))
			}
		} else {
			l.CPUWeight = (readInt(dir, "cpu.shares")*defaultWeight + defaultShares/2) / defaultShares
			l.CPUMillis = millis(readInt(dir, "cpu.cfs_quota_us"), readInt(dir, "cpu.cfs_period_us"))
		}
	}
	if dir, v2 := c.dir(tenant, "memory"); dir != "" {
		if v2 {
			l.MemoryHigh, l.MemoryMax = readInt(dir, "memory.high"), readInt(dir, "memory.max")
		} else {
			l.MemoryHigh, l.MemoryMax = readInt(dir, "memory.soft_limit_in_bytes"), readInt(dir, "memory.limit_in_bytes")
		}
	}
	if dir, _ := c.dir(tenant, "pids"); dir != "" {
		l.Pids = readInt(dir, "pids.max")
	}
	return l
}

func millis(quota, period int64) int64 {
	if quota <= 0 || period <= 0 {
		return 0
	}
	return quota * 1000 / period
}

func readFields(dir, file string) []string {
	data, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return nil
	}
	return strings.Fields(string(data))
}

// readInt reads a control file of one number; 0 for "max", for version 1's way to
// say so, and for a file that isn't there.
func readInt(dir, file string) int64 {
	f := readFields(dir, file)
	if len(f) == 0 {
		return 0
	}
	return parseInt(f[0])
}

func parseInt(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n >= math.MaxInt64&^0xffff {
		return 0
	}
	return n
}
