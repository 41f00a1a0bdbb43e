// Command cluster runs real Kubernetes on this machine without Docker: a control
// plane and worker nodes, each in namespaces and cgroups of its own.
//
//	go run ./hack/cluster up [--nodes N]     start it, or do nothing if it runs
//	go run ./hack/cluster down               end it and remove all of it
//	go run ./hack/cluster status             what runs and where its logs are
//	go run ./hack/cluster load ARCHIVE…      load image archives into all nodes
//	go run ./hack/cluster kubectl ARG…       the cluster's own kubectl
//	eval "$(go run ./hack/cluster env)"      KUBECONFIG and PATH, with the cluster's kubectl
//	go run ./hack/cluster exec NODE -- CMD   run a command on a node
//
// --name NAME before the command chooses another cluster than "local"; several
// can run side by side.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/cluster/machine"
	"github.com/bulkhead-mesh/bulkhead/hack/cluster/packages"
)

const usage = "up [--nodes N] | down | status | load ARCHIVE… | kubectl ARG… | env | exec NODE -- COMMAND"

// commands that a cluster needs, with the package of Debian and Ubuntu of each.
var commands = map[string]string{
	"runc": "runc", "nft": "nftables", "conntrack": "conntrack", "ip": "iproute2",
	"nsenter": "util-linux", "mount": "mount",
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == machine.InitArg {
		machine.Init(os.Args[2:])
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		stop()
		os.Exit(1)
	}
}

// say shows progress.
func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "cluster: "+format+"\n", args...) }

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("cluster", flag.ContinueOnError)
	flags.SetOutput(new(strings.Builder))
	name := flags.String("name", "local", "")
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("%w; usage: cluster [--name NAME] %s", err, usage)
	}
	if flags.NArg() == 0 {
		return errors.New("usage: cluster [--name NAME] " + usage)
	}
	command, args := flags.Arg(0), flags.Args()[1:]
	switch command {
	case "up", "down", "status", "load", "kubectl", "env", "exec":
	default:
		return fmt.Errorf("unknown command %q; usage: cluster [--name NAME] %s", command, usage)
	}
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Errorf("a cluster makes namespaces, mounts and cgroups: run this as root, not as user %d", uid)
	}
	switch command {
	case "up", "down":
		unlock, err := lock(ctx)
		if err != nil {
			return err
		}
		defer unlock()
	}
	if command == "up" {
		nodes := 2
		flags := flag.NewFlagSet("up", flag.ContinueOnError)
		flags.SetOutput(new(strings.Builder))
		flags.IntVar(&nodes, "nodes", nodes, "")
		if err := flags.Parse(args); err != nil {
			return fmt.Errorf("up: %w", err)
		}
		if flags.NArg() > 0 || nodes < 1 || nodes > maxNodes {
			return fmt.Errorf("usage: up [--nodes N], N from 1 to %d", maxNodes)
		}
		if err := packages.Ensure(ctx, commands, say); err != nil {
			return err
		}
		return up(ctx, *name, nodes)
	}
	c, exists, err := loadCluster(*name)
	if err != nil {
		return err
	}
	if command == "down" {
		if !exists {
			say("there is no cluster %s; start one: go run ./hack/cluster up", *name)
		}
		return c.down()
	}
	if !exists {
		return errNotUp
	}
	switch command {
	case "status":
		return status(c)
	case "kubectl":
		return execKubectl(ctx, c, args)
	case "env":
		return printEnv(ctx, c)
	case "exec":
		return execNode(c, args)
	}
	if len(args) == 0 {
		return errors.New("usage: load ARCHIVE…; go run ./hack/images writes archives to out/images")
	}
	for _, archive := range args {
		if _, err := os.Stat(archive); err != nil {
			return fmt.Errorf("load: %w; go run ./hack/images writes archives to out/images", err)
		}
	}
	bin, err := binaries(ctx)
	if err != nil {
		return err
	}
	for n := 1; n <= c.Nodes; n++ {
		if err := c.load(ctx, bin, n, args...); err != nil {
			return err
		}
	}
	return nil
}

// lock waits until no other up or down is at work.
func lock(ctx context.Context) (func(), error) {
	if err := os.MkdirAll(filepath.Dir(stateDir()), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(stateDir()+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, err
		}
		if !told {
			say("waiting for another up or down")
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}
