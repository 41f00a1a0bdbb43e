package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/agent/chain"
	"github.com/bulkhead-mesh/bulkhead/agent/cost"
	"github.com/bulkhead-mesh/bulkhead/agent/debug"
	"github.com/bulkhead-mesh/bulkhead/agent/image"
	"github.com/bulkhead-mesh/bulkhead/agent/podnet"
	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/agent/uplink"
	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/identity/workloadapi"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// process names one run of a process: pids are used again.
type process struct {
	pid        int
	startTicks uint64
}

// Agent is a node's agent. Run runs one by what Kubernetes says, RunPlan by a file.
type Agent struct {
	o   Options
	log *slog.Logger
	// started is when this agent did: what runs may be older.
	started time.Time

	bulkheads  *isolation.Manager
	identities *identity.Store
	workloads  *workloadapi.Server
	relay      *relay.Relay
	images     *image.Store
	operator   nodev1alpha1.NodeServiceClient
	roots      *uplink.Roots
	sandboxes  *sandboxes
	costs      *cost.Meter
	tunnels    tunnelReadings
	// nodeProc is a process in the node's own namespaces.
	nodeProc string
	// With Kubernetes only.
	kube    client.WithWatch
	keeper  *chain.Keeper
	members *membership
	status  *statusWriter
	debug   *debug.Server

	woken chan struct{}

	// Of the loop alone.
	taken     map[relay.Key]process
	idleSince map[model.Tenant]time.Time
	// endingSince is when nothing kept a tenant without pods any more but what may be under
	// way in its tunnels.
	endingSince map[model.Tenant]time.Time
	// endFailed is why the last attempt to remove such a tenant failed, if it did.
	endFailed map[model.Tenant]error
	// staying tenants' proxies don't take their leave of tunnels.
	staying map[model.Tenant]bool
	// released pods have left the mesh and may have connections to finish, since
	// then.
	released map[string]time.Time
	// admissions of running pods to other tenants, by UID, and their goroutines.
	admissions map[string]*admission
	admitting  sync.WaitGroup
	// swept is when connections that have ended were last looked for.
	swept time.Time
	// hits of tenants' limits, as of hitsAt.
	hits   map[model.Tenant]tenantHits
	hitsAt time.Time
	// capacityProblem is what will be full soon, as of capacityAt.
	capacityProblem string
	capacityAt      time.Time
	// former is another way of redirecting, until its pods have the new one.
	former steering

	// planning has the identities' pods and the plan change together. It is locked before mu.
	planning sync.Mutex

	mu       sync.Mutex
	datapath steering
	// redirected is closed, and replaced, when the datapath is another one.
	redirected    chan struct{}
	nodeAddresses []netip.Addr
	plan          plan
	planKnown     bool
	planError     string
	last          round
	// refusedBefore is what an earlier agent told of, by tenant.
	refusedBefore map[string]map[resource]refusal
	// usages are what proxies took when that was read last.
	usages map[model.Tenant]isolation.Usage
	// toldCosts are those of the status.
	toldCosts map[model.Tenant]cost.Account
	// toldFigures are those of the status, of canaries and what serves beside them.
	toldFigures toldFigures
	// trusted is a digest of the roots that all proxies have acknowledged.
	trusted  string
	roundEnd chan struct{}
	// The agents' DaemonSet, or its namespace, is on its way out.
	daemonSetGone, namespaceGone bool
	// uninstallTold is closed, and replaced, when they are set.
	uninstallTold chan struct{}
}

// newAgent returns an agent that has nothing open yet.
func newAgent(o Options) (*Agent, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Agent{
		o: o, log: o.Log, started: time.Now(), roots: &uplink.Roots{}, nodeProc: "/proc/1",
		woken: make(chan struct{}, 1), roundEnd: make(chan struct{}), uninstallTold: make(chan struct{}), redirected: make(chan struct{}),
		taken: map[relay.Key]process{}, idleSince: map[model.Tenant]time.Time{}, endingSince: map[model.Tenant]time.Time{}, endFailed: map[model.Tenant]error{}, staying: map[model.Tenant]bool{}, released: map[string]time.Time{},
		admissions: map[string]*admission{},
	}, nil
}

// open opens the leaves, which adopt what an earlier agent left.
func (a *Agent) open() (err error) {
	if a.sandboxes, err = openSandboxes(a.o.sandboxDir(), a.log); err != nil {
		return err
	}
	// Without it, counting begins anew.
	if a.costs, err = cost.Open(a.o.costsFile()); err != nil {
		a.log.Error("what tenants took before isn't known", "error", err)
	}
	options := a.o.isolation()
	options.Changed = func(model.Tenant) { a.wake() }
	if a.bulkheads, err = isolation.Open(options); err != nil {
		return fmt.Errorf("open tenants: %w", err)
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
	if err := a.openWorkloadAPI(); err != nil {
		return err
	}
	if a.images, err = image.Open(image.Options{Dir: a.o.imageDir(), Versions: a.bulkheads, Access: a.registryAccess, Changed: a.wake, Log: a.log}); err != nil {
		return err
	}
	a.relay = relay.New(relay.Options{
		Operator: conn, Secrets: a.identities, LastGoodDir: a.o.lastGoodDir(), Log: a.log,
		Changed: func(model.Tenant) { a.wake() },
	})
	return nil
}

// task is a goroutine of the agent. It ends with its context.
type task struct {
	what string
	run  func(context.Context) error
}

// run runs the loop, what every agent needs for it, and others, the source of
// plans among them. It returns when all have ended, with the first error.
func (a *Agent) run(ctx context.Context, others ...task) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, t := range append([]task{
		{"control socket", a.serveControl},
		{"health", a.serveHealth},
		{"node's addresses", func(ctx context.Context) error {
			podnet.WatchNodeAddresses(ctx, a.setNodeAddresses,
				func(err error) { a.log.Error("node's addresses", "error", err) })
			return nil
		}},
		{"keys", a.identities.Run},
		{"images", a.images.Run},
		{"Workload API", a.workloads.Serve},
		{"meter", a.meter},
		{"analysis", a.analyse},
		{"hosts for tunnels", a.watchTunnels},
		{"count of connections", a.checkConnections},
		{"reconcile", func(ctx context.Context) error { a.loop(ctx); return nil }},
	}, others...) {
		wg.Go(func() {
			if err := t.run(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", t.what, err))
			}
		})
	}
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
	for _, d := range []steering{a.steering(), a.former} {
		if d.datapath != nil {
			errs = append(errs, d.Close())
		}
	}
	if a.bulkheads != nil {
		a.bulkheads.Close()
	}
	return errors.Join(errs...)
}

// linkExists reports whether the pod's veth is still there.
func (a *Agent) linkExists(r sandboxRecord) bool {
	link, err := netlink.LinkByIndex(r.Ifindex)
	return err == nil && link.Attrs().Name == r.Ifname
}
