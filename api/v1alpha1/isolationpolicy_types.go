package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// IsolationPolicySpec bounds each tenant proxy of the policy's namespace, and what
// its pods take. A field that isn't set is as the MeshTopology says; what is set
// can't go beyond the MeshTopology's ceilings.
//
// +kubebuilder:validation:XValidation:rule="has(self.cpu) || has(self.memory) || has(self.pids) || has(self.connections) || has(self.bandwidth) || has(self.concurrency) || has(self.warmStandby) || has(self.plainText) || has(self.upgrades)",message="set at least one of cpu, memory, pids, connections, bandwidth, concurrency, warmStandby, plainText, upgrades"
type IsolationPolicySpec struct {
	ProxyLimits `json:",inline"`
	// PlainText can be Strict only: a namespace can refuse what its MeshTopology
	// would let in, and not the reverse. Default: as the MeshTopology says.
	// +kubebuilder:validation:XValidation:rule="self == 'Strict'",message="plainText must be Strict: a namespace can only refuse what its MeshTopology lets in; leave it out for what the MeshTopology says"
	// +optional
	PlainText PlainText `json:"plainText,omitempty"`
	// Upgrades of the namespace's proxies: when they may begin, and how long
	// connections may go on in what was replaced.
	// +optional
	Upgrades *UpgradePolicy `json:"upgrades,omitempty"`
}

// IsolationPolicyStatus tells what is enforced where.
type IsolationPolicyStatus struct {
	// ObservedGeneration of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions: Accepted (reasons Accepted, Capped, NotInMesh, SharedProxy), Ready
	// (reasons Enforced, PartlyEnforced, Progressing, NoProxies; True with NodesAway where
	// nodes that aren't Ready enforced it when they were heard last).
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Nodes on which the namespace has proxies, and what is enforced there.
	// +listType=map
	// +listMapKey=node
	// +listMapKey=tenant
	// +kubebuilder:validation:MaxItems=1000
	// +optional
	Nodes []EnforcedLimits `json:"nodes,omitempty"`
}

// IsolationPolicy bounds what the proxies of its namespace may use on each node,
// and can close its pods to plain text.
// Of several in one namespace, the strictest value of each field counts; and none
// goes beyond the ceilings of the namespace's MeshTopology.
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
