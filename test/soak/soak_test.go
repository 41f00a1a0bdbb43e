// Package soak has the tests that take minutes: `make soak`, as root.
//
// One half runs inside of a virtual machine whose processor is software: Debian's
// kernel, version 2 of cgroups alone and, in one of the runs, systemd as process 1,
// whatever the machine has that runs the tests. Nothing is installed in it: its
// root is this machine's, read-only, below a tmpfs that takes what is written.
// Process 1 of it is this test binary.
package soak

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

func TestMain(m *testing.M) {
	if os.Getpid() == 1 && os.Args[0] == "/init" {
		guest()
	}
	os.Exit(m.Run())
}

const (
	// guestTime bounds a machine, guestMemory is its memory in MiB, and consoleLimit
	// what it may say.
	guestTime    = 9 * time.Minute
	guestMemory  = 3072
	consoleLimit = 8 << 20
)

// order is what the guest is to do, a file in its first root.
type order struct {
	// Dir is where Command runs, with Env.
	Dir     string
	Env     []string
	Command []string
	// Systemd has systemd run it, as process 1.
	Systemd bool
	// Modules to load first, in this order.
	Modules []string
}

// machine is what guests are made from.
type machine struct {
	root   string
	dir    string
	kernel kernel
	init   string
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if testing.Short() {
		t.Skip("takes minutes: make soak")
	}
	for _, tool := range []struct{ command, pkg string }{
		{"qemu-system-x86_64", "qemu-system-x86"}, {"xz", "xz-utils"}, {"dpkg-deb", "dpkg"}, {"apt-get", "apt"},
	} {
		if _, err := exec.LookPath(tool.command); err != nil {
			t.Fatalf("%s is missing: apt-get install --no-install-recommends %s", tool.command, tool.pkg)
		}
	}
	root, err := filepath.Abs("../..")
	check(t, err)
	m := &machine{root: root, dir: filepath.Join(root, "out", "soak")}
	check(t, os.MkdirAll(m.dir, 0o755))
	m.kernel = fetchKernel(t)
	m.init = m.compile(t, "./test/soak", "CGO_ENABLED=0")
	return m
}

// compile builds the tests of a package, to run where there is no compiler.
func (m *machine) compile(t *testing.T, pkg string, env ...string) string {
	t.Helper()
	out := filepath.Join(m.dir, filepath.Base(pkg)+".test")
	m.goRun(t, env, "test", "-c", "-o", out, pkg)
	return out
}

