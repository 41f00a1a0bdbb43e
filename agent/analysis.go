package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/agent/figures"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

const (
	// figuresPeriod is how often canaries are compared with what serves beside them. A
	// pair that takes long to read is read less often: a twentieth of the time at most.
	figuresPeriod = time.Second
	figuresShare  = 20
	// figuresReaders is how many pairs are read at a time.
	figuresReaders = 4
	// figuresTimeout bounds how long one process may take to answer.
	figuresTimeout = 2 * time.Second
	// tellTrouble and tellWell are how often the status says how a canary fares that
	// has failed at something since, and one that hasn't: nodes are many.
	tellTrouble = 2 * time.Second
	tellWell    = 10 * time.Second
	// growth of memory that counts as trouble.
	growth = 4 << 20
	// tellSilence is after how long the status says that an Envoy doesn't answer, and
	// silence what it says: a busy one answers late now and then, and everybody who
	// follows the status would do so at each turn.
	tellSilence = 30 * time.Second
	silence     = "its administration doesn't answer"
)

// generationWatcher counts connections by how they fare. Not every datapath can.
type generationWatcher interface {
	GenerationCounters(index uint16) ([steer.Generations]steer.GenerationCounters, bool, error)
}

// pair are what serves a tenant and the canary beside it, in this order.
type pair struct {
	// weight of the canary: what was counted at another one is of another time for the
	// one than for the other, and a bad minute would be put down to who had more of it.
	weight      int
	generations [2]int
	processes   [2]process
}

// comparison is what has been counted of a pair.
type comparison struct {
	pair
	series figures.Series
	next   time.Time
	// nextAsk is when Envoys are asked again, and unread why not before.
	nextAsk time.Time
	unread  string
	// silentSince is when they first didn't answer, if they are unread.
	silentSince time.Time
	told        figures.Figures
}

// figures are those for the status: of silence it says nothing before it has lasted, and
// nothing that an Envoy may have put there.
func (c *comparison) figures() (figures.Figures, bool) {
	f, ok := c.series.Figures()
	switch {
	case f.Unread == "":
	case f.At.Sub(c.silentSince) < tellSilence:
		f.Unread = ""
	default:
		f.Unread = silence
	}
	return f, ok
}

// toldFigures are what the status says of processes.
type toldFigures map[process]*v1alpha1.GenerationFigures

// pairs are the canaries with a share of connections, and what they are compared with.
func (a *Agent) pairs() map[model.Tenant]pair {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := map[model.Tenant]pair{}
	for t, weight := range a.last.weights {
		pl := a.last.placed[t]
		if weight == 0 || pl.standby || pl.first == none || pl.canary == none {
			continue
		}
		p := pair{weight: int(weight), generations: [2]int{pl.first, pl.canary}}
		for i, g := range p.generations {
			p.processes[i] = a.last.taking[t][g]
		}
		if !slices.Contains(p.processes[:], process{}) {
			all[t] = p
		}
	}
	return all
}

// analyse compares canaries with what serves beside them until ctx ends.
func (a *Agent) analyse(ctx context.Context) error {
	ticker := time.NewTicker(figuresPeriod)
	defer ticker.Stop()
	comparisons := map[model.Tenant]*comparison{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		changed := false
		pairs := a.pairs()
		for t, c := range comparisons {
			if pairs[t] != c.pair {
				delete(comparisons, t)
				changed = true
			}
		}
		for t, p := range pairs {
			if comparisons[t] == nil {
				comparisons[t] = &comparison{pair: p}
			}
		}
		a.readFigures(ctx, comparisons)
		if a.tellFigures(comparisons, changed) {
			a.reportStatus()
		}
	}
}

// readFigures reads the pairs whose turn it is.
func (a *Agent) readFigures(ctx context.Context, comparisons map[model.Tenant]*comparison) {
	var reading errgroup.Group
	reading.SetLimit(figuresReaders)
	for t, c := range comparisons {
		began := time.Now()
		if began.Before(c.next) {
			continue
		}
		reading.Go(func() error {
			began := time.Now()
			r, err := a.readPair(ctx, t, c)
			if c.next = time.Now().Add(figuresShare * time.Since(began)); c.unread != "" {
				c.next = time.Time{} // it was a wait: the kernel answers at once
			}
			if err != nil {
				// It may have just ended, which the loop sees by itself.
				a.log.Debug("a canary isn't compared", "tenant", t.String(), "error", err)
				return nil
			}
			c.series.Add(r)
			return nil
		})
	}
	_ = reading.Wait()
}

