package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ProxyLimits bound one tenant proxy: one tenant on one node, all generations of
// it together. They take effect while it runs, but for concurrency.
//
// +kubebuilder:validation:XValidation:rule="!has(self.warmStandby) || !self.warmStandby || !has(self.memory) || !has(self.memory.max) || (isQuantity(string(self.memory.max)) && quantity(string(self.memory.max)).compareTo(quantity('96Mi')) >= 0)",message="memory.max must be at least 96Mi with warmStandby: two Envoys need that"
type ProxyLimits struct {
	// CPU of each proxy.
	// +optional
	CPU *CPUIsolation `json:"cpu,omitempty"`
	// Memory of each proxy.
	// +optional
	Memory *MemoryIsolation `json:"memory,omitempty"`
	// Pids is how many threads and processes each proxy may have. Envoy needs
	// about 10. Default 512.
	// +kubebuilder:validation:Minimum=32
	// +kubebuilder:validation:Maximum=32768
	// +optional
	Pids *int64 `json:"pids,omitempty"`
	// Connections that each proxy takes, from its pods and to them.
	// +optional
	Connections *ConnectionIsolation `json:"connections,omitempty"`
	// Bandwidth between each proxy and all but its own pods.
	// +optional
	Bandwidth *BandwidthIsolation `json:"bandwidth,omitempty"`
	// Concurrency is how many threads of each Envoy serve connections, from its next
	// start on: an Envoy that runs can't change it. Each takes memory and pools of its
	// own. Default 2, and 1 where the CPU limit is one CPU or less.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=4
	// +optional
	Concurrency *int64 `json:"concurrency,omitempty"`
	// WarmStandby keeps a second Envoy ready beside each, which takes new connections
	// at once when the first crashes; what was open there is lost all the same. Both
	// are within the limits of one proxy. It gives way to a canary. In ceilings,
	// false forbids it. Default false.
	// +optional
	WarmStandby *bool `json:"warmStandby,omitempty"`
}

// ConnectionIsolation bounds what a tenant's pods on a node, and who dials them,
// may open. What is beyond is dropped at the pod's veth before it costs the proxy
// anything, without an answer: the client's kernel tries again after 1, 3 and 7 s.
// Connections that have begun go on. A tunnel of another proxy counts as one
// connection, whatever is in it; what is excluded from the mesh doesn't count.
//
// +kubebuilder:validation:XValidation:rule="has(self.concurrent) || has(self.newPerSecond) || has(self.newDirectPerSecond)",message="set concurrent, newPerSecond, newDirectPerSecond, or several of them"
type ConnectionIsolation struct {
	// Concurrent is the most at a time, of which the last quarter is for those that
	// the pods open. With redirection EBPF, connections that open at the same instant
	// can go beyond it by as many, and it isn't enforced on nodes without cgroup v2.
	// Default: no limit.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	// +optional
	Concurrent *int64 `json:"concurrent,omitempty"`
	// NewPerSecond is how many the pods may open in a second, and others to them as
	// many; after a second without any, so many at once. Default: no limit.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	// +optional
	NewPerSecond *int64 `json:"newPerSecond,omitempty"`
	// NewDirectPerSecond is how many flows the pods may begin in a second beside the
	// proxy: of UDP, ICMP and other protocols, and TCP to the node itself or excluded
	// from the mesh; after a second without any, so many at once. Each takes an entry of
	// the node's conntrack, which all of the node share, for half a minute or longer.
	// Default: no limit.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	// +optional
	NewDirectPerSecond *int64 `json:"newDirectPerSecond,omitempty"`
}

// BandwidthIsolation bounds what a proxy sends and receives, in bytes per second,
// from the IP header on, retransmissions included. Between the proxy and its own
// pods nothing is bounded, and what doesn't pass the proxy neither. With redirection
// EBPF, egress isn't enforced on nodes without cgroup v2.
//
// +kubebuilder:validation:XValidation:rule="has(self.egress) || has(self.ingress)",message="set egress, ingress, or both"
type BandwidthIsolation struct {
	// Egress is what the proxy sends, as its pods, to other proxies and servers.
	// Default: no limit.
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:XValidation:rule="isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('128Ki')) >= 0",message="bandwidth.egress must be at least 128Ki: below, TLS handshakes time out"
	// +kubebuilder:validation:XValidation:rule="isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('100Gi')) <= 0",message="bandwidth.egress must be at most 100Gi"
	// +optional
	Egress *resource.Quantity `json:"egress,omitempty"`
	// Ingress is what comes to the proxy from others than its own pods. Default: no
	// limit.
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:XValidation:rule="isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('128Ki')) >= 0",message="bandwidth.ingress must be at least 128Ki: below, TLS handshakes time out"
	// +kubebuilder:validation:XValidation:rule="isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('100Gi')) <= 0",message="bandwidth.ingress must be at most 100Gi"
	// +optional
	Ingress *resource.Quantity `json:"ingress,omitempty"`
}

