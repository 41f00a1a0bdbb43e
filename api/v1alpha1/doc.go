// Package v1alpha1 holds Bulkhead's Kubernetes types, API group
// mesh.bulkhead.dev. It is a contract: no logic, no imports of ours.
//
// +kubebuilder:object:generate=true
// +groupName=mesh.bulkhead.dev
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var (
	// GroupVersion is the API group and version of this package.
	GroupVersion = schema.GroupVersion{Group: "mesh.bulkhead.dev", Version: "v1alpha1"}

	schemeBuilder = runtime.NewSchemeBuilder(addTypes)

	// AddToScheme adds this package's types to a scheme.
	AddToScheme = schemeBuilder.AddToScheme
)

func addTypes(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&IsolationPolicy{}, &IsolationPolicyList{},
		&MeshTopology{}, &MeshTopologyList{},
		&NodeProxy{}, &NodeProxyList{},
		&ProxyRollout{}, &ProxyRolloutList{},
		&TenantProxy{}, &TenantProxyList{},
	)
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}

// Reasons and types of conditions that more than one kind uses.
const (
	// ConditionAccepted tells whether the object is valid and in force.
	ConditionAccepted = "Accepted"
	// ConditionReady tells whether what the object asks for runs.
	ConditionReady = "Ready"
	// ConditionEmergencyBypass is True while pods pass the mesh by.
	ConditionEmergencyBypass = "EmergencyBypass"
	// ConditionRedirected tells whether nodes lead connections to their proxies as
	// the object asks for.
	ConditionRedirected = "Redirected"
	// ConditionConfigured tells whether the proxies took all configuration that was
	// made for them.
	ConditionConfigured = "Configured"
	// ConditionStable: no process of the proxies has ended lately by what isn't the
	// mesh's will.
	ConditionStable = "Stable"
	// ConditionServed is a Service's: whether proxies can reach it as it is written.
	// It is there only while it is false.
	ConditionServed = "mesh.bulkhead.dev/Served"
	// ConditionIdentityReady tells whether identities can be proven now and
	// certificates are renewed in time.
	ConditionIdentityReady = "IdentityReady"
	// ConditionPodRangesKnown tells whether the nodes with pods of the mesh have
	// podCIDRs: pods of one without are dialled in the clear by their own addresses.
	ConditionPodRangesKnown = "PodRangesKnown"
	// ConditionVersionAvailable tells whether all nodes can run the version that a
	// rollout brings.
	ConditionVersionAvailable = "VersionAvailable"
)
