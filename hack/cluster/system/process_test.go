package system

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// starterEnv makes the test's executable start the daemon of a Spec and die of
// SIGKILL.
const starterEnv = "SYSTEM_TEST_START"

func TestMain(m *testing.M) {
	if data := os.Getenv(starterEnv); data != "" {
		os.Unsetenv(starterEnv)
		var spec Spec
		if err := json.Unmarshal([]byte(data), &spec); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		if _, err := Start(context.Background(), spec); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
	os.Exit(m.Run())
}

// shell is a daemon that runs a script.
func shell(t *testing.T, body string) Spec {
	t.Helper()
	dir := t.TempDir()
	return Spec{Name: "d", RecordDir: filepath.Join(dir, "run"), Path: "sh", Args: []string{"-c", body}, LogFile: filepath.Join(dir, "log", "d.log")}
}

const lasting = "echo ready; exec tail -f /dev/null"

func mustStart(t *testing.T, spec Spec) *Process {
	t.Helper()
	p, err := Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(context.Background(), 0); err != nil {
			t.Error(err)
		}
	})
	return p
}

// await waits until a log ends with a text.
func await(t *testing.T, path, end string) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for tick := time.NewTicker(2 * time.Millisecond); ; <-tick.C {
		data, _ := os.ReadFile(path)
		if strings.HasSuffix(string(data), end) {
			tick.Stop()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not end with %q but %q", path, end, data[max(0, len(data)-200):])
		}
	}
}

func hasRecord(spec Spec) bool {
	_, err := os.Stat(recordPath(spec.RecordDir, spec.Name))
	return err == nil
}

func TestStartLoadStop(t *testing.T) {
	spec := shell(t, "pwd; echo $WORD >&2; "+lasting)
	spec.Dir, spec.Env = t.TempDir(), []string{"WORD=both", "PATH=" + os.Getenv("PATH")}
	p := mustStart(t, spec)
	await(t, spec.LogFile, spec.Dir+"\nboth\nready\n")
	if sid, err := unix.Getsid(p.PID()); err != nil || sid != p.PID() {
		t.Errorf("its session is %d, %v; want its own, %d", sid, err, p.PID())
	}
	loaded, err := Load(spec.RecordDir, "d")
	if err != nil || loaded.PID() != p.PID() || !loaded.Running() {
		t.Fatalf("loaded %+v, %v; want running process %d", loaded, err, p.PID())
	}
	if again := mustStart(t, spec); again.PID() != p.PID() {
		t.Errorf("starting the same again gives process %d, want %d", again.PID(), p.PID())
	}
	spec.Args = []string{"-c", "echo other; " + lasting}
	other := mustStart(t, spec)
	if p.Running() || !other.Running() {
		t.Errorf("after a change running is %v for the old, %v for the new", p.Running(), other.Running())
	}
	// An old handle must not forget the new daemon.
	if err := p.Stop(t.Context(), 0); err != nil || !hasRecord(spec) || !other.Running() {
		t.Errorf("stopping the old one: %v, record %v, new running %v", err, hasRecord(spec), other.Running())
	}
	list, err := List(spec.RecordDir)
	if err != nil || len(list) != 1 || list[0].PID() != other.PID() {
		t.Errorf("list is %v, %v", list, err)
	}
	for range 2 {
		if err := other.Stop(t.Context(), 20*time.Second); err != nil {
			t.Error(err)
		}
		if other.Running() || hasRecord(spec) {
			t.Errorf("after stop: running %v, record %v", other.Running(), hasRecord(spec))
		}
	}
}

func TestDaemonOutlivesItsStarter(t *testing.T) {
	spec := shell(t, lasting)
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), starterEnv+"="+string(data))
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the starter: %v: %s", err, out)
	}
	p, err := Load(spec.RecordDir, "d")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Stop(context.Background(), 0) })
	await(t, spec.LogFile, "ready\n") // its log is written with nobody left
	if !p.Running() {
		t.Fatal("it does not run")
	}
	if err := p.Stop(t.Context(), 20*time.Second); err != nil || p.Running() {
		t.Errorf("stop: %v, running %v", err, p.Running())
	}
}

