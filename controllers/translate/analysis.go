package translate

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// staleFigures are left out: their node says nothing any more. Clocks may differ by
	// as much.
	staleFigures = 5 * time.Minute
	// beyondChance is by how many standard deviations more must have failed than if
	// both versions were alike. Each tenant is looked at each second by a dozen
	// figures; this is one false alarm in three million looks.
	beyondChance = 5
	// fewestFailures and fewestConnections keep a single client's trouble from being
	// taken for a version's: a client's connections go to both.
	fewestFailures    = 5
	fewestConnections = 5
	// ofAll is how many times the minimum sample all tenants together must have: what one
	// of them shows alone is said of that one.
	ofAll = 5
	// usual is the share of the old version's connections of which none is slow.
	usual = 0.9
	// histogramBuckets is how many a histogram has at most; an empty end is left out.
	histogramBuckets = 16
	// fastEnough in milliseconds is never slow.
	fastEnough = 10
	// leastCPU is what a process must have taken to be judged by it, and leastWork and
	// leastBytes what both must have done: less is mostly start.
	leastCPU = 3 * time.Second
	leastWork,
	leastBytes = 200, 1 << 20
	// mostMemoryOnTop is what a process may have beyond its share in any case.
	mostMemoryOnTop = 64 << 20
)

// compared is one place where both versions serve: a tenant on a node.
type compared struct {
	tenant, node string
	old, new     v1alpha1.GenerationFigures
	// memoryBound of both together, as the MeshTopology has it: memory.high, or else
	// memory.max; 0 is none. What a namespace takes away from that is no measure of a
	// version.
	memoryBound int64
}

// finding is a figure by which the new version is worse than it may be.
type finding struct {
	reason        v1alpha1.RolloutFigure
	node, message string
}

