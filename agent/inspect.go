package agent

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Inspection is what an agent reads back from its node's kernel about the tenant
// proxies: the output of `agent inspect`.
type Inspection struct {
	Node string `json:"node"`
	// Redirection that is at work, EBPF or Netfilter.
	Redirection string `json:"redirection"`
	// Problem is what of the plan can't be done, "" if nothing.
	Problem string `json:"problem,omitempty"`
	// TrustBundle is a digest of the roots that all proxies trust, and Identities says
	// how their certificates are.
	TrustBundle string `json:"trustBundle,omitempty"`
	Identities  string `json:"identities"`
	// HostNamespaces are the node's own, to compare with.
	HostNamespaces map[string]string `json:"hostNamespaces"`
	Tenants        []InspectedTenant `json:"tenants"`
}

// InspectedTenant is one tenant on the node.
type InspectedTenant struct {
	Name   string          `json:"name"`
	Ready  bool            `json:"ready"`
	Reason string          `json:"reason,omitempty"`
	Weight int             `json:"weight"`
	Limits InspectedLimits `json:"limits"`
	// Connections that its proxy holds now, where they can be counted.
	Connections int64 `json:"connections,omitempty"`
	// Steered counts new connections by generation.
	Steered     [2]uint64             `json:"steered"`
	Generations []InspectedGeneration `json:"generations"`
	Pods        []InspectedPod        `json:"pods"`
	// Excluded and Bypassed count new connections that passed in the clear.
	Excluded uint64 `json:"excluded,omitempty"`
	Bypassed uint64 `json:"bypassed,omitempty"`
	// Drops counts packets that steering refused, by reason.
	Drops map[string]uint64 `json:"drops,omitempty"`
	// EventsLost counts connection events that nobody was told of: beyond a pace, or for
	// want of room, which with EBPF is also where nobody watches.
	EventsLost uint64 `json:"eventsLost,omitempty"`
	// Cost is what the tenant has taken of the node; Shares of it are the namespaces'
	// that use a shared proxy.
	Cost   *v1alpha1.NodeCost        `json:"cost,omitempty"`
	Shares []v1alpha1.NamespaceShare `json:"shares,omitempty"`
}

