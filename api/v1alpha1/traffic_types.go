package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Direction is of a connection, as the pod sees it.
//
// +kubebuilder:validation:Enum=Outbound;Inbound
type Direction string

// The values of Direction.
const (
	// DirectionOutbound is for connections that the pod makes.
	DirectionOutbound Direction = "Outbound"
	// DirectionInbound is for those that are made to it.
	DirectionInbound Direction = "Inbound"
)

// Exclusion leaves new connections out of the mesh: they pass in the clear, by no
// proxy, and without identity. Where it has both port and cidr, both must fit.
type Exclusion struct {
	// Direction of the connections.
	Direction Direction `json:"direction"`
	// Port that they are made to. Default: all of them.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	// +optional
	Port int32 `json:"port,omitempty"`
	// CIDR is the network of the pod's peer, for example 10.0.0.0/8 or
	// 2001:db8::/32. Default: all of them.
	// +kubebuilder:validation:MaxLength=43
	// +optional
	CIDR string `json:"cidr,omitempty"`
}

// Annotations by which a pod excludes connections of its own, where its
// MeshTopology lets it (podExclusions). A comma-separated list of PORT, CIDR and
// CIDR:PORT, for example "5432, 10.0.0.0/8, 2001:db8::/32:443"; together at most
// 8. They can be changed while the pod runs. One that can't be read is told in an
// event of the pod and changes nothing. Inbound ones don't count where plain text
// is Strict.
const (
	AnnotationExcludeOutbound = "mesh.bulkhead.dev/exclude-outbound"
	AnnotationExcludeInbound  = "mesh.bulkhead.dev/exclude-inbound"
)

// MaxPodExclusions is how many exclusions a pod can have of its own.
const MaxPodExclusions = 8

// PodExclusions says whether pods may exclude connections.
//
// +kubebuilder:validation:Enum=Allow;Deny
type PodExclusions string

// The values of PodExclusions.
const (
	PodExclusionsAllow PodExclusions = "Allow"
	PodExclusionsDeny  PodExclusions = "Deny"
)

// PlainText says what becomes of connections from outside of the mesh.
//
// +kubebuilder:validation:Enum=Permissive;Strict
type PlainText string

// The values of PlainText.
const (
	// PlainTextPermissive pods take connections in plain text from clients that
	// aren't in the mesh.
	PlainTextPermissive PlainText = "Permissive"
	// PlainTextStrict pods refuse them before they begin. What comes through a
	// NodePort, or is masqueraded, counts as from outside; what the node itself
	// makes, as the kubelet's probes, does not.
	PlainTextStrict PlainText = "Strict"
)

// EmergencyBypass takes a namespace past its proxies.
type EmergencyBypass struct {
	// Namespace whose pods bypass the mesh. It must be one of this MeshTopology's.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Namespace string `json:"namespace"`
	// RequestedBy is the user name of whoever adds this entry; the API server
	// refuses another one (kubectl auth whoami tells it).
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	RequestedBy string `json:"requestedBy"`
	// Reason for people: what is wrong, and what must happen before this ends.
	// +kubebuilder:validation:MinLength=8
	// +kubebuilder:validation:MaxLength=512
	Reason string `json:"reason"`
}

// BypassStatus is a bypass that is on.
type BypassStatus struct {
	// Namespace whose pods bypass the mesh.
	Namespace string `json:"namespace"`
	// RequestedBy is who asked for it.
	RequestedBy string `json:"requestedBy"`
	// Reason that was given.
	Reason string `json:"reason"`
	// Since when the operator has it on.
	Since metav1.Time `json:"since"`
	// Pods of the namespace that are in the mesh.
	// +optional
	Pods int32 `json:"pods,omitempty"`
	// BypassedPods of them whose nodes say so.
	// +optional
	BypassedPods int32 `json:"bypassedPods,omitempty"`
}
