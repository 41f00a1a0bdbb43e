package isolation

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// unifiedMount is where version 2 is, "" if it is nowhere.
func unifiedMount(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	return ""
}

// The figures of a tenant that uses all it may, as the kernel counts them.
func TestUsage(t *testing.T) {
	n := newNode(t)
	n.useStandin(map[int]string{1: "flood"}, standinTargets{})
	m := n.open()
	err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: Limits{CPUMillis: 100}, Generations: []Generation{{0, standinVersion}, {1, standinVersion}}})
	if err != nil {
		t.Fatal(err)
	}
	var u Usage
	s := n.await(m, tenantA, "isn't throttled", func(State) bool {
		if u, err = m.Usage(tenantA); err != nil {
			t.Fatal(err)
		}
		return u.Throttled > 100*time.Millisecond && u.CPU > 50*time.Millisecond
	})
	var pids []int
	threads := int64(0)
	for _, p := range s.Processes {
		pids = append(pids, p.PID)
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.PID))
		if err != nil {
			t.Fatal(err)
		}
		threads += int64(len(tasks))
	}
	if u.Private < 1<<20 || u.PSS < u.Private || u.MemoryPeak < u.Memory || u.Memory < u.Private/2 || u.OOMKills != 0 || u.Threads < 2 || u.Threads > threads+4 {
		t.Errorf("usage of %v with %d threads: %+v", pids, threads, u)
	}
	_, err = os.Stat(filepath.Join(unifiedMount(t), "cpu.pressure"))
	if measured := unifiedMount(t) != "" && err == nil; measured != (u.Pressure != nil) {
		t.Errorf("pressure is %v, and the kernel measures it: %t", u.Pressure, measured)
	} else if measured && u.Pressure.CPU.Some == 0 {
		t.Errorf("a tenant that is throttled feels no pressure: %+v", u.Pressure)
	}
	if _, err := m.Usage(tenantB); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("usage of nobody: %v", err)
	}
}

// All limits change under a running process, and the kernel says so.
func TestLimitsChangeInPlace(t *testing.T) {
	n := newNode(t)
	n.useStandin(nil, standinTargets{})
	m := n.open()
	_, v2 := m.cgroups.dir("", "memory")
	var first Process
	for _, c := range []struct{ set, want Limits }{
		{Limits{}, Limits{CPUWeight: 100, Pids: 256}},
		{
			Limits{CPUWeight: 400, CPUMillis: 1500, MemoryHigh: 100 << 20, MemoryMax: 200 << 20, Pids: 100},
			Limits{CPUWeight: 400, CPUMillis: 1500, MemoryHigh: 100 << 20, MemoryMax: 200 << 20, Pids: 100},
		},
		{
			Limits{CPUWeight: 50, CPUMillis: 250, MemoryHigh: 40 << 20, MemoryMax: 64 << 20, Pids: 50},
			Limits{CPUWeight: 50, CPUMillis: 250, MemoryHigh: 40 << 20, MemoryMax: 64 << 20, Pids: 50},
		},
		{Limits{MemoryMax: 300 << 20}, Limits{CPUWeight: 100, MemoryMax: 300 << 20, Pids: 256}},
		{Limits{}, Limits{CPUWeight: 100, Pids: 256}},
	} {
		if err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: c.set, Generations: []Generation{{1, standinVersion}}}); err != nil {
			t.Fatal(err)
		}
		now := n.waitLive(m, tenantA, 0)
		if first.PID == 0 {
			first = now
		}
		s, _ := m.State(tenantA)
		if now != first || s.Limits != c.want || s.Problem != "" {
			t.Errorf("set %+v: limits are %+v, problem %q, process %+v, was %+v", c.set, s.Limits, s.Problem, now, first)
		}
		if wish := c.set.MemoryHigh != 0 && !v2; wish != (len(s.Unenforced) == 1) {
			t.Errorf("set %+v on version 2 %t: unenforced are %q", c.set, v2, s.Unenforced)
		}
	}
	if !v2 {
		// Version 1 refuses what is in use already, and that is told.
		err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: Limits{MemoryMax: 64 << 10}, Generations: []Generation{{1, standinVersion}}})
		if s, _ := m.State(tenantA); !errors.Is(err, unix.EBUSY) || !strings.Contains(s.Problem, "limit memory of bhi-a to 65536") || !strings.Contains(s.Problem, "set a higher limit") {
			t.Errorf("less than it uses: %v, problem %q", err, s.Problem)
		}
	}
}

// On a node with cgroup version 2 alone. Where its controllers are version 1's,
// as on a hybrid host, what is left of it still counts and tells.
func TestUnifiedOnly(t *testing.T) {
	root := unifiedMount(t)
	if root == "" {
		t.Skip("cgroup version 2 isn't mounted below /sys/fs/cgroup")
	}
	n := newNode(t)
	n.o.CgroupRoot = root
	n.useStandin(map[int]string{1: "flood"}, standinTargets{})
	m := n.open()
	limits := Limits{CPUWeight: 50, CPUMillis: 100, MemoryHigh: 40 << 20, MemoryMax: 64 << 20, Pids: 50}
	err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: limits, Generations: []Generation{{1, standinVersion}}})
	s := n.await(m, tenantA, "isn't live", func(s State) bool { return len(s.Processes) == 1 && s.Processes[0].Live })
	var lacks []string
	for _, controller := range limiting {
		if dir, _ := m.cgroups.dir("", controller); dir == "" {
			lacks = append(lacks, controller)
		}
	}
	t.Logf("version 2 lacks the controllers %v here", lacks)
	for _, controller := range lacks {
		if err == nil || !strings.Contains(err.Error(), "limit "+controller) || !slices.ContainsFunc(s.Unenforced, func(told string) bool { return strings.HasPrefix(told, controller+":") }) {
			t.Errorf("%s isn't there, and this is told: %v; %q", controller, err, s.Unenforced)
		}
	}
	if len(lacks) == 0 && (err != nil || s.Limits != limits || len(s.Unenforced) > 0) {
		t.Errorf("%v; limits %+v, unenforced %q", err, s.Limits, s.Unenforced)
	}
	if !slices.Contains(mustProcs(t, s.CgroupV2), s.Processes[0].PID) {
		t.Errorf("process %d isn't in %s", s.Processes[0].PID, s.CgroupV2)
	}
	n.await(m, tenantA, "uses nothing", func(State) bool {
		u, err := m.Usage(tenantA)
		return err == nil && u.CPU > 50*time.Millisecond && u.Threads > 1 && u.Private > 0 && u.Pressure != nil &&
			(slices.Contains(lacks, "cpu") || u.Throttled > 0) && (slices.Contains(lacks, "memory") || u.Memory > 0)
	})
}

