package fairness

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// generators make the loads of both teams.
type generators struct {
	*loader.Loader
	b *testing.B
}

func limits(cpu int64) container.Limits {
	return container.Limits{Memory: container.Pod.Memory, CPUMillis: cpu}
}

// repeat makes a load until the context ends, again whenever it fails: an aggressor
// whose proxy ends doesn't give up.
func (g *generators) repeat(ctx context.Context, h *lab.Host, what string, o load.Options) {
	for ctx.Err() == nil {
		var ignored any
		g.Begin(ctx, h, what, o, "aggressor", limits(generatorCPU)).Wait(&ignored)
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// paced is the victim.
func (g *generators) paced(h *lab.Host, o load.PacedOptions) (r load.PacedResult) {
	g.b.Helper()
	if err := g.Begin(context.Background(), h, "paced", o, "victim", limits(0)).Wait(&r); err != nil {
		g.b.Fatalf("the victim's load: %v", err)
	}
	return r
}

// useServices has team-b's proxy hold the services that change: it has what was asked
// for once.
func (g *generators) useServices(l *lab.Lab) {
	for i := range services {
		g.paced(l.B1, load.PacedOptions{To: lab.At(lab.Addresses(fmt.Sprintf("10.96.7.%d", i), "::").V4, load.RequestPort), Rate: 100, Connections: 1, Duration: 10 * time.Millisecond, Patience: 5 * time.Second})
	}
}
