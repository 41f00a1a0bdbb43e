package kernel

import (
	"fmt"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// limit writes a plan and waits until the kernel has it: within 2 s.
func limit(t *testing.T, n *lab.Node, tenant string, l v1alpha1.Limits) {
	t.Helper()
	n.Limits = map[string]v1alpha1.Limits{tenant: l}
	n.WritePlan()
	begin := time.Now()
	lab.Eventually(t, "the limits", func() error {
		have := n.Tenant(tenant).Limits
		if have.CPUMillis != l.CPUMillis || have.MemoryMax != l.MemoryMax || have.Connections != l.Connections || have.NewConnections != l.NewConnections ||
			have.Egress != l.Egress || have.Ingress != l.Ingress {
			return fmt.Errorf("they are %+v", have)
		}
		return nil
	})
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("limits %+v took %s", l, took)
	}
}

// Limits hold in place, shed the tenant's own new connections only, and let it
// recover by itself.
func TestConnectionLimits(t *testing.T) {
	const seconds, rate, most = 6, 40, 60
	l := lab.New(t)
	n := l.Node1
	pid := n.Tenant("team-b").Generations[0].PID
	target, held := lab.At(l.B2.V4, app.HTTPPort).String(), lab.At(l.B2.V4, app.GreetPort).String()
	neighbour := func() func(any) {
		return l.A1.Begin(t, "load", "--protocol=http", "--connections=8", "--rate=100", "--new-connection-ratio=0.5",
			fmt.Sprintf("--duration=%ds", seconds), lab.At(l.A3.V4, app.HTTPPort).String())
	}
	undisturbed := func(wait func(any)) {
		t.Helper()
		var r app.RunResult
		if wait(&r); !r.OK {
			t.Errorf("the neighbour: %d exchanges, failures %+v", r.Exchanges, r.Failures)
		}
	}
	steered := func() uint64 { s := n.Tenant("team-b").Steered; return s[0] + s[1] }

	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, NewConnections: rate})
	wait, before := neighbour(), steered()
	flood := l.B1.Begin(t, "load", "--protocol=http", "--connections=64", "--rate=400", "--new-connection-ratio=1", "--timeout=300ms",
		fmt.Sprintf("--duration=%ds", seconds), target)
	var r app.RunResult
	flood(&r)
	if opened := steered() - before; opened > rate*(seconds+2) || opened < rate*(seconds-2) {
		t.Errorf("%d connections in %d s at %d a second", opened, seconds, rate)
	}
	undisturbed(wait)
	if tenant := n.Tenant("team-b"); tenant.Drops["tooFast"] == 0 || tenant.Generations[0].PID != pid {
		t.Errorf("drops %v, pid %d, was %d", tenant.Drops, tenant.Generations[0].PID, pid)
	}

	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, Connections: most})
	wait = neighbour()
	hold := l.B1.Begin(t, "hold", fmt.Sprint("--connections=", 3*most), "--interval=200ms", fmt.Sprintf("--duration=%ds", seconds), "--timeout=1s", held)
	lab.Eventually(t, "as many connections as may be", func() error {
		if have := n.Tenant("team-b").Connections; have < most {
			return fmt.Errorf("%d", have)
		}
		return nil
	})
	if have := n.Tenant("team-b").Connections; have > most+most/4 {
		t.Errorf("%d connections, at most %d", have, most)
	}
	hold(&r)
	undisturbed(wait)
	// The load has ended, and nothing else is to be done.
	for range 5 {
		flow{from: l.B1, to: l.B2}.check(t, 4)
	}

	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30})
	hold = l.B1.Begin(t, "hold", fmt.Sprint("--connections=", 3*most), "--interval=200ms", "--duration=2s", "--timeout=5s", held)
	if hold(&r); !r.OK || r.Held != 3*most {
		t.Errorf("without limits %d of %d connections are held: %+v", r.Held, 3*most, r.Failures)
	}
	if tenant := n.Tenant("team-b"); tenant.Drops["tooMany"] == 0 || tenant.Generations[0].PID != pid {
		t.Errorf("drops %v, pid %d, was %d", tenant.Drops, tenant.Generations[0].PID, pid)
	}
}
