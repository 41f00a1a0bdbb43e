// Command bulkhead shows the owners of namespaces what the mesh does for them. It
// is a plugin of kubectl as well, under the name kubectl-bulkhead.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, command(filepath.Base(os.Args[0]))); err != nil {
		fmt.Fprintln(os.Stderr, "bulkhead:", err)
		os.Exit(1)
	}
}

// run does what c's arguments say, and says where to read on if they are wrong.
func run(ctx context.Context, c *cobra.Command) error {
	called, err := c.ExecuteContextC(ctx)
	if err != nil && !called.Runnable() { // so the words are wrong
		return fmt.Errorf("%w\nsee %s --help", err, called.CommandPath())
	}
	return err
}

func command(name string) *cobra.Command {
	use := "bulkhead"
	if plugin, ok := strings.CutPrefix(name, "kubectl-"); ok {
		use = "kubectl " + plugin
	}
	c := &cobra.Command{
		Use:   "bulkhead",
		Short: "See what the proxies of your namespaces do",
		// main prints errors; what flags there are is for --help.
		SilenceErrors: true, SilenceUsage: true,
		Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: use},
	}
	var f cluster.Flags
	f.AddTo(c.PersistentFlags())
	c.AddCommand(rolloutCommand(&f), costCommand(&f))
	return c
}
