package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/agent/chain"
	"github.com/bulkhead-mesh/bulkhead/agent/cni"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/netfilter"
)

// Run runs the node's agent until ctx ends. What it made goes on without it,
// unless its DaemonSet is being deleted: then all of it is removed. config is how
// to reach the API server.
func Run(ctx context.Context, config *rest.Config, o Options) error {
	if o.Node == "" {
		return errors.New("the agent must know its node's name: set NODE_NAME from spec.nodeName")
	}
	a, err := newAgent(o)
	if err != nil {
		return err
	}
	scheme, err := newScheme()
	if err != nil {
		return err
	}
	if a.kube, err = client.NewWithWatch(config, client.Options{Scheme: scheme}); err != nil {
		return fmt.Errorf("reach the API server: %w", err)
	}
	a.members = &membership{file: a.o.membershipFile()}
	if err := a.members.load(); err != nil {
		a.log.Error("membership is read from the API alone", "error", err)
	}
	a.status = newStatusWriter(a.kube, a.o.Node, a.currentStatus, a.log)
	a.keeper = chain.New(chain.Options{
		ConfDir: a.o.CNIConfDir, BinDir: a.o.CNIBinDir, Binary: a.o.CNIPlugin, Log: a.log,
		Entry: chain.Entry{Socket: a.o.cniSocket(), Membership: a.o.membershipFile(), TimeoutSeconds: 60},
	})
	if err := a.open(); err != nil {
		return errors.Join(err, a.close())
	}
	a.debug = a.newDebug()
	server, err := cni.Listen(a.o.cniSocket(), a, a.log)
	if err != nil {
		return errors.Join(err, a.close())
	}
	// They outlive ctx: what they have to say may come with the word to end.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	var watches sync.WaitGroup
	watches.Go(func() { a.watchUninstall(watching) })
	defer watches.Wait()
	defer stopWatching()
	runErr := a.run(ctx,
		task{"watch objects", a.watch},
		task{"status", func(ctx context.Context) error { a.status.run(ctx); return nil }},
		task{"debugging", a.runDebug},
		// Last, so that what they ask for has somebody to do it.
		task{"CNI server", server.Serve},
		task{"CNI chain", a.keeper.Run})
	if ctx.Err() != nil && a.isUninstalled() {
		a.log.Info("the agents' DaemonSet is being deleted: removing everything from the node")
		return errors.Join(a.close(), a.removeAll())
	}
	return errors.Join(runErr, a.close())
}

// removeAll removes what the agent made on the node. The plugin goes first, so
// that no new pod waits for an agent; the programs that guard what leaves the
// tenants' namespaces go after the processes in them.
func (a *Agent) removeAll() error {
	errs := []error{a.keeper.Remove(), a.releasePods(),
		isolation.Uninstall(a.o.isolation()),
		bpf.Uninstall(a.o.PinDir), netfilter.Uninstall(), identity.Uninstall(a.o.keysDir())}
	for _, dir := range []string{a.o.RunDir, a.o.LibDir} {
		errs = append(errs, removeContents(dir), removeNodeDir(dir))
	}
	return errors.Join(errs...)
}

// releasePods lets the node's pods be reached as without a mesh.
func (a *Agent) releasePods() error {
	var errs []error
	for _, kind := range []v1alpha1.Redirection{v1alpha1.RedirectionEBPF, v1alpha1.RedirectionNetfilter} {
		there, err := a.installed(kind)
		if err == nil && there {
			err = a.releasePodsOf(kind)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (a *Agent) releasePodsOf(kind v1alpha1.Redirection) error {
	d, err := a.openDatapath(kind)
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
