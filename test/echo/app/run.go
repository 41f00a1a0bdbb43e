package app

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"
)

// Bounds of hold and load, so that no call can run away.
const (
	ConnectionLimit = 20000
	DurationLimit   = 2 * time.Hour
	// connecting is how many connections hold makes at the same time.
	connecting = 50
)

// runOptions are the flags of hold and load.
type runOptions struct {
	protocol    string
	connections int
	duration    time.Duration
	timeout     time.Duration
	data        string
	// interval is hold's time between exchanges on a connection.
	interval time.Duration
	// rate is load's exchanges a second over all connections, 0 as fast as they go.
	rate float64
	// newConnections is the share of load's exchanges that get a connection of
	// their own, from 0 to 1.
	newConnections float64
	// reconnect repeats, once and on a new connection, what got no answer on a kept
	// one that the server closed, as HTTP clients do.
	reconnect bool
}

// Event is a line that hold and load print while they run.
type Event struct {
	// Event is "established" (hold: all connections that can be, are) or
	// "started" (load).
	Event string    `json:"event"`
	At    time.Time `json:"at"`
	// Connections are those that exist, Failures those that couldn't be made.
	Connections int `json:"connections"`
	Failures    int `json:"failures"`
}

// RunResult is the last line that hold and load print.
type RunResult struct {
	// Event is "result".
	Event    string    `json:"event"`
	OK       bool      `json:"ok"`
	Protocol string    `json:"protocol"`
	Address  string    `json:"address"`
	Started  time.Time `json:"started"`
	Ended    time.Time `json:"ended"`
	// Connections is how many were opened; of hold's those that were still there
	// at the end are Held.
	Connections int `json:"connections"`
	Held        int `json:"held,omitempty"`
	// Reconnects are kept connections that the server closed and load made again.
	Reconnects int `json:"reconnects,omitempty"`
	// Exchanges are the good ones.
	Exchanges int      `json:"exchanges"`
	Failures  Failures `json:"failures"`
	// Latency is of good exchanges.
	Latency Latency `json:"latency"`
	// Clients counts good exchanges by the client IP that the server saw, Pods
	// by the server's pod.
	Clients map[string]int `json:"clients"`
	Pods    map[string]int `json:"pods"`
	// Seconds has one entry for each second since Started.
	Seconds []Second `json:"seconds"`
}

// Second is what happened in one second.
type Second struct {
	OK     int `json:"ok"`
	Failed int `json:"failed"`
}

// Latency is in milliseconds.
type Latency struct {
	P50 float64 `json:"p50_ms"`
	P90 float64 `json:"p90_ms"`
	P99 float64 `json:"p99_ms"`
	Max float64 `json:"max_ms"`
}

// recorder collects a run's outcome, from several goroutines.
type recorder struct {
	mu      sync.Mutex
	result  *RunResult
	buckets [bucketCount]int
	max     time.Duration
}

// Latencies are counted in buckets that grow by bucketGrowth from 10 µs, so that
// memory doesn't grow with a run.
const (
	bucketCount  = 400
	bucketGrowth = 1.05
)

func newRecorder(protocol, addr string) *recorder {
	return &recorder{result: &RunResult{
		Event: "result", Protocol: protocol, Address: addr, Started: time.Now(),
		Clients: map[string]int{}, Pods: map[string]int{},
	}}
}

func (r *recorder) second() *Second {
	n := max(0, int(time.Since(r.result.Started)/time.Second))
	for len(r.result.Seconds) <= n {
		r.result.Seconds = append(r.result.Seconds, Second{})
	}
	return &r.result.Seconds[n]
}

func (r *recorder) ok(a Answer, took time.Duration) {
	bucket := int(math.Log(float64(took)/float64(10*time.Microsecond)) / math.Log(bucketGrowth))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.Exchanges++
	r.result.Clients[a.ClientIP()]++
	r.result.Pods[a.Pod]++
	r.second().OK++
	r.buckets[min(max(bucket, 0), bucketCount-1)]++
	r.max = max(r.max, took)
}

func (r *recorder) failed(stage string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.Failures.add(newFailure(stage, err))
	r.second().Failed++
}

func (r *recorder) opened() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.Connections++
}

func (r *recorder) reconnected() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.Reconnects++
}

func (r *recorder) finish() *RunResult {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.Ended = time.Now()
	r.result.Latency = Latency{P50: r.quantile(0.5), P90: r.quantile(0.9), P99: r.quantile(0.99), Max: milliseconds(r.max)}
	r.result.OK = r.result.Failures.Total == 0 && r.result.Exchanges > 0
	return r.result
}

// quantile is the upper bound of the bucket that holds it.
func (r *recorder) quantile(q float64) float64 {
	rank := int(math.Ceil(q * float64(r.result.Exchanges)))
	for i, n := range r.buckets {
		if rank -= n; rank <= 0 && n > 0 {
			upper := time.Duration(float64(10*time.Microsecond) * math.Pow(bucketGrowth, float64(i+1)))
			return milliseconds(min(upper, r.max))
		}
	}
	return 0
}

