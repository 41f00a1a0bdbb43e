package app

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
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
		if r.Exchanges < 60 || r.Exchanges > 140 {
			t.Errorf("%s: %d exchanges of 20 connections in 300 ms, wanted about 120", protocol, r.Exchanges)
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
	cut := make(chan struct{})
	r := hold(t.Context(), proxy.addr, runOptions{
		protocol: "tcp", connections: 10, duration: 500 * time.Millisecond, interval: 20 * time.Millisecond, timeout: time.Second, data: "x",
	}, func(Event) {
		go func() {
			defer close(cut)
			for range 3 {
				proxy.cut()
			}
		}()
	})
	<-cut
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
		if r.Exchanges < 50 || r.Exchanges > 110 {
			t.Errorf("%s: %d exchanges in half a second at 200/s", protocol, r.Exchanges)
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
	result := make(chan *RunResult, 1)
	go func() {
		result <- load(t.Context(), addresses["tcp"], runOptions{
			protocol: "tcp", connections: 4, duration: 2200 * time.Millisecond, timeout: time.Second, rate: 400, data: "x",
		}, func(Event) {})
	}()
	again, end := context.WithCancel(t.Context())
	var restarted sync.WaitGroup
	restarted.Go(func() {
		time.Sleep(300 * time.Millisecond)
		stop()
		time.Sleep(800 * time.Millisecond)
		if err := Serve(again, ServerOptions{Greet: addresses["tcp"]}); err != nil {
			t.Error(err)
		}
	})
	defer restarted.Wait()
	defer end()
	var r *RunResult
	select {
	case r = <-result:
	case <-time.After(20 * time.Second):
		t.Fatal("load did not end")
	}
	if r.OK || r.Failures.Total < 4 || r.Failures.ByKind["connect refused"] == nil {
		t.Fatalf("an outage was not seen: %+v", r.Failures)
	}
	if r.Failures.First.At.Before(r.Started.Add(200*time.Millisecond)) || r.Failures.Last.At.Before(r.Failures.First.At) {
		t.Errorf("first failure %v, last %v, started %v", r.Failures.First.At, r.Failures.Last.At, r.Started)
	}
	// 4 connections that retry every tenth of a second: never a flood.
	if r.Failures.Total > 100 {
		t.Errorf("%d failures in about a second", r.Failures.Total)
	}
	if len(r.Seconds) < 2 || r.Seconds[0].OK == 0 || r.Seconds[1].Failed == 0 || r.Seconds[len(r.Seconds)-1].OK == 0 {
		t.Errorf("seconds %+v", r.Seconds)
	}
}
