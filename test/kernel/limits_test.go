package kernel

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// limit writes a plan and waits until the kernel has it, and returns how long that took.
func limit(t *testing.T, n *lab.Node, tenant string, l v1alpha1.Limits) (took time.Duration) {
	t.Helper()
	n.Limits = map[string]v1alpha1.Limits{tenant: l}
	n.WritePlan()
	begin := time.Now()
	lab.Eventually(t, "the limits", func() error {
		have := n.Tenant(tenant).Limits
		if have.CPUMillis != l.CPUMillis || have.MemoryMax != l.MemoryMax || have.Connections != l.Connections || have.NewConnections != l.NewConnections || have.NewDirect != l.NewDirect ||
			have.Egress != l.Egress || have.Ingress != l.Ingress {
			return fmt.Errorf("they are %+v", have)
		}
		return nil
	})
	return time.Since(begin)
}

// atOnce fails unless most of several changes, one after the other, took less than until
// the agent looks at everything, which it does every 10 s: a busy machine is late now and
// then, and by chance an agent that only looks is in time.
func atOnce(t *testing.T, what string, took []time.Duration) {
	t.Helper()
	t.Logf("%s: %s", what, took)
	if slices.Sorted(slices.Values(took))[len(took)/2] > 6*time.Second {
		t.Errorf("%s took %s: that is when the agent looks at everything", what, took)
	}
}

// undisturbed begins a neighbour's load; what it returns waits, and says if anything
// failed.
func undisturbed(t *testing.T, l *lab.Lab, seconds int) func() {
	t.Helper()
	wait := l.A1.Begin(t, "load", "--protocol=http", "--connections=8", "--rate=100", "--new-connection-ratio=0.5",
		fmt.Sprintf("--duration=%ds", seconds), lab.At(l.A3.V4, app.HTTPPort).String())
	return func() {
		t.Helper()
		var r app.RunResult
		if wait(&r); !r.OK {
			t.Errorf("the neighbour: %d exchanges, failures %+v", r.Exchanges, r.Failures)
		}
	}
}

// A tenant opens connections at its pace and no faster, whoever floods it leaves that
// alone, and neither is felt by a neighbour.
func TestPace(t *testing.T) { eachRedirection(t, testPace) }

func testPace(t *testing.T, l *lab.Lab) {
	const seconds, rate = 6, 40
	n := l.Node1
	pid := n.Running("team-b").PID
	steered := func() uint64 { s := n.Tenant("team-b").Steered; return s[0] + s[1] }
	// most is what may have been opened in the time that it took.
	flood := func(from *lab.Host, to string) (opened, most, shed uint64) {
		t.Helper()
		before, was, began := steered(), n.Tenant("team-b").Drops["tooFast"], time.Now()
		wait := from.Begin(t, "load", "--protocol=http", "--connections=64", "--rate=400", "--new-connection-ratio=1", "--timeout=300ms",
			fmt.Sprintf("--duration=%ds", seconds), to)
		// What its pods open has a pace of its own, whoever comes from outside.
		if from == l.Outside {
			<-time.After(2 * time.Second) // until the second's worth has been taken
			for range 20 {
				flow{from: l.B1, to: l.B2}.check(t, 4)
			}
		}
		var r app.RunResult
		wait(&r)
		opened = steered() - before
		// A second's worth comes at once.
		most = uint64(rate*(1+time.Since(began).Seconds())) + 1
		return opened, most, n.Tenant("team-b").Drops["tooFast"] - was
	}
	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, NewConnections: rate})
	neighbour := undisturbed(t, l, 2*seconds)
	if opened, most, shed := flood(l.B1, lab.At(l.B2.V4, app.HTTPPort).String()); opened > most || opened < rate*(seconds-2) || shed == 0 {
		t.Errorf("%d connections in %d s at %d a second, at most %d, %d shed", opened, seconds, rate, most, shed)
	}
	if opened, most, shed := flood(l.Outside, lab.At(l.B1.V4, app.HTTPPort).String()); opened > most+100 || opened < rate*(seconds-2) || shed == 0 {
		t.Errorf("%d connections from outside in %d s at %d a second, at most %d and what the pod opens, %d shed", opened, seconds, rate, most, shed)
	}
	neighbour()
	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30})
	if now := n.Running("team-b").PID; now != pid {
		t.Errorf("pid %d, was %d", now, pid)
	}
	if opened, _, shed := flood(l.B1, lab.At(l.B2.V4, app.HTTPPort).String()); opened < 2*rate*seconds || shed != 0 {
		t.Errorf("without a limit %d connections in %d s, %d shed", opened, seconds, shed)
	}
}

