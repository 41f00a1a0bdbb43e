// Package control measures what the control plane costs: the real store and server
// in a process of their own, real delta streams, synthetic objects.
package control

import (
	"fmt"
	"os"
	"testing"
)

// serverSocket in the environment makes the test's binary the server.
const serverSocket = "BULKHEAD_BENCH_CONTROL"

func TestMain(m *testing.M) {
	if path := os.Getenv(serverSocket); path != "" {
		if err := serve(path, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "serve:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}
