package isolation

import "time"

const (
	firstDelay = 100 * time.Millisecond
	lastDelay  = 10 * time.Second
	// healthyAfter is how long a process has to serve for its next start to be as
	// quick as the first.
	healthyAfter = 10 * time.Second
)

// backoff is how long to wait before the next start: each time twice as long, up
// to lastDelay. The zero value is ready.
type backoff struct{ delay time.Duration }

// next takes for how long the last process served, 0 if it didn't.
func (b *backoff) next(served time.Duration) time.Duration {
	if served > healthyAfter || b.delay == 0 {
		b.delay = firstDelay
	} else {
		b.delay = min(2*b.delay, lastDelay)
	}
	return b.delay
}
