package harness

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
)

// nodeNamespace is where the harness runs pods that see a whole node.
const nodeNamespace = "bulkhead-test-node"

// NodePod is a pod with the namespaces and files of a node.
type NodePod struct {
	cluster *Cluster
	name    string
}

// OnNode starts one. There is one for each node at a time; the caller removes it.
func (c *Cluster) OnNode(ctx context.Context, node string) (*NodePod, error) {
	p := &NodePod{c, "look-" + node}
	if err := c.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata:
  name: %[1]s
  labels: {pod-security.kubernetes.io/enforce: privileged}
---
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  nodeName: %[3]s
  hostNetwork: true
  hostPID: true
  terminationGracePeriodSeconds: 0
  containers:
  - name: look
    image: %[4]s
    imagePullPolicy: IfNotPresent
    args: [serve, --http=127.0.0.1:0, --grpc=, --tcp=, --bulk=]
    securityContext: {runAsUser: 0, privileged: true}
    volumeMounts: [{name: host, mountPath: /host, readOnly: true}]
  volumes: [{name: host, hostPath: {path: /}}]
`, nodeNamespace, p.name, node, EchoImage)); err != nil {
		return nil, err
	}
	err := Wait(ctx, 2*time.Minute, 200*time.Millisecond, "the pod "+p.name, func(ctx context.Context) error {
		pods, err := c.Pods(ctx, nodeNamespace, "")
		if err != nil {
			return err
		}
		for _, pod := range pods {
			if pod.Name == p.name {
				return nil
			}
		}
		return fmt.Errorf("%s isn't ready", p.name)
	})
	if err != nil {
		return nil, errors.Join(err, p.Remove())
	}
	return p, nil
}

// Remove removes the pod and waits for its end, whatever became of the context that it
// was started with.
func (p *NodePod) Remove() error {
	_, err := p.cluster.Kubectl(context.Background(), "", "delete", "pod", "-n", nodeNamespace, p.name, "--ignore-not-found", "--wait=true")
	return err
}

// Look returns what of the mesh is on the node, whether it runs or was left.
func (p *NodePod) Look(ctx context.Context) (report app.NodeReport, err error) {
	return report, p.cluster.ExecJSON(ctx, &report, nodeNamespace, p.name, "echo", "node", "--root", "/host")
}

// Kill ends all processes of the node that run a program with SIGKILL, and returns how
// many those were. The program is the path that they were started by.
func (p *NodePod) Kill(ctx context.Context, program string) (int, error) {
	var report app.KillReport
	err := p.cluster.ExecJSON(ctx, &report, nodeNamespace, p.name, "echo", "kill", program)
	return len(report.Killed), err
}

// LookAtNode returns what of the mesh is on a node, whether it runs or was left.
func (c *Cluster) LookAtNode(ctx context.Context, node string) (app.NodeReport, error) {
	p, err := c.OnNode(ctx, node)
	if err != nil {
		return app.NodeReport{}, err
	}
	report, err := p.Look(ctx)
	return report, errors.Join(err, p.Remove())
}
