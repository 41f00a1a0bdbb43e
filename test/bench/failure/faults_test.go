package failure

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

const (
	// spare memory, in bytes, that the tenth's proxies have before they hold connections,
	// and so many connections that it can't be enough for them, at some 20 KB each.
	spare, tooMany = 16 << 20, 4000
	// leastOfTwo is what they must be allowed with a standby, in bytes, or there is none.
	leastOfTwo = 96 << 20
	// changes of the tenth's service in a round, all of which its proxy refuses.
	changes = 20
)

// spoiler changes what the tenth's proxy is told of its own service into what Envoy
// refuses.
type spoiler struct {
	on      atomic.Bool
	refused atomic.Int64
	// failed is what went wrong besides.
	failed atomic.Pointer[string]
	// changes so far, of the benchmark alone.
	changes int
}

func (s *spoiler) rewrite(node string, _ model.Tenant, r *discoveryv3.Resource) {
	if !s.on.Load() || node != "node1" {
		return
	}
	if err := lab.SpoilEndpoints(r); err != nil {
		text := err.Error()
		s.failed.Store(&text)
	}
}

func (s *spoiler) onReject(r xds.Rejection) {
	if !strings.Contains(r.Message, lab.NoAddress) {
		text := fmt.Sprintf("Envoy refused %+v", r)
		s.failed.Store(&text)
	}
	s.refused.Add(1)
}

func BenchmarkFaults(b *testing.B) {
	memory := report.Table{Title: "A proxy that is out of memory",
		Text:   fmt.Sprintf("The same tenants and load. The tenth's pod opens connections and keeps them until its proxy, which may have %d MiB more than it has at rest (with a standby %d MiB in all, the least that leaves room for one), is killed for it by the kernel; then it closes them. \"Gone\" is from when the first connection that wasn't served had begun.", spare>>20, leastOfTwo>>20),
		Header: []string{"isolation", "kills", "the nine: requests", "failed", "p99 ms", "the tenth: held", "gone ms", "at most"}}
	config := report.Table{Title: "A configuration that is refused",
		Text:   fmt.Sprintf("The same tenants and load, and the tenth makes as many requests to a service of its own. In each round the service's endpoints change %d times, and the tenth's proxy is told an address of them that is none.", changes),
		Header: []string{"isolation", "changes", "the nine: requests", "failed", "p99 ms", "the tenth: requests", "failed", "p99 ms"}}
	for _, v := range variants {
		// A lab for each: what one leaves behind isn't the next one's.
		if !b.Run(v.name, func(b *testing.B) {
			s := &spoiler{}
			l := lab.NewWith(b, lab.Options{PathMTU: 1500, NoAccessLog: true, Tenants: tenants - 2, Rewrite: s.rewrite, OnReject: s.onReject})
			ld := loader.New(b)
			ld.Serve(l.A3, "serve", "serve", container.Pod)
			ld.Serve(l.B2, "serve", "serve-b", container.Pod)
			use(b, l, v)
			memory.Rows = append(memory.Rows, outOfMemory(b, l, ld, v))
			config.Rows = append(config.Rows, refuse(b, l, ld, s, v))
			if text := s.failed.Load(); text != nil {
				b.Fatal(*text)
			}
		}) {
			return
		}
	}
	if len(memory.Rows) == len(variants) { // -bench may have chosen some
		report.Publish(b, "failure-faults", memory, config)
	}
}

// outOfMemory has the tenth's proxy killed for its memory in each round, and leaves it
// as it was.
func outOfMemory(b *testing.B, l *lab.Lab, ld *loader.Loader, v variant) []string {
	b.Helper()
	first(b, l, v)
	bound := l.Node1.Memory(b, l.B1.Tenant.String()) + spare
	if v.standby {
		bound = max(bound, leastOfTwo)
	}
	limit(b, l, bound)
	others := besides(b, l, ld, time.Duration(*report.Rounds)**pause)
	var gone, held report.Samples
	for range *report.Rounds {
		next := time.Now().Add(*pause)
		n, took := exhaust(b, l, v)
		held, gone = append(held, float64(n)), append(gone, float64(took)/float64(time.Millisecond))
		time.Sleep(time.Until(next))
	}
	requests, failed, p99 := others(v.name)
	limit(b, l, 1<<30)
	first(b, l, v)
	return []string{v.name, fmt.Sprint(len(gone)), fmt.Sprint(requests), fmt.Sprint(failed), p99.Spread(), held.String(), gone.String(), fmt.Sprintf("%.0f", slices.Max(gone))}
}

