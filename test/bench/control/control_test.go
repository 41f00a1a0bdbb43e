package control

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
)

// Full size; smaller ones are for work on this benchmark.
var (
	services = flag.Int("services", 2000, "services of the mesh")
	nodes    = flag.Int("nodes", 170, "agents' connections")
	tenants  = flag.Int("tenants", 30, "streams of each agent")
	count    = flag.Int("changes", 1000, "changes of endpoints, one after the other")
)

const (
	endpoints = 20 // of each service
	used      = 20 // services by each stream
)

const (
	// commandPatience is for how long the server may work on one command.
	commandPatience = 2 * time.Minute
	// ackPatience is for how long a change's acknowledgements may take.
	ackPatience = 30 * time.Second
	// quiet is for how long nothing more may come after the last change: many times
	// the server's time for gathering changes.
	quiet = time.Second
)

// process is the server's.
type process struct {
	b     *testing.B
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	path  string
	ended bool
}

func startServer(b *testing.B) *process {
	b.Helper()
	dir, err := os.MkdirTemp("", "bulkhead-bench-")
	if err != nil {
		b.Fatal(err)
	}
	p := &process{b: b, path: filepath.Join(dir, "s")}
	p.cmd = exec.Command("/proc/self/exe")
	p.cmd.Env = append(os.Environ(), serverSocket+"="+p.path)
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		b.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		p.end()
		os.RemoveAll(dir)
	})
	return p
}

func (p *process) end() {
	if !p.ended {
		p.ended = true
		p.in.Close()
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
}

func (p *process) do(format string, args ...any) (u usage) {
	p.b.Helper()
	// The server is ended if it doesn't answer, so the read below is bounded.
	late := time.AfterFunc(commandPatience, func() { p.cmd.Process.Kill() })
	fmt.Fprintf(p.in, format+"\n", args...)
	line, err := p.out.ReadBytes('\n')
	if !late.Stop() {
		err = fmt.Errorf("no answer within %s", commandPatience)
	}
	if err == nil {
		err = json.Unmarshal(line, &u)
	}
	if err != nil {
		p.b.Fatalf("server: "+format+": %v", append(args, err)...)
	}
	return u
}

// changes are what a number of changes of endpoints cost.
type changes struct {
	p50, p99, max time.Duration
	cpu           float64 // seconds
	bytes         int     // to the streams that use the service
	others        int64   // bytes to all other streams
	pushes        int
}

// run makes changes, each after the last of the one before was acknowledged.
func run(b *testing.B, p *process, f *fleet, n int) (c changes) {
	b.Helper()
	var took []time.Duration
	began := p.do("cpu").CPU
	for i := range n {
		service := i * 7 % *services
		want := f.holders(service)
		if want == 0 {
			b.Fatalf("no stream uses service %d: too few streams for these services", service)
		}
		start := time.Now()
		p.do("change %d", service)
		last, late := start, time.After(ackPatience)
		for got := range want {
			select {
			case a := <-f.acks:
				if a.name != name(service) {
					b.Fatalf("%s was pushed to stream %d for a change of %s", a.name, a.stream, name(service))
				}
				c.bytes += a.bytes
				c.pushes++
				if a.at.After(last) {
					last = a.at
				}
			case err := <-f.ended:
				b.Fatal(err)
			case <-late:
				b.Fatalf("change %d of %s: %d of %d acknowledgements are missing after %s", i, name(service), want-got, want, ackPatience)
			}
		}
		took = append(took, last.Sub(start))
	}
	c.cpu = p.do("cpu").CPU - began
	slices.Sort(took)
	c.p50, c.p99, c.max = took[len(took)/2], took[len(took)*99/100], took[len(took)-1]
	time.Sleep(quiet)
	if c.others = f.others.Load(); c.others > 0 || len(f.acks) > 0 {
		b.Fatalf("%d bytes came to streams that don't use the service; %d responses too many after the last change", c.others, len(f.acks))
	}
	return c
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/1e6) }
func mib(n uint64) string       { return fmt.Sprintf("%.0f", float64(n)/(1<<20)) }

// some services for a stream, evenly.
func some(stream int) (out []int) {
	for i := range used {
		out = append(out, (stream*used+i*101)%*services)
	}
	return out
}

func all(int) (out []int) {
	for i := range *services {
		out = append(out, i)
	}
	return out
}

func BenchmarkControl(b *testing.B) {
	full := fullSize(b)
	ratio := everything(b)
	report.Publish(b, "control", full, ratio, proxyMemory(b))
}