// readPair reads the counters of two processes, as near to each other as can be. If an
// Envoy doesn't answer, what it would say is left out of both: a version must not hide
// behind its silence from what the kernel says of it.
func (a *Agent) readPair(ctx context.Context, t model.Tenant, c *comparison) (figures.Reading, error) {
	var r figures.Reading
	for i, g := range c.generations {
		cpu, private, err := a.bulkheads.ProcessUsage(t, g)
		if err != nil {
			return r, err
		}
		r.Counts[i].CPU, r.Levels[i].PrivateBytes = uint64(cpu.Milliseconds()), private
	}
	if !time.Now().Before(c.nextAsk) {
		began := time.Now()
		if err := a.askPair(ctx, t, c.pair, &r); err == nil {
			c.unread = ""
		} else {
			if c.unread == "" {
				c.silentSince = began
				a.log.Warn("a canary is compared by the kernel's figures alone", "tenant", t.String(), "error", err)
			}
			c.unread = err.Error()
		}
		c.nextAsk = time.Now().Add(figuresShare * time.Since(began))
	}
	r.Unread = c.unread
	state, ok := a.bulkheads.State(t)
	if watcher, can := a.steering().datapath.(generationWatcher); ok && can {
		counted, watched, err := watcher.GenerationCounters(state.Index)
		if err != nil {
			return r, fmt.Errorf("read how connections fare: %w", err)
		}
		for i, g := range c.generations {
			if n := counted[g]; watched {
				r.Counts[i].Connections, r.Counts[i].Unanswered, r.Counts[i].Resets, r.Counts[i].FirstByte = n.Connections, n.Unanswered, n.Resets, n.FirstByte
			}
		}
	}
	r.At = time.Now()
	return r, nil
}

// askPair has both Envoys say what they have counted.
func (a *Agent) askPair(ctx context.Context, t model.Tenant, p pair, r *figures.Reading) error {
	ctx, cancel := context.WithTimeout(ctx, figuresTimeout)
	defer cancel()
	var asking errgroup.Group
	for i, g := range p.generations {
		asking.Go(func() error {
			stats, err := a.bulkheads.Admin(ctx, t, g, figures.AdminPath)
			if err == nil {
				figures.ReadEnvoy(string(stats), &r.Counts[i], &r.Levels[i])
			}
			return err
		})
	}
	return asking.Wait()
}

// tellFigures decides whether the status is to say anew how canaries fare, and what.
// All is told at once; changed says that some are no more.
func (a *Agent) tellFigures(comparisons map[model.Tenant]*comparison, changed bool) bool {
	for _, c := range comparisons {
		f, ok := c.figures()
		if !ok {
			continue
		}
		since := f.At.Sub(c.told.At)
		trouble := f.Counts[1].Faults() > c.told.Counts[1].Faults() || f.Levels[1].PrivateBytes > c.told.Levels[1].PrivateBytes+growth
		changed = changed || f.Unread != c.told.Unread || since >= tellWell || trouble && since >= tellTrouble-figuresPeriod/2
	}
	if !changed {
		return false
	}
	told := toldFigures{}
	for _, c := range comparisons {
		f, ok := c.figures()
		if !ok {
			continue
		}
		c.told = f
		for i, p := range c.processes {
			told[p] = figuresStatus(f, i)
		}
	}
	a.mu.Lock()
	a.toldFigures = told
	a.mu.Unlock()
	return true
}

// figuresStatus is what the status says of one of a pair.
func figuresStatus(f figures.Figures, i int) *v1alpha1.GenerationFigures {
	c, l := &f.Counts[i], &f.Levels[i]
	return &v1alpha1.GenerationFigures{
		At: metav1.NewTime(f.At.UTC().Truncate(time.Second)), Seconds: int64(f.Over.Round(time.Second) / time.Second),
		Unread:      f.Unread,
		Connections: int64(c.Connections), Unanswered: int64(c.Unanswered), Resets: int64(c.Resets), FirstByte: histogram(c.FirstByte[:]),
		Upstreams: int64(c.Upstreams), UpstreamFailures: int64(c.UpstreamFailures),
		Handshakes: int64(c.Handshakes), HandshakeFailures: int64(c.HandshakeFailures),
		Tunnelled: int64(c.Tunnelled), TunnelConnections: max(int64(c.TunnelConnections), l.OpenTunnelConnections), TunnelErrors: int64(c.TunnelErrors),
		Requests: int64(c.Requests), RequestConnections: max(int64(c.RequestConnections), l.OpenRequestConnections), ServerErrors: int64(c.ServerErrors),
		Latency: histogram(c.Latency[:]), CPUMilliseconds: int64(c.CPU), Work: int64(c.Work), Bytes: int64(c.Bytes),
		PrivateBytes: l.PrivateBytes, OpenConnections: l.OpenConnections,
	}
}

// histogram leaves out the empty end.
func histogram(counts []uint64) (out []int64) {
	for i, n := range counts {
		if n > 0 {
			out = append(out, make([]int64, i+1-len(out))...)
			out[i] = int64(n)
		}
	}
	return out
}
