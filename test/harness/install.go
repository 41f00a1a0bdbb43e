package harness

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// SystemNamespace is where config/default installs Bulkhead.
const SystemNamespace = "bulkhead-system"

// Install applies the product's manifests as a user would and waits until
// operator and agents are ready. What an earlier run installed is started anew:
// its image has the same name and may have been another.
func (c *Cluster) Install(ctx context.Context, root string, timeout time.Duration) error {
	err := c.Client.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: "bulkhead-agent"}, &appsv1.DaemonSet{})
	installed := err == nil
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("look for an installation: %w", err)
	}
	if _, err := c.Kubectl(ctx, "", "apply", "--server-side", "--force-conflicts", "-k", root+"/config/default"); err != nil {
		return err
	}
	if installed {
		if _, err := c.Kubectl(ctx, "", "rollout", "restart", "--namespace", SystemNamespace, "deployment/bulkhead-operator", "daemonset/bulkhead-agent"); err != nil {
			return err
		}
	}
	return c.WaitInstalled(ctx, timeout)
}

// WaitInstalled waits until operator and agents are ready.
func (c *Cluster) WaitInstalled(ctx context.Context, timeout time.Duration) error {
	return Wait(ctx, timeout, 500*time.Millisecond, "operator and agents", func(ctx context.Context) error {
		var operator appsv1.Deployment
		if err := c.Client.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: "bulkhead-operator"}, &operator); err != nil {
			return err
		}
		if s := operator.Status; s.ObservedGeneration != operator.Generation || s.AvailableReplicas == 0 || s.AvailableReplicas != s.UpdatedReplicas || s.Replicas != s.UpdatedReplicas {
			return fmt.Errorf("%d of %d operator replicas are available", s.AvailableReplicas, s.Replicas)
		}
		var agents appsv1.DaemonSet
		if err := c.Client.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: "bulkhead-agent"}, &agents); err != nil {
			return err
		}
		if s := agents.Status; s.ObservedGeneration != agents.Generation || s.DesiredNumberScheduled == 0 || s.NumberAvailable != s.DesiredNumberScheduled || s.UpdatedNumberScheduled != s.DesiredNumberScheduled {
			return fmt.Errorf("%d of %d agents are available", s.NumberAvailable, s.DesiredNumberScheduled)
		}
		return nil
	})
}

// Agents are the agents' pods by node name.
func (c *Cluster) Agents(ctx context.Context) (map[string]corev1.Pod, error) {
	list, err := c.Kube.CoreV1().Pods(SystemNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=bulkhead-agent"})
	if err != nil {
		return nil, fmt.Errorf("list agents: %w", err)
	}
	agents := map[string]corev1.Pod{}
	for _, p := range list.Items {
		if p.DeletionTimestamp == nil && podReady(p) {
			agents[p.Spec.NodeName] = p
		}
	}
	return agents, nil
}

// WaitTenant waits until every proxy of a tenant is ready on the given number of
// nodes, and returns what its TenantProxy says.
func (c *Cluster) WaitTenant(ctx context.Context, namespace string, nodes int, timeout time.Duration) (v1alpha1.TenantProxy, error) {
	var tenant v1alpha1.TenantProxy
	err := Wait(ctx, timeout, 300*time.Millisecond, "the proxies of "+namespace, func(ctx context.Context) error {
		var list v1alpha1.TenantProxyList
		if err := c.Client.List(ctx, &list, client.InNamespace(namespace)); err != nil {
			return err
		}
		if len(list.Items) != 1 {
			return fmt.Errorf("%d TenantProxies, want 1", len(list.Items))
		}
		tenant = list.Items[0]
		if s := tenant.Status; int(s.Proxies) != nodes || s.ReadyProxies != s.Proxies {
			return fmt.Errorf("%d of %d proxies are ready, want %d", s.ReadyProxies, s.Proxies, nodes)
		}
		return nil
	})
	return tenant, err
}