// A starter that dies before the record is written takes the launcher along.
func TestLauncherEndsWithItsStarter(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	cmd := exec.Cmd{Path: "/proc/self/exe", Args: []string{launcherName}, ExtraFiles: []*os.File{read, os.Stderr}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// A launch cut short is none.
	if _, err := write.WriteString(`{"Path":"/bin/true","Args":["`); err != nil {
		t.Fatal(err)
	}
	write.Close()
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("the launcher ended with %v, want exit status 1", err)
	}
}

func TestStopKillsAfterGrace(t *testing.T) {
	for _, tc := range []struct {
		name     string
		grace    time.Duration
		canceled bool
	}{
		{"grace", 10 * time.Millisecond, false},
		{"context", time.Hour, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := shell(t, `trap "" TERM; `+lasting)
			p := mustStart(t, spec)
			await(t, spec.LogFile, "ready\n")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if tc.canceled {
				cancel()
			}
			if err := p.Stop(ctx, tc.grace); err != nil || p.Running() {
				t.Errorf("stop: %v, running %v", err, p.Running())
			}
		})
	}
}

func TestStopIsGentleFirst(t *testing.T) {
	spec := shell(t, `trap 'kill $!; echo bye; exit' TERM; tail -f /dev/null & echo ready; wait`)
	p := mustStart(t, spec)
	await(t, spec.LogFile, "ready\n")
	if err := p.Stop(t.Context(), 20*time.Second); err != nil {
		t.Fatal(err)
	}
	await(t, spec.LogFile, "bye\n")
}

// A pid that means another process now, or is of another boot, is left alone.
func TestStopSparesAnotherProcess(t *testing.T) {
	for name, change := range map[string]func(*record){
		"reused pid":   func(r *record) { r.Start-- },
		"another boot": func(r *record) { r.Boot = "00000000-0000-0000-0000-000000000000" },
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "tail", "-f", "/dev/null")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
			rec, err := identify(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			spec := shell(t, lasting)
			if err := spec.complete(); err != nil {
				t.Fatal(err)
			}
			rec.Name, rec.Spec = "d", spec.digest()
			change(&rec)
			if err := (&Process{path: recordPath(spec.RecordDir, "d"), rec: rec}).save(); err != nil {
				t.Fatal(err)
			}
			p, err := Load(spec.RecordDir, "d")
			if err != nil {
				t.Fatal(err)
			}
			if p.Running() {
				t.Fatal("it counts as running")
			}
			if err := p.Wait(t.Context()); err != nil {
				t.Errorf("wait: %v", err)
			}
			// Not taken for the daemon either.
			if started := mustStart(t, spec); started.PID() == rec.PID {
				t.Error("start returned the other process")
			}
			if err := p.save(); err != nil { // the mistaken record again
				t.Fatal(err)
			}
			if err := p.Stop(t.Context(), time.Hour); err != nil || hasRecord(spec) {
				t.Errorf("stop: %v, record %v", err, hasRecord(spec))
			}
			if _, err := identify(cmd.Process.Pid); err != nil {
				t.Errorf("the other process was ended: %v", err)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
			if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
				t.Errorf("the other process ended with %v before it was killed", err)
			}
		})
	}
}

func TestParseStat(t *testing.T) {
	stat := "7 (a) S (b) R " + strings.Repeat("1 ", 18) + "4242 9 9\n"
	if state, start, err := parseStat([]byte(stat)); state != "R" || start != 4242 || err != nil {
		t.Errorf("got %q, %d, %v", state, start, err)
	}
	if _, _, err := parseStat([]byte("7 (a) R 1")); err == nil {
		t.Error("a short stat is taken")
	}
}

func TestWait(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	p := mustStart(t, shell(t, "read x <"+fifo))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it runs: %v", err)
	}
	if err := os.WriteFile(fifo, []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(t.Context()); err != nil || p.Running() {
		t.Errorf("at its end: %v, running %v", err, p.Running())
	}
}

