// Command cmd is both ends of a load: `serve` and `flow`, which print a line when
// they listen, and `run`, `paced`, `unread`, `huge` and `scan` with their options as
// JSON, which print the result.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	debug.SetGCPercent(-1) // a collection would be seen in p99; a run is short
	if len(args) == 1 && args[0] == "serve" {
		return load.Serve(func() { fmt.Println("ready") })
	}
	if len(args) == 1 && args[0] == "flow" {
		return load.ServeFlow(func() { fmt.Println("ready") })
	}
	if len(args) != 2 {
		return fmt.Errorf("usage: serve | flow, or run | paced | unread | huge | scan and OPTIONS")
	}
	var r any
	var err error
	switch args[0] {
	case "run":
		var o load.Options
		if err := read(args[1], &o); err != nil {
			return err
		}
		r, err = load.Run(o)
	case "paced":
		var o load.PacedOptions
		if err := read(args[1], &o); err != nil {
			return err
		}
		r = load.RunPaced(o)
	case "unread", "huge", "scan":
		var o load.Options
		if err := read(args[1], &o); err != nil {
			return err
		}
		switch args[0] {
		case "unread":
			load.HoldUnread(o.To, o.Connections, o.Duration)
		case "huge":
			load.SendHuge(o.To, o.Connections, o.Duration)
		case "scan":
			err = load.Scan(o.From, o.To, o.Duration)
		}
	default:
		err = fmt.Errorf("%q is no command", args[0])
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func read(options string, o any) error {
	if err := json.Unmarshal([]byte(options), o); err != nil {
		return fmt.Errorf("read options: %w", err)
	}
	return nil
}
