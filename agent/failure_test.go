package agent

import (
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/isolation"
)

// A failure is told until all processes have served for a while, with the end of
// what was written, however much that is.
func TestFailure(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	exit := func(cause isolation.Cause, ago time.Duration, log string) isolation.Exit {
		return isolation.Exit{Cause: cause, Status: "killed by SIGKILL", At: now.Add(-ago), Log: log}
	}
	run := func(generation int, since time.Duration, e isolation.Exit) isolation.Process {
		return isolation.Process{Generation: generation, PID: 5, Live: true, StartedAt: now.Add(-since), Restarts: 3, Exit: e}
	}
	down := run(0, time.Hour, exit(isolation.CauseOutOfMemory, time.Second, "a\nb\nc\nd\ne\nf\n"))
	down.PID, down.Live = 0, false
	for name, test := range map[string]struct {
		processes []isolation.Process
		cause     string
		recovered bool
		log       string
	}{
		"none":               {[]isolation.Process{run(0, time.Hour, isolation.Exit{})}, "", false, ""},
		"asked to":           {[]isolation.Process{run(0, time.Hour, exit(isolation.CauseStopped, time.Hour, ""))}, "", false, ""},
		"down":               {[]isolation.Process{down}, "OutOfMemory", false, "b\nc\nd\ne\nf"},
		"up a moment ago":    {[]isolation.Process{run(0, 9*time.Second, exit(isolation.CauseCrash, 10*time.Second, ""))}, "Crash", false, ""},
		"up for a while":     {[]isolation.Process{run(0, 10*time.Second, exit(isolation.CauseCrash, 11*time.Second, ""))}, "Crash", true, ""},
		"the later of two":   {[]isolation.Process{run(0, time.Hour, exit(isolation.CauseCrash, time.Hour, "")), run(1, time.Minute, exit(isolation.CauseKilled, time.Minute, ""))}, "Killed", true, ""},
		"one of two is down": {[]isolation.Process{down, run(1, time.Hour, isolation.Exit{})}, "OutOfMemory", false, "b\nc\nd\ne\nf"},
	} {
		f := failure(isolation.State{Processes: test.processes}, now)
		switch {
		case f == nil:
			if test.cause != "" {
				t.Errorf("%s: nothing is told", name)
			}
		case f.Cause != test.cause || f.Recovered != test.recovered || f.Log != test.log || f.Restarts != 3:
			t.Errorf("%s: %+v", name, f)
		}
	}
	const start = "[2026-11-27 03:48:58.321][1][warning][main] [source/server/server.cc:1059] There is no configured limit to the number of allowed active downstream connections. Configure a limit in `envoy.resource_monitors.global_downstream_max_connections` resource monitor."
	for _, test := range [][2]string{{start + "\n", ""}, {start + "\nb\nc\nd\ne\nf\n" + start, "b\nc\nd\ne\nf"}, {"it said: " + start[81:], "it said: " + start[81:]}} {
		if got := lastWords(test[0]); got != test[1] {
			t.Errorf("of %q is told %q, want %q", test[0], got, test[1])
		}
	}
	long := failure(isolation.State{Processes: []isolation.Process{run(0, 0, exit(isolation.CauseCrash, 0, strings.Repeat("ü", 4000)))}}, now)
	if n := len(long.Log); n > maxFailureLog+4 || n < maxFailureLog-4 || !strings.HasSuffix(long.Log, "ü") {
		t.Errorf("%d bytes of log are told: %q", n, long.Log)
	}
}
