package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Isolation is what a tenant, the unit that gets a proxy of its own on each
// node, is made of.
//
// +kubebuilder:validation:Enum=Node;Namespace;ServiceAccount;Pod
type Isolation string

// The values of Isolation.
const (
	// IsolationNode makes all pods of a node one tenant: they share its proxy.
	IsolationNode Isolation = "Node"
	// IsolationNamespace makes each namespace a tenant.
	IsolationNamespace Isolation = "Namespace"
	// IsolationServiceAccount makes each service account of a namespace a tenant.
	IsolationServiceAccount Isolation = "ServiceAccount"
	// IsolationPod makes each pod a tenant, as a sidecar would.
	IsolationPod Isolation = "Pod"
)

// LabelOptOut keeps a single pod of a namespace out of the mesh, with the value
// "true"; it can be set and removed while the pod runs.
const LabelOptOut = "mesh.bulkhead.dev/opt-out"

// AccessLog says which connections a tenant proxy writes to its log.
//
// +kubebuilder:validation:Enum=None;Connections
type AccessLog string

// The values of AccessLog.
const (
	AccessLogNone        AccessLog = "None"
	AccessLogConnections AccessLog = "Connections"
)

// Egress says what becomes of connections that leave the cluster.
//
// +kubebuilder:validation:Enum=PassThrough;Reject
type Egress string

// The values of Egress.
const (
	// EgressPassThrough makes them from the pod's own address, without identity.
	EgressPassThrough Egress = "PassThrough"
	// EgressReject closes them.
	EgressReject Egress = "Reject"
)

// MeshTopologySpec says who is in the mesh and where its proxies sit.
type MeshTopologySpec struct {
	// TrustDomain is the first part of every SPIFFE ID. It can't be changed: all
	// identities would.
	// +kubebuilder:default="cluster.local"
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="trustDomain can't be changed: delete the MeshTopology and create another"
	// +optional
	TrustDomain string `json:"trustDomain,omitempty"`

	// Rules put namespaces into the mesh; the first that matches a namespace
	// counts. The operator's own namespace and kube-system never match.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	Rules []TenancyRule `json:"rules"`

	// Egress says what becomes of connections to addresses outside of the cluster:
	// those that are neither a service's nor in a node's pod range. Other nodes, and
	// so hostNetwork pods by their own address, are outside.
	// +kubebuilder:default=PassThrough
	// +optional
	Egress Egress `json:"egress,omitempty"`

	// Proxy is what the tenant proxies run.
	// +optional
	// +kubebuilder:default={}
	Proxy ProxySpec `json:"proxy,omitempty"`

	// Identity of the workloads.
	// +optional
	// +kubebuilder:default={}
	Identity IdentitySpec `json:"identity,omitempty"`

	// Limits of the proxies: defaults and ceilings for each, and bounds for all of a
	// node together.
	// +optional
	Limits *TopologyLimits `json:"limits,omitempty"`

	// Redirection of the nodes that no entry of nodeRedirections selects. A node
	// steers all of its pods one way, so of several MeshTopologies the oldest says
	// for all nodes; see the condition Redirected.
	// +kubebuilder:default=EBPF
	// +optional
	Redirection Redirection `json:"redirection,omitempty"`

	// NodeRedirections are for nodes that differ, for example because their kernel
	// can't load BPF programs. The first that selects a node counts. Default: none.
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	// +optional
	NodeRedirections []NodeRedirection `json:"nodeRedirections,omitempty"`

	// Exclusions are left out of the mesh, for all pods of its namespaces. They
	// concern new connections; those that have begun stay where they are. Default:
	// none.
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:XValidation:rule="self.all(e, has(e.port) || has(e.cidr))",message="set port, cidr, or both"
	// +kubebuilder:validation:XValidation:rule="self.all(e, e.direction != 'Inbound' || !has(e.port) || e.port != 15008)",message="port 15008 is the mesh's own and can't be excluded"
	// +kubebuilder:validation:XValidation:rule="self.all(e, !has(e.cidr) || (isCIDR(e.cidr) && cidr(e.cidr).masked() == cidr(e.cidr)))",message="cidr must be a network, such as 10.0.0.0/8: no bit may be set behind its prefix"
	// +listType=atomic
	// +optional
	Exclusions []Exclusion `json:"exclusions,omitempty"`

	// PodExclusions says whether pods may exclude connections of their own, by
	// annotations: who makes a pod can then take it past the mesh.
	// +kubebuilder:default=Deny
	// +optional
	PodExclusions PodExclusions `json:"podExclusions,omitempty"`

	// PlainText says what becomes of connections from outside of the mesh. A
	// namespace can be stricter, by an IsolationPolicy, but not less strict.
	// +kubebuilder:default=Permissive
	// +optional
	PlainText PlainText `json:"plainText,omitempty"`

	// EmergencyBypass takes namespaces past their proxies: all their new connections
	// are in plain text, without identity, policy, and Strict. It is for the hour in
	// which the mesh itself is broken; the condition EmergencyBypass, events and
	// metrics show it until the entry is removed. Default: none.
	// +kubebuilder:validation:MaxItems=64
	// +listType=map
	// +listMapKey=namespace
	// +optional
	EmergencyBypass []EmergencyBypass `json:"emergencyBypass,omitempty"`
}

