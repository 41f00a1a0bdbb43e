package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Redirection is what leads the connections of pods to their tenants' proxies.
//
// +kubebuilder:validation:Enum=EBPF;Netfilter
type Redirection string

// The values of Redirection.
const (
	// RedirectionEBPF steers by BPF programs: the default, and also what "" means.
	RedirectionEBPF Redirection = "EBPF"
	// RedirectionNetfilter steers by nftables rules, where BPF can't be had.
	RedirectionNetfilter Redirection = "Netfilter"
)

// NodeProxySpec is the plan of one node: which tenant proxies it runs for which
// pods. The operator writes it; people read it.
type NodeProxySpec struct {
	// TrustDomain of the mesh.
	// +optional
	TrustDomain string `json:"trustDomain,omitempty"`
	// ReadySince is since when the Node is Ready, when it was last. The status has it
	// again: what was said before is about what was.
	// +optional
	ReadySince *metav1.Time `json:"readySince,omitempty"`
	// Redirection of the node's pods: one a node, for one agent steers it. None is
	// EBPF.
	// +optional
	Redirection Redirection `json:"redirection,omitempty"`
	// Limits of all tenant proxies together. 0 is no limit.
	// +optional
	Limits Limits `json:"limits,omitempty"`
	// Tenants that have pods on the node, by name.
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=500
	// +optional
	Tenants []NodeTenant `json:"tenants,omitempty"`
	// Namespaces of the node's pods for which there is more to say.
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=1000
	// +optional
	Namespaces []NodeNamespace `json:"namespaces,omitempty"`
	// Images have versions of Envoy that the agent doesn't bring along. The node
	// fetches them ahead, and keeps them while they are here or a tenant has their
	// version. A rollout owns this field, as it does canaries.
	// +listType=map
	// +listMapKey=version
	// +kubebuilder:validation:MaxItems=8
	// +optional
	Images []NodeImage `json:"images,omitempty"`
	// Outside are pods that opted out: they start without the mesh.
	// +listType=map
	// +listMapKey=uid
	// +kubebuilder:validation:MaxItems=1000
	// +optional
	Outside []OutsidePod `json:"outside,omitempty"`
	// Pods of the mesh that are bound to the node, by UID. Their addresses aren't
	// here: the node knows them first.
	// +listType=map
	// +listMapKey=uid
	// +kubebuilder:validation:MaxItems=1000
	// +optional
	Pods []NodePod `json:"pods,omitempty"`
}

// NodeImage is a version of Envoy that comes from a registry.
type NodeImage struct {
	// Version is Envoy's, a plus, and the first twelve digits of the image's digest.
	// +kubebuilder:validation:Pattern=`^[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]{1,24})?\+[0-9a-f]{12}$`
	// +kubebuilder:validation:MaxLength=60
	Version string `json:"version"`
	// Image is a repository and a digest.
	// +kubebuilder:validation:Pattern=`^[a-z0-9A-Z.:/_\[\]-]+@sha256:[0-9a-f]{64}$`
	// +kubebuilder:validation:MaxLength=512
	Image string `json:"image"`
	// Rollout is the ProxyRollout that asks for it. Without one it was made by hand.
	// +kubebuilder:validation:MaxLength=253
	// +optional
	Rollout string `json:"rollout,omitempty"`
}