// hold opens connections, and exchanges data on each of them every interval for
// the whole duration. A connection that fails is counted and not made again.
func hold(ctx context.Context, addr string, opts runOptions, event func(Event)) *RunResult {
	r := newRecorder(opts.protocol, addr)
	sessions := make([]*session, opts.connections)
	slots := make(chan struct{}, connecting)
	var making sync.WaitGroup
	for i := range sessions {
		slots <- struct{}{}
		making.Go(func() {
			defer func() { <-slots }()
			s, err := connect(ctx, opts.protocol, addr, opts.timeout)
			if err != nil {
				r.failed("connect", err)
				return
			}
			r.opened()
			sessions[i] = s
		})
	}
	making.Wait()
	sessions = slices.DeleteFunc(sessions, func(s *session) bool { return s == nil })
	event(Event{Event: "established", At: time.Now(), Connections: len(sessions), Failures: opts.connections - len(sessions)})

	ctx, cancel := context.WithTimeout(ctx, opts.duration)
	defer cancel()
	var mu sync.Mutex
	held := 0
	var holding sync.WaitGroup
	for i, s := range sessions {
		holding.Go(func() {
			defer s.close()
			// Connections take turns within an interval.
			phase := opts.interval * time.Duration(i) / time.Duration(len(sessions))
			if exchangeEvery(ctx, s, r, fmt.Sprintf("%s %d", opts.data, i), phase, opts) {
				mu.Lock()
				held++
				mu.Unlock()
			}
		})
	}
	holding.Wait()
	result := r.finish()
	result.Held = held
	result.OK = result.OK && held == opts.connections
	return result
}

// exchangeEvery reports whether the session was good until ctx ended.
func exchangeEvery(ctx context.Context, s *session, r *recorder, name string, phase time.Duration, opts runOptions) bool {
	if !sleep(ctx, phase) {
		return true
	}
	ticker := time.NewTicker(opts.interval)
	defer ticker.Stop()
	for n := 0; ; n++ {
		// An exchange that began is let end: being cut off by our own deadline
		// would count as the server's failure.
		if !once(context.WithoutCancel(ctx), s, r, fmt.Sprintf("%s %d", name, n), opts.timeout) {
			return false
		}
		select {
		case <-ctx.Done():
			return true
		case <-ticker.C:
		}
	}
}

func once(ctx context.Context, s *session, r *recorder, payload string, timeout time.Duration) bool {
	start := time.Now()
	a, err := s.do(ctx, payload, timeout)
	if err != nil {
		r.failed("exchange", err)
		return false
	}
	r.ok(a, time.Since(start))
	return true
}

// load exchanges data on each connection again and again. A connection that
// fails is counted and made again after a tenth of a second.
func load(ctx context.Context, addr string, opts runOptions, event func(Event)) *RunResult {
	r := newRecorder(opts.protocol, addr)
	ctx, cancel := context.WithTimeout(ctx, opts.duration)
	defer cancel()
	event(Event{Event: "started", At: time.Now()})
	var period time.Duration
	if opts.rate > 0 {
		period = time.Duration(float64(opts.connections) / opts.rate * float64(time.Second))
	}
	var working sync.WaitGroup
	for i := range opts.connections {
		working.Go(func() {
			if sleep(ctx, period*time.Duration(i)/time.Duration(opts.connections)) {
				loadOne(ctx, addr, i, period, r, opts)
			}
		})
	}
	working.Wait()
	return r.finish()
}

// retryAfter keeps a server that refuses from being asked as fast as it refuses.
const retryAfter = 100 * time.Millisecond

func loadOne(ctx context.Context, addr string, worker int, period time.Duration, r *recorder, opts runOptions) {
	var s *session
	defer func() {
		if s != nil {
			s.close()
		}
	}()
	next := time.Now()
	share := 0.0
	kept := false
	for n := 0; ctx.Err() == nil; n++ {
		if s == nil {
			var err error
			if s, err = connect(context.WithoutCancel(ctx), opts.protocol, addr, opts.timeout); err != nil {
				r.failed("connect", err)
				s = nil
				sleep(ctx, retryAfter)
				continue
			}
			r.opened()
			kept = false
		}
		start := time.Now()
		a, err := s.do(context.WithoutCancel(ctx), fmt.Sprintf("%s %d %d", opts.data, worker, n), opts.timeout)
		if kind := kindOf(err); err != nil && kept && opts.reconnect && (kind == "eof" || kind == "reset") {
			s.close()
			s = nil
			r.reconnected()
			continue
		}
		good := err == nil
		if good {
			r.ok(a, time.Since(start))
		} else {
			r.failed("exchange", err)
		}
		kept = true
		share += opts.newConnections
		if !good || share >= 1 {
			s.close()
			s = nil
			share = math.Mod(share, 1)
		}
		if !good {
			sleep(ctx, retryAfter)
		}
		if period > 0 {
			// A late exchange isn't made up for: the rate is a limit.
			next = next.Add(period)
			if now := time.Now(); next.Before(now) {
				next = now
			}
			sleep(ctx, time.Until(next))
		}
	}
}

// sleep reports whether the time went by before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
