package isolation

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

func TestFilters(t *testing.T) {
	for name, want := range map[string]string{
		"unix": "ok", "inet6": "ok", "vsock": "address family not supported by protocol", "packet": "address family not supported by protocol",
		// The number of an allowed call as the family of a socket, or as flags, is still what it is.
		"family-as-call": "address family not supported by protocol",
		"clone3":         "function not implemented", "thread": "ok",
		"userns": "SIGSYS", "unshare": "SIGSYS", "mount": "SIGSYS", "ptrace": "SIGSYS", "bpf": "SIGSYS", "setns": "SIGSYS",
		"x32": "function not implemented",
		// Answered without being done; all other options are done.
		"transparent": "ok", "transparent6": "ok", "nodelay": "bad file descriptor", "ttl": "bad file descriptor", "option19": "bad file descriptor",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, err := exec.Command("/proc/self/exe", "filtered", name).CombinedOutput()
			got := string(out)
			var exit *exec.ExitError
			if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled() {
				got = unix.SignalName(exit.Sys().(syscall.WaitStatus).Signal())
			}
			if !strings.HasPrefix(got, want) {
				t.Errorf("%s: got %q, want %q", name, got, want)
			}
		})
	}
}

// filtered makes one call behind the filters and prints what it returned.
func filtered(name string) {
	runtime.LockOSThread()
	const noFile = ^uintptr(0)
	calls := map[string][4]uintptr{
		"unix": {unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM}, "inet6": {unix.SYS_SOCKET, unix.AF_INET6, unix.SOCK_STREAM},
		"vsock": {unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM}, "packet": {unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_DGRAM},
		"family-as-call": {unix.SYS_SOCKET, unix.SYS_WRITEV, unix.SOCK_DGRAM},
		"clone3":         {unix.SYS_CLONE3, 0, 0}, "userns": {unix.SYS_CLONE, unix.CLONE_NEWUSER | uintptr(unix.SIGCHLD), 0},
		"unshare": {unix.SYS_UNSHARE, unix.CLONE_NEWUSER, 0}, "mount": {unix.SYS_MOUNT, 0, 0}, "ptrace": {unix.SYS_PTRACE, 0, 0},
		"bpf": {unix.SYS_BPF, 0, 0}, "setns": {unix.SYS_SETNS, 0, 0}, "x32": {0x40000000 | unix.SYS_READ, 0, 0},
		"transparent":  {unix.SYS_SETSOCKOPT, noFile, unix.SOL_IP, unix.IP_TRANSPARENT},
		"transparent6": {unix.SYS_SETSOCKOPT, noFile, unix.SOL_IPV6, unix.IPV6_TRANSPARENT},
		"nodelay":      {unix.SYS_SETSOCKOPT, noFile, unix.SOL_TCP, unix.TCP_NODELAY},
		"ttl":          {unix.SYS_SETSOCKOPT, noFile, unix.SOL_IP, unix.IP_TTL},
		"option19":     {unix.SYS_SETSOCKOPT, noFile, unix.SOL_IPV6, unix.IP_TRANSPARENT},
	}
	list, err := filters()
	if err == nil {
		err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	for _, f := range list {
		if err == nil {
			err = loadFilter(f)
		}
	}
	if err != nil {
		os.Stdout.WriteString(err.Error())
		os.Exit(1)
	}
	if name == "thread" {
		// The runtime clones one for each locked goroutine.
		done := make(chan struct{})
		go func() { runtime.LockOSThread(); close(done) }()
		<-done
	} else if c := calls[name]; true {
		if _, _, errno := unix.RawSyscall(c[0], c[1], c[2], c[3]); errno != 0 {
			os.Stdout.WriteString(errno.Error())
			os.Exit(0)
		}
	}
	os.Stdout.WriteString("ok")
	os.Exit(0)
}

func TestSettings(t *testing.T) {
	full := Limits{CPUWeight: 50, CPUMillis: 1500, MemoryHigh: 100, MemoryMax: 200, Pids: 9}
	for _, c := range []struct {
		limits     Limits
		controller string
		v2         bool
		want       string
	}{
		{full, "cpu", true, "cpu.weight=50 cpu.max=150000 100000"},
		{full, "cpu", false, "cpu.shares=512 cpu.cfs_period_us=100000 cpu.cfs_quota_us=150000"},
		{full, "memory", true, "memory.high=100 memory.max=200 memory.swap.max=0"},
		{full, "memory", false, "memory.soft_limit_in_bytes=100 memory.limit_in_bytes=200 memory.swappiness=0"},
		{full, "pids", true, "pids.max=9"},
		{Limits{}, "cpu", true, "cpu.weight=100 cpu.max=max 100000"},
		{Limits{}, "cpu", false, "cpu.shares=1024 cpu.cfs_period_us=100000 cpu.cfs_quota_us=-1"},
		{Limits{}, "memory", true, "memory.high=max memory.max=max memory.swap.max=0"},
		{Limits{}, "memory", false, "memory.soft_limit_in_bytes=-1 memory.limit_in_bytes=-1 memory.swappiness=0"},
		{Limits{}, "pids", false, "pids.max=256"},
	} {
		var got []string
		for _, s := range c.limits.settings(c.controller, "a", c.v2) {
			got = append(got, s.file+"="+s.value)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%+v %s v2=%t: got %q, want %q", c.limits, c.controller, c.v2, got, c.want)
		}
	}
}

func TestIndexes(t *testing.T) {
	dir := t.TempDir()
	open := func() *indexes {
		x, err := openIndexes(dir)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	want := func(x *indexes, name string, want uint16) {
		t.Helper()
		if got, err := x.acquire(name); got != want || err != nil {
			t.Errorf("%s got index %d, %v, want %d", name, got, err, want)
		}
	}
	x := open()
	want(x, "a", 1)
	want(x, "b", 2)
	want(x, "a", 1)
	x = open()
	want(x, "b", 2)
	if err := x.release("a"); err != nil {
		t.Fatal(err)
	}
	x = open()
	want(x, "c", 3)
	x.last = maxIndex
	want(x, "d", 1)
	if err := x.reserve("e", 2); err != nil {
		t.Fatal(err)
	}
	want(open(), "b", 4)
}

func TestCheckTenant(t *testing.T) {
	for _, bad := range []model.Tenant{{}, {Scope: model.ScopeNamespace, Namespace: "../x"}, {Scope: model.ScopePod, Namespace: "a", Name: "../b"}, {Scope: model.ScopeNode, Name: "x"}} {
		if checkTenant(bad) == nil {
			t.Errorf("%#v is taken for a tenant", bad)
		}
	}
}

// A setting that a version doesn't know it logs an error and a stack for.
func TestFeatures(t *testing.T) {
	const setting = "enable_send_rst_on_user_space_socket"
	for version, has := range map[string]bool{"1.39.0": false, "1.39.3": false, "1.39.3+0123456789ab": false, "1.40.0": true, "1.40.0-rc.1": true, "1.41.2+0123456789ab": true, "2.0.0": true, "dev": true} {
		b, err := bootstrap(model.NamespaceTenant("team-a"), 0, version)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), setting) != has {
			t.Errorf("%s: set is %v", version, !has)
		}
	}
}

