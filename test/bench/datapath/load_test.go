package datapath

import (
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
)

// kind is one kind of load.
type kind struct {
	name    string
	options load.Options
	// oneCPU has both ends and the proxies share one. A single request is never
	// under way in two places at once, and what waking another CPU costs depends on
	// the machine: this leaves the length of the way.
	oneCPU bool
}

var kinds = []kind{
	{"1 connection", load.Options{Connections: 1}, false},
	{"1 connection, one CPU", load.Options{Connections: 1}, true},
	{"16 connections", load.Options{Connections: 16}, false},
	{"64 connections", load.Options{Connections: 64}, false},
	{"a connection each, 16 at a time", load.Options{Connections: 16, New: true}, false},
	{"one stream", load.Options{Bulk: true}, false},
}

// pin has processes run on the first CPU, or on any again.
func pin(b *testing.B, one bool, pids []int) {
	b.Helper()
	var cpus []int
	for i := range runtime.NumCPU() {
		cpus = append(cpus, i)
		if one {
			break
		}
	}
	for _, pid := range pids {
		container.Pin(b, pid, cpus...)
	}
}

// bench runs the load on hosts.
type bench struct {
	*loader.Loader
	b *testing.B
	// servers are all of them, by PID.
	servers []int
	// setting that the nodes have.
	setting *setting
}

// run makes load on a way, of which no request may fail.
func (l *bench) run(w *way, k kind, duration time.Duration) load.Result {
	b := l.b
	b.Helper()
	o := k.options
	o.Duration, o.To = duration, netip.AddrPortFrom(w.to, load.RequestPort)
	if o.Bulk {
		o.To = netip.AddrPortFrom(w.to, load.BulkPort)
	}
	o.Processes = w.processes()
	pin(b, k.oneCPU, slices.Concat(l.servers, o.Processes))
	client := l.Begin(b.Context(), w.from, "run", o, "client", container.Pod)
	pin(b, k.oneCPU, []int{client.PID})
	var r load.Result
	if err := client.Wait(&r); err != nil {
		b.Fatalf("%s, %s: %v", w.name, k.name, err)
	}
	if len(o.Processes) > 0 && r.CPU.Processes == 0 {
		b.Fatalf("%s, %s: the proxies had nothing to do", w.name, k.name)
	}
	return r
}

// outcome is what the rounds measured of one way and kind.
type outcome struct {
	// rate is requests a second, or Gbit/s of a stream.
	rate     report.Samples
	p50, p99 report.Samples // µs
	// CPU time in µs a request, or in ms a Gbit.
	all, kernel, proxies report.Samples
}

func (o *outcome) add(k kind, r load.Result) {
	n, unit := float64(r.Requests), float64(time.Microsecond)
	if k.options.Bulk {
		n, unit = float64(r.Bytes)*8/1e9, float64(time.Millisecond)
	}
	o.rate = append(o.rate, n/r.Duration.Seconds())
	o.p50 = append(o.p50, float64(r.P50)/float64(time.Microsecond))
	o.p99 = append(o.p99, float64(r.P99)/float64(time.Microsecond))
	o.all = append(o.all, float64(r.CPU.All)/unit/n)
	o.kernel = append(o.kernel, float64(r.CPU.Kernel)/unit/n)
	o.proxies = append(o.proxies, float64(r.CPU.Processes)/unit/n)
}

// row of a table, with rate and kernel time beside the baseline's, if there is one.
func (o *outcome) row(k kind, name string, baseline *outcome) []string {
	latency := []string{o.p50.String(), o.p99.String()}
	if k.options.Bulk {
		latency = []string{"", ""}
	}
	if baseline == nil {
		baseline = o
	}
	return append(append([]string{k.name, name, o.rate.Spread(), o.rate.Per(baseline.rate).String()}, latency...),
		o.all.String(), o.kernel.String(), o.kernel.Per(baseline.kernel).String(), o.proxies.String())
}
