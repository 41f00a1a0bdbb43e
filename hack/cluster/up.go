package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/bulkhead-mesh/bulkhead/hack/cluster/build"
	"github.com/bulkhead-mesh/bulkhead/hack/cluster/machine"
	"github.com/bulkhead-mesh/bulkhead/hack/cluster/pki"
)

//go:embed files/addons.yaml
var addons string

// kubeletClient is who the API server is to kubelets.
const kubeletClient = "kube-apiserver-kubelet-client"

// minFree is what images, logs and etcd of a cluster may come to, with room to
// spare: a disk that fills up takes other work with it.
const minFree = 5 << 30

// patience with each part of a cluster that starts: seconds on an idle machine.
const patience = 5 * time.Minute

// machineSysctls are set by kubelets for the whole machine.
var machineSysctls = []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"}

// up starts the cluster, or does nothing if it runs. If it fails, nothing is left.
func up(ctx context.Context, name string, nodes int) error {
	c, exists, err := loadCluster(name)
	if err != nil {
		return err
	}
	if exists {
		if c.Complete && c.Nodes != nodes && c.running() {
			return fmt.Errorf("cluster %s runs with %d nodes; end it first: go run ./hack/cluster down", c.Name, c.Nodes)
		}
		if c.Complete && c.running() && c.waitReady(ctx) == nil {
			say("cluster %s is up already", c.Name)
			return c.mergeKubeconfig()
		}
		say("cluster %s was left half-way: removing it", c.Name)
		if err := c.down(); err != nil {
			return err
		}
	}
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	for _, dir := range []string{stateDir(), cache} {
		if err := checkFree(dir, minFree); err != nil {
			return err
		}
	}
	bin, err := build.Ensure(ctx, cache, say)
	if err != nil {
		return err
	}
	c.Nodes, c.Complete = nodes, false
	if c.Subnet, err = freeSubnet(c); err != nil {
		return err
	}
	c.Restore = map[string]string{}
	for _, s := range machineSysctls {
		if b, err := os.ReadFile("/proc/sys/" + s); err == nil {
			c.Restore[s] = string(bytes.TrimSpace(b))
		}
	}
	if err := c.save(); err != nil {
		return err
	}
	if err := c.start(ctx, bin); err != nil {
		logs := c.keepLogs()
		return errors.Join(fmt.Errorf("%w (logs: %s)", err, logs), c.down())
	}
	c.Complete = true
	if err := c.save(); err != nil {
		return err
	}
	return errors.Join(c.mergeKubeconfig(), c.linkKubectl(bin.Path("kubectl")))
}

func (c cluster) start(ctx context.Context, bin build.Binaries) error {
	began := time.Now()
	ca, err := pki.New(c.pkiDir())
	if err != nil {
		return err
	}
	// Machines outlive this program, which `go run` removes.
	self := c.path("init")
	if err := copyFile("/proc/self/exe", self, 0o700); err != nil {
		return err
	}
	say("starting the control plane")
	spec, err := c.controlPlane(ca, bin)
	if err != nil {
		return err
	}
	controlPlane, err := machine.Start(spec, self, c.attachControlPlane)
	if err != nil {
		return err
	}
	images, err := c.ownImages(bin)
	if err != nil {
		return err
	}
	if err := c.waitAPI(ctx); err != nil {
		return err
	}
	// The API server makes the namespaces that these are in when it serves already.
	if err := wait(ctx, patience, "what goes with a cluster", func(ctx context.Context) error {
		return c.kubectl(ctx, bin, c.addonManifests(), "apply", "--server-side", "-f", "-")
	}); err != nil {
		return err
	}
	for n := 1; n <= c.Nodes; n++ {
		spec, err := c.node(n, ca, bin)
		if err != nil {
			return err
		}
		say("starting %s", spec.Name)
		if err := os.MkdirAll(spec.Dir, 0o700); err != nil {
			return err
		}
		// Before its kubelet makes one that has no pod ranges.
		if err := c.makeNode(ctx, n); err != nil {
			return err
		}
		if _, err := machine.Start(spec, self, c.attachNode(n, controlPlane.PID)); err != nil {
			return err
		}
	}
	for n := 1; n <= c.Nodes; n++ {
		if err := c.load(ctx, bin, n, images...); err != nil {
			return err
		}
	}
	if err := c.waitReady(ctx); err != nil {
		return err
	}
	say("cluster %s is up after %.0f s", c.Name, time.Since(began).Seconds())
	return nil
}

// ownImages builds the images that every cluster needs.
func (c cluster) ownImages(bin build.Binaries) ([]string, error) {
	var archives []string
	for _, i := range []struct{ tag, program string }{{pauseImage, bin.Path("pause")}, {corednsImage, bin.Path("coredns")}} {
		archive := c.path(filepath.Base(i.program) + ".tar")
		if err := writeImage(archive, i.tag, i.program); err != nil {
			return nil, err
		}
		archives = append(archives, archive)
	}
	return archives, nil
}

func (c cluster) addonManifests() string {
	return strings.NewReplacer("KUBELET_CLIENT", kubeletClient, "CLUSTER_DOMAIN", clusterDomain, "COREDNS_IMAGE", corednsImage,
		"DNS4", dnsService4.String(), "DNS6", dnsService6.String()).Replace(addons)
}

func (c cluster) client() (*kubernetes.Clientset, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig())
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

// makeNode makes the Node object with its pod ranges, as a cloud's or a
// controller's allocation would.
func (c cluster) makeNode(ctx context.Context, n int) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName(n)}}
	for _, p := range podCIDRs(n) {
		node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, p.String())
	}
	node.Spec.PodCIDR = node.Spec.PodCIDRs[0]
	return wait(ctx, time.Minute, nodeName(n), func(ctx context.Context) error {
		_, err := client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			return nil
		}
		return err
	})
}

func (c cluster) waitAPI(ctx context.Context) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	return wait(ctx, patience, "the API server", func(ctx context.Context) error {
		_, err := client.RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	})
}

// waitReady waits until all nodes and the cluster's DNS serve.
func (c cluster) waitReady(ctx context.Context) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	return wait(ctx, patience, "the nodes and DNS", func(ctx context.Context) error {
		for n := 1; n <= c.Nodes; n++ {
			node, err := client.CoreV1().Nodes().Get(ctx, nodeName(n), metav1.GetOptions{})
			if err != nil {
				return err
			}
			if !nodeReady(node) {
				return fmt.Errorf("%s isn't Ready", node.Name)
			}
		}
		dns, err := client.AppsV1().Deployments("kube-system").Get(ctx, "coredns", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if dns.Status.AvailableReplicas == 0 {
			return errors.New("CoreDNS isn't available")
		}
		return nil
	})
}

func nodeReady(node *corev1.Node) bool {
	for _, condition := range node.Status.Conditions {
		if condition.Type == corev1.NodeReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}

// wait calls f until it succeeds. The end of the timeout cuts f off as well.
func wait(ctx context.Context, timeout time.Duration, what string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var last error
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		// Of what was cut off it is the better word what it said before.
		if ctx.Err() == nil || last == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s didn't come up in %v: %w", what, timeout, last)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
