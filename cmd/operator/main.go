// Command operator is Bulkhead's control plane: it plans each node, serves its
// agents, and tells users what came of it. See controllers.Options.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/bulkhead-mesh/bulkhead/controllers"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "operator:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var o controllers.Options
	var level slog.Level
	var qps float32
	c := &cobra.Command{
		Use:   "operator",
		Short: "Run a replica of Bulkhead's control plane",
		Args:  cobra.NoArgs,
		// main prints errors; what flags there are is for --help.
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := ctrl.GetConfig()
			if err != nil {
				return fmt.Errorf("find the API server (in a cluster by the service account, else by KUBECONFIG): %w", err)
			}
			config.QPS, config.Burst = qps, int(2*qps)
			o.Config = config
			o.Logger = slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
			return controllers.Run(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.Namespace, "namespace", os.Getenv("POD_NAMESPACE"), "namespace that the operator runs in (default POD_NAMESPACE, or bulkhead-system)")
	f.StringVar(&o.Service, "service", "bulkhead-operator", "name of the Service in front of the replicas")
	f.StringVar(&o.Listen, "listen", ":15012", "address for agents, gRPC over TLS")
	f.StringVar(&o.Health, "health", ":8081", "address of /healthz and /readyz")
	f.StringVar(&o.Metrics, "metrics", ":8080", "address of /metrics")
	f.DurationVar(&o.JWTTTL, "jwt-ttl", 0, "life of workloads' JWT-SVIDs, 1m to 1h (default 5m)")
	f.Float32Var(&qps, "api-qps", 100, "requests a second to the API server, beyond a burst of twice as many")
	f.TextVar(&level, "log-level", slog.LevelInfo, "DEBUG, INFO, WARN or ERROR")
	return c
}
