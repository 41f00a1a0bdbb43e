package isolation

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

func TestJudge(t *testing.T) {
	exited := func(status int) exitStatus { return exitStatus{true, syscall.WaitStatus(status << 8)} }
	signaled := func(s syscall.Signal) exitStatus { return exitStatus{true, syscall.WaitStatus(s)} }
	for _, c := range []struct {
		status       exitStatus
		oom, stopped bool
		cause        Cause
		text         string
	}{
		{exited(0), false, false, CauseExited, "exit status 0"},
		{exited(0), false, true, CauseStopped, "exit status 0"},
		{exited(1), false, false, CauseCrash, "exit status 1"},
		{signaled(unix.SIGSEGV), false, false, CauseCrash, "killed by SIGSEGV"},
		{signaled(unix.SIGSEGV), false, true, CauseCrash, "killed by SIGSEGV"},
		// A process that crashes while another one is killed for memory.
		{signaled(unix.SIGABRT), true, false, CauseCrash, "killed by SIGABRT"},
		{signaled(unix.SIGKILL), false, false, CauseKilled, "killed by SIGKILL"},
		{signaled(unix.SIGKILL), false, true, CauseStopped, "killed by SIGKILL"},
		{signaled(unix.SIGKILL), true, false, CauseOutOfMemory, "killed by SIGKILL: out of memory"},
		{signaled(unix.SIGKILL), true, true, CauseOutOfMemory, "killed by SIGKILL: out of memory"},
		{signaled(unix.SIGSYS), false, false, CauseForbiddenCall, "killed by SIGSYS: a system call that isn't allowed"},
		{exitStatus{}, true, false, CauseOutOfMemory, "ended: out of memory"},
		{exitStatus{}, false, true, CauseStopped, "ended as asked"},
		{exitStatus{}, false, false, CauseUnknown, "ended; its status is unknown, because another agent process had started it"},
	} {
		if cause, text := judge(c.status, c.oom, c.stopped); cause != c.cause || text != c.text {
			t.Errorf("%+v: %s %q", c, cause, text)
		}
	}
}

func TestBackoff(t *testing.T) {
	var b backoff
	if first := b.next(0); first > 250*time.Millisecond {
		t.Errorf("the first try waits %s", first)
	}
	last := firstDelay
	for range 20 {
		now := b.next(time.Second)
		if now != min(2*last, lastDelay) {
			t.Errorf("%s after %s", now, last)
		}
		last = now
	}
	if again := b.next(healthyAfter + 1); again != firstDelay {
		t.Errorf("%s after a healthy life", again)
	}
}

func TestLastLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for _, c := range []struct {
		content, want string
		offset        int64
	}{
		{"", "", 0},
		{"old\nnew\n", "new", 4},
		// Cut since.
		{"new\n", "new", 400},
		{"a\x1b[2Jb\xff\n", "a·[2Jb·", 0},
		{strings.Repeat("x\n", 100), strings.TrimSuffix(strings.Repeat("x\n", lastLines), "\n"), 0},
		{strings.Repeat("y", 9000), strings.Repeat("y", lastBytes), 0},
	} {
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := lastLog(path, c.offset); got != c.want {
			t.Errorf("%.20q from %d: %.80q, want %.80q", c.content, c.offset, got, c.want)
		}
	}
	if got := lastLog(path+"not", 0); got != "" {
		t.Errorf("no file: %q", got)
	}
}

// exits collects what a manager tells.
type exits struct {
	mu   sync.Mutex
	told map[model.Tenant][]Exit
}

func (n *node) collectExits() *exits {
	e := &exits{told: map[model.Tenant][]Exit{}}
	n.o.Exited = func(t model.Tenant, _ int, exit Exit) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.told[t] = append(e.told[t], exit)
	}
	return e
}

func (e *exits) of(t model.Tenant) []Exit {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]Exit(nil), e.told[t]...)
}