// NodeRedirection is the redirection of some nodes.
type NodeRedirection struct {
	// NodeSelector picks nodes by their labels. An empty selector picks all of them.
	NodeSelector metav1.LabelSelector `json:"nodeSelector"`

	// Redirection of these nodes.
	Redirection Redirection `json:"redirection"`
}

// TenancyRule puts the pods of some namespaces into tenants.
type TenancyRule struct {
	// NamespaceSelector picks namespaces by their labels. An empty selector picks
	// all of them.
	NamespaceSelector metav1.LabelSelector `json:"namespaceSelector"`

	// Isolation is what a tenant is made of. It can be changed while pods run: their
	// connections go on in the former proxies to their end. A node has room for 500
	// tenants.
	// +kubebuilder:default=Namespace
	// +optional
	Isolation Isolation `json:"isolation,omitempty"`
}

// ProxySpec says which Envoy runs as tenant proxy, and how.
type ProxySpec struct {
	// Version of Envoy. The agents must have it: see status.conditions.
	// +kubebuilder:default="1.40.0"
	// +kubebuilder:validation:Pattern=`^[0-9]+\.[0-9]+\.[0-9]+$`
	// +kubebuilder:validation:MaxLength=20
	// +optional
	Version string `json:"version,omitempty"`

	// AccessLog writes a line for each connection that a proxy took for its pods
	// to the proxy's log on the node. It costs CPU for each connection.
	// +kubebuilder:default=None
	// +optional
	AccessLog AccessLog `json:"accessLog,omitempty"`
}

// MeshTopologyStatus tells what the topology came to.
type MeshTopologyStatus struct {
	// ObservedGeneration of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions: Accepted (reasons Accepted, NothingSelected, Overlaps,
	// UnknownProxyVersion, InvalidSelector, TrustDomainMismatch), Ready (reasons
	// Ready, Progressing, NodesNotReady; NodesAway: True while all proxies serve that are on
	// nodes which are Ready, Unknown if there is none), Redirected (reasons AsSpecified,
	// Progressing, NodesDiffer, OlderDecides), IdentityReady (reasons Ready,
	// ChangingRoots, OlderDecides, InvalidAuthority, AuthorityExpired, NoRootKey,
	// InvalidIssuer, InvalidTrustDomain, NotRenewed), PodRangesKnown (reasons Known,
	// NodesWithoutRanges), EmergencyBypass (True with reasons InForce and Progressing;
	// False with Off and NotInMesh).
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Bypasses that are on.
	// +listType=map
	// +listMapKey=namespace
	// +optional
	Bypasses []BypassStatus `json:"bypasses,omitempty"`
	// Namespaces that are in the mesh by this topology.
	// +optional
	Namespaces int32 `json:"namespaces,omitempty"`
	// Pods that are in the mesh by this topology.
	// +optional
	Pods int32 `json:"pods,omitempty"`
	// Proxies wanted: one per tenant and node that hosts pods of it.
	// +optional
	Proxies int32 `json:"proxies,omitempty"`
	// ReadyProxies that serve now.
	// +optional
	ReadyProxies int32 `json:"readyProxies,omitempty"`
}

// MeshTopology says which namespaces are in the mesh and how their proxies are
// cut. Where two of them pick the same namespace, the older one counts.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=mtopo,categories=bulkhead
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].reason`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Namespaces",type=integer,JSONPath=`.status.namespaces`
// +kubebuilder:printcolumn:name="Pods",type=integer,JSONPath=`.status.pods`
// +kubebuilder:printcolumn:name="Proxies",type=integer,JSONPath=`.status.proxies`
// +kubebuilder:printcolumn:name="Version",type=string,JSONPath=`.spec.proxy.version`
// +kubebuilder:printcolumn:name="Bypass",type=string,JSONPath=`.status.conditions[?(@.type=="EmergencyBypass")].status`
// +kubebuilder:printcolumn:name="PlainText",type=string,JSONPath=`.spec.plainText`,priority=1
// +kubebuilder:printcolumn:name="Redirection",type=string,JSONPath=`.spec.redirection`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type MeshTopology struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   MeshTopologySpec   `json:"spec"`
	Status MeshTopologyStatus `json:"status,omitempty"`
}

// MeshTopologyList is a list of MeshTopology.
//
// +kubebuilder:object:root=true
type MeshTopologyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []MeshTopology `json:"items"`
}
