package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// TenantProxyStatus is what the owner of a namespace sees of its proxies.
type TenantProxyStatus struct {
	// Conditions: Ready (reasons Ready, Progressing, ProxiesNotReady; NodesAway: True while
	// all proxies serve that are on nodes which are Ready, Unknown if there is none),
	// Configured (reasons Configured, ConfigRejected), Stable (True with reason Stable; False with
	// OutOfMemory, ForbiddenCall, Crash, Killed, Exited, Unknown, which say why a proxy
	// ended that hasn't served for 10 s since), EmergencyBypass (True with reason
	// InForce, False with Off).
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Tenant is the tenant's name in metrics and in NodeProxy objects.
	// +optional
	Tenant string `json:"tenant,omitempty"`
	// Version of Envoy that is wanted.
	// +optional
	Version string `json:"version,omitempty"`
	// Pods that the proxies serve.
	// +optional
	Pods int32 `json:"pods,omitempty"`
	// Proxies wanted: one per node that hosts pods of the tenant.
	// +optional
	Proxies int32 `json:"proxies,omitempty"`
	// ReadyProxies that serve now.
	// +optional
	ReadyProxies int32 `json:"readyProxies,omitempty"`
	// Upgrade to another version, while a ProxyRollout is at it, and after one that was
	// taken back until there is another.
	// +optional
	Upgrade *TenantUpgrade `json:"upgrade,omitempty"`
	// Nodes where the tenant has pods.
	// +listType=map
	// +listMapKey=node
	// +optional
	Nodes []TenantNodeStatus `json:"nodes,omitempty"`
	// Cost of the tenant.
	// +optional
	Cost *TenantCost `json:"cost,omitempty"`
}

// TenantUpgrade is where an upgrade of the tenant's proxies is.
type TenantUpgrade struct {
	// Rollout is the ProxyRollout that does it.
	Rollout string `json:"rollout"`
	// From is the version that connections leave, To the one that they go to.
	From string `json:"from"`
	To   string `json:"to"`
	// Weight is the percentage of new connections that goes to the new version.
	Weight int32 `json:"weight"`
	// Step of the rollout and how many it has: "1/3".
	// +optional
	Step string `json:"step,omitempty"`
	// Verdict: NotYet (the tenant doesn't take part so far), OnHold (its namespace's
	// IsolationPolicies hold it back), InProgress, Healthy (it serves and nothing is
	// wrong), HeldBack (it failed here alone, and the tenant stays at the version
	// before), RolledBack or Aborted.
	Verdict string `json:"verdict"`
	// Paused: who runs the mesh keeps it as it is.
	// +optional
	Paused bool `json:"paused,omitempty"`
	// Message says what is happening, since when, what comes next, and who can stop it.
	// +kubebuilder:validation:MaxLength=2048
	Message string `json:"message"`
	// Since when.
	// +optional
	Since *metav1.Time `json:"since,omitempty"`
	// HeldUntil is when the upgrade begins here, which the namespace's
	// IsolationPolicies hold back.
	// +optional
	HeldUntil *metav1.Time `json:"heldUntil,omitempty"`
}

// TenantNodeStatus is a tenant's proxy on one node.
type TenantNodeStatus struct {
	// Node that the proxy runs on.
	Node string `json:"node"`
	// Ready to serve.
	Ready bool `json:"ready"`
	// Reason why it isn't ready, for people.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Pods of the tenant there.
	// +optional
	Pods int32 `json:"pods,omitempty"`
	// Weight is the percentage of new connections that the canary takes.
	// +optional
	Weight int32 `json:"weight,omitempty"`
	// Failure is how one of the processes ended last that wasn't asked to.
	// +optional
	Failure *ProxyFailure `json:"failure,omitempty"`
	// Generations that run: the first, and the canary if there is one.
	// +listType=map
	// +listMapKey=generation
	// +optional
	Generations []GenerationStatus `json:"generations,omitempty"`
}

// TenantProxy shows the owner of a namespace the proxies that serve it. The
// operator makes one for each tenant and writes its status; it has no spec.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,shortName=tproxy,categories=bulkhead
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Proxies",type=integer,JSONPath=`.status.proxies`
// +kubebuilder:printcolumn:name="Serving",type=integer,JSONPath=`.status.readyProxies`
// +kubebuilder:printcolumn:name="Pods",type=integer,JSONPath=`.status.pods`
// +kubebuilder:printcolumn:name="Bypass",type=string,JSONPath=`.status.conditions[?(@.type=="EmergencyBypass")].status`
// +kubebuilder:printcolumn:name="Version",type=string,JSONPath=`.status.version`
// +kubebuilder:printcolumn:name="UpgradeTo",type=string,JSONPath=`.status.upgrade.to`
// +kubebuilder:printcolumn:name="Weight",type=integer,JSONPath=`.status.upgrade.weight`
// +kubebuilder:printcolumn:name="Step",type=string,JSONPath=`.status.upgrade.step`
// +kubebuilder:printcolumn:name="Verdict",type=string,JSONPath=`.status.upgrade.verdict`
// +kubebuilder:printcolumn:name="Paused",type=boolean,JSONPath=`.status.upgrade.paused`
// +kubebuilder:printcolumn:name="UpgradeSince",type=date,JSONPath=`.status.upgrade.since`
// +kubebuilder:printcolumn:name="HeldUntil",type=string,JSONPath=`.status.upgrade.heldUntil`,priority=1
// +kubebuilder:printcolumn:name="Upgrade",type=string,JSONPath=`.status.upgrade.message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type TenantProxy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Status TenantProxyStatus `json:"status,omitempty"`
}

// TenantProxyList is a list of TenantProxy.
//
// +kubebuilder:object:root=true
type TenantProxyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []TenantProxy `json:"items"`
}
