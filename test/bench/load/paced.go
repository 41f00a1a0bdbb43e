package load

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// PacedOptions of RunPaced.
type PacedOptions struct {
	// To is where a Serve is.
	To netip.AddrPort
	// Rate is requests a second, whatever becomes of them.
	Rate int
	// Connections that are kept.
	Connections int
	// NewEvery request of so many has a connection of its own; 0 is none.
	NewEvery int
	// Duration of the measurement.
	Duration time.Duration
	// Patience with one request. Default 1 s.
	Patience time.Duration
}

// PacedResult is what RunPaced measured.
type PacedResult struct {
	Requests int `json:"requests"`
	// Failed of them had no or a wrong answer in time, FirstFailure is why.
	Failed       int    `json:"failed"`
	FirstFailure string `json:"firstFailure"`
	// Percentiles of the time from when a request was due, not from when it could be
	// sent: who is late makes those behind it late. Failed ones count with the time
	// that was lost with them.
	P50, P99, P999 time.Duration
	// Late is the 99th percentile of the time from when a request was due to when it
	// was handed out to be sent: what this process waited for a CPU.
	Late time.Duration
	// LastFailure is when the last one that failed was due, since the beginning.
	LastFailure time.Duration
}

// RunPaced makes requests at a rate that no answer slows down, and goes on after
// failures.
func RunPaced(o PacedOptions) PacedResult {
	if o.Patience == 0 {
		o.Patience = time.Second
	}
	total := int(o.Duration.Seconds() * float64(o.Rate))
	due := make(chan dueRequest, total)
	results := make(chan paced, total)
	var workers sync.WaitGroup
	for range o.Connections {
		workers.Go(func() { (&pacer{o: o}).work(due, results) })
	}
	late := make([]time.Duration, 0, total)
	begin := time.Now()
	for i := range total {
		at := begin.Add(time.Duration(i) * time.Second / time.Duration(o.Rate))
		time.Sleep(time.Until(at))
		late = append(late, time.Since(at))
		due <- dueRequest{at, o.NewEvery > 0 && i%o.NewEvery == 0}
	}
	close(due)
	workers.Wait()
	close(results)
	r := PacedResult{}
	var latencies []time.Duration
	for got := range results {
		r.Requests++
		latencies = append(latencies, got.latency)
		if got.err != nil {
			if r.Failed++; r.FirstFailure == "" {
				r.FirstFailure = got.err.Error()
			}
			r.LastFailure = max(r.LastFailure, got.due.Sub(begin))
		}
	}
	slices.Sort(latencies)
	slices.Sort(late)
	if n := len(late); n > 0 {
		r.Late = late[n*99/100]
	}
	if n := len(latencies); n > 0 {
		r.P50, r.P99, r.P999 = latencies[n/2], latencies[n*99/100], latencies[n*999/1000]
	}
	return r
}

type dueRequest struct {
	due time.Time
	own bool
}

type paced struct {
	due     time.Time
	latency time.Duration
	err     error
}

// pacer makes one request after the other.
type pacer struct {
	o    PacedOptions
	kept net.Conn
}

func (p *pacer) work(due <-chan dueRequest, results chan<- paced) {
	for r := range due {
		err := p.exchange(r)
		results <- paced{r.due, time.Since(r.due), err}
	}
	if p.kept != nil {
		p.kept.Close()
	}
}

func (p *pacer) exchange(r dueRequest) (err error) {
	c := p.kept
	if c == nil || r.own {
		if c, err = net.DialTimeout("tcp", p.o.To.String(), p.o.Patience); err != nil {
			return err
		}
	}
	if r.own {
		defer c.Close()
	} else {
		p.kept = c
		defer func() {
			if err != nil {
				c.Close()
				p.kept = nil
			}
		}()
	}
	if err := c.SetDeadline(time.Now().Add(p.o.Patience)); err != nil {
		return err
	}
	if _, err := c.Write(question); err != nil {
		return err
	}
	got := make([]byte, len(response))
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("wait for the answer: %w", err)
	}
	if string(got) != response {
		return errors.New("the answer is wrong")
	}
	return nil
}