// analyse compares the new version with the old one, for each tenant and for all
// together. It returns nil if it is as good, or if nobody can tell yet.
func (r *rollout) analyse() *v1alpha1.RolloutVerdict {
	limits := AnalysisLimits(r.Rollout.Spec.Analysis)
	places := map[string][]compared{}
	var all []compared
	for name, placed := range r.tenants {
		if isHeldBack(r.status, name) {
			continue // its figures may be as much its own doing
		}
		if t, err := model.ParseTenant(name); err == nil && t.Scope != model.ScopeNode && slices.Contains(limits.IgnoreNamespaces, t.Namespace) {
			continue
		}
		for _, p := range placed {
			if c, ok := r.compared(p); ok {
				c.tenant = name
				places[name] = append(places[name], c)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(places)) {
		all = append(all, places[name]...)
		if f := judge(places[name], limits); f != nil {
			return &v1alpha1.RolloutVerdict{Reason: string(f.reason), Tenant: name, Node: f.node, Message: cutTo(f.message, 1000)}
		}
	}
	if len(places) > 1 {
		limits.MinSample *= ofAll
		if f := judge(all, limits); f != nil {
			return &v1alpha1.RolloutVerdict{Reason: string(f.reason), Message: cutTo("all tenants together: "+f.message, 1000)}
		}
	}
	return nil
}

// compared are the figures of the canary and of what serves beside it, if there are
// any that are about the same time.
func (r *rollout) compared(p placed) (c compared, ok bool) {
	if p.status == nil || !r.owns(p) || r.isStale(p.node) {
		return c, false
	}
	var old, new *v1alpha1.GenerationFigures
	for _, g := range p.status.Generations {
		switch {
		case g.Figures == nil || r.Now.Sub(g.Figures.At.Time) > staleFigures:
		case g.Role == v1alpha1.RoleCanary && g.Version == r.version:
			new = g.Figures
		case g.Role == v1alpha1.RoleFirst && g.Version != r.version:
			old = g.Figures
		}
	}
	if old == nil || new == nil || !old.At.Equal(&new.At) || old.Seconds != new.Seconds {
		return c, false
	}
	return compared{node: p.node.Name, old: *old, new: *new, memoryBound: r.memoryBound(p)}, true
}

// unread says whose Envoys keep silent about how they fare, and what is left to compare
// them by; "" if none does.
func (r *rollout) unread() (message string) {
	silent, unseen := map[string]string{}, map[string]string{}
	for name, placed := range r.tenants {
		for _, p := range placed {
			c, ok := r.compared(p)
			switch where := name + " on " + c.node; {
			case !ok || c.new.Unread == "":
			case p.node.Status.Redirection == v1alpha1.RedirectionNetfilter:
				unseen[where] = c.new.Unread
			default:
				silent[where] = c.new.Unread
			}
		}
	}
	if len(silent) > 0 {
		message = "; compared by the kernel's figures alone: " + describe(silent)
	}
	if len(unseen) > 0 {
		message += "; compared by nothing, as Netfilter counts no connections: " + describe(unseen)
	}
	return message
}

func (r *rollout) memoryBound(p placed) int64 {
	l := p.status.Limits
	if t, err := model.ParseTenant(p.status.Name); err == nil && t.Scope != model.ScopeNode {
		l = Limits(nil, r.Bounds[t.Namespace])
	}
	return cmp.Or(l.MemoryHigh, l.MemoryMax)
}

// AnalysisLimits are a rollout's, with defaults where it says nothing.
func AnalysisLimits(a *v1alpha1.RolloutAnalysis) v1alpha1.RolloutAnalysis {
	var l v1alpha1.RolloutAnalysis
	if a != nil {
		l = *a
	}
	l.MinSample = cmp.Or(l.MinSample, 20)
	l.FailurePercent = cmp.Or(l.FailurePercent, 5)
	l.SlowPercent = cmp.Or(l.SlowPercent, 20)
	l.CPUPercent = cmp.Or(l.CPUPercent, 300)
	l.MemoryPercent = cmp.Or(l.MemoryPercent, 200)
	return l
}

// share is a figure that counts what went wrong of what was tried.
type share struct {
	reason v1alpha1.RolloutFigure
	// what went wrong, for people: "11 of 52 <what>".
	what string
	of   func(f *v1alpha1.GenerationFigures) (bad, all int64)
	// carriers are the connections in which what was tried came, where many come in one;
	// nil if each is its own. What one carries isn't independent: its peer may ask for
	// the same thing in vain over and over.
	carriers func(f *v1alpha1.GenerationFigures) int64
}

var shares = []share{
	{reason: v1alpha1.FigureConnectFailures, what: "connections ended before a byte came back",
		of: func(f *v1alpha1.GenerationFigures) (int64, int64) { return f.Unanswered, f.Connections }},
	{reason: v1alpha1.FigureConnectFailures, what: "connections to upstreams failed",
		of: func(f *v1alpha1.GenerationFigures) (int64, int64) { return f.UpstreamFailures, f.Upstreams }},
	{reason: v1alpha1.FigureConnectFailures, what: "tunnelled connections were answered with an error",
		of:       func(f *v1alpha1.GenerationFigures) (int64, int64) { return f.TunnelErrors, f.Tunnelled },
		carriers: func(f *v1alpha1.GenerationFigures) int64 { return f.TunnelConnections }},
	{reason: v1alpha1.FigureResets, what: "connections were reset",
		of: func(f *v1alpha1.GenerationFigures) (int64, int64) { return f.Resets, f.Connections }},
	{reason: v1alpha1.FigureHandshakeFailures, what: "TLS handshakes failed",
		of: func(f *v1alpha1.GenerationFigures) (int64, int64) {
			return f.HandshakeFailures, f.Handshakes + f.HandshakeFailures
		}},
	{reason: v1alpha1.FigureServerErrors, what: "requests were answered with a server error",
		of:       func(f *v1alpha1.GenerationFigures) (int64, int64) { return f.ServerErrors, f.Requests },
		carriers: ofRequests},
}

func ofRequests(f *v1alpha1.GenerationFigures) int64 { return f.RequestConnections }

// judge returns the first figure by which the new version is worse than it may be
// than the old one at these places, or nil.
func judge(places []compared, l v1alpha1.RolloutAnalysis) *finding {
	for _, s := range shares {
		if f := s.judge(places, l.MinSample, l.FailurePercent); f != nil && !slices.Contains(l.Ignore, s.reason) {
			return f
		}
	}
	for _, s := range []share{
		slow(places, v1alpha1.FigureFirstByte, "connections took longer than %s to the first byte", firstByteBound, nil,
			func(f *v1alpha1.GenerationFigures) []int64 { return f.FirstByte }),
		slow(places, v1alpha1.FigureLatency, "requests took longer than %s", latencyBound, ofRequests,
			func(f *v1alpha1.GenerationFigures) []int64 { return f.Latency }),
	} {
		if f := s.judge(places, l.MinSample, l.SlowPercent); f != nil && !slices.Contains(l.Ignore, s.reason) {
			return f
		}
	}
	if f := judgeCPU(places, l); f != nil && !slices.Contains(l.Ignore, v1alpha1.FigureCPU) {
		return f
	}
	if f := judgeMemory(places, l); f != nil && !slices.Contains(l.Ignore, v1alpha1.FigureMemory) {
		return f
	}
	return nil
}

// judge compares the shares. Places are strata (Cochran, Mantel and Haenszel): at
// each, what fails is expected of either version by how much it had there, so that a
// node or a tenant where much fails anyway says nothing of the version that happens to
// have more of its connections.
func (s share) judge(places []compared, minSample, limit int32) *finding {
	if s.of == nil {
		return nil
	}
	var newBad, newAll, newCarriers, oldBad, oldAll, oldCarriers int64
	var failed, expected, variance, excess, worst float64
	node := ""
	for i := range places {
		p := &places[i]
		nb, na := s.of(&p.new)
		ob, oa := s.of(&p.old)
		if na <= 0 || oa <= 0 {
			continue // there is nothing to compare with
		}
		newEach, nc := s.carried(&p.new, na)
		oldEach, oc := s.carried(&p.old, oa)
		newCarriers, oldCarriers = newCarriers+nc, oldCarriers+oc
		// A connection can be counted in the time before the one in which it fails.
		nb, ob = min(nb, na), min(ob, oa)
		newBad, newAll, oldBad, oldAll = newBad+nb, newAll+na, oldBad+ob, oldAll+oa
		// As if what one connection carried were one try: its share of the sample.
		n, o := float64(na)/newEach, float64(oa)/oldEach
		newFailed, bad, all := float64(nb)/newEach, float64(nb)/newEach+float64(ob)/oldEach, n+o
		failed += newFailed
		expected += n * bad / all
		if all > 1 {
			variance += n * o * bad * (all - bad) / (all * all * (all - 1))
		}
		more := float64(nb) - float64(na)*float64(ob)/float64(oa)
		excess += more
		if node == "" || more > worst {
			node, worst = p.node, more
		}
	}
	if s.carriers != nil && min(newCarriers, oldCarriers) < fewestConnections {
		return nil
	}
	if newAll < int64(minSample) || oldAll < int64(minSample) || newBad < fewestFailures {
		return nil
	}
	if excess/float64(newAll) <= float64(limit)/100 || failed-expected-0.5 <= beyondChance*math.Sqrt(variance) {
		return nil
	}
	return &finding{s.reason, node, fmt.Sprintf("of the new version's %d of %d %s (%s), of the old one's at the same time %d of %d (%s); limit: %d more of 100",
		newBad, newAll, s.what, inPercent(newBad, newAll), oldBad, oldAll, inPercent(oldBad, oldAll), limit)}
}

// carried is how many tries each carrier of a process has had on average, 1 where each
// is its own, and how many carriers there were.
func (s share) carried(f *v1alpha1.GenerationFigures, tries int64) (each float64, carriers int64) {
	if s.carriers == nil {
		return 1, tries
	}
	carriers = s.carriers(f)
	return max(1, float64(tries)/float64(max(carriers, 1))), carriers
}

// slow has histograms compared as shares: of what took more than twice as long as
// nine of ten do with the old version.
func slow(places []compared, reason v1alpha1.RolloutFigure, what string, bound func(i int) time.Duration, carriers func(*v1alpha1.GenerationFigures) int64, of func(*v1alpha1.GenerationFigures) []int64) share {
	var sum [histogramBuckets]int64
	var all int64
	for i := range places {
		for k, n := range of(&places[i].old) {
			if k < len(sum) {
				sum[k], all = sum[k]+n, all+n
			}
		}
	}
	k := 0
	for below := sum[0]; k < len(sum)-1 && float64(below) < usual*float64(all); below += sum[k] {
		k++
	}
	if all == 0 || k >= len(sum)-2 {
		return share{} // nothing is slower than that
	}
	for k++; k < len(sum)-2 && bound(k) < fastEnough*time.Millisecond; k++ {
	}
	return share{reason: reason, what: fmt.Sprintf(what, bound(k)), carriers: carriers, of: func(f *v1alpha1.GenerationFigures) (bad, all int64) {
		for i, n := range of(f) {
			if all += n; i > k {
				bad += n
			}
		}
		return bad, all
	}}
}

// firstByteBound is the upper bound of a bucket of GenerationFigures.FirstByte.
func firstByteBound(i int) time.Duration { return 128 * time.Microsecond << i }

// latencyBounds are Envoy's.
var latencyBounds = []time.Duration{
	time.Millisecond / 2, time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond, 5 * time.Second,
	10 * time.Second, 30 * time.Second, time.Minute,
}

func latencyBound(i int) time.Duration { return latencyBounds[min(i, len(latencyBounds)-1)] }

// judgeCPU compares what a connection or request costs, and a byte: connections that
// carry much cost much, and a new version has only new ones.
func judgeCPU(places []compared, l v1alpha1.RolloutAnalysis) *finding {
	var n, o v1alpha1.GenerationFigures
	node, worst := "", 0.0
	for i := range places {
		p := &places[i]
		if p.new.Unread != "" {
			continue // of before: Work and Bytes
		}
		n.CPUMilliseconds, n.Work, n.Bytes = n.CPUMilliseconds+p.new.CPUMilliseconds, n.Work+p.new.Work, n.Bytes+p.new.Bytes
		o.CPUMilliseconds, o.Work, o.Bytes = o.CPUMilliseconds+p.old.CPUMilliseconds, o.Work+p.old.Work, o.Bytes+p.old.Bytes
		if each := ratio(p.new.CPUMilliseconds, p.new.Work); node == "" || each > worst {
			node, worst = p.node, each
		}
	}
	if n.CPUMilliseconds < leastCPU.Milliseconds() || min(n.Work, o.Work) < max(leastWork, int64(l.MinSample)) || min(n.Bytes, o.Bytes) < leastBytes {
		return nil
	}
	// The kernel counts in hundredths of a second.
	o.CPUMilliseconds = max(o.CPUMilliseconds, 10)
	perWork, perByte := ratio(n.CPUMilliseconds, n.Work)/ratio(o.CPUMilliseconds, o.Work), ratio(n.CPUMilliseconds, n.Bytes)/ratio(o.CPUMilliseconds, o.Bytes)
	if limit := float64(l.CPUPercent) / 100; perWork <= limit || perByte <= limit {
		return nil
	}
	return &finding{v1alpha1.FigureCPU, node, fmt.Sprintf("the new version took %d ms of CPU for %d connections and requests and %d KiB, the old one at the same time %d ms for %d and %d KiB; limit: %d %% of that for each",
		n.CPUMilliseconds, n.Work, n.Bytes>>10, o.CPUMilliseconds, o.Work, o.Bytes>>10, l.CPUPercent)}
}

// judgeMemory looks at each place by itself: a leak needs no average.
func judgeMemory(places []compared, l v1alpha1.RolloutAnalysis) *finding {
	for i := range places {
		p := &places[i]
		if p.new.Unread != "" || p.new.PrivateBytes == 0 || p.old.PrivateBytes == 0 {
			continue // nobody says for how many connections
		}
		onTop := float64(mostMemoryOnTop)
		if p.memoryBound > 0 {
			onTop = min(onTop, float64(p.memoryBound)/4)
		}
		more := max(1, ratio(p.new.OpenConnections, max(p.old.OpenConnections, 1)))
		limit := float64(p.old.PrivateBytes)*more*float64(l.MemoryPercent)/100 + onTop
		if float64(p.new.PrivateBytes) <= limit {
			continue
		}
		return &finding{v1alpha1.FigureMemory, p.node, fmt.Sprintf("the new version has %d MiB of memory with %d open connections, the old one %d MiB with %d; limit: %d MiB",
			p.new.PrivateBytes>>20, p.new.OpenConnections, p.old.PrivateBytes>>20, p.old.OpenConnections, int64(limit)>>20)}
	}
	return nil
}

func ratio(a, b int64) float64 { return float64(a) / float64(b) }

func inPercent(n, of int64) string { return fmt.Sprintf("%.1f %%", 100*ratio(n, of)) }