// InspectedLimits are what the kernel enforces; 0 is none.
type InspectedLimits struct {
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

// InspectedGeneration is one Envoy process, as /proc shows it.
type InspectedGeneration struct {
	Generation int    `json:"generation"`
	Version    string `json:"version"`
	PID        int    `json:"pid"`
	UID        int    `json:"uid"`
	Cgroup     string `json:"cgroup"`
	Ready      bool   `json:"ready"`
	// Role is what it is for, and Serving says whether new connections are led to it.
	Role     string `json:"role"`
	Serving  bool   `json:"serving"`
	Restarts int    `json:"restarts"`
	LastExit string `json:"lastExit,omitempty"`
	// DrainUntil is when it ends at the latest; nil while it is wanted.
	DrainUntil *time.Time `json:"drainUntil,omitempty"`
	// Figures are how it fares beside the other, of a canary with a share of connections
	// and of what serves beside it, as the status says it.
	Figures      *v1alpha1.GenerationFigures `json:"figures,omitempty"`
	Namespaces   map[string]string           `json:"namespaces"`
	Capabilities map[string]string           `json:"capabilities"`
	NoNewPrivs   bool                        `json:"noNewPrivs"`
	Seccomp      int                         `json:"seccomp"`
}

// InspectedPod is a steered pod.
type InspectedPod struct {
	UID       string   `json:"uid"`
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	IPs       []string `json:"ips"`
	Ifindex   int      `json:"ifindex"`
	// Excluded connections pass in the clear, for example "outbound 10.0.0.0/8:443".
	Excluded []string `json:"excluded,omitempty"`
	// Strict pods take no plain text.
	Strict bool `json:"strict,omitempty"`
	// Bypass is the emergency bypass.
	Bypass bool `json:"bypass,omitempty"`
	// Connections counts new ones by the listener that got them, and under direct those
	// in the clear that are written down: excluded, bypassed, or of a pod that leaves.
	Connections map[string]uint64 `json:"connections,omitempty"`
	// BytesSent by the pod, and received, are of TCP, with its headers.
	BytesSent     uint64 `json:"bytesSent"`
	BytesReceived uint64 `json:"bytesReceived"`
	// Drops counts packets that steering refused at its veth, by reason.
	Drops map[string]uint64 `json:"drops,omitempty"`
}

// namespaces that a proxy has of its own.
var namespaceKinds = []string{"net", "mnt", "pid", "ipc", "uts", "cgroup"}

// inspect reads everything anew.
func (a *Agent) inspect() (Inspection, error) {
	a.readCosts()
	o := a.observe()
	i := Inspection{Node: a.o.Node, Problem: cmp.Or(o.planError, o.round.redirectionProblem, o.round.capacityProblem), Tenants: []InspectedTenant{},
		TrustBundle: o.trustBundle, Identities: identityCondition(o.identities).Message}
	var err error
	if i.HostNamespaces, err = namespacesOf(a.nodeProc); err != nil {
		return i, err
	}
	now := a.steering()
	i.Redirection = string(now.kind)
	var counters map[uint16]steer.Counters
	var perPod map[string]steer.PodCounters
	if now.datapath != nil {
		if counters, err = now.Counters(); err != nil {
			return i, fmt.Errorf("read counters: %w", err)
		}
		if perPod, err = now.PodCounters(); err != nil {
			return i, fmt.Errorf("read pods' counters: %w", err)
		}
	}
	status := makeStatus(o)
	for n, tp := range o.round.plan.tenants {
		state := o.states[tp.tenant]
		t := InspectedTenant{Name: tp.tenant.String(), Ready: status.Tenants[n].Ready, Reason: status.Tenants[n].Reason,
			Weight: o.round.weights[tp.tenant], Limits: InspectedLimits(status.Tenants[n].Limits),
			Generations: []InspectedGeneration{}, Pods: []InspectedPod{}}
		t.read(state, counters)
		for g, p := range state.Processes {
			t.Generations[g].Role, t.Generations[g].Serving = string(o.round.placed[tp.tenant].role(p)), o.takes(tp.tenant, p)
			t.Generations[g].Figures = o.figures[process{p.PID, p.StartTicks}]
		}
		if now.datapath != nil {
			if t.Connections, err = now.Connections(state.Index); err != nil && !errors.Is(err, steer.ErrUnknownTenant) {
				return i, err
			}
		}
		if account, ok := a.costs.Account(tp.tenant); ok {
			t.Cost, t.Shares = costOf(account)
		}
		for _, p := range o.round.plan.pods {
			s, ok := o.steered(p)
			if !ok || p.Tenant != tp.tenant {
				continue
			}
			pod := InspectedPod{UID: p.UID, Namespace: p.Namespace, Name: p.Name, Ifindex: s.Ifindex, Strict: s.Strict, Bypass: s.Bypass}
			for _, e := range s.Exclusions {
				pod.Excluded = append(pod.Excluded, e.String())
			}
			for _, ip := range s.IPs {
				pod.IPs = append(pod.IPs, ip.String())
			}
			counted := perPod[p.UID]
			pod.Connections, pod.Drops = podConnections(counted), counted.Dropped.ByReason()
			pod.BytesSent, pod.BytesReceived = counted.BytesSent, counted.BytesReceived
			t.Pods = append(t.Pods, pod)
		}
		i.Tenants = append(i.Tenants, t)
	}
	for _, name := range a.bulkheads.Tenants() {
		state, ok := a.bulkheads.State(name)
		if o.round.plan.has(name) || !ok {
			continue
		}
		t := InspectedTenant{Name: name.String(), Reason: cmp.Or(o.round.leaving[name], "it has no pods here any more and ends soon"),
			Limits: InspectedLimits(enforcedLimits(state.Limits, state.Bandwidth, steer.ConnectionLimits{})), Generations: []InspectedGeneration{}, Pods: []InspectedPod{}}
		t.read(state, counters)
		i.Tenants = append(i.Tenants, t)
	}
	return i, nil
}

// read adds what runs and what was counted.
func (t *InspectedTenant) read(state isolation.State, counters map[uint16]steer.Counters) {
	if c, ok := counters[state.Index]; ok {
		t.Steered, t.Drops, t.Excluded, t.Bypassed, t.EventsLost = c.Steered, drops(c), c.Excluded, c.Bypassed, c.EventsLost
	}
	for _, p := range state.Processes {
		t.Generations = append(t.Generations, inspectProcess(p))
	}
}

// drops names the counters that aren't zero.
func drops(c steer.Counters) map[string]uint64 {
	m := c.Dropped.ByReason()
	if c.Refused > 0 {
		m["refused"] = c.Refused
	}
	if c.Cut > 0 {
		m["cut"] = c.Cut
	}
	return m
}

// podConnections names the counters that aren't zero.
func podConnections(c steer.PodCounters) map[string]uint64 {
	m := c.ByListener()
	if c.Direct > 0 {
		m["direct"] = c.Direct
	}
	return m
}

// inspectProcess reads a process from /proc; of one that has just ended only
// what the manager knows is told.
func inspectProcess(p isolation.Process) InspectedGeneration {
	g := InspectedGeneration{Generation: p.Generation, Version: p.Version, PID: p.PID, UID: -1,
		Ready: p.Live, Restarts: p.Restarts, LastExit: p.LastExit, Capabilities: map[string]string{}}
	if !p.DrainUntil.IsZero() {
		g.DrainUntil = &p.DrainUntil
	}
	if p.PID == 0 {
		return g
	}
	dir := filepath.Join("/proc", strconv.Itoa(p.PID))
	g.Namespaces, _ = namespacesOf(dir)
	if f, err := os.Open(filepath.Join(dir, "status")); err == nil {
		for lines := bufio.NewScanner(f); lines.Scan(); {
			name, value, _ := strings.Cut(lines.Text(), ":")
			fields := strings.Fields(value)
			if len(fields) == 0 {
				continue
			}
			switch name {
			case "Uid":
				g.UID, _ = strconv.Atoi(fields[0])
			case "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb":
				g.Capabilities[name] = fields[0]
			case "NoNewPrivs":
				g.NoNewPrivs = fields[0] == "1"
			case "Seccomp":
				g.Seccomp, _ = strconv.Atoi(fields[0])
			}
		}
		f.Close()
	}
	g.Cgroup = cgroupOf(dir)
	return g
}

// cgroupOf is the process's cgroup that bounds its memory: in version 1 that of
// the memory controller, else the one of version 2.
func cgroupOf(dir string) string {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	if err != nil {
		return ""
	}
	unified := ""
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		if strings.Contains(","+f[1]+",", ",memory,") {
			return f[2]
		}
		if f[1] == "" {
			unified = f[2]
		}
	}
	return unified
}

func namespacesOf(dir string) (map[string]string, error) {
	m := map[string]string{}
	for _, kind := range namespaceKinds {
		target, err := os.Readlink(filepath.Join(dir, "ns", kind))
		if err != nil {
			return m, fmt.Errorf("read namespaces: %w", err)
		}
		m[kind] = target
	}
	return m, nil
}
