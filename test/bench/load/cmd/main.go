// Command cmd is both ends of a load: `serve`, which prints a line when it
// listens, and `run OPTIONS` with load.Options as JSON, which prints the result.
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
	if len(args) != 2 || args[0] != "run" {
		return fmt.Errorf("usage: serve | run OPTIONS")
	}
	var o load.Options
	if err := json.Unmarshal([]byte(args[1]), &o); err != nil {
		return fmt.Errorf("read options: %w", err)
	}
	r, err := load.Run(o)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}
