package agent

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

// signer has the operator sign.
type signer struct {
	operator nodev1alpha1.NodeServiceClient
}

// Sign implements identity.Signer.
func (s signer) Sign(ctx context.Context, csr []byte, pod identity.Pod) ([][]byte, error) {
	r, err := s.operator.SignCertificate(ctx, &nodev1alpha1.SignCertificateRequest{
		Csr: csr, PodUid: pod.UID, PodNamespace: pod.Namespace, PodName: pod.Name})
	return r.GetChain(), err
}

// watch follows the objects that an agent may read.
func (a *Agent) watch(ctx context.Context) error {
	var wg sync.WaitGroup
	in := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: a.o.Namespace, Name: name}
	}
	wg.Go(func() {
		watchOne(ctx, a.kube, &v1alpha1.NodeProxyList{}, &v1alpha1.NodeProxy{ObjectMeta: metav1.ObjectMeta{Name: a.o.Node}}, a.setNodeProxy)
	})
	wg.Go(func() {
		watchOne(ctx, a.kube, &corev1.ConfigMapList{}, &corev1.ConfigMap{ObjectMeta: in(membershipConfigMap)}, a.setMembership)
	})
	wg.Go(func() {
		watchOne(ctx, a.kube, &corev1.ConfigMapList{}, &corev1.ConfigMap{ObjectMeta: in(trustBundleConfigMap)}, a.setTrustBundle)
	})
	wg.Wait()
	return ctx.Err()
}

// watchUninstall follows what says whether the agent's end is for good.
func (a *Agent) watchUninstall(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() {
		watchOne(ctx, a.kube, &appsv1.DaemonSetList{}, &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: a.o.Namespace, Name: daemonSet}}, func(d *appsv1.DaemonSet, deleted bool) {
			// With its pods orphaned, it may come back.
			a.setUninstall(func() { a.daemonSetGone = deleted || d.DeletionTimestamp != nil })
		})
	})
	wg.Go(func() {
		watchOne(ctx, a.kube, &corev1.NamespaceList{}, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: a.o.Namespace}}, func(n *corev1.Namespace, deleted bool) {
			a.setUninstall(func() { a.namespaceGone = deleted || n.DeletionTimestamp != nil })
		})
	})
	wg.Wait()
}

// setNodeProxy takes a new plan. One that is deleted changes nothing: what runs
// for pods must not depend on an object that somebody removed.
func (a *Agent) setNodeProxy(np *v1alpha1.NodeProxy, deleted bool) {
	if deleted {
		a.log.Error("the node's NodeProxy was deleted: what runs goes on until there is a new one", "node", a.o.Node)
		return
	}
	a.mu.Lock()
	if a.refusedBefore == nil { // later it is what this agent says itself
		a.refusedBefore = rememberedRefusals(np.Status)
	}
	a.mu.Unlock()
	p, err := makePlan(np)
	problem := ""
	if err != nil {
		problem = err.Error()
		a.log.Error("NodeProxy has parts that make no sense", "error", err)
	}
	a.setPlan(p, problem)
}

// setPlan replaces the plan; problem names what was left out of it.
func (a *Agent) setPlan(p plan, problem string) {
	a.planning.Lock()
	defer a.planning.Unlock()
	// Their certificates don't wait for the round that is under way, which may be steering
	// many pods.
	a.identities.AddPods(p.pods)
	a.mu.Lock()
	// The agent's own status comes back as an event as well.
	same := a.planKnown && p.uid != "" && a.plan.uid == p.uid && a.plan.generation == p.generation
	a.plan, a.planKnown, a.planError = p, true, problem
	a.mu.Unlock()
	a.images.Want(p.images, p.versions())
	if !same {
		a.wake()
	}
}

func (a *Agent) setMembership(m *corev1.ConfigMap, deleted bool) {
	if deleted {
		return // as it was: members stay closed
	}
	if err := a.members.set([]byte(m.Data["membership.json"])); err != nil {
		a.log.Error("membership stays as it was", "error", err)
		return
	}
	a.wake()
}

func (a *Agent) setTrustBundle(m *corev1.ConfigMap, deleted bool) {
	if deleted {
		return
	}
	if err := a.setRoots(m.Data["trustDomain"], []byte(m.Data["ca.crt"])); err != nil {
		a.log.Error("trust bundle stays as it was", "error", fmt.Errorf("ConfigMap %s: %w", trustBundleConfigMap, err))
		return
	}
	a.setBundle(m.Data["trustDomain"], m.Data["bundle.json"])
	if a.debug != nil {
		a.debug.RootsChanged()
	}
	a.wake()
}

// setRoots says whom the agent and the workloads trust.
func (a *Agent) setRoots(trustDomain string, roots []byte) error {
	var der [][]byte
	for rest := roots; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		der = append(der, block.Bytes)
	}
	if err := a.roots.SetPEM(roots); err != nil {
		return err
	}
	return a.identities.SetBundle(trustDomain, der)
}

func (a *Agent) setUninstall(set func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	set()
	close(a.uninstallTold)
	a.uninstallTold = make(chan struct{})
}

// lastWord is how long an agent that is told to end, and has no rights any more,
// waits for what its watches have under way. It is less than its grace period.
const lastWord = 5 * time.Second

// isUninstalled reports, when the agent is told to end, whether it is for good.
func (a *Agent) isUninstalled() bool {
	told := func() (bool, <-chan struct{}) {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.daemonSetGone || a.namespaceGone, a.uninstallTold
	}
	if gone, _ := told(); gone {
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	var d appsv1.DaemonSet
	err := a.kube.Get(ctx, client.ObjectKey{Namespace: a.o.Namespace, Name: daemonSet}, &d)
	if !apierrors.IsUnauthorized(err) && !apierrors.IsForbidden(err) {
		// Any other error tells nothing: then all of it stays.
		return apierrors.IsNotFound(err) || (err == nil && d.DeletionTimestamp != nil)
	}
	// The account has gone before the agent, as when all is deleted at once. That
	// alone tells nothing, but watches that are open go on.
	for end := time.After(lastWord); ; {
		gone, changed := told()
		if gone {
			return true
		}
		select {
		case <-changed:
		case <-end:
			return false
		}
	}
}

// removeNodeDir removes an empty directory of the node; here it may be a mount.
// What others put there stays, and so does a mount point: removing one that is
// another namespace's takes the mount away with it.
func removeNodeDir(dir string) error {
	table, err := os.ReadFile("/proc/1/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == dir {
			return nil
		}
	}
	if err := os.Remove(nodePath(dir)); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// removeContents empties a directory, which may be a mount point.
func removeContents(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}
