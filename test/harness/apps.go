package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
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

// EchoPods waits until the application's DaemonSet is complete, and its Service's
// endpoints, and returns its pods by node name.
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
		if err := c.endpoints(ctx, e, list); err != nil {
			return err
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

// endpoints returns an error unless the endpoints of the application's Service are these
// pods: they follow the pods a moment later.
func (c *Cluster) endpoints(ctx context.Context, e Echo, pods []corev1.Pod) error {
	var all discoveryv1.EndpointSliceList
	if err := c.Client.List(ctx, &all, client.InNamespace(e.Namespace), client.MatchingLabels{discoveryv1.LabelServiceName: e.Name}); err != nil {
		return err
	}
	ready := map[string]bool{}
	for _, s := range all.Items {
		for _, ep := range s.Endpoints {
			for _, address := range ep.Addresses {
				ready[address] = ep.Conditions.Ready == nil || *ep.Conditions.Ready
			}
		}
	}
	for _, p := range pods {
		for _, ip := range p.Status.PodIPs {
			if !ready[ip.IP] {
				return fmt.Errorf("%s of %s isn't an endpoint of the Service yet", ip.IP, p.Name)
			}
			delete(ready, ip.IP)
		}
	}
	for address, is := range ready {
		if is {
			return fmt.Errorf("%s is still an endpoint of the Service", address)
		}
	}
	return nil
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
	return c.load(ctx, from, nil, started, append([]string{"echo"}, args...))
}

// LoadUntil is Load whose command ends when stop is closed: a test of what takes a
// machine's time can't know how long that will be. Ending before that, as its duration
// is over or as no connection is left, is an error; the result is returned with it.
func (c *Cluster) LoadUntil(ctx context.Context, from Pod, started chan<- struct{}, stop <-chan struct{}, args ...string) (app.RunResult, error) {
	stdin, end := io.Pipe()
	defer stdin.Close() // nobody shall write to a command that ended by itself
	go func() {
		select {
		case <-stop:
		case <-ctx.Done():
		}
		_, _ = io.WriteString(end, "\n")
		end.Close()
	}()
	r, err := c.load(ctx, from, stdin, started, append([]string{"echo", args[0], "--until-stdin"}, args[1:]...))
	select {
	case <-stop:
	default:
		err = errors.Join(err, fmt.Errorf("echo %s in %s ended before it was told to", args[0], from))
	}
	return r, err
}

func (c *Cluster) load(ctx context.Context, from Pod, stdin io.Reader, started chan<- struct{}, command []string) (app.RunResult, error) {
	var r app.RunResult
	lines, err := c.execLines(ctx, stdin, from.Namespace, from.Name, func() { close(started) }, command...)
	for _, line := range lines {
		if strings.Contains(line, `"event":"result"`) {
			return r, decode(line, &r)
		}
	}
	if err == nil {
		err = fmt.Errorf("no result from %v in %s", command, from)
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