// CPUIsolation bounds a proxy's CPU time.
//
// +kubebuilder:validation:XValidation:rule="!has(self.limit) || (isQuantity(string(self.limit)) && quantity(string(self.limit)).compareTo(quantity('20m')) >= 0)",message="cpu.limit must be at least 20m: below, Envoy doesn't start in reasonable time"
// +kubebuilder:validation:XValidation:rule="!has(self.limit) || (isQuantity(string(self.limit)) && quantity(string(self.limit)).compareTo(quantity('1024')) <= 0)",message="cpu.limit must be at most 1024"
type CPUIsolation struct {
	// Weight is the proxy's share when CPU is scarce, in cgroup v2's terms.
	// Default 100.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=10000
	// +optional
	Weight *int64 `json:"weight,omitempty"`
	// Limit is the most CPU time it gets, in CPUs (500m is half of one). Default:
	// none.
	// +kubebuilder:validation:XIntOrString
	// +optional
	Limit *resource.Quantity `json:"limit,omitempty"`
}

// MemoryIsolation bounds a proxy's memory, in bytes.
//
// +kubebuilder:validation:XValidation:rule="!has(self.max) || (isQuantity(string(self.max)) && quantity(string(self.max)).compareTo(quantity('48Mi')) >= 0)",message="memory.max must be at least 48Mi: Envoy needs that to start and to load a few services"
// +kubebuilder:validation:XValidation:rule="!has(self.high) || (isQuantity(string(self.high)) && quantity(string(self.high)).compareTo(quantity('32Mi')) >= 0)",message="memory.high must be at least 32Mi"
// +kubebuilder:validation:XValidation:rule="!has(self.high) || !has(self.max) || (isQuantity(string(self.high)) && isQuantity(string(self.max)) && quantity(string(self.high)).compareTo(quantity(string(self.max))) <= 0)",message="memory.high must not be above memory.max"
// +kubebuilder:validation:XValidation:rule="!has(self.max) || (isQuantity(string(self.max)) && quantity(string(self.max)).compareTo(quantity('1Ti')) <= 0)",message="memory.max must be at most 1Ti"
type MemoryIsolation struct {
	// High is where the kernel starts to slow the proxy down and reclaim. Not
	// enforced on cgroup v1. Default: none.
	// +kubebuilder:validation:XIntOrString
	// +optional
	High *resource.Quantity `json:"high,omitempty"`
	// Max is where the kernel ends the proxy (and no other). Default: none.
	// +kubebuilder:validation:XIntOrString
	// +optional
	Max *resource.Quantity `json:"max,omitempty"`
}

// TopologyLimits are what a MeshTopology says of its proxies' limits.
type TopologyLimits struct {
	// Defaults hold for the fields that no IsolationPolicy of a namespace sets, and
	// for proxies that a whole node shares. Default: pids 512, and else none.
	// +optional
	Defaults *ProxyLimits `json:"defaults,omitempty"`
	// Ceilings are beyond what no namespace gets, whatever its policies and the
	// defaults say. A field that isn't set is as the default's: then namespaces can
	// only be stricter than that. Default: the defaults.
	// +optional
	Ceilings *ProxyLimits `json:"ceilings,omitempty"`
	// Node bounds all proxies of a node together, beside what bounds each. A node
	// is one: of several MeshTopologies the oldest says. Default: see there.
	// +optional
	Node *NodeLimits `json:"node,omitempty"`
}

