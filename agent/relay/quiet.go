package relay

import (
	"context"
	"log/slog"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// What one proxy may have the agent write to its log: a tenant that makes it write
// all the time must not fill the node's disk, or hide what others are about.
const (
	linesPerSecond = 1
	linesAtOnce    = 50
)

// quiet hands on what one proxy has the agent log, as far as that isn't too much,
// and says how much was left out.
type quiet struct {
	slog.Handler
	limit   *rate.Limiter
	leftOut *atomic.Int64
}

func newQuiet(h slog.Handler) slog.Handler {
	return quiet{h, rate.NewLimiter(linesPerSecond, linesAtOnce), &atomic.Int64{}}
}

// Handle implements slog.Handler.
func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	if !q.limit.Allow() {
		q.leftOut.Add(1)
		return nil
	}
	if n := q.leftOut.Swap(0); n > 0 {
		r.AddAttrs(slog.Int64("linesLeftOut", n))
	}
	return q.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler {
	q.Handler = q.Handler.WithAttrs(attrs)
	return q
}

// WithGroup implements slog.Handler.
func (q quiet) WithGroup(name string) slog.Handler {
	q.Handler = q.Handler.WithGroup(name)
	return q
}