// A parent that isn't one, or isn't there, is refused, and nothing is made.
func TestCgroupParent(t *testing.T) {
	for _, bad := range []string{"bulkhead.slice", "/a/../b", "/a/", ".."} {
		if _, err := (Options{CgroupParent: bad}).withDefaults(); err == nil || !strings.Contains(err.Error(), "cgroup parent") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := (Options{CgroupParent: "/bulkhead.slice/bulkhead.service"}).withDefaults(); err != nil {
		t.Error(err)
	}
	c, err := openCgroups("/sys/fs/cgroup", "/bht-nowhere", "bht")
	if err == nil || !strings.Contains(err.Error(), "cgroup parent /bht-nowhere") {
		t.Errorf("opened %+v, %v", c, err)
	}
}

// Both versions' own files, which say the same in other words and units.
func TestHitsOfEitherVersion(t *testing.T) {
	want := Hits{Throttled: 7, ThrottledFor: 1500 * time.Millisecond, OOMKills: 3, Pids: 5}
	for _, c := range []struct {
		v2    bool
		files map[string]string
		high  uint64
	}{
		{false, map[string]string{
			"cpu.stat":           "nr_periods 900\nnr_throttled 7\nthrottled_time 1500000000\nnr_bursts 1\nburst_time 2\n",
			"memory.oom_control": "oom_kill_disable 0\nunder_oom 1\noom_kill 3\n",
			"pids.events":        "max 5\n",
		}, 0},
		{true, map[string]string{
			"cpu.stat":      "usage_usec 99\nuser_usec 98\nsystem_usec 1\nnr_periods 900\nnr_throttled 7\nthrottled_usec 1500000\nnr_bursts 1\nburst_usec 2\n",
			"memory.events": "low 10\nhigh 11\nmax 12\noom 13\noom_kill 3\noom_group_kill 14\n",
			"pids.events":   "max 5\n",
		}, 11},
	} {
		mount := t.TempDir()
		dir := filepath.Join(mount, "all", "a")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for file, text := range c.files {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cg := &cgroups{name: "all", hierarchies: []hierarchy{{mount: mount, v2: c.v2, controllers: limiting}}}
		want.MemoryHigh = c.high
		if got := cg.hits("a"); got != want {
			t.Errorf("version 2 %t: %+v, want %+v", c.v2, got, want)
		}
		if u := cg.usage("a"); u.Throttled != want.ThrottledFor || u.OOMKills != want.OOMKills {
			t.Errorf("version 2 %t: usage %+v", c.v2, u)
		}
		if got := cg.hits("b"); got != (Hits{}) {
			t.Errorf("version 2 %t: nobody has %+v", c.v2, got)
		}
	}
}

// Limits that bound nothing, as the node or all its proxies together have less, are told.
func TestLimitsAboveWhatThereIs(t *testing.T) {
	c := &cgroups{hierarchies: []hierarchy{{mount: t.TempDir(), v2: true, controllers: limiting}}}
	c.all.Store(&Limits{CPUMillis: 500, MemoryMax: 1 << 30, Pids: 300})
	for _, test := range []struct {
		tenant string
		l      Limits
		want   []string
	}{
		{"a", Limits{CPUMillis: 500, MemoryMax: 1 << 30, Pids: 300}, nil},
		{"a", Limits{}, nil},
		{"a", Limits{CPUMillis: 501}, []string{"cpu limit 501m: all proxies of the node have only 500m together"}},
		{"a", Limits{MemoryMax: 1<<30 + 1}, []string{"memory max 1073741825: all proxies of the node have only 1073741824 bytes together"}},
		{"a", Limits{Pids: 301}, []string{"pids 301: all proxies of the node have only 300 together"}},
		{"a", Limits{CPUMillis: 1 << 30, MemoryMax: 1 << 60}, []string{"cpu limit 1073741824m: the node has only", "memory max 1152921504606846976: the node has only"}},
		{everyone, Limits{CPUMillis: 501, MemoryMax: 1<<30 + 1, Pids: 301}, nil},
	} {
		got := c.unenforced(test.tenant, test.l)
		same := len(got) == len(test.want)
		for i := range test.want {
			same = same && strings.HasPrefix(got[i], test.want[i])
		}
		if !same {
			t.Errorf("%q %+v: %q, want %q", test.tenant, test.l, got, test.want)
		}
	}
}

// The kernel takes memory back with each write of a limit, so what is in force isn't
// written again.
func TestLimitsInForceAreNotWritten(t *testing.T) {
	mount := t.TempDir()
	dir := filepath.Join(mount, "all", "a")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c := &cgroups{name: "all", hierarchies: []hierarchy{{mount: mount, v2: true, controllers: limiting}}}
	files := map[string]string{
		"cpu.weight": "100\n", "cpu.max": "max 100000\n", "memory.high": "1048576\n", "memory.max": "max\n", "memory.swap.max": "0\n", "pids.max": "1024\n",
	}
	old := time.Unix(1, 0)
	for file, text := range files {
		path := filepath.Join(dir, file)
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chtimes(path, old, old)); err != nil {
			t.Fatal(err)
		}
	}
	written := func(l Limits) (names []string) {
		if err := c.limit("a", l); err != nil {
			t.Fatal(err)
		}
		for _, s := range slices.Concat(l.settings("cpu", "a", true), l.settings("memory", "a", true), l.settings("pids", "a", true)) {
			if info, err := os.Stat(filepath.Join(dir, s.file)); err != nil || !info.ModTime().Equal(old) {
				names = append(names, s.file)
			}
		}
		return names
	}
	l := Limits{CPUWeight: 100, MemoryHigh: 1 << 20, Pids: 1024}
	if names := written(l); len(names) > 0 {
		t.Errorf("what was in force was written: %q", names)
	}
	l.MemoryHigh = 2 << 20
	if names := written(l); !slices.Equal(names, []string{"memory.high"}) {
		t.Errorf("%q was written, want memory.high", names)
	}
}
