package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/agent/chain"
	"github.com/bulkhead-mesh/bulkhead/agent/cni"
	"github.com/bulkhead-mesh/bulkhead/agent/podnet"
	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/agent/uplink"
	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// process names one run of a process: pids are used again.
type process struct {
	pid        int
	startTicks uint64
}

// Agent is a node's agent. New makes one, Run runs it.
type Agent struct {
	o    Options
	log  *slog.Logger
	kube client.WithWatch

	bulkheads  *isolation.Manager
	datapath   *bpf.Datapath
	identities *identity.Store
	relay      *relay.Relay
	operator   nodev1alpha1.NodeServiceClient
	roots      *uplink.Roots
	keeper     *chain.Keeper
	sandboxes  *sandboxes
	members    *membership
	status     *statusWriter

	woken chan struct{}

	// Of the loop alone.
	taken     map[relay.Key]process
	draining  map[relay.Key]time.Time
	idleSince map[model.Tenant]time.Time

	mu        sync.Mutex
	plan      plan
	planKnown bool
	planError string
	last      round
	roundEnd  chan struct{}
	// The agents' DaemonSet, or its namespace, is on its way out.
	daemonSetGone, namespaceGone bool
}

// Run runs the node's agent until ctx ends. What it made goes on without it,
// unless its DaemonSet is being deleted: then all of it is removed. config is how
// to reach the API server.
func Run(ctx context.Context, config *rest.Config, o Options) error {
	o, err := o.withDefaults()
	if err != nil {
		return err
	}
	if err := bpf.Probe(); err != nil {
		return fmt.Errorf("this node's kernel can't steer: %w", err)
	}
	scheme, err := newScheme()
	if err != nil {
		return err
	}
	kube, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("reach the API server: %w", err)
	}
	a := &Agent{
		o: o, log: o.Log, kube: kube, roots: &uplink.Roots{},
		members: &membership{file: o.membershipFile()},
		woken:   make(chan struct{}, 1), roundEnd: make(chan struct{}),
		taken: map[relay.Key]process{}, draining: map[relay.Key]time.Time{}, idleSince: map[model.Tenant]time.Time{},
	}
	if err := a.members.load(); err != nil {
		a.log.Error("membership is read from the API alone", "error", err)
	}
	if err := a.open(); err != nil {
		return errors.Join(err, a.close())
	}
	runErr := a.run(ctx)
	if ctx.Err() != nil && a.isUninstalled() {
		a.log.Info("the agents' DaemonSet is being deleted: removing everything from the node")
		return errors.Join(a.close(), a.removeAll())
	}
	return errors.Join(runErr, a.close())
}

// open opens the leaves, which adopt what an earlier agent left.
func (a *Agent) open() (err error) {
	if a.sandboxes, err = openSandboxes(a.o.sandboxDir(), a.log); err != nil {
		return err
	}
	if a.bulkheads, err = isolation.Open(isolation.Options{
		RunDir: a.o.RunDir, LibDir: a.o.LibDir, EnvoyDir: a.o.EnvoyDir, Log: a.log,
		Changed: func(model.Tenant) { a.wake() },
	}); err != nil {
		return fmt.Errorf("open tenants: %w", err)
	}
	if err := bpf.Mount(filepath.Dir(a.o.PinDir)); err != nil {
		return err
	}
	if a.datapath, err = bpf.Open(bpf.Options{PinDir: a.o.PinDir, Log: a.log}); err != nil {
		return fmt.Errorf("open steering: %w", err)
	}
	host, _, err := net.SplitHostPort(a.o.Operator)
	if err != nil {
		return fmt.Errorf("operator's address %q: %w", a.o.Operator, err)
	}
	conn, err := uplink.Dial(uplink.Options{Address: a.o.Operator, ServerName: host, TokenFile: a.o.TokenFile}, a.roots)
	if err != nil {
		return err
	}
	a.operator = nodev1alpha1.NewNodeServiceClient(conn)
	if a.identities, err = identity.OpenStore(identity.StoreOptions{Dir: a.o.keysDir(), Signer: signer{a.operator}, Log: a.log}); err != nil {
		return fmt.Errorf("open keys: %w", err)
	}
	a.relay = relay.New(relay.Options{
		Operator: conn, Secrets: a.identities, LastGoodDir: a.o.lastGoodDir(), Log: a.log,
		Changed: func(model.Tenant) { a.wake() },
	})
	a.keeper = chain.New(chain.Options{
		ConfDir: a.o.CNIConfDir, BinDir: a.o.CNIBinDir, Binary: a.o.CNIPlugin, Log: a.log,
		Entry: chain.Entry{Socket: a.o.cniSocket(), Membership: a.o.membershipFile(), TimeoutSeconds: 60},
	})
	a.status = newStatusWriter(a.kube, a.o.Node, a.log)
	return nil
}

// run runs all of the agent's goroutines and returns when they have ended.
func (a *Agent) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	server, err := cni.Listen(a.o.cniSocket(), a, a.log)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	start := func(what string, f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", what, err))
			}
		})
	}
	start("control socket", a.serveControl)
	start("health", a.serveHealth)
	start("watch objects", a.watch)
	start("node's addresses", func(ctx context.Context) error {
		podnet.WatchNodeAddresses(ctx, func(addrs []netip.Addr) error { return a.datapath.SetNodeAddresses(addrs) },
			func(err error) { a.log.Error("node's addresses", "error", err) })
		return nil
	})
	start("keys", a.identities.Run)
	start("reconcile", func(ctx context.Context) error { a.loop(ctx); return nil })
	start("status", func(ctx context.Context) error { a.status.run(ctx); return nil })
	// Last, so that what they ask for has somebody to do it.
	start("CNI server", server.Serve)
	start("CNI chain", a.keeper.Run)
	wg.Wait()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// close lets go of everything and leaves it running.
func (a *Agent) close() error {
	var errs []error
	if a.relay != nil {
		a.relay.Shutdown()
	}
	if a.datapath != nil {
		errs = append(errs, a.datapath.Close())
	}
	if a.bulkheads != nil {
		a.bulkheads.Close()
	}
	return errors.Join(errs...)
}

// removeAll removes what the agent made on the node. The plugin goes first, so
// that no new pod waits for an agent; the programs that guard what leaves the
// tenants' namespaces go after the processes in them.
func (a *Agent) removeAll() error {
	errs := []error{a.keeper.Remove(), a.releasePods(),
		isolation.Uninstall(isolation.Options{RunDir: a.o.RunDir, LibDir: a.o.LibDir, EnvoyDir: a.o.EnvoyDir, Log: a.log}),
		bpf.Uninstall(a.o.PinDir), identity.Uninstall(a.o.keysDir())}
	for _, dir := range []string{a.o.RunDir, a.o.LibDir} {
		errs = append(errs, removeContents(dir), removeNodeDir(dir))
	}
	return errors.Join(errs...)
}

// releasePods lets the node's pods be reached as without a mesh.
func (a *Agent) releasePods() error {
	d, err := bpf.Open(bpf.Options{PinDir: a.o.PinDir, Log: a.log})
	if err != nil {
		return err
	}
	defer d.Close()
	uids, err := d.Pods()
	errs := []error{err}
	for _, uid := range uids {
		errs = append(errs, d.DeletePod(uid))
	}
	return errors.Join(errs...)
}

// linkExists reports whether the pod's veth is still there.
func (a *Agent) linkExists(r sandboxRecord) bool {
	link, err := netlink.LinkByIndex(r.Ifindex)
	return err == nil && link.Attrs().Name == r.Ifname
}
