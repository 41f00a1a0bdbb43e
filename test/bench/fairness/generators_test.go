package fairness

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// generators run the program of package load on hosts.
type generators struct {
	b      *testing.B
	binary string
}

func newGenerators(b *testing.B) *generators {
	b.Helper()
	g := &generators{b: b, binary: filepath.Join(b.TempDir(), "load")}
	out, err := exec.Command("go", "build", "-o", g.binary, "github.com/bulkhead-mesh/bulkhead/test/bench/load/cmd").CombinedOutput()
	if err != nil {
		b.Fatalf("build the load: %v: %s", err, out)
	}
	return g
}

func (g *generators) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, g.binary, args...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return cmd
}

// serve bears load on a host until the benchmark ends.
func (g *generators) serve(h *lab.Host, what string, cpu int64) {
	b := g.b
	b.Helper()
	cmd := g.command(context.Background(), what)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	lab.Check(b, err)
	h.Do(b, func() { lab.Check(b, cmd.Start()) })
	container.Put(b, h.Name+"-"+what, cmd.Process.Pid, container.Limits{Memory: 1 << 30, CPUMillis: cpu})
	b.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		b.Fatalf("%s on %s: %q, %v", what, h.Name, line, err)
	}
}

// ports lets hosts make many connections in a second.
func (g *generators) ports(hosts ...*lab.Host) {
	for _, h := range hosts {
		h.Do(g.b, func() { lab.Sysctl(g.b, "ipv4/ip_local_port_range=1024 65535", "ipv4/tcp_tw_reuse=1") })
	}
}

// repeat makes a load until the context ends, again whenever it fails: an aggressor
// whose proxy ends doesn't give up.
func (g *generators) repeat(ctx context.Context, h *lab.Host, what string, o load.Options) {
	for n := 0; ctx.Err() == nil; n++ {
		text, err := json.Marshal(o)
		lab.Check(g.b, err)
		cmd := g.command(ctx, what, string(text))
		h.Do(g.b, func() { lab.Check(g.b, cmd.Start()) })
		container.Put(g.b, "aggressor", cmd.Process.Pid, container.Limits{Memory: 1 << 30, CPUMillis: generatorCPU})
		cmd.Wait()
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// paced is the victim.
func (g *generators) paced(h *lab.Host, o load.PacedOptions) (r load.PacedResult) {
	b := g.b
	b.Helper()
	text, err := json.Marshal(o)
	lab.Check(b, err)
	cmd := g.command(context.Background(), "paced", string(text))
	var out, messages bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &messages
	h.Do(b, func() { lab.Check(b, cmd.Start()) })
	container.Put(b, "victim", cmd.Process.Pid, container.Limits{Memory: 1 << 30})
	if err := cmd.Wait(); err != nil {
		b.Fatalf("the victim's load: %v: %s", err, messages.String())
	}
	lab.Check(b, json.Unmarshal(out.Bytes(), &r))
	return r
}

// useServices has team-b's proxy hold the services that change: it has what was asked
// for once.
func (g *generators) useServices(l *lab.Lab) {
	for i := range services {
		g.paced(l.B1, load.PacedOptions{To: lab.At(lab.Addresses(fmt.Sprintf("10.96.7.%d", i), "::").V4, load.RequestPort), Rate: 100, Connections: 1, Duration: 10 * time.Millisecond, Patience: 5 * time.Second})
	}
}
