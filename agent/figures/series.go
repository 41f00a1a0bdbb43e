package figures

import "time"

const (
	// window is what figures are about: its beginning moves on in steps.
	window = time.Minute
	step   = 10 * time.Second
	// longest is how far back they go where little happens, in longStep.
	longest  = time.Hour
	longStep = 5 * time.Minute
	// plenty of connections and requests of the canary in a window need no longer one.
	plenty = 100
	// settling is the time in which a new process opens its tunnels and fills its caches:
	// how fast it is then says nothing.
	settling = 10 * time.Second
)

// Reading is what two processes' counters show at one time: of what serves, and of the
// canary.
type Reading struct {
	At time.Time
	// Unread says why Envoy's counts aren't in it, "" if they are. The kernel's are.
	Unread string
	Counts [2]Counts
	Levels [2]Levels
}

// Figures are what two processes added in the same time, and their levels at its end.
type Figures struct {
	At time.Time
	// Unread says why Envoy's counts, CPU and levels end before At, for both.
	Unread string
	Over   time.Duration
	Counts [2]Counts
	Levels [2]Levels
}

// Series are the figures of one pair of processes. Its zero value is ready.
type Series struct {
	began    time.Time
	last     Reading
	total    [2]Counts
	marks    []mark // the oldest first
	longMark time.Time
	// envoy says that Envoy's counts have been read once.
	envoy bool
}

// mark is what was counted up to a time.
type mark struct {
	at    time.Time
	total [2]Counts
	long  bool
}

// Add takes a reading in. The first only says where counting begins.
func (s *Series) Add(r Reading) {
	switch {
	case r.Unread != "":
		for g := range r.Counts {
			r.Counts[g].takeEnvoy(&s.last.Counts[g])
		}
		r.Levels = s.last.Levels
	case !s.envoy:
		s.envoy = true
		for g := range r.Counts {
			s.last.Counts[g].takeEnvoy(&r.Counts[g]) // what was before doesn't count
		}
	}
	if s.began.IsZero() {
		s.began, s.last, s.longMark = r.At, r, r.At
		s.marks = []mark{{at: r.At, long: true}}
		return
	}
	settled := s.last.At.Sub(s.began) >= settling
	for g := range s.total {
		s.total[g].add(&s.last.Counts[g], &r.Counts[g], settled)
	}
	s.last = r
	if r.At.Sub(s.marks[len(s.marks)-1].at) >= step {
		long := r.At.Sub(s.longMark) >= longStep
		if long {
			s.longMark = r.At
		}
		s.marks = append(s.marks, mark{r.At, s.total, long})
	}
	kept := s.marks[:0]
	for _, m := range s.marks {
		if age := r.At.Sub(m.at); age <= window+step || m.long && age <= longest+longStep {
			kept = append(kept, m)
		}
	}
	s.marks = kept
}

// Figures are those of the last window, or of a longer time if little happened in it.
// There are none before the second reading.
func (s *Series) Figures() (f Figures, ok bool) {
	if s.began.IsZero() || !s.last.At.After(s.began) {
		return f, false
	}
	from := s.marks[0]
	for i := len(s.marks) - 1; i >= 0; i-- {
		m := s.marks[i]
		if s.last.At.Sub(m.at) >= window && s.total[1].activity()-m.total[1].activity() >= plenty {
			from = m
			break
		}
	}
	f = Figures{At: s.last.At, Unread: s.last.Unread, Over: s.last.At.Sub(from.at), Levels: s.last.Levels}
	for g := range f.Counts {
		f.Counts[g].add(&from.total[g], &s.total[g], true)
	}
	return f, true
}

func (c *Counts) activity() uint64 {
	return c.Connections + c.Tunnelled + c.Requests + c.Upstreams
}

// takeEnvoy takes over what is Envoy's word, and CPU, which nothing could be set against
// without it.
func (c *Counts) takeEnvoy(from *Counts) {
	own := *c
	*c = *from
	c.Connections, c.Unanswered, c.Resets, c.FirstByte = own.Connections, own.Unanswered, own.Resets, own.FirstByte
}

// add adds what rose from one reading to the next. What fell has lost a part, as when
// Envoy forgets a cluster: nothing is known to have been added then. Unless it has
// settled, how fast a process is doesn't count.
func (c *Counts) add(from, to *Counts, settled bool) {
	rose := func(sum *uint64, from, to uint64) {
		if to > from {
			*sum += to - from
		}
	}
	rose(&c.Connections, from.Connections, to.Connections)
	rose(&c.Unanswered, from.Unanswered, to.Unanswered)
	rose(&c.Resets, from.Resets, to.Resets)
	rose(&c.Upstreams, from.Upstreams, to.Upstreams)
	rose(&c.UpstreamFailures, from.UpstreamFailures, to.UpstreamFailures)
	rose(&c.Handshakes, from.Handshakes, to.Handshakes)
	rose(&c.HandshakeFailures, from.HandshakeFailures, to.HandshakeFailures)
	rose(&c.Tunnelled, from.Tunnelled, to.Tunnelled)
	rose(&c.TunnelConnections, from.TunnelConnections, to.TunnelConnections)
	rose(&c.TunnelErrors, from.TunnelErrors, to.TunnelErrors)
	rose(&c.Requests, from.Requests, to.Requests)
	rose(&c.RequestConnections, from.RequestConnections, to.RequestConnections)
	rose(&c.ServerErrors, from.ServerErrors, to.ServerErrors)
	if !settled {
		return
	}
	for i := range c.FirstByte {
		rose(&c.FirstByte[i], from.FirstByte[i], to.FirstByte[i])
	}
	for i := range c.Latency {
		rose(&c.Latency[i], from.Latency[i], to.Latency[i])
	}
	rose(&c.Work, from.Work, to.Work)
	rose(&c.Bytes, from.Bytes, to.Bytes)
	rose(&c.CPU, from.CPU, to.CPU)
}

// Faults is how often something went wrong, whatever it was.
func (c *Counts) Faults() uint64 {
	return c.Unanswered + c.Resets + c.UpstreamFailures + c.HandshakeFailures + c.TunnelErrors + c.ServerErrors
}