// NodeLimits bound all tenant proxies of a node together, so that they can't take
// what its pods and its kubelet need. Within them, proxies share by their weights,
// and what one leaves idle the others may use.
type NodeLimits struct {
	// CPU of all proxies. The weight is theirs together beside kubepods and the
	// node's services; default 100. Default: no limit.
	// +optional
	CPU *CPUIsolation `json:"cpu,omitempty"`
	// MemoryMax of all proxies, in bytes. Beyond it the kernel ends one of them, the
	// largest as a rule: set memory.max of each so that it isn't reached. Default: none.
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:XValidation:rule="isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('128Mi')) >= 0",message="node.memoryMax must be at least 128Mi: two Envoys and what they have loaded"
	// +kubebuilder:validation:XValidation:rule="isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('16Ti')) <= 0",message="node.memoryMax must be at most 16Ti"
	// +optional
	MemoryMax *resource.Quantity `json:"memoryMax,omitempty"`
	// Pids is how many threads and processes all proxies may have. Default 16384.
	// +kubebuilder:validation:Minimum=128
	// +kubebuilder:validation:Maximum=4194304
	// +optional
	Pids *int64 `json:"pids,omitempty"`
}

// EnforcedLimits are limits of one proxy, read back from the kernel of its node.
type EnforcedLimits struct {
	// Node where they hold.
	Node string `json:"node"`
	// Tenant whose proxy it is.
	Tenant string `json:"tenant"`
	// Limits that are enforced.
	Limits Limits `json:"limits"`
	// Unenforced says which of the limits the node can't hold as they are meant,
	// and why.
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	// +optional
	Unenforced []string `json:"unenforced,omitempty"`
	// Hits are how often limits were met.
	// +optional
	Hits *LimitHits `json:"hits,omitempty"`
}

// LimitHits are how often a proxy met its limits. They are brought up to date
// every 10 s.
type LimitHits struct {
	// Since when they are counted: when the tenant came to the node.
	// +optional
	Since *metav1.Time `json:"since,omitempty"`
	// Last is when one of them was last seen to rise; none if they haven't since
	// the node's agent started.
	// +optional
	Last *metav1.Time `json:"last,omitempty"`
	// CPUThrottled is in how many periods of 100 ms the CPU quota was used up.
	// +optional
	CPUThrottled int64 `json:"cpuThrottled,omitempty"`
	// CPUThrottledMillis is for how long threads waited for the quota, summed up,
	// in milliseconds.
	// +optional
	CPUThrottledMillis int64 `json:"cpuThrottledMillis,omitempty"`
	// MemoryHigh is how often the proxy was slowed down beyond memory.high.
	// +optional
	MemoryHigh int64 `json:"memoryHigh,omitempty"`
	// OOMKills is how often the kernel ended a process of the proxy for memory.
	// +optional
	OOMKills int64 `json:"oomKills,omitempty"`
	// Pids is how often a thread was refused.
	// +optional
	Pids int64 `json:"pids,omitempty"`
	// Connections is how often a connection was dropped because there were as many
	// as may be; one that is tried again counts again.
	// +optional
	Connections int64 `json:"connections,omitempty"`
	// NewConnections is how often one was dropped because they opened too fast.
	// +optional
	NewConnections int64 `json:"newConnections,omitempty"`
	// NewDirect is how often a flow beside the proxy was dropped because they began too
	// fast.
	// +optional
	NewDirect int64 `json:"newDirect,omitempty"`
}

// Limits of one proxy. A field that isn't there is no limit.
type Limits struct {
	// CPUWeight, 1 to 10000.
	// +optional
	CPUWeight int64 `json:"cpuWeight,omitempty"`
	// CPUMillis is the quota in thousandths of a CPU.
	// +optional
	CPUMillis int64 `json:"cpuMillis,omitempty"`
	// MemoryHigh in bytes.
	// +optional
	MemoryHigh int64 `json:"memoryHigh,omitempty"`
	// MemoryMax in bytes.
	// +optional
	MemoryMax int64 `json:"memoryMax,omitempty"`
	// Pids is the most threads and processes.
	// +optional
	Pids int64 `json:"pids,omitempty"`
	// Connections is the most at a time.
	// +optional
	Connections int64 `json:"connections,omitempty"`
	// NewConnections is how many may open in a second.
	// +optional
	NewConnections int64 `json:"newConnections,omitempty"`
	// NewDirect is how many flows may begin in a second beside the proxy.
	// +optional
	NewDirect int64 `json:"newDirect,omitempty"`
	// Egress in bytes per second.
	// +optional
	Egress int64 `json:"egress,omitempty"`
	// Ingress in bytes per second.
	// +optional
	Ingress int64 `json:"ingress,omitempty"`
	// Concurrency is how many threads of each Envoy serve connections.
	// +optional
	Concurrency int64 `json:"concurrency,omitempty"`
}
