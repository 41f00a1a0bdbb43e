// Demo installs Bulkhead on the cluster of KUBECONFIG, puts three teams into a
// mesh and shows, from what it observes, that the product does what it says.
// Each statement that it prints is checked; one that is false makes it exit with
// 1. It leaves everything up, to look further.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

func main() {
	timeout := flag.Duration("timeout", 10*time.Minute, "for everything together")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "demo takes no arguments, got %q\n", flag.Args())
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	cluster, err := harness.Connect()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
	d := &demo{Cluster: cluster, started: time.Now()}
	err = d.run(ctx)
	switch {
	case err != nil:
		fmt.Printf("\nThe demo stopped: %v\n", err)
		os.Exit(1)
	case d.failed > 0:
		fmt.Printf("\n%d of %d statements are FALSE (marked ✘).\n", d.failed, d.checked)
		os.Exit(1)
	}
	fmt.Printf("\nAll %d statements hold (%s).\n", d.checked, time.Since(d.started).Round(time.Second))
}

// demo is the state of a run.
type demo struct {
	*harness.Cluster
	started time.Time
	checked int
	failed  int

	nodes  []string // with a pod of each team, sorted
	apps   map[harness.Echo]map[string]harness.Pod
	agents map[string]string // node → pod name
}

// step prints a heading.
func (d *demo) step(format string, args ...any) {
	fmt.Printf("\n[%3.0fs] %s\n", time.Since(d.started).Seconds(), fmt.Sprintf(format, args...))
}

// check prints a statement and whether it was seen to hold.
func (d *demo) check(holds bool, format string, args ...any) {
	d.checked++
	mark := "✔"
	if !holds {
		mark = "✘"
		d.failed++
	}
	fmt.Printf("   %s %s\n", mark, fmt.Sprintf(format, args...))
}

// checkErr is a check that gives the reason when it doesn't hold.
func (d *demo) checkErr(err error, format string, args ...any) {
	statement := fmt.Sprintf(format, args...)
	if err != nil {
		statement += ": " + strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	d.check(err == nil, "%s", statement)
}

func (d *demo) run(ctx context.Context) error {
	for _, part := range []func(context.Context) error{
		d.install, d.deploy, d.showProxies, d.showCalls, d.showWire, d.showCrash, d.showCanary,
	} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	fmt.Print(`
Look further:
   kubectl get mtopo,nproxy                      the mesh, and each node's plan and state
   kubectl get tproxy,isopol -A                  what a team sees of its proxies and limits
   kubectl describe tproxy -n team-a
   kubectl exec -n team-a ds/web -- echo get http://web.team-b:8080/
   kubectl exec -n bulkhead-system ds/bulkhead-agent -- /bulkhead/agent inspect
   make down                                     removes the local cluster
`)
	return nil
}

func (d *demo) install(ctx context.Context) error {
	d.step("Install Bulkhead: kubectl apply -k config/default")
	root, err := harness.RepositoryRoot()
	if err != nil {
		return err
	}
	if err := d.Install(ctx, root, 3*time.Minute); err != nil {
		return err
	}
	agents, err := d.Agents(ctx)
	if err != nil {
		return err
	}
	d.agents = map[string]string{}
	for node, pod := range agents {
		d.agents[node] = pod.Name
	}
	d.check(len(agents) >= 2, "operator and %d agents are ready", len(agents))
	if len(agents) < 2 {
		return errors.New("the demo needs two nodes")
	}
	return nil
}
