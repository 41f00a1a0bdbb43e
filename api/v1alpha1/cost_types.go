package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Taken is what was taken of a node in some time.
type Taken struct {
	// CPUMilliseconds of the proxy, in user space and in the kernel.
	// +optional
	CPUMilliseconds int64 `json:"cpuMilliseconds,omitempty"`
	// PrivateMebibyteSeconds is the memory that the proxy shares with nobody, times
	// how long it was held.
	// +optional
	PrivateMebibyteSeconds int64 `json:"privateMebibyteSeconds,omitempty"`
	// PSSMebibyteSeconds counts pages that several proxies share in parts, so that
	// all tenants' add up to what they take together.
	// +optional
	PSSMebibyteSeconds int64 `json:"pssMebibyteSeconds,omitempty"`
	// BytesSent by the pods, of TCP.
	// +optional
	BytesSent int64 `json:"bytesSent,omitempty"`
	// BytesReceived by the pods, of TCP.
	// +optional
	BytesReceived int64 `json:"bytesReceived,omitempty"`
	// Connections are new ones that the proxy took, from and to the pods.
	// +optional
	Connections int64 `json:"connections,omitempty"`
}

// NodeCost is what a tenant has taken of one node. All of Taken only grows while
// Since stays; with another Since it was counted anew.
type NodeCost struct {
	// Since when it is counted.
	Since metav1.Time `json:"since"`
	// At is when it was read.
	At    metav1.Time `json:"at"`
	Taken `json:",inline"`
	// PrivateBytes and PSSBytes are the memory at the time At.
	// +optional
	PrivateBytes int64 `json:"privateBytes,omitempty"`
	// +optional
	PSSBytes int64 `json:"pssBytes,omitempty"`
}

// NamespaceShare is what a namespace has of a proxy that it shares with others:
// CPU and memory are estimated by bytes and connections, which are counted.
type NamespaceShare struct {
	// Name of the namespace.
	Name string `json:"name"`
	// Cost of the namespace on the node.
	Cost NodeCost `json:"cost"`
}

// TenantCost is what a tenant has taken of all nodes. What it took in the last
// minute on a node that it has left isn't in it.
type TenantCost struct {
	// Since when it is counted.
	Since metav1.Time `json:"since"`
	// At is when it was last added to: at most every 5 minutes.
	At metav1.Time `json:"at"`
	// Estimated says that CPU and memory are the namespace's share, by bytes and
	// connections, of proxies that other namespaces use as well.
	// +optional
	Estimated bool `json:"estimated,omitempty"`
	// Total since Since.
	// +optional
	Total Taken `json:"total,omitempty"`
	// Hours are the last 25 with any cost, UTC, the newest last.
	// +kubebuilder:validation:MaxItems=25
	// +listType=atomic
	// +optional
	Hours []CostPeriod `json:"hours,omitempty"`
	// Days are the last 32 with any cost, UTC, the newest last.
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	// +optional
	Days []CostPeriod `json:"days,omitempty"`
	// Nodes has the counters that were added last, by which the next are compared.
	// +listType=map
	// +listMapKey=node
	// +optional
	Nodes []CostOfNode `json:"nodes,omitempty"`
}

// CostPeriod is what was taken in one hour or day.
type CostPeriod struct {
	// Start of the period.
	Start metav1.Time `json:"start"`
	Taken `json:",inline"`
}

// CostOfNode is what has been counted of one node.
type CostOfNode struct {
	// Node that it is about.
	Node string `json:"node"`
	// Cost there.
	Cost NodeCost `json:"cost"`
}