// OutsidePod is a pod of a namespace in the mesh that isn't in the mesh itself.
type OutsidePod struct {
	// UID of the pod.
	UID string `json:"uid"`
	// Name of the pod and its namespace, for people.
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// NodeNamespace is what holds for all pods of a namespace on a node.
type NodeNamespace struct {
	// Name of the namespace.
	Name string `json:"name"`
	// Exclusions are left out of the mesh.
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	// +optional
	Exclusions []Exclusion `json:"exclusions,omitempty"`
	// PlainText says what becomes of connections from outside of the mesh. None is
	// Permissive.
	// +optional
	PlainText PlainText `json:"plainText,omitempty"`
	// EmergencyBypass is on: new connections pass in the clear.
	// +optional
	EmergencyBypass bool `json:"emergencyBypass,omitempty"`
}

// NodeTenant is one tenant proxy of a node.
type NodeTenant struct {
	// Name of the tenant: of the namespace, or with what else the tenant is made
	// of ("team-a.sa.reviews").
	// +kubebuilder:validation:Pattern=`^(_node|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.(sa|pod)\.[a-z0-9]([-.a-z0-9]*[a-z0-9])?)?)$`
	// +kubebuilder:validation:MaxLength=330
	Name string `json:"name"`
	// Version of Envoy.
	Version string `json:"version"`
	// Limits of the proxy.
	// +optional
	Limits Limits `json:"limits,omitempty"`
	// Standby is a second process of the proxy's version that takes new connections
	// when the first ends. A canary has its place.
	// +optional
	Standby bool `json:"standby,omitempty"`
	// DrainSeconds is for how long a process that isn't wanted any more may finish its
	// connections. 0 is as the agent says.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=86400
	// +optional
	DrainSeconds int64 `json:"drainSeconds,omitempty"`
	// Canary is a second generation of this proxy that runs beside the first and
	// takes a share of the new connections. A rollout owns this field, by
	// server-side apply under its own name; without one there is no canary.
	// +optional
	Canary *CanaryGeneration `json:"canary,omitempty"`
}

// CanaryGeneration is the second generation of a proxy.
type CanaryGeneration struct {
	// Version of Envoy.
	Version string `json:"version"`
	// Weight is the percentage of new connections that it takes; the others go to
	// the first generation, as do all while it isn't ready.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100
	Weight int32 `json:"weight"`
	// Promoted makes this version the tenant's on the node, whatever its own field
	// says: it takes all new connections as soon as it is ready, and the first
	// generation finishes those that it has, and ends. Weight doesn't count then.
	// +optional
	Promoted bool `json:"promoted,omitempty"`
	// Rollout is the ProxyRollout that asks for it. Without one it was made by hand.
	// +kubebuilder:validation:MaxLength=253
	// +optional
	Rollout string `json:"rollout,omitempty"`
	// RolloutUID is that ProxyRollout's: one that is made again under its name is
	// another. Operators of before don't say it.
	// +kubebuilder:validation:MaxLength=64
	// +optional
	RolloutUID string `json:"rolloutUID,omitempty"`
}

// NodePod is a pod of the mesh.
type NodePod struct {
	// UID of the pod.
	UID string `json:"uid"`
	// Namespace of the pod.
	Namespace string `json:"namespace"`
	// Name of the pod.
	Name string `json:"name"`
	// ServiceAccount of the pod; with the namespace, its identity.
	ServiceAccount string `json:"serviceAccount"`
	// Tenant that it belongs to: a name in tenants.
	Tenant string `json:"tenant"`
	// Exclusions of its own, beside its namespace's.
	// +kubebuilder:validation:MaxItems=8
	// +listType=atomic
	// +optional
	Exclusions []Exclusion `json:"exclusions,omitempty"`
}

// NodeProxyStatus is what the node's agent sees.
type NodeProxyStatus struct {
	// ObservedGeneration of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// ReadySince of the spec that this status is about; none if the agent is of before
	// it was.
	// +optional
	ReadySince *metav1.Time `json:"readySince,omitempty"`
	// Conditions: Ready (reasons Ready, Progressing, ProxiesNotReady,
	// KernelUnsupported), Redirected (reasons AsPlanned, Unsupported), IdentityReady
	// (reasons Ready, NotRenewed, Expired).
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// AgentVersion that runs on the node.
	// +optional
	AgentVersion string `json:"agentVersion,omitempty"`
	// AgentStartedAt is since when this agent runs. Proxies outlive it, and come back
	// to the next one within some seconds: before that, none of them is Serving.
	// +optional
	AgentStartedAt *metav1.Time `json:"agentStartedAt,omitempty"`
	// ProxyVersions of Envoy that the node can run.
	// +listType=set
	// +optional
	ProxyVersions []string `json:"proxyVersions,omitempty"`
	// Images that the node was asked to have.
	// +listType=map
	// +listMapKey=version
	// +optional
	Images []NodeImageStatus `json:"images,omitempty"`
	// TrustBundle is a digest of the roots that all of the node's proxies trust.
	// +optional
	TrustBundle string `json:"trustBundle,omitempty"`
	// Redirection that the node's pods have.
	// +optional
	Redirection Redirection `json:"redirection,omitempty"`
	// Limits that hold for all tenant proxies together, read back from the kernel.
	// +optional
	Limits Limits `json:"limits,omitempty"`
	// Unenforced says which of the limits for all together the node can't hold, and
	// why.
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	// +optional
	Unenforced []string `json:"unenforced,omitempty"`
	// Tenants whose proxies run, or should.
	// +listType=map
	// +listMapKey=name
	// +optional
	Tenants []NodeTenantStatus `json:"tenants,omitempty"`
}

// NodeImageStatus is how an image is on the node.
type NodeImageStatus struct {
	// Version as in the spec.
	Version string `json:"version"`
	// Ready: the node can run it.
	Ready bool `json:"ready"`
	// Reason why it can't be had: ImageNotFound, Unauthorized, RegistryUnreachable,
	// DigestMismatch, InvalidImage, TooOld, DiskFull or Failed. It is tried again,
	// every five minutes at last. "" while it is being fetched.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Message for people.
	// +kubebuilder:validation:MaxLength=1024
	// +optional
	Message string `json:"message,omitempty"`
}

// NodeTenantStatus is one tenant's proxy as it runs on one node.
type NodeTenantStatus struct {
	// Name of the tenant.
	Name string `json:"name"`
	// Ready to serve the tenant's pods.
	Ready bool `json:"ready"`
	// Reason why it isn't ready, for people.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Pods that are steered to it.
	// +optional
	Pods int32 `json:"pods,omitempty"`
	// StrictPods of them refuse plain text.
	// +optional
	StrictPods int32 `json:"strictPods,omitempty"`
	// BypassedPods of them pass the proxy by: the emergency bypass.
	// +optional
	BypassedPods int32 `json:"bypassedPods,omitempty"`
	// Limits that the kernel enforces, read back from it.
	// +optional
	Limits Limits `json:"limits,omitempty"`
	// Unenforced says which of the limits the node can't hold as they are meant,
	// and why.
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	// +optional
	Unenforced []string `json:"unenforced,omitempty"`
	// Hits are how often limits were met.
	// +optional
	Hits *LimitHits `json:"hits,omitempty"`
	// Weight is the percentage of new connections that the canary takes.
	// +optional
	Weight int32 `json:"weight,omitempty"`
	// Cost of the tenant on this node, read every 30 seconds.
	// +optional
	Cost *NodeCost `json:"cost,omitempty"`
	// Shares of Cost that the namespaces have whose pods use a shared proxy.
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=1000
	// +optional
	Shares []NamespaceShare `json:"shares,omitempty"`
	// Rejected is configuration that the tenant's Envoys refused and hold no better
	// version of: what they had before it is in force. At most 16.
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	// +optional
	Rejected []RejectedResource `json:"rejected,omitempty"`
	// Failure is how one of the tenant's processes ended last that wasn't asked to;
	// none if none has, or the agent has forgotten it.
	// +optional
	Failure *ProxyFailure `json:"failure,omitempty"`
	// Waits says what the plan's next version waits for, "" if for nothing.
	// +optional
	Waits string `json:"waits,omitempty"`
	// Generations that run: the first, and the canary if there is one.
	// +listType=map
	// +listMapKey=generation
	// +optional
	Generations []GenerationStatus `json:"generations,omitempty"`
}

// ProxyFailure is the end of a process that wasn't asked to end.
type ProxyFailure struct {
	// Generation that ended.
	Generation int32 `json:"generation"`
	// Cause: OutOfMemory, ForbiddenCall (the sandbox doesn't allow a system call),
	// Crash, Killed (by a signal of somebody on the node), Exited or Unknown.
	// +kubebuilder:validation:MaxLength=32
	Cause string `json:"cause"`
	// Message is how it ended, for people.
	// +kubebuilder:validation:MaxLength=256
	// +optional
	Message string `json:"message,omitempty"`
	// At is when.
	At metav1.Time `json:"at"`
	// Restarts of that generation since it began.
	// +optional
	Restarts int32 `json:"restarts,omitempty"`
	// Log has the last lines that it wrote, at most 5 and 512 bytes. What isn't
	// printable is replaced.
	// +kubebuilder:validation:MaxLength=1024
	// +optional
	Log string `json:"log,omitempty"`
	// Recovered: all of the tenant's processes have served for 10 s since.
	// +optional
	Recovered bool `json:"recovered,omitempty"`
}

// RejectedResource is one xDS resource that an Envoy refused.
type RejectedResource struct {
	// Type of the resource: LDS, CDS, EDS, RDS or FCDS.
	// +kubebuilder:validation:MaxLength=16
	Type string `json:"type"`
	// Name of the resource.
	// +kubebuilder:validation:MaxLength=1024
	Name string `json:"name"`
	// Message is Envoy's, cut.
	// +kubebuilder:validation:MaxLength=300
	// +optional
	Message string `json:"message,omitempty"`
	// Shared: it is no matter of an Envoy's version. All versions that ran beside each
	// other refused it, or none ran beside the one that did.
	// +optional
	Shared bool `json:"shared,omitempty"`
}

// GenerationRole is what a process of a tenant is.
type GenerationRole string

// The values of GenerationRole.
const (
	RoleFirst   GenerationRole = "First"
	RoleCanary  GenerationRole = "Canary"
	RoleFormer  GenerationRole = "Former"
	RoleLeaving GenerationRole = "Leaving"
	RoleStandby GenerationRole = "Standby"
)

// GenerationStatus is one Envoy process of a tenant.
type GenerationStatus struct {
	// Generation: 0 or 1. Which of them serves changes with each upgrade.
	Generation int32 `json:"generation"`
	// Role of the process: First serves the tenant, Canary has a share of new
	// connections, Former serves until the first is ready, Leaving finishes its
	// connections, Standby takes new connections while the first can't.
	// +kubebuilder:validation:Enum=First;Canary;Former;Leaving;Standby
	// +optional
	Role GenerationRole `json:"role,omitempty"`
	// Version of Envoy.
	Version string `json:"version"`
	// PID in the node's process namespace.
	// +optional
	PID int32 `json:"pid,omitempty"`
	// Ready to take connections.
	Ready bool `json:"ready"`
	// Serving: new connections are led to it, by its weight.
	// +optional
	Serving bool `json:"serving,omitempty"`
	// Rejected is how many resources this process refused and holds no better version
	// of.
	// +optional
	Rejected int32 `json:"rejected,omitempty"`
	// RefusedAlone is how many resources it refuses, for some seconds, that a process of
	// another version beside it takes; none if the agent doesn't say.
	// +optional
	RefusedAlone *int32 `json:"refusedAlone,omitempty"`
	// DrainUntil is when a process that leaves ends at the latest.
	// +optional
	DrainUntil *metav1.Time `json:"drainUntil,omitempty"`
	// Since when this process runs.
	// +optional
	StartedAt *metav1.Time `json:"startedAt,omitempty"`
	// Restarts since the tenant came to the node.
	// +optional
	Restarts int32 `json:"restarts,omitempty"`
	// LastExit says how the process before this one ended.
	// +optional
	LastExit string `json:"lastExit,omitempty"`
	// Figures of it, and of the one beside it, while a canary has a share of the
	// connections; in NodeProxies alone.
	// +optional
	Figures *GenerationFigures `json:"figures,omitempty"`
}

// NodeProxy is one node's share of the mesh; it has the node's name.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=nproxy,categories=bulkhead
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Redirection",type=string,JSONPath=`.status.redirection`
// +kubebuilder:printcolumn:name="Agent",type=string,JSONPath=`.status.agentVersion`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type NodeProxy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   NodeProxySpec   `json:"spec,omitempty"`
	Status NodeProxyStatus `json:"status,omitempty"`
}

// NodeProxyList is a list of NodeProxy.
//
// +kubebuilder:object:root=true
type NodeProxyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []NodeProxy `json:"items"`
}