// Each end is told with its tenant, its cause and its last words, and nobody
// else's: one leaks, one crashes, one gives up, one is killed, one is well.
func TestCausesAreToldApart(t *testing.T) {
	n := newNode(t)
	told := n.collectExits()
	const well, leak, crash, fail = 0, 1, 2, 3
	n.useStandin(map[int]string{leak: "leak", crash: "crash", fail: "fail"}, standinTargets{})
	m := n.open()
	tenants := map[int]model.Tenant{}
	for generation, name := range map[int]string{well: "bhi-well", leak: "bhi-leak", crash: "bhi-crash", fail: "bhi-fail"} {
		tenants[generation] = model.NamespaceTenant(name)
		err := m.Update(t.Context(), Spec{Tenant: tenants[generation], Limits: Limits{MemoryMax: 48 << 20},
			Generations: []Generation{{generation, standinVersion}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	for generation, want := range map[int]Exit{
		leak:  {Cause: CauseOutOfMemory, Status: "killed by SIGKILL: out of memory", Log: "last words of bhi-leak"},
		crash: {Cause: CauseCrash, Status: "killed by SIGSEGV", Log: "not·printable\nlast words of bhi-crash"},
		fail:  {Cause: CauseCrash, Status: "exit status 3", Log: "last words of bhi-fail"},
	} {
		name := tenants[generation]
		n.await(m, name, "didn't end twice", func(s State) bool { return len(told.of(name)) >= 2 })
		for _, e := range told.of(name) {
			if e.Cause != want.Cause || e.Status != want.Status || e.Log != want.Log || e.PID == 0 || e.At.IsZero() {
				t.Errorf("%s: %+v, want %+v", name, e, want)
			}
		}
	}
	if u, err := m.Usage(tenants[leak]); err != nil || u.OOMKills < 2 {
		t.Errorf("usage of the one that leaks: %+v, %v", u, err)
	}
	s := n.await(m, tenants[well], "isn't live", func(s State) bool { return s.Processes[0].Live })
	if u, err := m.Usage(tenants[well]); err != nil || u.OOMKills != 0 || len(told.of(tenants[well])) != 0 || s.Processes[0].Restarts != 0 {
		t.Errorf("the one that is well: %+v %+v %v, %v", s, u, told.of(tenants[well]), err)
	}
	if err := m.Kill(s.Processes[0].PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.await(m, tenants[well], "isn't live again", func(now State) bool {
		return now.Processes[0].Live && now.Processes[0].PID != s.Processes[0].PID
	})
	if e := told.of(tenants[well]); len(e) != 1 || e[0].Cause != CauseKilled || e[0].PID != s.Processes[0].PID {
		t.Errorf("killed: %+v", e)
	}
}

// An OOM kill is one process's: neither its neighbour's of the same tenant that
// crashes later, nor that of the same generation's next process, nor one that
// the next manager asks about.
func TestOOMKillIsPutDownToOneProcess(t *testing.T) {
	n := newNode(t)
	told := n.collectExits()
	n.useStandin(map[int]string{1: "leak"}, standinTargets{})
	m := n.open()
	spec := Spec{Tenant: tenantA, Limits: Limits{MemoryMax: 64 << 20}, Generations: []Generation{{0, standinVersion}, {1, standinVersion}}}
	if err := m.Update(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	n.await(m, tenantA, "wasn't out of memory", func(s State) bool { return s.Processes[1].Exit.Cause == CauseOutOfMemory })
	spec.Generations = spec.Generations[:1]
	if err := m.Update(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	kill := func() Exit {
		t.Helper()
		s := n.await(m, tenantA, "isn't live", func(s State) bool { return s.Processes[0].Live })
		before := s.Processes[0].PID
		if err := m.Kill(before, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		s = n.await(m, tenantA, "isn't live again", func(s State) bool { return s.Processes[0].Live && s.Processes[0].PID != before })
		return s.Processes[0].Exit
	}
	if e := kill(); e.Cause != CauseKilled {
		t.Errorf("killed: %+v of %+v", e, told.of(tenantA))
	}
	m.Close()
	m = n.open()
	if e := kill(); e.Cause != CauseKilled {
		t.Errorf("killed after adoption: %+v", e)
	}
}

// A proxy that writes as fast as it can fills its own log and no disk.
func TestLogIsBounded(t *testing.T) {
	n := newNode(t)
	n.useStandin(map[int]string{1: "flood"}, standinTargets{})
	m := n.open()
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Generations: []Generation{{1, standinVersion}}}); err != nil {
		t.Fatal(err)
	}
	path := m.LogFile(tenantA, 1)
	size := func(path string) int64 {
		info, err := os.Stat(path)
		if err != nil {
			return 0
		}
		if info.Size() > LogLimit {
			t.Fatalf("%s has %d bytes", path, info.Size())
		}
		return info.Size()
	}
	// What was turned has been the log: that it is full shows that the other one was.
	s := n.await(m, tenantA, "didn't fill and turn its log", func(State) bool { return size(path) > 0 && size(path+".1") == LogLimit })
	if !s.Processes[0].Live || s.Processes[0].Restarts != 0 {
		t.Errorf("a full log ended the proxy: %+v", s.Processes[0])
	}
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 2 {
		t.Errorf("log files are %v, %v", files, err)
	}
}

// A proxy that crashes again and again waits longer each time, and once it has served for
// long enough its next start is as quick as the first.
func TestHealthEndsBackoff(t *testing.T) {
	n := newNode(t)
	n.useStandin(nil, standinTargets{})
	m := n.open()
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Generations: []Generation{{1, standinVersion}}}); err != nil {
		t.Fatal(err)
	}
	p := n.waitLive(m, tenantA, 0)
	waited := func() time.Duration {
		t.Helper()
		if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p = n.waitLive(m, tenantA, p.PID)
		return p.StartedAt.Sub(p.Exit.At)
	}
	const crashes = 6
	for i := range crashes {
		if took := waited(); took < firstDelay<<i {
			t.Errorf("after %d crashes it waits %s", i+1, took)
		}
	}
	n.await(m, tenantA, "doesn't serve", func(State) bool { return m.tenant(tenantA).process(1).healthyFor() > healthyAfter })
	// Its health counts, also if it hung before it died.
	if err := unix.Kill(p.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	n.await(m, tenantA, "is still live", func(s State) bool { return !s.Processes[0].Live })
	// Without that it would be twice as long as this: a machine may stand still for seconds.
	if took := waited(); took > firstDelay<<crashes/2 {
		t.Errorf("after it has served it waits %s", took)
	}
}
