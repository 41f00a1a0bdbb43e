package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/capture"
)

// Inspection is what an agent reads back from its node's kernel: the output of
// its inspect command.
type Inspection struct {
	Node           string            `json:"node"`
	HostNamespaces map[string]string `json:"hostNamespaces"`
	Tenants        []Proxy           `json:"tenants"`
}

// Proxy is one tenant's proxy on one node.
type Proxy struct {
	Tenant string `json:"name"`
	Ready  bool   `json:"ready"`
	// Weight is the percentage of new connections that the canary takes.
	Weight int    `json:"weight"`
	Limits Limits `json:"limits"`
	// Steered counts new connections by the generation that got them.
	Steered     [2]uint64         `json:"steered"`
	Generations []Generation      `json:"generations"`
	Pods        []SteeredPod      `json:"pods"`
	Drops       map[string]uint64 `json:"drops"`

	// Node and HostNamespaces are the inspection's.
	Node           string            `json:"-"`
	HostNamespaces map[string]string `json:"-"`
}

// Limits of a proxy that the kernel enforces; 0 is none.
type Limits struct {
	CPUWeight  int64 `json:"cpuWeight"`
	CPUMillis  int64 `json:"cpuMillis"`
	MemoryHigh int64 `json:"memoryHigh"`
	MemoryMax  int64 `json:"memoryMax"`
	Pids       int64 `json:"pids"`
	// Connections at a time, and new ones in a second.
	Connections    int64 `json:"connections"`
	NewConnections int64 `json:"newConnections"`
	NewDirect      int64 `json:"newDirect"`
	// Egress and Ingress are in bytes per second.
	Egress  int64 `json:"egress"`
	Ingress int64 `json:"ingress"`
	// Concurrency is how many threads of a process serve connections.
	Concurrency int64 `json:"concurrency"`
}

// Generation is one Envoy process.
type Generation struct {
	Generation   int               `json:"generation"`
	Version      string            `json:"version"`
	PID          int               `json:"pid"`
	UID          int               `json:"uid"`
	Cgroup       string            `json:"cgroup"`
	Ready        bool              `json:"ready"`
	Role         string            `json:"role"`
	Serving      bool              `json:"serving"`
	Restarts     int               `json:"restarts"`
	LastExit     string            `json:"lastExit"`
	Namespaces   map[string]string `json:"namespaces"`
	Capabilities map[string]string `json:"capabilities"`
	NoNewPrivs   bool              `json:"noNewPrivs"`
	Seccomp      int               `json:"seccomp"`
}

// SteeredPod is a pod whose TCP goes to a proxy.
type SteeredPod struct {
	UID       string   `json:"uid"`
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	IPs       []string `json:"ips"`
	Ifindex   int      `json:"ifindex"`
}

// AgentExec runs the agent's command line in a node's agent pod.
func (c *Cluster) AgentExec(ctx context.Context, node string, args ...string) (string, error) {
	agents, err := c.Agents(ctx)
	if err != nil {
		return "", err
	}
	agent, ok := agents[node]
	if !ok {
		return "", fmt.Errorf("no agent is ready on %s", node)
	}
	return c.Exec(ctx, SystemNamespace, agent.Name, append([]string{"/bulkhead/agent"}, args...)...)
}

// Inspect asks a node's agent what runs there.
func (c *Cluster) Inspect(ctx context.Context, node string) (Inspection, error) {
	out, err := c.AgentExec(ctx, node, "inspect")
	if err != nil {
		return Inspection{}, err
	}
	var i Inspection
	return i, decode(out, &i)
}

// Proxy asks a node's agent about one tenant's proxy.
func (c *Cluster) Proxy(ctx context.Context, node, tenant string) (Proxy, error) {
	i, err := c.Inspect(ctx, node)
	if err != nil {
		return Proxy{}, err
	}
	for _, p := range i.Tenants {
		if p.Tenant == tenant {
			p.Node, p.HostNamespaces = node, i.HostNamespaces
			return p, nil
		}
	}
	return Proxy{}, fmt.Errorf("%s has no proxy on %s", tenant, node)
}

// Access is a line of a proxy's access log about a connection it took for one of
// its pods.
type Access struct {
	// Kind is inbound (HBONE), plain (from outside of the mesh) or outbound (a
	// failed connection of a pod).
	Kind string `json:"bulkhead"`
	// Time is when it began.
	Time time.Time `json:"time"`
	// Peer and Own are the SPIFFE IDs of the client's and the server's side.
	Peer string `json:"peer"`
	Own  string `json:"own"`
	// Source is the client's address, Destination the pod's, both with port.
	Source      string `json:"source"`
	Destination string `json:"destination"`
	Authority   string `json:"authority"`
	Code        int    `json:"code"`
}

// AccessLog reads a proxy's access log.
func (c *Cluster) AccessLog(ctx context.Context, node, tenant string) ([]Access, error) {
	out, err := c.AgentExec(ctx, node, "log", "--tenant", tenant)
	if err != nil {
		return nil, err
	}
	var entries []Access
	for line := range strings.Lines(out) {
		var a Access
		if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &a) == nil && a.Kind != "" {
			entries = append(entries, a)
		}
	}
	return entries, nil
}

// Capture counts the TCP packets that pass the interface with this address of a
// node while work runs. It uses a pod in the node's network namespace, removed
// afterwards.
func (c *Cluster) Capture(ctx context.Context, node, address, marker string, limit time.Duration, work func(context.Context) error) (capture.Report, error) {
	p, err := c.OnNode(ctx, node)
	if err != nil {
		return capture.Report{}, err
	}
	report, err := c.capture(ctx, p.name, address, marker, limit, work)
	if err := errors.Join(err, p.Remove()); err != nil {
		return report, fmt.Errorf("capture on %s: %w", node, err)
	}
	return report, nil
}

func (c *Cluster) capture(ctx context.Context, pod, address, marker string, limit time.Duration, work func(context.Context) error) (capture.Report, error) {
	type outcome struct {
		lines []string
		err   error
	}
	capturing, captured := make(chan struct{}), make(chan outcome, 1)
	stdin, end := io.Pipe()
	defer end.Close()
	go func() {
		lines, err := c.execLines(ctx, stdin, nodeNamespace, pod, func() { close(capturing) },
			"echo", "capture", "--address", address, "--marker", marker, "--duration", limit.String())
		captured <- outcome{lines, err}
	}()
	select {
	case <-capturing:
	case <-ctx.Done():
		return capture.Report{}, ctx.Err()
	}
	workErr := work(ctx)
	_, endErr := io.WriteString(end, "\n")
	o := <-captured
	if err := errors.Join(workErr, endErr, o.err); err != nil {
		return capture.Report{}, err
	}
	var report capture.Report
	return report, decode(o.lines[len(o.lines)-1], &report)
}
