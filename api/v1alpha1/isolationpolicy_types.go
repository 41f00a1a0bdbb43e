package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// IsolationPolicySpec bounds each tenant proxy of the policy's namespace, and what
// its pods take.
//
// +kubebuilder:validation:XValidation:rule="has(self.cpu) || has(self.memory) || has(self.pids) || has(self.plainText)",message="set at least one of cpu, memory, pids, plainText"
type IsolationPolicySpec struct {
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
	// PlainText can be Strict only: a namespace can refuse what its MeshTopology
	// would let in, and not the reverse. Default: as the MeshTopology says.
	// +kubebuilder:validation:Enum=Strict
	// +optional
	PlainText PlainText `json:"plainText,omitempty"`
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

// IsolationPolicyStatus tells what is enforced where.
type IsolationPolicyStatus struct {
	// ObservedGeneration of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions: Accepted (reasons Accepted, NotInMesh, SharedProxy), Ready (reasons Enforced,
	// Progressing, NoProxies).
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Nodes on which the namespace has a proxy, and what the kernel enforces there.
	// +listType=map
	// +listMapKey=node
	// +kubebuilder:validation:MaxItems=1000
	// +optional
	Nodes []EnforcedLimits `json:"nodes,omitempty"`
}

// EnforcedLimits are limits read back from the kernel of one node.
type EnforcedLimits struct {
	// Node where they hold.
	Node string `json:"node"`
	// Limits that the kernel enforces.
	Limits Limits `json:"limits"`
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
}

// IsolationPolicy bounds what the proxies of its namespace may use on each node,
// and can close its pods to plain text.
// Of several in one namespace, the strictest value of each field counts.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,shortName=isopol,categories=bulkhead
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].reason`
// +kubebuilder:printcolumn:name="Enforced",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="CPU",type=string,JSONPath=`.spec.cpu.limit`
// +kubebuilder:printcolumn:name="Memory",type=string,JSONPath=`.spec.memory.max`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type IsolationPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   IsolationPolicySpec   `json:"spec"`
	Status IsolationPolicyStatus `json:"status,omitempty"`
}

// IsolationPolicyList is a list of IsolationPolicy.
//
// +kubebuilder:object:root=true
type IsolationPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []IsolationPolicy `json:"items"`
}