// The files of version 2, for hosts whose controllers are version 1's.
func TestUnifiedFiles(t *testing.T) {
	root := t.TempDir()
	for file, content := range map[string]string{
		"cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nnr_throttled 3\nthrottled_usec 700000\n", "cpu.weight": "50\n", "cpu.max": "150000 100000\n",
		"memory.current": "1048576\n", "memory.peak": "2097152\n", "memory.high": "max\n", "memory.max": "4194304\n",
		"memory.events": "low 0\nhigh 7\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n", "pids.current": "12\n", "pids.max": "64\n", "pids.events": "max 5\n",
		"cpu.pressure":    "some avg10=1.00 avg60=0.50 avg300=0.10 total=4000000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\n",
		"memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=2000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1000\n",
		"io.pressure":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
	} {
		if err := os.MkdirAll(filepath.Join(root, "all", "a"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "all", "a", file), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c := &cgroups{name: "all", hierarchies: []hierarchy{{mount: root, v2: true, controllers: limiting}}}
	u := c.usage("a")
	p := u.Pressure
	u.Pressure = nil
	if want := (Usage{CPU: 2500 * time.Millisecond, Throttled: 700 * time.Millisecond, Memory: 1 << 20, MemoryPeak: 2 << 20, OOMKills: 2, Threads: 12}); u != want {
		t.Errorf("usage is %+v, want %+v", u, want)
	}
	if want := (Pressure{CPU: Stall{4 * time.Second, time.Second}, Memory: Stall{2 * time.Millisecond, time.Millisecond}}); p == nil || *p != want {
		t.Errorf("pressure is %+v, want %+v", p, want)
	}
	if h, want := c.hits("a"), (Hits{Throttled: 3, ThrottledFor: 700 * time.Millisecond, MemoryHigh: 7, OOMKills: 2, Pids: 5}); h != want {
		t.Errorf("hits are %+v, want %+v", h, want)
	}
	if l := c.limits("a"); l != (Limits{CPUWeight: 50, CPUMillis: 1500, MemoryMax: 4 << 20, Pids: 64}) {
		t.Errorf("limits are %+v", l)
	}
	if told := c.unenforced("a", Limits{MemoryHigh: 1}); len(told) > 0 {
		t.Errorf("unenforced: %q", told)
	}
	if err := os.Remove(filepath.Join(root, "all", "a", "io.pressure")); err != nil {
		t.Fatal(err)
	}
	if p := c.usage("a").Pressure; p != nil {
		t.Errorf("pressure of a kernel that doesn't measure it: %+v", p)
	}
}

// The first tenant doesn't pay for the text that all share. The second half is
// the same without the read ahead, so that the first half means something.
func TestTextIsChargedToNobody(t *testing.T) {
	n := newNode(t)
	// A tmpfs has its pages charged to who wrote them, whoever reads.
	n.o.LibDir = filepath.Join(t.TempDir(), "lib")
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(n.o.LibDir), &st); err != nil {
		t.Fatal(err)
	}
	if st.Type == unix.TMPFS_MAGIC {
		t.Skipf("%s is a tmpfs, whose pages are charged to who wrote them; set TMPDIR to a disk", filepath.Dir(n.o.LibDir))
	}
	m := n.open()
	mapped := func() int64 {
		t.Helper()
		n.run(m, tenantA, Limits{})
		dir, v2 := m.cgroups.dir(tenantA.FileName(), "memory")
		if dir == "" {
			t.Skip("the node has no cgroup controller for memory")
		}
		file := readTable(dir, "memory.stat")[map[bool]string{true: "file_mapped", false: "mapped_file"}[v2]]
		u, err := m.Usage(tenantA)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("the tenant is charged %.1f MiB, of these %.1f MiB of files, and nobody %.1f MiB",
			float64(u.Memory)/(1<<20), float64(file)/(1<<20), float64(m.SharedUsage().Memory)/(1<<20))
		if err := m.Delete(t.Context(), tenantA); err != nil {
			t.Fatal(err)
		}
		return file
	}
	if with := mapped(); with > 4<<20 {
		t.Errorf("the first tenant pays for %d bytes of files", with)
	}
	if shared := m.SharedUsage(); shared.Memory < 30<<20 || shared.Threads != 0 {
		t.Errorf("nobody pays %+v", shared)
	}
	tree, err := m.versions.tree(dist.Default)
	if err != nil {
		t.Fatal(err)
	}
	paths, err := files(tree)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		f, err := os.Open(filepath.Join(tree, path))
		if err != nil {
			t.Fatal(err)
		}
		if err := dropCache(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	if without := mapped(); without < 20<<20 {
		t.Errorf("without the read ahead the first tenant pays for %d bytes only", without)
	}
}
