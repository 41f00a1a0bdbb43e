package app

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestHold(t *testing.T) {
	addresses, _ := start(t, "127.0.0.1")
	for _, protocol := range protocols {
		addr := addresses[protocol]
		if protocol == "h2c" {
			addr = addresses["http"]
		}
		r, err := runCommand[RunResult](t, "hold", "--protocol", protocol, "--connections", "20",
			"--interval", "50ms", "--duration", "300ms", addr)
		if err != nil || !r.OK || r.Connections != 20 || r.Held != 20 || r.Failures.Total != 0 {
			t.Fatalf("%s: %v: %+v", protocol, err, r)
		}
		// About 120; a busy machine has fewer, and a late end another one of each.
		if r.Exchanges < 20 || r.Exchanges > 180 {
			t.Errorf("%s: %d exchanges of 20 connections in 300 ms", protocol, r.Exchanges)
		}
		if r.Clients["127.0.0.1"] != r.Exchanges || len(r.Pods) != 1 {
			t.Errorf("%s: clients %v, pods %v", protocol, r.Clients, r.Pods)
		}
		if l := r.Latency; l.P50 <= 0 || l.P50 > l.P90 || l.P90 > l.P99 || l.P99 > l.Max {
			t.Errorf("%s: latency %+v", protocol, l)
		}
	}
}

func TestHoldSaysWhenItIsEstablished(t *testing.T) {
	addresses, _ := start(t, "127.0.0.1")
	var out bytes.Buffer
	err := Main(t.Context(), []string{"hold", "--connections", "5", "--duration", "50ms", "--interval", "20ms", addresses["tcp"]}, nil, &out, &out)
	if err != nil {
		t.Fatal(err)
	}
	var event Event
	if err := json.Unmarshal([]byte(strings.Split(out.String(), "\n")[0]), &event); err != nil {
		t.Fatal(err)
	}
	if event.Event != "established" || event.Connections != 5 || event.Failures != 0 {
		t.Errorf("first line %+v", event)
	}
}

func TestHoldCountsEachLostConnectionOnce(t *testing.T) {
	addresses, _ := start(t, "127.0.0.1")
	proxy := cutAfter(t, addresses["tcp"])
	r := hold(t.Context(), proxy.addr, runOptions{
		protocol: "tcp", connections: 10, duration: 500 * time.Millisecond, interval: 20 * time.Millisecond, timeout: patience, data: "x",
	}, func(Event) { // all are there, and nothing has been exchanged
		for range 3 {
			proxy.cut()
		}
	})
	if r.OK || r.Held != 7 || r.Failures.Total != 3 {
		t.Errorf("held %d with %d failures, wanted 7 and 3: %+v", r.Held, r.Failures.Total, r.Failures)
	}
	for kind := range r.Failures.ByKind {
		if kind != "exchange eof" && kind != "exchange reset" {
			t.Errorf("failure %q", kind)
		}
	}
}

func TestHoldWithoutServer(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	r, err := runCommand[RunResult](t, "hold", "--connections", "3", "--duration", "50ms", closed.Addr().String())
	if err == nil || r.OK || r.Failures.ByKind["connect refused"].Count != 3 {
		t.Errorf("%v: %+v", err, r)
	}
}

func TestLoadKeepsItsRateAndRatio(t *testing.T) {
	addresses, _ := start(t, "127.0.0.1")
	for _, protocol := range protocols {
		addr := addresses[protocol]
		if protocol == "h2c" {
			addr = addresses["http"]
		}
		r, err := runCommand[RunResult](t, "load", "--protocol", protocol, "--connections", "4", "--rate", "200",
			"--new-connection-ratio", "0.5", "--duration", "500ms", addr)
		if err != nil || !r.OK {
			t.Fatalf("%s: %v: %+v", protocol, err, r)
		}
		// The rate is a limit, which a busy machine doesn't come to.
		if most := 200*r.Ended.Sub(r.Started).Seconds() + 10; r.Exchanges < 8 || float64(r.Exchanges) > most {
			t.Errorf("%s: %d exchanges at 200/s, at most %.0f", protocol, r.Exchanges, most)
		}
		// Each of the 4 workers ends with one connection more than it used up.
		if want := r.Exchanges / 2; r.Connections < want-4 || r.Connections > want+8 {
			t.Errorf("%s: %d connections for %d exchanges at a ratio of 0.5", protocol, r.Connections, r.Exchanges)
		}
	}
}