// limit bounds the memory of the tenth's proxies, in place.
func limit(b *testing.B, l *lab.Lab, bytes int64) {
	b.Helper()
	name := l.B1.Tenant.String()
	l.Node1.Limits = map[string]v1alpha1.Limits{name: {MemoryMax: bytes}}
	l.Node1.WritePlan()
	lab.Eventually(b, "the limit", func() error {
		if have := l.Node1.Tenant(name).Limits.MemoryMax; have != bytes {
			return fmt.Errorf("it is %d", have)
		}
		return nil
	})
}

// exhaust has the tenth's proxy killed for its memory.
func exhaust(b *testing.B, l *lab.Lab, v variant) (held int, gone time.Duration) {
	b.Helper()
	before := first(b, l, v)
	to := lab.At(l.B2.V4, app.GreetPort).String()
	l.B1.Do(b, func() {
		var all []net.Conn
		var unserved time.Time
		// Near its bound a proxy serves late: that isn't the end, and those are kept, too.
		for begun := time.Now(); unix.Kill(before.PID, 0) == nil; {
			next := time.Now()
			if len(all) == tooMany || next.Sub(begun) > lab.Patience {
				b.Fatalf("after %d connections in %s process %d is there still", len(all), next.Sub(begun), before.PID)
			}
			c, err := greet(to)
			if err != nil && unserved.IsZero() {
				unserved = next
			}
			if c != nil {
				all = append(all, c)
			}
		}
		if unserved.IsZero() {
			unserved = time.Now() // its standby has all that was to come
		}
		for _, c := range all {
			c.Close()
		}
		held = len(all)
		gone = untilServed(b, to, unserved)
	})
	lab.Eventually(b, "the kill for memory", func() error {
		for _, g := range l.Node1.Tenant(l.B1.Tenant.String()).Generations {
			if g.PID == before.PID {
				return fmt.Errorf("after %d connections process %d is there still", held, g.PID)
			}
			if strings.HasSuffix(g.LastExit, "out of memory") {
				return nil
			}
		}
		return fmt.Errorf("after %d connections nothing was out of memory: %+v", held, l.Node1.Tenant(l.B1.Tenant.String()).Generations)
	})
	return held, gone
}

// refuse has the tenth's proxy refuse what it is told of a service that the tenth uses.
func refuse(b *testing.B, l *lab.Lab, ld *loader.Loader, s *spoiler, v variant) []string {
	b.Helper()
	const every = 100 * time.Millisecond
	// What differs from change to change is another endpoint, which nobody is led to.
	change := func() {
		endpoints := []model.Endpoint{{Addr: lab.At(l.B2.V4, load.RequestPort), Identity: l.B2.Identity}}
		if s.changes++; s.changes%2 == 0 {
			endpoints = append(endpoints, model.Endpoint{Addr: lab.At(l.A3.V4, load.RequestPort), Identity: l.A3.Identity, Draining: true})
		}
		lab.Check(b, l.Store.SetService(model.Service{Namespace: "team-b", Name: "refused", VIPs: l.B2.VIP.Both(),
			Ports: []model.ServicePort{{Port: load.RequestPort, Endpoints: endpoints}}}))
	}
	change()
	duration := time.Duration(*report.Rounds*changes) * every
	o := load.PacedOptions{To: lab.At(l.B2.VIP.V4, load.RequestPort), Rate: rate, Connections: connections, NewEvery: newEvery, Duration: every, Patience: 5 * time.Second}
	ld.Exchange(l.B1, o, "first-b", container.Pod)
	others := besides(b, l, ld, duration)
	o.Duration, o.Patience = duration+time.Second, time.Second
	tenth := ld.Begin(context.Background(), l.B1, "paced", o, "client-b1", container.Pod)
	before := s.refused.Load()
	s.on.Store(true)
	for range *report.Rounds * changes {
		next := time.Now().Add(every)
		change()
		time.Sleep(time.Until(next))
	}
	// Of many at once the server tells only some.
	if s.refused.Load() == before {
		b.Fatal("Envoy refused nothing")
	}
	s.on.Store(false)
	change()
	requests, failed, p99 := others(v.name)
	var r load.PacedResult
	lab.Check(b, tenth.Wait(&r))
	if r.Failed > 0 {
		fmt.Fprintf(os.Stderr, "failure: %s, the tenth: %s\n", v.name, r.FirstFailure)
	}
	return []string{v.name, fmt.Sprint(*report.Rounds * changes), fmt.Sprint(requests), fmt.Sprint(failed), p99.Spread(),
		fmt.Sprint(r.Requests), fmt.Sprint(r.Failed), report.Samples{float64(r.P99) / float64(time.Millisecond)}.String()}
}
