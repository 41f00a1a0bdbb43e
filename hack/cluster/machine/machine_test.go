package machine

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == InitArg {
		Init(os.Args[2:])
	}
	os.Exit(m.Run())
}

// eventually waits for a condition of another process.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func startTestMachine(t *testing.T) (Spec, Machine) {
	if testing.Short() {
		t.Skip("makes namespaces and cgroups as root: make test-kernel")
	}
	dir := t.TempDir()
	disk := t.TempDir()
	spec := Spec{
		Name: "bhtest-machine", Dir: dir, Root: true,
		Cgroup: fmt.Sprintf("bhtest-machine-%d", os.Getpid()), SubCgroups: []string{"sub"},
		Mounts: []Mount{{Source: disk, Target: "/var/lib/disk"}},
		Files:  map[string]string{"/etc/hello": "world"},
		Daemons: []Daemon{
			// It ends when somebody takes its file away, and then comes back.
			{Name: "worker", Path: "/bin/sh", Args: []string{"-c",
				"cat /etc/hello; cat /proc/self/cgroup; echo $$ > /var/lib/disk/pid; exec sleep 1000"}},
			{Name: "late", Path: "/bin/sh", After: "/var/lib/disk/pid", Args: []string{"-c", "echo late > /var/lib/disk/late; exec sleep 1000"}},
		},
	}
	t.Cleanup(func() {
		if err := Stop(dir); err != nil {
			t.Error(err)
		}
	})
	m, err := Start(spec, "/proc/self/exe", func(int) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return spec, m
}

func TestMachine(t *testing.T) {
	spec, m := startTestMachine(t)
	disk := spec.Mounts[0].Source
	pidOf := func() string {
		b, _ := os.ReadFile(filepath.Join(disk, "pid"))
		return strings.TrimSpace(string(b))
	}
	eventually(t, "both daemons", func() bool {
		_, err := os.Stat(filepath.Join(disk, "late"))
		return err == nil && pidOf() != ""
	})
	if found, ok, err := Find(spec.Dir); err != nil || !ok || found != m {
		t.Errorf("Find = %v, %v, %v; want %v", found, ok, err, m)
	}
	logFile := filepath.Join(spec.LogDir(), "worker.log")
	eventually(t, "the worker's log", func() bool {
		b, _ := os.ReadFile(logFile)
		return strings.Contains(string(b), "world") && strings.Count(string(b), ":/\n") >= 2
	})

	// The daemon is ended: it is started again.
	before := pidOf()
	in := func(args ...string) string {
		out, err := exec.Command("nsenter", append([]string{"--target", fmt.Sprint(m.PID), "--all", "--"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	in("kill", "-9", before)
	eventually(t, "the worker to come back", func() bool { return pidOf() != before && pidOf() != "" })

	if got := in("hostname"); got != spec.Name {
		t.Errorf("hostname is %q, want %q", got, spec.Name)
	}
	if got := in("ls", "/"); strings.Contains(got, "work") || strings.Contains(got, "home") {
		t.Errorf("the machine's root shows this machine's: %s", got)
	}
	if got := in("stat", "-f", "-c", "%T", "/sys/fs/bpf"); got != "bpf_fs" {
		t.Errorf("/sys/fs/bpf is a %s", got)
	}

	// Ended, it leaves nothing.
	if err := Stop(spec.Dir); err != nil {
		t.Fatal(err)
	}
	if _, ok, _ := Find(spec.Dir); ok {
		t.Error("the machine runs after Stop")
	}
	eventually(t, "its init to be reaped", func() bool { return unix.Kill(m.PID, 0) != nil })
	leftCgroups(t, spec)
	if b, _ := os.ReadFile("/proc/self/mounts"); strings.Contains(string(b), spec.Dir) {
		t.Error("a mount is left")
	}
	if err := Stop(spec.Dir); err != nil {
		t.Errorf("second Stop: %v", err)
	}
}

func leftCgroups(t *testing.T, spec Spec) {
	t.Helper()
	all, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range all {
		if _, err := os.Stat(filepath.Join(h.Dir, spec.Cgroup)); err == nil {
			t.Errorf("cgroup %s/%s is left", h.Dir, spec.Cgroup)
		}
	}
}

// TestStartFails shows that a machine that doesn't come up leaves nothing.
func TestStartFails(t *testing.T) {
	if testing.Short() {
		t.Skip("makes namespaces and cgroups as root: make test-kernel")
	}
	spec := Spec{Name: "bhtest-broken", Dir: t.TempDir(), Root: true, Cgroup: fmt.Sprintf("bhtest-broken-%d", os.Getpid()),
		Mounts: []Mount{{Source: "/does/not/exist", Target: "/x"}}}
	_, err := Start(spec, "/proc/self/exe", func(int) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "/does/not/exist") {
		t.Errorf("error %v doesn't name what is missing", err)
	}
	if _, ok, _ := Find(spec.Dir); ok {
		t.Error("the machine runs")
	}
	leftCgroups(t, spec)
}

// TestOtherProcess shows that a record from before a restart, or whose pid is
// another process's by now, ends nobody.
func TestOtherProcess(t *testing.T) {
	dir := t.TempDir()
	other := exec.Command("sleep", "100")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { other.Process.Kill(); other.Wait() }()
	ticks, err := startTicks(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []record{{other.Process.Pid, ticks + 1, boot}, {other.Process.Pid, ticks, "earlier"}} {
		b := fmt.Sprintf(`{"pid":%d,"startTicks":%d,"bootID":%q}`, r.PID, r.StartTicks, r.BootID)
		if err := os.WriteFile(filepath.Join(dir, "init.json"), []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Stop(dir); err != nil {
			t.Error(err)
		}
		if err := unix.Kill(other.Process.Pid, 0); err != nil {
			t.Fatalf("%+v ended another process", r)
		}
	}
}

func TestLogIsBounded(t *testing.T) {
	name := filepath.Join(t.TempDir(), "x.log")
	l, err := openLog(name)
	if err != nil {
		t.Fatal(err)
	}
	line := []byte(strings.Repeat("x", 1<<20))
	for range 3 * logBytes >> 20 {
		l.Write(line)
	}
	for _, f := range []string{name, name + ".old"} {
		info, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() == 0 || info.Size() > logBytes {
			t.Errorf("%s has %d bytes, want at most %d", f, info.Size(), logBytes)
		}
	}
}
