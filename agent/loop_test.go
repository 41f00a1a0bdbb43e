package agent

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"
)

// Whoever wakes the loop all the time doesn't have it run all the time; what comes
// now and then is looked at at once.
func TestLoopIsPaced(t *testing.T) {
	a, err := newAgent(Options{Node: "n", Operator: "localhost:1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		a.loop(ctx)
	}()
	round := func() {
		t.Helper()
		done := a.roundDone()
		a.wake()
		select {
		case <-done:
		case <-time.After(30 * time.Second):
			t.Fatal("no round")
		}
	}
	// Some of them: on a busy machine each may take as long as the pace has others wait.
	var each []time.Duration
	for range roundsAtOnce / 2 {
		begin := time.Now()
		round()
		each = append(each, time.Since(begin))
	}
	slices.Sort(each)
	if each[2] > time.Second/roundsPerSecond/2 {
		t.Errorf("rounds took %s", each)
	}
	n := 0
	begin := time.Now()
	for ; time.Since(begin) < 2*time.Second; n++ {
		round()
	}
	if most := roundsAtOnce + int(time.Since(begin).Seconds()*roundsPerSecond) + 1; n > most || n < roundsPerSecond/2 {
		t.Errorf("%d rounds in %s, at most %d", n, time.Since(begin), most)
	}
	cancel()
	<-ended
}