func (m *machine) goRun(t *testing.T, env []string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir, cmd.Env = m.root, append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// run starts a guest and returns what it said, once it is off.
func (m *machine) run(t *testing.T, o order) string {
	t.Helper()
	o.Modules = m.kernel.modules
	o.Env = append(o.Env, "PATH="+os.Getenv("PATH"), "HOME="+os.Getenv("HOME"), "TMPDIR=/tmp")
	data, err := json.Marshal(o)
	check(t, err)
	files := []file{{name: "dev", mode: unix.S_IFDIR | 0o755}, {name: "modules", mode: unix.S_IFDIR | 0o755},
		{name: "dev/console", mode: unix.S_IFCHR | 0o600, major: 5, minor: 1}, {name: "order.json", mode: unix.S_IFREG | 0o600, data: data}}
	init, err := os.ReadFile(m.init)
	check(t, err)
	files = append(files, file{name: "init", mode: unix.S_IFREG | 0o755, data: init})
	for _, name := range m.kernel.modules {
		data, err := os.ReadFile(filepath.Join(m.kernel.dir, name+".ko"))
		check(t, err)
		files = append(files, file{name: "modules/" + name + ".ko", mode: unix.S_IFREG | 0o600, data: data})
	}
	initramfs := filepath.Join(t.TempDir(), "initramfs")
	check(t, os.WriteFile(initramfs, archive(files), 0o600))

	ctx, cancel := context.WithTimeout(t.Context(), guestTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35", "-cpu", "max", "-accel", "tcg,thread=multi",
		"-smp", fmt.Sprint(min(2, runtime.NumCPU())), "-m", fmt.Sprint(guestMemory),
		"-kernel", m.kernel.image, "-initrd", initramfs, "-append", "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off "+m.kernel.cmdline,
		"-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap", "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
		"-device", "virtio-rng-pci", "-serial", "stdio")
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.StdoutPipe()
	check(t, err)
	var messages bytes.Buffer
	cmd.Stderr = &messages
	begin := time.Now()
	check(t, cmd.Start())
	var said strings.Builder
	lines := bufio.NewReader(io.LimitReader(out, consoleLimit))
	for {
		line, err := lines.ReadString('\n')
		line = strings.TrimRight(line, "\r\n")
		said.WriteString(line + "\n")
		if testing.Verbose() && line != "" {
			t.Log(line)
		}
		if err != nil {
			break
		}
	}
	if err := cmd.Wait(); err != nil || ctx.Err() != nil {
		t.Fatalf("the machine didn't end well after %s: %v %v: %s\n%s", time.Since(begin).Round(time.Second), err, ctx.Err(), &messages, tail(said.String(), 16<<10))
	}
	t.Logf("Linux %s in software: %s", m.kernel.release, time.Since(begin).Round(time.Second))
	return said.String()
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// environment is what tests in a guest find instead of a compiler and a network.
func (m *machine) environment(t *testing.T) []string {
	t.Helper()
	envoy, err := dist.Fetch(t.Context(), dist.Default)
	check(t, err)
	standin := filepath.Join(m.dir, "standin")
	m.goRun(t, []string{"CGO_ENABLED=0"}, "build", "-trimpath", "-ldflags=-s -w", "-o", standin, "./isolation/testdata/standin")
	return []string{"BULKHEAD_CACHE=" + filepath.Dir(filepath.Dir(envoy.Dir)), "BULKHEAD_TEST_STANDIN=" + standin}
}

// wantPassed fails the test unless all of the guest's were run and passed.
func wantPassed(t *testing.T, said string, names ...string) {
	t.Helper()
	if !strings.Contains(said, ended+"0\n") {
		t.Errorf("the tests in the machine failed:\n%s", tail(said, 16<<10))
	}
	for _, name := range names {
		if !strings.Contains(said, "--- PASS: "+name+" ") {
			t.Errorf("%s wasn't passed", name)
		}
	}
}

// The bulkheads hold where there is version 2 of cgroups alone.
func TestUnifiedCgroups(t *testing.T) {
	m := newMachine(t)
	// Without those that want a proxy back in milliseconds, or start it with a tenth of
	// a processor, of which this one has too little.
	tests := []string{
		"TestSandbox", "TestSandboxHoldsAProbe", "TestUnifiedOnly", "TestLimitsChangeInPlace", "TestOutOfMemory",
		"TestCloseAndOpenAdopts", "TestDrain", "TestUninstallAfterCrash",
	}
	said := m.run(t, order{Dir: filepath.Join(m.root, "isolation"), Env: m.environment(t),
		Command: []string{m.compile(t, "./isolation"), "-test.v", "-test.timeout=8m", "-test.run=^(" + strings.Join(tests, "|") + ")$"}})
	wantPassed(t, said, tests...)
	if strings.Contains(said, "version 2 lacks the controllers [") && !strings.Contains(said, "version 2 lacks the controllers []") {
		t.Error("version 2 hasn't all controllers there")
	}
}

// systemd, as process 1 and with version 2 alone, leaves the bulkheads as they are.
func TestSystemd(t *testing.T) {
	m := newMachine(t)
	said := m.run(t, order{Systemd: true, Dir: filepath.Join(m.root, "isolation"), Env: m.environment(t),
		Command: []string{m.compile(t, "./isolation"), "-test.v", "-test.timeout=8m", "-test.run=^TestSystemd(LeavesTenantsAlone|Delegates)$"}})
	wantPassed(t, said, "TestSystemdLeavesTenantsAlone", "TestSystemdDelegates")
}
