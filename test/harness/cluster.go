// Package harness drives a real Kubernetes cluster for the demo and the e2e
// tests: it applies manifests, runs commands in pods and waits for conditions.
// It knows the product only by its public objects.
package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/client-go/kubernetes"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Cluster is a connection to a cluster. Its methods may be called concurrently.
type Cluster struct {
	Config *rest.Config
	Kube   kubernetes.Interface
	// Client reads and writes Bulkhead's own kinds as well.
	Client client.Client
}

// Connect uses KUBECONFIG, or kubectl's default file.
func Connect() (*Cluster, error) {
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		clientcmd.NewDefaultClientConfigLoadingRules(), &clientcmd.ConfigOverrides{}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("load kubeconfig (set KUBECONFIG, or run `make up`): %w", err)
	}
	config.QPS, config.Burst = 200, 400
	config.Wrap(func(t http.RoundTripper) http.RoundTripper { return retrying{t} })
	scheme := runtime.NewScheme()
	utilruntime.Must(clientgoscheme.AddToScheme(scheme))
	utilruntime.Must(v1alpha1.AddToScheme(scheme))
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make client: %w", err)
	}
	c, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("make client: %w", err)
	}
	return &Cluster{Config: config, Kube: kube, Client: c}, nil
}

// Kubectl runs the user's kubectl and returns what it printed. An error holds
// its last lines. What an API server has no time for is tried again, but for what rollout
// changes, which isn't the same twice.
func (c *Cluster) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	for try := 1; ; try++ {
		cmd := exec.CommandContext(ctx, "kubectl", args...)
		cmd.Stdin = strings.NewReader(stdin)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		if err == nil {
			return stdout.String(), nil
		}
		if try == tries || ctx.Err() != nil || args[0] == "rollout" && args[1] != "status" || !passing(stderr.String()) {
			return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, tail(stderr.String(), 2000))
		}
		pause(ctx, try)
	}
}

// Apply applies manifests by server-side apply.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	_, err := c.Kubectl(ctx, manifests, "apply", "--server-side", "--force-conflicts", "-f", "-")
	return err
}

// ExecError is returned when a command in a pod ran and failed.
type ExecError struct {
	Pod     string
	Command []string
	Stderr  string
	Err     error
}

func (e *ExecError) Error() string {
	return fmt.Sprintf("run %s in %s: %v: %s", strings.Join(e.Command, " "), e.Pod, e.Err, tail(e.Stderr, 1000))
}

func (e *ExecError) Unwrap() error { return e.Err }

// Exec runs a command in a pod's first container and returns its standard
// output. A command that fails gives an *ExecError with its standard error.
func (c *Cluster) Exec(ctx context.Context, namespace, pod string, command ...string) (string, error) {
	var stdout bytes.Buffer
	err := c.exec(ctx, nil, &stdout, namespace, pod, command)
	return stdout.String(), err
}

// execLines runs a command and returns the lines of its standard output; first
// is called when the first of them is there.
func (c *Cluster) execLines(ctx context.Context, stdin io.Reader, namespace, pod string, first func(), command ...string) ([]string, error) {
	var stdout firstLine
	stdout.first = sync.OnceFunc(first)
	defer stdout.first() // nobody shall wait for a command that printed nothing
	err := c.exec(ctx, stdin, &stdout, namespace, pod, command)
	return strings.Split(strings.TrimSpace(stdout.buffer.String()), "\n"), err
}

// firstLine doesn't embed its buffer: io.Copy would pass Write by with its
// ReadFrom.
type firstLine struct {
	buffer bytes.Buffer
	first  func()
}

func (f *firstLine) Write(p []byte) (int, error) {
	n, err := f.buffer.Write(p)
	if bytes.IndexByte(p, '\n') >= 0 {
		f.first()
	}
	return n, err
}

func (c *Cluster) exec(ctx context.Context, stdin io.Reader, stdout io.Writer, namespace, pod string, command []string) error {
	url := c.Kube.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: command, Stdin: stdin != nil, Stdout: true, Stderr: true}, clientgoscheme.ParameterCodec).URL()
	executor, err := remotecommand.NewWebSocketExecutor(c.Config, "GET", url.String())
	if err != nil {
		return fmt.Errorf("exec in %s/%s: %w", namespace, pod, err)
	}
	var stderr bytes.Buffer
	for try := 1; ; try++ {
		if err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: stdout, Stderr: &stderr}); err == nil {
			return nil
		}
		// Of an API server or a kubelet that had no time for it. Nothing has run.
		if !httpstream.IsUpgradeFailure(err) || try == tries || ctx.Err() != nil {
			break
		}
		pause(ctx, try)
	}
	return &ExecError{Pod: namespace + "/" + pod, Command: command, Stderr: stderr.String(), Err: err}
}

// ExecJSON runs a command in a pod and decodes its standard output. It decodes
// the output of a command that failed as well, so that its report isn't lost,
// and returns that failure.
func (c *Cluster) ExecJSON(ctx context.Context, into any, namespace, pod string, command ...string) error {
	out, err := c.Exec(ctx, namespace, pod, command...)
	if decodeErr := decode(out, into); decodeErr != nil {
		return errors.Join(err, fmt.Errorf("%s in %s/%s: %w", strings.Join(command, " "), namespace, pod, decodeErr))
	}
	return err
}

func decode(out string, into any) error {
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("decode output: %w: %s", err, tail(out, 500))
	}
	return nil
}

// Pods lists running, ready pods by label, by name.
func (c *Cluster) Pods(ctx context.Context, namespace, selector string) ([]corev1.Pod, error) {
	list, err := c.Kube.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, fmt.Errorf("list pods of %s: %w", namespace, err)
	}
	var ready []corev1.Pod
	for _, p := range list.Items {
		if p.DeletionTimestamp == nil && podReady(p) {
			ready = append(ready, p)
		}
	}
	return ready, nil
}

func podReady(p corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// Wait calls check every interval until it returns nil, and returns its last
// error when ctx ends or the timeout is over.
func Wait(ctx context.Context, timeout, interval time.Duration, what string, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	var last error
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		// What the deadline cut off tells nothing.
		if last == nil || ctx.Err() == nil && !strings.Contains(err.Error(), "context deadline") {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait %s for %s: %w", timeout, what, last)
		case <-ticker.C:
		}
	}
}

// RepositoryRoot is the folder that holds go.mod, looked for upwards from the
// working directory.
func RepositoryRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	root, ok := strings.CutSuffix(strings.TrimSpace(string(out)), string(os.PathSeparator)+"go.mod")
	if err != nil || !ok {
		return "", errors.New("find the repository: run this inside of it")
	}
	return root, nil
}

func tail(s string, n int) string {
	s = strings.TrimSpace(s)
	if len(s) > n {
		s = "…" + s[len(s)-n:]
	}
	return s
}