// The pace is kept while agents come and go: not one of them gives another second's
// worth.
func TestPaceOverAgents(t *testing.T) { eachRedirection(t, testPaceOverAgents) }

func testPaceOverAgents(t *testing.T, l *lab.Lab) {
	const seconds, rate, agents = 10, 40, 5
	n := l.Node1
	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, NewConnections: rate})
	steered := func() uint64 { s := n.Tenant("team-b").Steered; return s[0] + s[1] }
	before, began := steered(), time.Now()
	wait := l.B1.Begin(t, "load", "--protocol=http", "--connections=64", "--rate=400", "--new-connection-ratio=1", "--timeout=300ms",
		fmt.Sprintf("--duration=%ds", seconds), lab.At(l.B2.V4, app.HTTPPort).String())
	for range agents {
		n.Kill()
		n.Start()
		n.WaitReady()
	}
	restarted := time.Since(began)
	var r app.RunResult
	wait(&r)
	opened, took := steered()-before, time.Since(began)
	t.Logf("%d connections in %s at %d a second, with %d agents in the first %s", opened, took, rate, agents, restarted)
	// A second's worth comes at once.
	if most := uint64(rate*(1+took.Seconds())) + 1; opened > most || opened < rate*(seconds-2) {
		t.Errorf("%d connections are more than %d, or fewer than %d", opened, most, rate*(seconds-2))
	}
}

// Limits hold in place, shed the tenant's own new connections only, and let it
// recover by itself.
func TestConnectionLimits(t *testing.T) { eachRedirection(t, testConnectionLimits) }

func testConnectionLimits(t *testing.T, l *lab.Lab) {
	const seconds, most = 6, 60
	n := l.Node1
	pid := n.Running("team-b").PID
	held := lab.At(l.B2.V4, app.GreetPort).String()

	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, Connections: most})
	flow{from: l.B1, to: l.B2}.check(t, 4) // what the first waits for, the others needn't
	neighbour := undisturbed(t, l, seconds)
	var r app.RunResult
	hold := l.B1.BeginUntil(t, "hold", fmt.Sprint("--connections=", 3*most), "--interval=200ms", "--timeout=3s", held)
	waitConnections(t, n, "team-b", most)
	if have := n.Tenant("team-b").Connections; have > most+most/4 {
		t.Errorf("%d connections, at most %d", have, most)
	}
	hold(&r)
	neighbour()
	// The load has ended, and nothing else is to be done.
	for range 5 {
		flow{from: l.B1, to: l.B2}.check(t, 4)
	}

	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30})
	hold = l.B1.Begin(t, "hold", fmt.Sprint("--connections=", 3*most), "--interval=200ms", "--duration=2s", "--timeout=20s", held)
	if hold(&r); !r.OK || r.Held != 3*most {
		t.Errorf("without limits %d of %d connections are held: %+v", r.Held, 3*most, r.Failures)
	}
	if drops, now := n.Tenant("team-b").Drops, n.Running("team-b").PID; drops["tooMany"] == 0 || now != pid {
		t.Errorf("drops %v, pid %d, was %d", drops, now, pid)
	}
}