// fullSize has all agents with all their tenants.
func fullSize(b *testing.B) report.Table {
	p := startServer(b)
	defer p.end()
	p.do("world %d %d", *services, endpoints)
	p.do("proxies %d %d", *nodes, *tenants)
	empty := p.do("usage")
	began := time.Now()
	f := connect(b, p.path, *nodes, *tenants, some)
	defer f.close()
	start := time.Since(began)
	streams := len(f.streams)
	idle := p.do("usage")
	c := run(b, p, f, *count)
	per := func(with, without uint64) string {
		return fmt.Sprintf("%.1f KiB", float64(with-without)/1024/float64(streams))
	}
	return report.Table{
		Title: "The server",
		Text: fmt.Sprintf("%d services with %d endpoints, %d streams over %d connections, each with %d services, so 40 names; %d changes of one endpoint, one after the other.",
			*services, endpoints, streams, *nodes, used, *count),
		Header: []string{"", ""},
		Rows: [][]string{
			{"memory without streams", mib(empty.RSS) + " MiB"},
			{"memory with all streams", mib(idle.RSS) + " MiB"},
			{"of that the heap's objects", mib(idle.Heap) + " MiB"},
			{"a stream with its names: resident", per(idle.RSS, empty.RSS)},
			{"of a stream: objects", per(idle.Heap, empty.Heap)},
			{"of a stream: stacks", per(idle.Stacks, empty.Stacks)},
			{"all streams from nothing", fmt.Sprintf("%.1f s", start.Seconds())},
			{"change to the last ACK, p50 / p99 / worst", ms(c.p50) + " / " + ms(c.p99) + " / " + ms(c.max) + " ms"},
			{"streams concerned by a change", fmt.Sprint(c.pushes / *count)},
			{"bytes to those", fmt.Sprintf("%d KiB a change", c.bytes / *count / 1024)},
			{"bytes to the others, in all", fmt.Sprint(c.others)},
			{"CPU of the server for 1,000 changes", fmt.Sprintf("%.2f s", c.cpu*1000/float64(*count))},
		},
	}
}

// everything compares with proxies that are subscribed to all services.
func everything(b *testing.B) report.Table {
	const someNodes, someTenants, n = 20, 5, 200
	measure := func(uses func(int) []int) (changes, usage, usage) {
		p := startServer(b)
		defer p.end()
		p.do("world %d %d", *services, endpoints)
		p.do("proxies %d %d", someNodes, someTenants)
		empty := p.do("usage")
		f := connect(b, p.path, someNodes, someTenants, uses)
		defer f.close()
		u := p.do("usage")
		return run(b, p, f, n), empty, u
	}
	few, fewEmpty, fewUse := measure(some)
	every, everyEmpty, everyUse := measure(all)
	row := func(what, a, b string, ratio float64) []string {
		return []string{what, a, b, fmt.Sprintf("%.1f", ratio)}
	}
	per := func(u, e usage) float64 { return float64(u.RSS-e.RSS) / (someNodes * someTenants) }
	return report.Table{
		Title: "On demand beside everything",
		Text: fmt.Sprintf("The same server and services in one run, scaled down to %d streams, for 5,100 that hold everything would begin with 20 million responses: %d changes, to proxies that hold the %d services that they use, and to proxies that hold all %d. The ratio of bytes doesn't depend on the number of streams. Those of CPU and memory would be larger with more: what a change costs once, and what all streams share, is in both columns.",
			someNodes*someTenants, n, used, *services),
		Header: []string{"", "on demand", "everything", "ratio"},
		Rows: [][]string{
			row("bytes a change", fmt.Sprintf("%d", few.bytes/n), fmt.Sprintf("%d", every.bytes/n), float64(every.bytes)/float64(few.bytes)),
			row("CPU of the server for 1,000 changes", fmt.Sprintf("%.2f s", few.cpu*1000/n), fmt.Sprintf("%.2f s", every.cpu*1000/n), every.cpu/few.cpu),
			row("change to the last ACK, p99", ms(few.p99)+" ms", ms(every.p99)+" ms", float64(every.p99)/float64(few.p99)),
			row("memory of the server for a stream", fmt.Sprintf("%.0f KiB", per(fewUse, fewEmpty)/1024), fmt.Sprintf("%.0f KiB", per(everyUse, everyEmpty)/1024), per(everyUse, everyEmpty)/per(fewUse, fewEmpty)),
		},
	}
}