// TestLoadSeesAnOutage stops the server under load and starts it again: the
// outage must be in the figures, and so must the time after it.
func TestLoadSeesAnOutage(t *testing.T) {
	addresses, stop := start(t, "127.0.0.1")
	answers := func() bool {
		s, err := connect(t.Context(), "tcp", addresses["tcp"], patience)
		if err == nil {
			s.close()
		}
		return err == nil
	}
	ctx, over := context.WithCancel(t.Context())
	defer over()
	result := make(chan *RunResult, 1)
	go func() {
		result <- load(ctx, addresses["tcp"], runOptions{
			protocol: "tcp", connections: 4, duration: 4 * patience, timeout: patience, rate: 400, data: "x",
		}, func(Event) {})
	}()
	again, end := context.WithCancel(t.Context())
	var restarted sync.WaitGroup
	defer restarted.Wait()
	defer end()
	// What is seen is what goes on for some time: before, meanwhile and afterwards.
	time.Sleep(500 * time.Millisecond)
	stopped := time.Now()
	stop()
	time.Sleep(1500 * time.Millisecond)
	began := time.Now()
	restarted.Go(func() {
		if err := Serve(again, ServerOptions{Greet: addresses["tcp"]}); err != nil {
			t.Error(err)
		}
	})
	for !answers() && time.Since(began) < patience {
		time.Sleep(10 * time.Millisecond)
	}
	served := time.Now()
	time.Sleep(time.Second)
	over()
	r := <-result
	if r.OK || r.Failures.Total < 4 || r.Failures.ByKind["connect refused"] == nil {
		t.Fatalf("an outage was not seen: %+v", r.Failures)
	}
	if r.Failures.First.At.Before(stopped) || r.Failures.Last.At.Before(r.Failures.First.At) {
		t.Errorf("first failure %v, last %v, stopped %v", r.Failures.First.At, r.Failures.Last.At, stopped)
	}
	// 4 connections that retry every tenth of a second: never a flood.
	if most := int(40*served.Sub(stopped).Seconds()) + 20; r.Failures.Total > most {
		t.Errorf("%d failures in %s, at most %d", r.Failures.Total, served.Sub(stopped), most)
	}
	second := func(at time.Time) int { return int(at.Sub(r.Started) / time.Second) }
	seen := func(from, to int, of func(Second) int) bool {
		return slices.ContainsFunc(r.Seconds[min(from, len(r.Seconds)):min(to+1, len(r.Seconds))], func(s Second) bool { return of(s) > 0 })
	}
	ok, failed := func(s Second) int { return s.OK }, func(s Second) int { return s.Failed }
	if !seen(0, second(stopped), ok) || !seen(second(stopped), second(began), failed) || !seen(second(served), len(r.Seconds), ok) {
		t.Errorf("stopped %v, served again %v; seconds %+v", stopped, served, r.Seconds)
	}
}

// What is said to end does so, with what it has, before its duration is over.
func TestRunsEndWithTheirInput(t *testing.T) {
	addresses, _ := start(t, "127.0.0.1")
	for _, name := range []string{"hold", "load"} {
		in, end := io.Pipe()
		var out bytes.Buffer
		first := &signal{w: &out, at: func() { end.Write([]byte("\n")) }}
		// Before it has exchanged anything it isn't said to have gone well.
		err := Main(t.Context(), []string{name, "--until-stdin", "--protocol", "tcp", "--connections", "3", "--duration", "1h", addresses["tcp"]}, in, first, &out)
		if err != nil && !errors.Is(err, errFailed) {
			t.Errorf("%s: %v", name, err)
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		var r RunResult
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &r); err != nil || r.Event != "result" || r.Failures.Total > 0 {
			t.Errorf("%s: %v: %+v", name, err, r)
		}
		if name == "hold" && (r.Held != 3 || r.Connections != 3) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// signal calls at before the first of what is written goes on.
type signal struct {
	w    io.Writer
	at   func()
	once sync.Once
}

func (s *signal) Write(p []byte) (int, error) {
	s.once.Do(s.at)
	return s.w.Write(p)
}
