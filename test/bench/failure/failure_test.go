package failure

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// pause is long enough for the restarts' back-off to begin anew.
var pause = flag.Duration("pause", 11*time.Second, "time from one kill to the next")

const (
	// tenants on the node, of which the last one's proxy is killed.
	tenants = 10
	// rate of each of the others, in requests a second, every fourth on a connection of
	// its own.
	rate, connections, newEvery = 30, 4, 4
	// inARow connections must get through to say that a tenant serves.
	inARow = 50
)

type variant struct {
	name    string
	tenant  func(*lab.Host) model.Tenant
	standby bool
}

var variants = []variant{
	{"Namespace", func(p *lab.Host) model.Tenant { return model.NamespaceTenant(p.Identity.Namespace) }, false},
	{"Namespace, warm standby", func(p *lab.Host) model.Tenant { return model.NamespaceTenant(p.Identity.Namespace) }, true},
	{"Node", func(*lab.Host) model.Tenant { return model.Tenant{Scope: model.ScopeNode} }, false},
}

func BenchmarkFailure(b *testing.B) {
	l := lab.NewWith(b, lab.Options{PathMTU: 1500, NoAccessLog: true, Tenants: tenants - 2})
	ld := loader.New(b)
	ld.Serve(l.A3, "serve", "serve", container.Pod)
	t := report.Table{Title: "A proxy that is killed",
		Text: fmt.Sprintf("Ten tenants of a node; the tenth's proxy gets a SIGKILL as many times as there are rounds, %s apart, while each of the others makes %d requests a second (open-loop, every %dth on a connection of its own) to another node. With `Node` that proxy is everybody's. \"Gone\" is when the last connection that the tenth couldn't make had begun, after the kill, before %d in a row got through.",
			*pause, rate, newEvery, inARow),
		Header: []string{"isolation", "kills", "the nine: requests", "failed", "p99 ms", "the tenth: gone ms", "at most"}}
	for _, v := range variants {
		use(b, l, v)
		others := besides(b, l, ld, time.Duration(*report.Rounds)**pause)
		var gone report.Samples
		for range *report.Rounds {
			next := time.Now().Add(*pause)
			gone = append(gone, float64(kill(b, l, v))/float64(time.Millisecond))
			time.Sleep(time.Until(next))
		}
		requests, failed, p99 := others(v.name)
		t.Rows = append(t.Rows, []string{v.name, fmt.Sprint(len(gone)), fmt.Sprint(requests), fmt.Sprint(failed), p99.Spread(), gone.String(), fmt.Sprintf("%.0f", slices.Max(gone))})
	}
	report.Publish(b, "failure", t)
}

// besides begins the load of the nine others; what it returns waits for its end, and
// says what became of it.
func besides(b *testing.B, l *lab.Lab, ld *loader.Loader, duration time.Duration) func(what string) (requests, failed int, p99 report.Samples) {
	b.Helper()
	o := load.PacedOptions{To: lab.At(l.A3.V4, load.RequestPort), Rate: rate, Connections: connections, NewEvery: newEvery, Duration: 100 * time.Millisecond, Patience: 5 * time.Second}
	nine := slices.DeleteFunc(slices.Clone(l.Node1.Pods), func(p *lab.Host) bool { return p == l.B1 || p == l.A2 })
	for _, p := range nine {
		ld.Exchange(p, o, "first", container.Pod) // what is made on demand
	}
	o.Duration, o.Patience = duration+time.Second, time.Second
	var loads []*loader.Load
	for _, p := range nine {
		loads = append(loads, ld.Begin(context.Background(), p, "paced", o, "client-"+p.Name, container.Pod))
	}
	return func(what string) (requests, failed int, p99 report.Samples) {
		b.Helper()
		first := ""
		for _, running := range loads {
			var r load.PacedResult
			if err := running.Wait(&r); err != nil {
				b.Fatalf("a tenant's load: %v", err)
			}
			requests, failed, first = requests+r.Requests, failed+r.Failed, cmp.Or(first, r.FirstFailure)
			p99 = append(p99, float64(r.P99)/float64(time.Millisecond))
		}
		if failed > 0 {
			fmt.Fprintf(os.Stderr, "failure: %s: %s\n", what, first)
		}
		return requests, failed, p99
	}
}

// use gives all pods the proxies of a variant, and waits until those alone serve.
func use(b *testing.B, l *lab.Lab, v variant) {
	b.Helper()
	l.Node1.Standby = v.standby
	l.SetTenants(v.tenant)
}

// kill kills the tenth's proxy, once all that is to serve does, and returns when the
// last connection that didn't get through had begun.
func kill(b *testing.B, l *lab.Lab, v variant) (last time.Duration) {
	b.Helper()
	first := first(b, l, v)
	to := lab.At(l.B2.V4, app.GreetPort).String()
	l.B1.Do(b, func() {
		if !greeted(to) {
			b.Error("nothing gets through before the kill")
		}
		lab.Check(b, unix.Kill(first.PID, unix.SIGKILL))
		last = untilServed(b, to, time.Now())
	})
	return last
}

// first is the tenth's process that takes connections, once all that is to serve does.
func first(b *testing.B, l *lab.Lab, v variant) (first agent.InspectedGeneration) {
	b.Helper()
	processes := 1
	if v.standby {
		processes = 2
	}
	lab.Eventually(b, "all processes of the tenth", func() error {
		t := l.Node1.Tenant(l.B1.Tenant.String())
		if len(t.Generations) != processes || !t.Ready || slices.ContainsFunc(t.Generations, func(g agent.InspectedGeneration) bool { return !g.Serving }) {
			return fmt.Errorf("%s %+v", t.Reason, t.Generations)
		}
		first = t.Generations[max(0, slices.IndexFunc(t.Generations, func(g agent.InspectedGeneration) bool { return g.Role == "First" }))]
		return nil
	})
	return first
}

// untilServed waits until connections get through in a row, and returns when the last
// one that didn't had begun, from since on.
func untilServed(b *testing.B, to string, since time.Time) (last time.Duration) {
	b.Helper()
	for row := 0; row < inARow; row++ {
		begun := time.Since(since)
		if !greeted(to) {
			last, row = begun, -1
		}
		if begun > lab.Patience {
			b.Fatal("the tenth doesn't serve again")
		}
		time.Sleep(time.Millisecond)
	}
	return last
}

func greeted(to string) bool {
	c, err := greet(to)
	if c != nil {
		err = errors.Join(err, c.Close())
	}
	return err == nil
}

// greet makes a connection, and waits for the server's first byte on it. Also one on which
// none comes is the caller's to close.
func greet(to string) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", to, 200*time.Millisecond)
	if err != nil {
		return nil, err
	}
	if err = c.SetDeadline(time.Now().Add(200 * time.Millisecond)); err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	return c, err
}
