// Package loader runs the program of package load on hosts of the lab, each process
// in a container of its own.
package loader

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// Loader has the program.
type Loader struct {
	b      *testing.B
	binary string
}

// New builds the program.
func New(b *testing.B) *Loader {
	b.Helper()
	l := &Loader{b: b, binary: filepath.Join(b.TempDir(), "load")}
	out, err := exec.Command("go", "build", "-o", l.binary, "github.com/bulkhead-mesh/bulkhead/test/bench/load/cmd").CombinedOutput()
	if err != nil {
		b.Fatalf("build the load: %v: %s", err, out)
	}
	return l
}

// Serve bears load on a host until the benchmark ends; command is serve or flow. It
// returns the process, which listens.
func (l *Loader) Serve(h *lab.Host, command, name string, limits container.Limits) (pid int) {
	b := l.b
	b.Helper()
	cmd := l.command(context.Background(), command)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	lab.Check(b, err)
	h.Do(b, func() { lab.Check(b, cmd.Start()) })
	container.Put(b, name, cmd.Process.Pid, limits)
	b.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		b.Fatalf("%s on %s: %q, %v", command, h.Name, line, err)
	}
	return cmd.Process.Pid
}

// Load is a process that makes load.
type Load struct {
	PID           int
	cmd           *exec.Cmd
	out, messages bytes.Buffer
}

// Begin has a host make load until it is done, or the context is: command is run,
// paced, unread, huge or scan, with its options.
func (l *Loader) Begin(ctx context.Context, h *lab.Host, command string, options any, name string, limits container.Limits) *Load {
	b := l.b
	b.Helper()
	text, err := json.Marshal(options)
	lab.Check(b, err)
	begun := &Load{cmd: l.command(ctx, command, string(text))}
	begun.cmd.Stdout, begun.cmd.Stderr = &begun.out, &begun.messages
	h.Do(b, func() { lab.Check(b, begun.cmd.Start()) })
	begun.PID = begun.cmd.Process.Pid
	container.Put(b, name, begun.PID, limits)
	return begun
}

// Exchange is Begin and Wait of a paced load, which must not end before its time.
func (l *Loader) Exchange(h *lab.Host, o load.PacedOptions, name string, limits container.Limits) (r load.PacedResult) {
	l.b.Helper()
	if err := l.Begin(l.b.Context(), h, "paced", o, name, limits).Wait(&r); err != nil {
		l.b.Fatalf("the load %s: %v", name, err)
	}
	return r
}

// Wait waits for the end of a load, and reads what it found. The error has what the
// process said.
func (l *Load) Wait(result any) error {
	if err := l.cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, l.messages.String())
	}
	return json.Unmarshal(l.out.Bytes(), result)
}

// CPU is the CPU time that a load has used, once it has ended.
func (l *Load) CPU() time.Duration {
	return l.cmd.ProcessState.UserTime() + l.cmd.ProcessState.SystemTime()
}

func (l *Loader) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, l.binary, args...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return cmd
}

// RoomForPorts lets a host make many connections in a second: as many ports as
// there can be, taken again one second after their last use.
func RoomForPorts(b *testing.B, h *lab.Host) {
	b.Helper()
	h.Do(b, func() { lab.Sysctl(b, "ipv4/ip_local_port_range=1024 65535", "ipv4/tcp_tw_reuse=1") })
}

// Record has perf look at all CPUs until stop is called; the file is named after
// what was measured.
func Record(b *testing.B, dir, name string) (stop func()) {
	b.Helper()
	lab.Check(b, os.MkdirAll(dir, 0o755))
	file := filepath.Join(dir, regexp.MustCompile("[^A-Za-z0-9.]+").ReplaceAllString(name, "-")+".data")
	cmd := exec.Command("perf", "record", "--quiet", "--all-cpus", "-e", "cpu-clock", "-F", "1999", "-g", "-o", file)
	lab.Check(b, cmd.Start())
	return func() {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
	}
}
