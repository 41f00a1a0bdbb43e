package isolation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

func TestKilledProxyComesBack(t *testing.T) {
	n := newNode(t)
	m := n.open()
	a, b := n.run(m, tenantA, Limits{}), n.run(m, tenantB, Limits{})

	killed := time.Now()
	if err := m.Kill(a.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	again := n.waitLive(m, tenantA, a.PID)
	// TestBackoff says that the first try is due within 250 ms; how late a busy
	// machine is, is only to be read here.
	t.Logf("ended %s after the signal, was started again %s later", again.Exit.At.Sub(killed), again.StartedAt.Sub(again.Exit.At))
	if d := again.StartedAt.Sub(killed); d > 5*time.Second {
		t.Errorf("was started again after %s", d)
	}
	if again.Restarts != 1 || again.LastExit != "killed by SIGKILL" {
		t.Errorf("%d restarts, last exit %q", again.Restarts, again.LastExit)
	}
	if now := n.waitLive(m, tenantB, 0); now != b {
		t.Errorf("the other tenant's process is %+v, was %+v", now, b)
	}
	// Process 1 of a pid namespace gets only what it has a handler for.
	if err := m.Kill(again.PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if third := n.waitLive(m, tenantA, again.PID); third.LastExit != "exit status 0" {
		t.Errorf("after SIGTERM the last exit is %q", third.LastExit)
	}
	if err := m.Kill(os.Getpid(), unix.SIGKILL); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("killing another process: %v", err)
	}
}

func TestGenerationsAndDelete(t *testing.T) {
	n := newNode(t)
	var changes atomic.Int32
	n.o.Changed = func(name model.Tenant) {
		if name == tenantA {
			changes.Add(1)
		}
	}
	m := n.open()
	first := n.run(m, tenantA, Limits{})
	b := n.run(m, tenantB, Limits{})
	spec := Spec{Tenant: tenantA, MTU: 1400, Generations: []Generation{{1, dist.Default}}}
	for range 2 {
		changes.Store(0)
		if err := m.Update(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
	}
	if changes.Load() != 0 {
		t.Error("an update that changed nothing was told as a change: who repeats it on each change would never end")
	}
	n.serveXDS(m, tenantA, 2, nil)
	spec.Generations = append(spec.Generations, Generation{2, dist.Default})
	if err := m.Update(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	s, _ := m.State(tenantA)
	if len(s.Processes) != 2 || s.Processes[0].PID != first.PID || !alive(s.Processes[1].PID) {
		t.Fatalf("two generations: %+v", s.Processes)
	}
	if err := m.Update(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	again, _ := m.State(tenantA)
	if len(again.Processes) != 2 || again.Processes[1].PID != s.Processes[1].PID {
		t.Errorf("the same again: %+v, was %+v", again.Processes, s.Processes)
	}
	spec.Generations = []Generation{{2, dist.Default}}
	if err := m.Update(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if alive(first.PID) {
		t.Error("generation 1 still runs")
	}
	if last, _ := m.State(tenantA); len(last.Processes) != 1 || last.Processes[0].PID != s.Processes[1].PID {
		t.Errorf("one generation: %+v", last.Processes)
	}

	err := m.Update(t.Context(), Spec{Tenant: tenantA, MTU: 1400, Generations: []Generation{{2, dist.Default}, {3, "9.9.9"}}})
	if !errors.Is(err, ErrVersion) {
		t.Errorf("a version that isn't there: %v", err)
	}
	if p, _ := m.State(tenantA); p.Problem == "" || !alive(p.Processes[0].PID) {
		t.Errorf("beside a version that isn't there: %+v", p)
	}
	err = m.Update(t.Context(), Spec{Tenant: tenantA, MTU: 1400, Generations: []Generation{{2, "9.9.9"}}})
	if !errors.Is(err, ErrVersion) {
		t.Errorf("to a version that isn't there: %v", err)
	}
	if p, _ := m.State(tenantA); len(p.Processes) != 1 || p.Processes[0].PID != s.Processes[1].PID || p.Processes[0].Version != dist.Default {
		t.Errorf("a version that isn't there changed what runs: %+v", p.Processes)
	}

	if err := m.Delete(t.Context(), tenantA); err != nil {
		t.Fatal(err)
	}
	if err := m.Delete(t.Context(), tenantA); err != nil {
		t.Errorf("deleting again: %v", err)
	}
	if alive(s.Processes[1].PID) {
		t.Error("a process is left")
	}
	if has := m.HasCgroupV2(); has != (s.CgroupV2 != "") {
		t.Errorf("without the tenant the node has cgroup version 2: %v, its folder was %q", has, s.CgroupV2)
	}
	paths := append(m.cgroups.dirs("bhi-a"), s.Netns, n.o.RunDir+"/state/bhi-a", n.o.RunDir+"/tenants/bhi-a", n.o.LibDir+"/log/bhi-a",
		"/sys/class/net/"+n.o.linkName(s.Index))
	for _, path := range paths {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if now := n.waitLive(m, tenantB, 0); now != b {
		t.Errorf("the other tenant's process is %+v, was %+v", now, b)
	}
	if got := m.Tenants(); len(got) != 1 || got[0] != tenantB {
		t.Errorf("tenants are %v", got)
	}
	back, err := m.Prepare(t.Context(), tenantA, 1400)
	if err != nil || back.Index == s.Index {
		t.Errorf("index %d was given out again at once, %v", back.Index, err)
	}
}

func TestCloseAndOpenAdopts(t *testing.T) {
	n := newNode(t)
	m := n.open()
	a := n.run(m, tenantA, Limits{MemoryMax: 256 << 20})
	before, _ := m.State(tenantA)
	m.Close()
	if !alive(a.PID) {
		t.Fatal("the process ended with its manager")
	}
	m = n.open()
	now := n.waitLive(m, tenantA, 0)
	if now.PID != a.PID || now.StartTicks != a.StartTicks || now.Restarts != 0 {
		t.Errorf("adopted %+v, was %+v", now, a)
	}
	if after, _ := m.State(tenantA); fmt.Sprint(after.Bulkhead) != fmt.Sprint(before.Bulkhead) || after.Limits != before.Limits {
		t.Errorf("adopted %+v, was %+v", after, before)
	}
	if err := m.Kill(a.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	want := CauseKilled
	if !kernelTellsExit(t) {
		t.Log("this kernel tells nothing of how somebody else's child ended: Linux 6.15 does")
		want = CauseUnknown
	}
	if again := n.waitLive(m, tenantA, a.PID); again.Exit.Cause != want {
		t.Errorf("last exit of an adopted process: %+v", again.Exit)
	}
}

// kernelTellsExit asks the kernel how a process ended that was reaped already.
func kernelTellsExit(t *testing.T) bool {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	cmd.Process.Kill()
	cmd.Wait()
	return exitOf(uintptr(fd)) != (exitStatus{})
}

// What is in a tenant's cgroup and isn't its proxy is ended at the next start of
// a manager, and the proxy isn't.
func TestStrayProcessIsEnded(t *testing.T) {
	n := newNode(t)
	n.useStandin(nil, standinTargets{})
	m := n.open()
	spec := Spec{Tenant: tenantA, Generations: []Generation{{1, standinVersion}}}
	if err := m.Update(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	before := n.waitLive(m, tenantA, 0)
	m.Close()
	stray := exec.Command("sleep", "300")
	if err := stray.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stray.Process.Kill() })
	if err := m.cgroups.join(tenantA.FileName(), stray.Process.Pid); err != nil {
		t.Fatal(err)
	}
	m = n.open()
	ended := make(chan struct{})
	go func() { stray.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(patience()):
		t.Error("the stray process is left")
	}
	if now := n.waitLive(m, tenantA, 0); now.PID != before.PID {
		t.Errorf("the process is %+v, was %+v", now, before)
	}
}

// A manager that is killed at any moment leaves something that the next one can
// take over or remove.
func TestManagerIsKilled(t *testing.T) {
	n := newNode(t)
	warm := n.open()
	if _, err := warm.versions.tree(dist.Default); err != nil {
		t.Fatal(err)
	}
	warm.Close()
	options, err := json.Marshal(n.managed())
	if err != nil {
		t.Fatal(err)
	}
	var last int
	whole := false
	for after := 20 * time.Millisecond; !whole && after < 30*time.Second; after += after / 3 {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		cmd := exec.CommandContext(ctx, "/proc/self/exe", "manage", string(options))
		out, err := cmd.CombinedOutput()
		cancel()
		if err == nil || cmd.ProcessState.Exited() {
			t.Fatalf("a manager ended: %v %s", err, out)
		}
		whole = string(out) == "updated"
		m := n.open()
		s, _ := m.State(tenantA)
		if len(s.Processes) == 1 && s.Processes[0].PID != 0 {
			last = s.Processes[0].PID
		}
		if err := m.Update(t.Context(), Spec{Tenant: tenantA, Generations: []Generation{{1, dist.Default}}}); err != nil {
			t.Errorf("killed after %s: %v", after, err)
		}
		n.waitRunning(m)
		if err := m.Delete(t.Context(), tenantA); err != nil {
			t.Errorf("killed after %s: %v", after, err)
		}
		if pids := m.cgroups.pids("bhi-a"); len(pids) > 0 {
			t.Errorf("killed after %s: processes %v are left", after, pids)
		}
		m.Close()
	}
	if last == 0 || !whole {
		t.Error("no manager came far enough to leave a process")
	}
}

// waitRunning waits for exactly the process of the state in the tenant's cgroups.
func (n *node) waitRunning(m *Manager) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), patience())
	defer cancel()
	for {
		s, _ := m.State(tenantA)
		pids := m.cgroups.pids("bhi-a")
		if len(s.Processes) == 1 && len(pids) == 1 && pids[0] == s.Processes[0].PID {
			return
		}
		select {
		case <-ctx.Done():
			n.t.Fatalf("state %+v, in the cgroups %v", s, pids)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// managed are the options that manage can be given.
type managed struct {
	RunDir, LibDir, EnvoyDir, CgroupName, LinkPrefix string
	UIDBase                                          uint32
}

func (n *node) managed() managed {
	return managed{n.o.RunDir, n.o.LibDir, n.o.EnvoyDir, n.o.CgroupName, n.o.LinkPrefix, n.o.UIDBase}
}

func openManaged(options string) (*Manager, error) {
	var o managed
	if err := json.Unmarshal([]byte(options), &o); err != nil {
		return nil, err
	}
	return Open(Options{RunDir: o.RunDir, LibDir: o.LibDir, EnvoyDir: o.EnvoyDir,
		CgroupName: o.CgroupName, LinkPrefix: o.LinkPrefix, UIDBase: o.UIDBase})
}

// manage is a manager in a process of its own.
func manage(options string) {
	m, err := openManaged(options)
	if err == nil {
		err = m.Update(context.Background(), Spec{Tenant: tenantA, Generations: []Generation{{1, dist.Default}}})
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Print("updated")
	select {}
}

func TestUninstallAfterCrash(t *testing.T) {
	n := newNode(t)
	m := n.open()
	a, b := n.run(m, tenantA, Limits{}), n.run(m, tenantB, Limits{})
	m.Close()
	// As no crash of ours leaves it, but a full disk may.
	state, err := os.ReadFile(n.o.statePath(tenantA))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.o.statePath(tenantA), state[:len(state)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.o.LibDir, "indexes.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Uninstall(n.o); err != nil {
		t.Fatal(err)
	}
	n.wantNothingLeft()
	for _, pid := range []int{a.PID, b.PID} {
		if status := procStatus(t, pid); !strings.HasPrefix(status["State"], "Z") {
			t.Errorf("process %d is %s", pid, status["State"])
		}
	}
	if err := Uninstall(n.o); err != nil {
		t.Errorf("uninstalling again: %v", err)
	}
}

func TestOutOfMemory(t *testing.T) {
	n := newNode(t)
	m := n.open()
	b := n.run(m, tenantB, Limits{})
	n.serveXDS(m, tenantA, 1, nil)
	// Enough to become Envoy, not enough to be it.
	err := m.Update(t.Context(), Spec{Tenant: tenantA, Limits: Limits{MemoryMax: 8 << 20}, Generations: []Generation{{1, dist.Default}}})
	if err != nil {
		t.Log(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience())
	defer cancel()
	for {
		s, _ := m.State(tenantA)
		if len(s.Processes) == 1 && strings.HasSuffix(s.Processes[0].LastExit, "out of memory") {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%+v", s)
		case <-time.After(10 * time.Millisecond):
		}
	}
	if u, err := m.Usage(tenantA); err != nil || u.OOMKills == 0 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if now := n.waitLive(m, tenantB, 0); now != b {
		t.Errorf("the other tenant's process is %+v, was %+v", now, b)
	}
}
