package main

import (
	"github.com/spf13/cobra"

	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/cluster"
	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/cost"
)

func costCommand(f *cluster.Flags) *cobra.Command {
	var o cost.Options
	c := &cobra.Command{
		Use:   "cost",
		Short: "Show what each tenant's proxies took of all nodes",
		Long: `Show what each tenant's proxies took of all nodes: CPU, memory on average, bytes
and connections of its pods. It is read from the TenantProxies that you may list.

For a proxy that namespaces share, CPU and memory are split by bytes and
connections: an estimate, and marked as one.`,
		Example: "  bulkhead cost -A --since 7d\n  bulkhead cost -n team-a -o csv",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			reader, namespace, err := f.Connect()
			if err != nil {
				return err
			}
			return cost.Run(cmd.Context(), reader, namespace, o, cmd.OutOrStdout())
		},
	}
	c.Flags().StringVar(&o.Since, "since", "", "for how long back, such as 6h or 7d: whole hours up to a day, whole days up to a month (default: since it is counted)")
	c.Flags().StringVarP(&o.Output, "output", "o", "table", "table, csv or json")
	return c
}
