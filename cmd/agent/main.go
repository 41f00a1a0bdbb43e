// Command agent runs on each node of the mesh: it runs the node's tenant proxies,
// steers its pods to them and relays their configuration.
//
//	agent run                            what the DaemonSet starts
//	agent run --plan FILE                the same without Kubernetes, by a plan in a file
//	agent inspect                        what runs here, read back from the kernel
//	agent log --tenant T [--generation]  a proxy's log
//	agent debug config|stats|heap|loglevel --tenant T  what a proxy has and does; sets a log level
//	agent kill --signal KILL PID         a signal to a tenant proxy, and to nothing else
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"

	"golang.org/x/sys/unix"
	ctrl "sigs.k8s.io/controller-runtime/pkg/client/config"
	crlog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/go-logr/logr"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/agent/debug"
	"github.com/bulkhead-mesh/bulkhead/isolation"
)

// version is set when an image is built.
var version = "dev"

func main() {
	if len(os.Args) > 1 && os.Args[1] == "sandbox-init" {
		isolation.SandboxInit()
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "agent:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	const usage = "usage: agent run [--plan FILE] | inspect | log --tenant TENANT | events [--tenant TENANT] [--duration TIME] | debug config|stats|heap|loglevel --tenant TENANT | kill --signal NAME PID"
	if len(args) == 0 {
		return fmt.Errorf("%s", usage)
	}
	o := agent.Options{Node: os.Getenv("NODE_NAME"), Namespace: os.Getenv("POD_NAMESPACE"), Version: version}
	flags := flag.NewFlagSet("agent "+args[0], flag.ContinueOnError)
	flags.StringVar(&o.RunDir, "run-dir", "/run/bulkhead", "what ends with a reboot")
	switch args[0] {
	case "run":
		flags.StringVar(&o.Operator, "operator", "", "host:port of the operator")
		flags.StringVar(&o.TokenFile, "token-file", "", "token for the operator")
		flags.StringVar(&o.LibDir, "lib-dir", "", "what stays")
		flags.StringVar(&o.EnvoyDir, "envoy-dir", "", "versions of Envoy")
		flags.StringVar(&o.HealthAddress, "health-address", "", "probes and metrics")
		flags.StringVar(&o.DebugAddress, "debug-address", "", "where owners look into their proxies, or off")
		flags.StringVar(&o.PinDir, "pin-dir", "", "where the kernel keeps programs and maps")
		flags.StringVar(&o.CgroupParent, "cgroup-parent", "", "cgroup that the tenants' folder is in, delegated by the node's systemd")
		flags.StringVar(&o.CgroupName, "cgroup-name", "", "folder of the tenants' cgroups")
		flags.StringVar(&o.PodCgroups, "pod-cgroups", "", "cgroup of all pods of the kubelet")
		flags.DurationVar(&o.Linger, "linger", 0, "how long a proxy stays after its tenant's last pod")
		flags.DurationVar(&o.Drain, "drain", 0, "how long a generation that isn't wanted any more may finish its connections")
		flags.DurationVar(&o.MeterPeriod, "meter-period", 0, "how often it is read what tenants take (default 30s)")
		flags.DurationVar(&o.CostPeriod, "cost-period", 0, "how often that is told if nothing else is (default 1m)")
		mark := flags.Uint("mark", 0, "the bit of packets' marks that steering uses, such as 0x4000, if another has the default's")
		plan := flags.String("plan", "", "a plan (YAML) in place of Kubernetes")
		debug := flags.Bool("debug", false, "log more")
		if err := parse(flags, args[1:]); err != nil {
			return err
		}
		if o.Mark = uint32(*mark); uint(o.Mark) != *mark {
			return fmt.Errorf("mark %#x: it has 32 bits", *mark)
		}
		level := slog.LevelInfo
		if *debug {
			level = slog.LevelDebug
		}
		o.Log = slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
		slog.SetDefault(o.Log)
		crlog.SetLogger(logr.FromSlogHandler(o.Log.Handler()))
		if *plan != "" {
			o.Log.Info("agent starts", "version", version, "plan", *plan)
			return agent.RunPlan(ctx, *plan, o)
		}
		config, err := ctrl.GetConfig()
		if err != nil {
			return fmt.Errorf("find the API server: %w", err)
		}
		o.Log.Info("agent starts", "version", version, "node", o.Node)
		return agent.Run(ctx, config, o)
	case "inspect":
		if err := parse(flags, args[1:]); err != nil {
			return err
		}
		return agent.Control(ctx, o.ControlSocket(), http.MethodGet, "/inspect", nil, os.Stdout)
	case "log":
		tenant := flags.String("tenant", "", "whose proxy")
		generation := flags.String("generation", "", "0 or 1 (default the one that serves)")
		if err := parse(flags, args[1:]); err != nil {
			return err
		}
		return agent.Control(ctx, o.ControlSocket(), http.MethodGet, "/log",
			url.Values{"tenant": {*tenant}, "generation": {*generation}}, os.Stdout)
	case "events":
		tenant := flags.String("tenant", "", "whose alone")
		duration := flags.Duration("duration", 0, "for how long; 0 is until interrupted")
		if err := parse(flags, args[1:]); err != nil {
			return err
		}
		watch := ctx
		if *duration > 0 {
			var cancel context.CancelFunc
			watch, cancel = context.WithTimeout(ctx, *duration)
			defer cancel()
		}
		err := agent.Control(watch, o.ControlSocket(), http.MethodGet, "/events", url.Values{"tenant": {*tenant}}, os.Stdout)
		if watch.Err() != nil {
			return nil // that is how it ends
		}
		return err
	case "debug":
		return lookInto(ctx, flags, &o, args[1:])
	case "kill":
		name := flags.String("signal", "TERM", "name of the signal, without SIG")
		if err := parse(flags, args[1:]); err != nil {
			return err
		}
		return agent.Control(ctx, o.ControlSocket(), http.MethodPost, "/kill",
			url.Values{"pid": {flags.Arg(0)}, "signal": {*name}}, os.Stdout)
	}
	return fmt.Errorf("unknown command %q; %s", args[0], usage)
}

// parse reads flags, and leaves it to main to tell what is wrong with them. That somebody
// asks for them ends with flag.ErrHelp, when they are written.
func parse(flags *flag.FlagSet, args []string) error {
	var help bytes.Buffer
	flags.SetOutput(&help)
	err := flags.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		os.Stdout.Write(help.Bytes())
		return err
	}
	if err != nil {
		return fmt.Errorf("%w; see %s --help", err, flags.Name())
	}
	return nil
}

