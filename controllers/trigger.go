package controllers

import (
	"context"
	"sync"
	"time"

	"k8s.io/client-go/util/workqueue"
)

// trigger is a source of keys from inside of the program. Keys that are added
// while its controller doesn't run are dropped, and can be: a controller starts
// with a key for every object of the kinds that it watches. It is safe for
// concurrent use and never blocks.
type trigger[K comparable] struct {
	// delay gathers several changes into one. Default none.
	delay time.Duration

	mu    sync.Mutex
	queue workqueue.TypedRateLimitingInterface[K]
}

// Start implements source.TypedSource.
func (t *trigger[K]) Start(_ context.Context, q workqueue.TypedRateLimitingInterface[K]) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.queue = q
	return nil
}

func (t *trigger[K]) add(keys ...K) {
	t.mu.Lock()
	q := t.queue
	t.mu.Unlock()
	if q == nil {
		return
	}
	for _, k := range keys {
		q.AddAfter(k, t.delay)
	}
}
