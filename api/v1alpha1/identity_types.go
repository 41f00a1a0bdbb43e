package v1alpha1

// IdentitySpec says how workloads prove who they are.
type IdentitySpec struct {
	// CertificateTTL is how long the certificates of these namespaces' workloads
	// live. They are renewed at half of it, so half of it is what a mesh survives
	// without its operator. From 5m to 720h.
	// +kubebuilder:default="1h"
	// +kubebuilder:validation:Pattern=`^([0-9]+(h|m|s))+$`
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('5m') && duration(self) <= duration('720h')",message="certificateTTL must be 5m to 720h"
	// +optional
	CertificateTTL string `json:"certificateTTL,omitempty"`

	// IssuerSecret names a Secret in the operator's namespace with an intermediate
	// that signs all identities of the mesh: tls.crt, tls.key and ca.crt, as
	// cert-manager writes them. It is read again every 10 s. Of several
	// MeshTopologies the oldest says. Default: an authority of the mesh's own.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`
	// +kubebuilder:validation:XValidation:rule="self != 'bulkhead-ca'",message="bulkhead-ca is the operator's own"
	// +optional
	IssuerSecret string `json:"issuerSecret,omitempty"`
}