func TestFailedStartLeavesNothing(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("\x7fELF nonsense"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*Spec)
		want   string
	}{
		{"no program", func(s *Spec) { s.Path = "/nonexistent/program" }, "/nonexistent/program"},
		{"no executable", func(s *Spec) { s.Path = bad }, "execute " + bad},
		{"no directory", func(s *Spec) { s.Dir = "/nonexistent" }, "working directory"},
		{"no cgroup", func(s *Spec) { s.Cgroups = []string{"/nonexistent"} }, "enter cgroup"},
		{"no namespace", func(s *Spec) { s.Namespaces = []string{"/nonexistent"} }, "enter namespace"},
		{"name with a slash", func(s *Spec) { s.Name = "a/b" }, "fit for a file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := shell(t, lasting)
			tc.change(&spec)
			p, err := Start(t.Context(), spec)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if p != nil || hasRecord(spec) {
				t.Errorf("process %v, record %v", p, hasRecord(spec))
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	spec := shell(t, lasting)
	if p, err := Start(ctx, spec); !errors.Is(err, context.Canceled) || hasRecord(spec) {
		t.Errorf("a start called off: %v, %v, record %v", p, err, hasRecord(spec))
	}
}

func TestLogIsBounded(t *testing.T) {
	const limit = 40_000
	spec := shell(t, "seq 100000; echo end")
	spec.LogLimit = limit
	p := mustStart(t, spec)
	if err := p.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, spec.LogFile, "\nend\n")
	before, err := os.ReadFile(spec.LogFile + ".1")
	if err != nil {
		t.Fatal(err)
	}
	last, err := os.ReadFile(spec.LogFile)
	if err != nil {
		t.Fatal(err)
	}
	if len(before) != limit || len(last) > limit {
		t.Errorf("log has %d bytes before and %d, limit is %d", len(before), len(last), limit)
	}
	if files, err := os.ReadDir(filepath.Dir(spec.LogFile)); err != nil || len(files) != 2 {
		t.Errorf("log has files %v, %v, want two", files, err)
	}
	// Nothing is lost in between.
	var want bytes.Buffer
	for i := 1; i <= 100000; i++ {
		fmt.Fprintln(&want, i)
	}
	want.WriteString("end\n")
	if kept := append(before, last...); !bytes.HasSuffix(want.Bytes(), kept) {
		t.Error("the log's files are not the end of what was written")
	}
	// The next daemon's keeper goes on with the same file.
	spec.Args = []string{"-c", "echo next"}
	mustStart(t, spec)
	await(t, spec.LogFile, "end\nnext\n")
}

func TestCgroupAndNamespaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	holder := exec.CommandContext(t.Context(), "tail", "-f", "/dev/null")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = holder.Process.Kill(); _ = holder.Wait() }()
	spec := shell(t, lasting)
	var want []string
	for _, kind := range []string{"mnt", "net", "uts"} {
		path := fmt.Sprintf("/proc/%d/ns/%s", holder.Process.Pid, kind)
		id, err := os.Readlink(path)
		if err != nil {
			t.Fatal(err)
		}
		spec.Namespaces, want = append(spec.Namespaces, path), append(want, id)
	}
	name := fmt.Sprintf("system-test-%d", os.Getpid())
	for _, parent := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(parent, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(parent, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
		spec.Cgroups = append(spec.Cgroups, dir)
	}
	if len(spec.Cgroups) == 0 {
		t.Fatal("no cgroup hierarchy found")
	}
	p := mustStart(t, spec)
	for i, id := range want {
		got, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", p.PID(), filepath.Base(spec.Namespaces[i])))
		if err != nil || got != id {
			t.Errorf("it is in %s, %v; want %s", got, err, id)
		}
	}
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID()))
	if n := strings.Count(string(groups), ":/"+name+"\n"); err != nil || n < len(spec.Cgroups) {
		t.Errorf("it is in the cgroups\n%s, %v; want those of %q", groups, err, spec.Cgroups)
	}
	// Wait until it is gone before its cgroups are removed.
	if err := p.Stop(t.Context(), 0); err != nil {
		t.Error(err)
	}
}
