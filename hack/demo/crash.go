package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/capture"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// showCrash kills one tenant's Envoy under load, with a capture running.
func (d *demo) showCrash(ctx context.Context) error {
	victim, node := teams[0], d.nodes[0]
	d.step("kill -9 of %s's Envoy on %s while every team is under load", victim, node)
	type outcome struct {
		team   string
		result app.RunResult
		err    error
	}
	const seconds = 10
	var outcomes []outcome
	var killed time.Time
	var before, after int
	var report capture.Report
	report, err := d.captureWhile(ctx, node, marker, func(ctx context.Context) error {
		results := make(chan outcome, len(teams))
		for _, a := range []harness.Echo{webA, webB, webC} {
			started := make(chan struct{})
			go func() {
				r, err := d.Load(ctx, d.pod(a, 0), started, "load", "--connections", "8", "--rate", "80", "--new-connection-ratio", "0.25",
					"--data", marker, "--timeout", "2s", "--duration", fmt.Sprintf("%ds", seconds), address(d.pod(a, 1).IPv4, app.HTTPPort))
				results <- outcome{a.Namespace, r, err}
			}()
			select {
			case <-started:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		proxy, err := d.Proxy(ctx, node, victim)
		if err != nil {
			return err
		}
		before = proxy.Generations[0].PID
		// Some seconds of undisturbed load first, to compare with.
		time.Sleep(2 * time.Second)
		killed = time.Now()
		if _, err := d.Exec(ctx, harness.SystemNamespace, d.agents[node], "/bulkhead/agent", "kill", "--signal", "KILL", strconv.Itoa(before)); err != nil {
			return err
		}
		for range teams {
			outcomes = append(outcomes, <-results)
		}
		return harness.Wait(ctx, 20*time.Second, 200*time.Millisecond, "the proxy to come back", func(ctx context.Context) error {
			proxy, err := d.Proxy(ctx, node, victim)
			if err != nil {
				return err
			}
			if len(proxy.Generations) == 0 || proxy.Generations[0].PID == 0 || proxy.Generations[0].PID == before {
				return fmt.Errorf("%s has no new process on %s", victim, node)
			}
			after = proxy.Generations[0].PID
			return nil
		})
	})
	if err != nil {
		return err
	}
	for _, o := range outcomes {
		r := o.result
		switch {
		case r.Exchanges == 0 && o.err != nil:
			d.checkErr(o.err, "%s: load ran", o.team)
		case o.team == victim:
			last := r.Seconds[max(0, len(r.Seconds)-3):]
			d.check(r.Failures.Total > 0, "%s: %d requests answered, %d refused or cut: its own proxy was killed", o.team, r.Exchanges, r.Failures.Total)
			d.check(allGood(last), "%s: served again, without an error in the last seconds; errors lasted %s", o.team, lasted(r, killed))
		default:
			var problem error
			if r.Failures.Total > 0 {
				problem = fmt.Errorf("the last: %+v", r.Failures.Last)
			}
			d.checkErr(problem, "%s: %d requests answered, %d errors", o.team, r.Exchanges, r.Failures.Total)
		}
	}
	d.check(after != before, "%s's Envoy came back by itself: pid %d, then %d", victim, before, after)
	w := d.readWire(report)
	d.checkErr(joined(w.clear), "while it was away nothing of it passed in the clear (%d packets captured)", report.Packets)
	d.check(w.meshMarked == 0, "and the marker that the load sent was never readable")
	return nil
}

func allGood(seconds []app.Second) bool {
	ok := 0
	for _, s := range seconds {
		if s.Failed > 0 {
			return false
		}
		ok += s.OK
	}
	return ok > 0
}

// lasted is the time from the kill to the last failure.
func lasted(r app.RunResult, killed time.Time) time.Duration {
	if r.Failures.Last == nil {
		return 0
	}
	return r.Failures.Last.At.Sub(killed).Round(time.Millisecond)
}
