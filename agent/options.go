package agent

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/bulkhead-mesh/bulkhead/isolation"
)

// Names of the objects that all agents read; config/default makes them.
const (
	membershipConfigMap  = "bulkhead-membership"
	trustBundleConfigMap = "bulkhead-trust-bundle"
	registrySecret       = "bulkhead-registry"
	daemonSet            = "bulkhead-agent"
)

// DebugOff is the DebugAddress that none is.
const DebugOff = "off"

// Options of an Agent. Run needs Node, all else has a default.
type Options struct {
	// Node that this is the agent of. Default of RunPlan: the host's name.
	Node string
	// Namespace of the operator, the agents and the ConfigMaps. Default
	// bulkhead-system.
	Namespace string
	// Version of this program, for the status.
	Version string
	// Operator is host:port of the operator. Default
	// bulkhead-operator.<Namespace>.svc:15012. Its certificate must be for the host.
	Operator string
	// TokenFile holds the token for the operator. Default
	// /var/run/secrets/bulkhead/token.
	TokenFile string
	// RunDir holds what ends with a reboot. Default /run/bulkhead.
	RunDir string
	// LibDir holds what stays. Default /var/lib/bulkhead.
	LibDir string
	// EnvoyDir holds a directory for each version of Envoy. Default
	// /opt/bulkhead/envoy.
	EnvoyDir string
	// PinDir is where the kernel keeps programs and maps. Default
	// /sys/fs/bpf/bulkhead.
	PinDir string
	// Mark is the one bit of packets' marks that the steering uses, on the node and
	// nowhere else, for nodes where something else has the default's. Default: all bits
	// with EBPF, which nobody else sees; netfilter.DefaultMark with Netfilter.
	Mark uint32
	// CgroupParent is the cgroup that the tenants' folder is in, with version 2 alone:
	// one that the node's systemd has delegated. Default "", the root.
	CgroupParent string
	// CgroupName is the folder of all tenants in each cgroup hierarchy; agents of
	// several nodes on one machine need one each. Default "bulkhead".
	CgroupName string
	// CNIPlugin is the plugin to install on the node. Default
	// /opt/bulkhead/bin/bulkhead-cni.
	CNIPlugin string
	// CNIConfDir and CNIBinDir of the node. Default /etc/cni/net.d and /opt/cni/bin.
	CNIConfDir, CNIBinDir string
	// PodCgroups is the cgroup of all of the kubelet's pods, such as /kubepods.
	// Default: the one that the agent itself is in.
	PodCgroups string
	// HealthAddress serves /healthz, /readyz and /metrics. Default 127.0.0.1:15021.
	HealthAddress string
	// DebugAddress is where owners look into their proxies, by Kubernetes' word on
	// who they are. Default :15022; DebugOff for nowhere, as always with RunPlan.
	DebugAddress string
	// Linger is for how long a tenant's proxy stays after its last pod has left the
	// node: a rolling restart shouldn't start it anew. Default 10 s.
	Linger time.Duration
	// Drain is for how long a generation that isn't wanted any more may finish its
	// connections; it ends as soon as it has none. Default 15 s.
	Drain time.Duration
	// MeterPeriod is how often it is read what tenants take: some milliseconds of CPU
	// a proxy. Default 30 s.
	MeterPeriod time.Duration
	// CostPeriod is how often that is told in the status, if nothing else is. Default
	// 1 min.
	CostPeriod time.Duration
	// Log; default slog.Default().
	Log *slog.Logger
}

func (o Options) withDefaults() (Options, error) {
	if o.Node == "" {
		name, err := os.Hostname()
		if err != nil {
			return o, fmt.Errorf("name the node: %w", err)
		}
		o.Node = name
	}
	for _, d := range []struct {
		field *string
		value string
	}{
		{&o.Namespace, "bulkhead-system"},
		{&o.TokenFile, "/var/run/secrets/bulkhead/token"},
		{&o.RunDir, "/run/bulkhead"},
		{&o.LibDir, "/var/lib/bulkhead"},
		{&o.EnvoyDir, "/opt/bulkhead/envoy"},
		{&o.PinDir, "/sys/fs/bpf/bulkhead"},
		{&o.CgroupName, "bulkhead"},
		{&o.CNIPlugin, "/opt/bulkhead/bin/bulkhead-cni"},
		{&o.CNIConfDir, "/etc/cni/net.d"},
		{&o.CNIBinDir, "/opt/cni/bin"},
		{&o.HealthAddress, "127.0.0.1:15021"},
		{&o.DebugAddress, ":15022"},
	} {
		if *d.field == "" {
			*d.field = d.value
		}
	}
	// Netfilter has the two lowest bits for itself.
	if o.Mark&(o.Mark-1) != 0 || o.Mark&3 != 0 {
		return o, fmt.Errorf("mark %#x: want one bit, from 0x4 to 0x80000000", o.Mark)
	}
	if o.Operator == "" {
		o.Operator = "bulkhead-operator." + o.Namespace + ".svc:15012"
	}
	if o.Linger == 0 {
		o.Linger = 10 * time.Second
	}
	if o.Drain == 0 {
		o.Drain = 15 * time.Second
	}
	if o.MeterPeriod == 0 {
		o.MeterPeriod = 30 * time.Second
	}
	if o.CostPeriod == 0 {
		o.CostPeriod = time.Minute
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return o, nil
}

func (o Options) isolation() isolation.Options {
	return isolation.Options{RunDir: o.RunDir, LibDir: o.LibDir, EnvoyDir: o.EnvoyDir, CgroupParent: o.CgroupParent, CgroupName: o.CgroupName, Log: o.Log}
}

func (o Options) membershipFile() string { return filepath.Join(o.LibDir, "cni", "membership.json") }
func (o Options) keysDir() string        { return filepath.Join(o.RunDir, "keys") }
func (o Options) costsFile() string      { return filepath.Join(o.RunDir, "costs.json") }
func (o Options) sandboxDir() string     { return filepath.Join(o.RunDir, "sandboxes") }
func (o Options) lastGoodDir() string    { return filepath.Join(o.LibDir, "lastgood") }
func (o Options) imageDir() string       { return filepath.Join(o.LibDir, "images") }
func (o Options) workloadSocket() string {
	return filepath.Join(o.RunDir, "workload-api", "socket")
}
func (o Options) cniSocket() string { return filepath.Join(o.RunDir, "cni.sock") }

// ControlSocket is where the agent answers its own command line.
func (o Options) ControlSocket() string { return filepath.Join(o.RunDir, "agent.sock") }
