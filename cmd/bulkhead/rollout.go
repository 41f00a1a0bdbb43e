package main

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/cluster"
	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/rollout"
)

func rolloutCommand(f *cluster.Flags) *cobra.Command {
	c := &cobra.Command{
		Use:   "rollout",
		Short: "See and steer upgrades of the proxies",
		// Its commands are asked for without it.
		SuggestFor: []string{"status", "history", "pause", "resume", "approve", "abort"},
		Long: `See and steer upgrades of the proxies: ProxyRollouts. Without a name it is the
one that is at work, or else the newest.`,
	}
	watch := false
	var status *cobra.Command
	status = sub(f, "status [NAME]", "Show how a rollout is, and each tenant in it", func(ctx context.Context, c client.Client, namespace, name string, w io.Writer) error {
		if watch {
			return rollout.Watch(ctx, c, name, namespace, w, status.ErrOrStderr())
		}
		return rollout.Status(ctx, c, name, namespace, w)
	})
	status.Flags().BoolVarP(&watch, "watch", "w", false, "show each change, until the rollout is done")
	history := sub(f, "history", "Show all rollouts, the newest first", func(ctx context.Context, c client.Client, _, _ string, w io.Writer) error {
		return rollout.History(ctx, c, time.Now(), w)
	})
	history.Args = cobra.NoArgs
	c.AddCommand(status,
		sub(f, "pause [NAME]", "Keep a rollout as it is; what goes wrong still takes it back", func(ctx context.Context, c client.Client, _, name string, w io.Writer) error {
			return rollout.Pause(ctx, c, name, true, w)
		}),
		sub(f, "resume [NAME]", "Let a paused rollout go on", func(ctx context.Context, c client.Client, _, name string, w io.Writer) error {
			return rollout.Pause(ctx, c, name, false, w)
		}),
		sub(f, "approve [NAME]", "Let a rollout leave the step that waits for approval", func(ctx context.Context, c client.Client, _, name string, w io.Writer) error {
			return rollout.Approve(ctx, c, name, w)
		}),
		sub(f, "abort [NAME]", "Give all new connections back to the version before, for good", func(ctx context.Context, c client.Client, _, name string, w io.Writer) error {
			return rollout.Abort(ctx, c, name, w)
		}),
		history)
	return c
}

// sub is a command with an optional name of a rollout.
func sub(f *cluster.Flags, use, short string, do func(ctx context.Context, c client.Client, namespace, name string, w io.Writer) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.MaximumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		// A rollout is of all namespaces: one is chosen by -n alone, not by the context.
		c, _, err := f.Connect()
		if err != nil {
			return err
		}
		name := ""
		if len(args) > 0 {
			name = args[0]
		}
		return do(cmd.Context(), c, f.Namespace, name, cmd.OutOrStdout())
	}}
}
