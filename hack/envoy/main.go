// Command envoy fetches the Envoy versions that Bulkhead is built and tested
// with, and prints the directory of each:
//
//	go run ./hack/envoy                    # the default version
//	go run ./hack/envoy --version 1.39.3
//	go run ./hack/envoy --all
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

func main() {
	version := flag.String("version", dist.Default, "version to fetch: "+strings.Join(dist.Versions(), ", "))
	all := flag.Bool("all", false, "fetch every pinned version")
	flag.Parse()
	versions := []string{*version}
	if *all {
		versions = dist.Versions()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, versions); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, versions []string) error {
	for _, version := range versions {
		envoy, err := dist.Fetch(ctx, version)
		if err != nil {
			return err
		}
		fmt.Println(envoy.Dir)
	}
	return nil
}
