// Command echo is the application that the end-to-end tests and the demo run in
// pods: a server that speaks HTTP, gRPC, a server-first TCP protocol and bulk
// transfers and tells what it saw, and the clients for them.
//
//	echo serve
//	echo get http://server:8080/any/path
//	echo grpc server:8081
//	echo tcp server:8082
//	echo bulk --up 67108864 --down 67108864 server:8083
//	echo hold --connections 1000 --interval 1s --duration 60s server:8082
//	echo load --protocol http --connections 16 --duration 10s server:8080
//	echo capture --address 10.0.0.1 --marker text
//	echo node --root /host
//
// Clients print JSON and exit with 1 if anything failed, 2 if they were called
// wrongly. `echo COMMAND -h` lists the flags.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := app.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.Is(err, app.ErrUsage):
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