// lookInto asks a proxy for its configuration, statistics, heap profile or log
// level, and sets the last if there is one to set.
func lookInto(ctx context.Context, flags *flag.FlagSet, o *agent.Options, args []string) error {
	tenant := flags.String("tenant", "", "whose proxy")
	generation := flags.String("generation", "", "0 or 1 (default the one that serves)")
	filter := flags.String("filter", "", "of stats a regular expression for names, of config a part such as dynamic_listeners")
	logger := flags.String("logger", "", "of loglevel: which to set; all without it")
	level := flags.String("level", "", "of loglevel: what to set it to")
	what := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		what, args = args[0], args[1:]
	}
	if err := parse(flags, args); err != nil {
		return err
	}
	if what == "" {
		return fmt.Errorf("debug what? One of %s", strings.Join(debug.What, ", "))
	}
	if *tenant == "" {
		return fmt.Errorf("debug %s: name the tenant with --tenant", what)
	}
	values := url.Values{"generation": {*generation}, "filter": {*filter}}
	method := http.MethodGet
	if *logger != "" || *level != "" {
		method = http.MethodPut
		values.Set("logger", *logger)
		values.Set("level", *level)
	}
	return agent.Control(ctx, o.ControlSocket(), method, "/tenants/"+url.PathEscape(*tenant)+"/"+url.PathEscape(what), values, os.Stdout)
}
