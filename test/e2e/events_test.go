package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
)

// TestEvents watches one tenant's connections on one node, as somebody who looks
// for a problem would. What a busy machine doesn't get done meanwhile is watched for longer.
func TestEvents(t *testing.T) {
	for duration := 6 * time.Second; !watchesEvents(t, duration); duration *= 2 {
		if duration > patience {
			t.Fatalf("not all was seen within %s", duration)
		}
	}
}

// watchesEvents reports whether all was seen.
func watchesEvents(t *testing.T, duration time.Duration) bool {
	t.Helper()
	from, to, other := e.pod(webA, 0), e.pod(webB, 1), e.pod(webB, 0)
	local := other // on the node that is watched
	type answer struct {
		out string
		err error
	}
	watched := make(chan answer, 1)
	begin := time.Now()
	go func() {
		for {
			out, err := e.AgentExec(t.Context(), e.nodes[0], "events", "--tenant", from.Echo.Namespace, "--duration", duration.String())
			// Who watched before may not have ended yet.
			if err == nil || !strings.Contains(err.Error(), "another reader") {
				watched <- answer{out, err}
				return
			}
		}
	}()
	// Calls go on until the watching has ended: it may begin late.
	var a answer
	calls := time.NewTicker(300 * time.Millisecond)
	defer calls.Stop()
	for over := false; !over; {
		mustCall(t, from, from.IPv4, "tcp", hostPort(to.IPv4, app.GreetPort))
		mustCall(t, from, from.IPv4, "tcp", hostPort(local.IPv4, app.GreetPort))
		mustCall(t, other, other.IPv4, "tcp", hostPort(to.IPv4, app.GreetPort))
		select {
		case a = <-watched:
			over = true
		case <-calls.C:
		}
	}
	if a.err != nil {
		t.Fatal(a.err)
	}
	opened, closed, locals := 0, 0, 0
	for line := range strings.Lines(a.out) {
		var event agent.ConnectionEvent
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if event.Tenant != from.Echo.Namespace {
			t.Errorf("an event of another tenant: %s", line)
		}
		if event.Way == "outbound" && event.Pod.Addr().String() == from.IPv4 && event.Peer.Addr().String() == local.IPv4 {
			if locals++; event.PodUID != string(from.UID) || event.PeerUID != string(local.UID) {
				t.Errorf("both ends are here and the event is of pods %q and %q, want %s and %s: %s", event.PodUID, event.PeerUID, from.UID, local.UID, line)
			}
		}
		if event.Way != "outbound" || event.Time.Before(begin) || event.Pod.Addr().String() != from.IPv4 || event.Peer.String() != hostPort(to.IPv4, app.GreetPort) {
			continue
		}
		if event.PodUID != string(from.UID) || event.Name != from.Name || event.Namespace != from.Namespace {
			t.Errorf("the event is of pod %s/%s %s, want %s %s: %s", event.Namespace, event.Name, event.PodUID, from.Name, from.UID, line)
		}
		switch event.Event {
		case "opened":
			opened++
		case "closed":
			closed++
			if event.BytesSent == 0 || event.BytesReceived == 0 {
				t.Errorf("a connection that exchanged data has no bytes: %s", line)
			}
		}
	}
	t.Logf("within %s %d connections of %s were seen to open, %d to close, and %d to %s", duration, opened, from, closed, locals, local)
	return locals > 0 && opened > 0 && closed > 0
}
