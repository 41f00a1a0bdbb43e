package harness

import (
	"context"
	"fmt"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
)

// EchoImage is the test application's image; hack/images makes it.
const EchoImage = "ghcr.io/bulkhead-mesh/echo:dev"

// Echo is one test application on every worker node: a DaemonSet whose pods both
// serve and, by commands run in them, call. Its Service and ServiceAccount have
// its name.
type Echo struct {
	Namespace string
	Name      string
}

// EchoNamespace is a manifest of a namespace with labels "KEY: VALUE".
func EchoNamespace(name string, labels ...string) string {
	m := fmt.Sprintf("---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: %s\n", name)
	if len(labels) > 0 {
		m += "  labels:\n    " + strings.Join(labels, "\n    ") + "\n"
	}
	return m
}

// Manifest of the application.
func (e Echo) Manifest() string {
	return strings.NewReplacer("{{namespace}}", e.Namespace, "{{name}}", e.Name, "IMAGE", EchoImage,
		"HTTP", fmt.Sprint(app.HTTPPort), "GRPC", fmt.Sprint(app.GRPCPort), "GREET", fmt.Sprint(app.GreetPort), "BULK", fmt.Sprint(app.BulkPort)).Replace(`---
apiVersion: v1
kind: ServiceAccount
metadata: {name: {{name}}, namespace: {{namespace}}}
---
apiVersion: v1
kind: Service
metadata: {name: {{name}}, namespace: {{namespace}}}
spec:
  selector: {app: {{name}}}
  ipFamilyPolicy: PreferDualStack
  ports:
  - {name: http, port: HTTP}
  - {name: grpc, port: GRPC, appProtocol: kubernetes.io/h2c}
  - {name: greet, port: GREET}
  - {name: bulk, port: BULK}
---
apiVersion: v1
kind: Service
metadata: {name: {{name}}-headless, namespace: {{namespace}}}
spec:
  clusterIP: None
  selector: {app: {{name}}}
  ipFamilyPolicy: PreferDualStack
  ports:
  - {name: http, port: HTTP}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: {{name}}, namespace: {{namespace}}}
spec:
  selector: {matchLabels: {app: {{name}}}}
  template:
    metadata: {labels: {app: {{name}}}}
    spec:
      serviceAccountName: {{name}}
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: IMAGE
        imagePullPolicy: IfNotPresent
        args: [serve]
        env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        readinessProbe: {tcpSocket: {port: HTTP}, periodSeconds: 2}
        resources: {requests: {cpu: 5m, memory: 16Mi}}
`)
}

// Pod is a running pod of an Echo.
type Pod struct {
	corev1.Pod
	Echo Echo
	// IPv4 and IPv6 are the pod's addresses, "" where it has none of that family.
	IPv4, IPv6 string
}

// Identity is the SPIFFE ID that the pod has in a mesh of this trust domain.
func (p Pod) Identity(trustDomain string) string {
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain, p.Echo.Namespace, p.Echo.Name)
}

// String is the pod's application and node, for people.
func (p Pod) String() string {
	return fmt.Sprintf("%s/%s@%s", p.Echo.Namespace, p.Echo.Name, p.Spec.NodeName)
}

// EchoPods waits until the application's DaemonSet is complete and returns its
// pods by node name.
func (c *Cluster) EchoPods(ctx context.Context, e Echo, timeout time.Duration) (map[string]Pod, error) {
	pods := map[string]Pod{}
	err := Wait(ctx, timeout, 500*time.Millisecond, fmt.Sprintf("pods of %s/%s", e.Namespace, e.Name), func(ctx context.Context) error {
		var set appsv1.DaemonSet
		if err := c.Client.Get(ctx, client.ObjectKey{Namespace: e.Namespace, Name: e.Name}, &set); err != nil {
			return err
		}
		s := set.Status
		if s.ObservedGeneration != set.Generation || s.DesiredNumberScheduled == 0 || s.NumberAvailable != s.DesiredNumberScheduled || s.UpdatedNumberScheduled != s.DesiredNumberScheduled {
			return fmt.Errorf("%d of %d pods are available", s.NumberAvailable, s.DesiredNumberScheduled)
		}
		list, err := c.Pods(ctx, e.Namespace, "app="+e.Name)
		if err != nil {
			return err
		}
		if len(list) != int(s.DesiredNumberScheduled) {
			return fmt.Errorf("%d of %d pods are ready", len(list), s.DesiredNumberScheduled)
		}
		clear(pods)
		for _, p := range list {
			pod := Pod{Pod: p, Echo: e}
			for _, ip := range p.Status.PodIPs {
				if strings.Contains(ip.IP, ":") {
					pod.IPv6 = ip.IP
				} else {
					pod.IPv4 = ip.IP
				}
			}
			pods[p.Spec.NodeName] = pod
		}
		return nil
	})
	return pods, err
}

// Call runs a client command of the test application in a pod: get, grpc, tcp or
// bulk with its arguments. The error of a call that was made and failed is nil;
// the result tells.
func (c *Cluster) Call(ctx context.Context, from Pod, args ...string) (app.CallResult, error) {
	var r app.CallResult
	err := c.ExecJSON(ctx, &r, from.Namespace, from.Name, append([]string{"echo"}, args...)...)
	if r.Address != "" {
		return r, nil
	}
	return r, err
}

// Load runs a load or hold command of the test application in a pod until it
// ends, and returns its result. started is closed when its connections are made.
func (c *Cluster) Load(ctx context.Context, from Pod, started chan<- struct{}, args ...string) (app.RunResult, error) {
	var r app.RunResult
	lines, err := c.execLines(ctx, nil, from.Namespace, from.Name, func() { close(started) }, append([]string{"echo"}, args...)...)
	for _, line := range lines {
		if strings.Contains(line, `"event":"result"`) {
			return r, decode(line, &r)
		}
	}
	if err == nil {
		err = fmt.Errorf("no result from %v in %s", args, from)
	}
	return r, err
}

// SelfAddress is the client that an application sees when its own pod's
// connection to a service comes back to it, for an address of the pod.
func SelfAddress(ip string) string {
	if strings.Contains(ip, ":") {
		return "fd69:8::2"
	}
	return "169.254.96.2"
}
