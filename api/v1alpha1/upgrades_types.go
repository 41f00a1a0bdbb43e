package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// UpgradePolicy is what a namespace says of upgrades of its own tenants' proxies.
// Proxies that it shares with others (isolation Node) don't ask it.
//
// +kubebuilder:validation:XValidation:rule="has(self.drain) || has(self.notBefore) || has(self.windows)",message="set at least one of drain, notBefore, windows"
type UpgradePolicy struct {
	// Drain is for how long connections may go on in a proxy that another version has
	// replaced; it ends with its last one. At most 24h. Of several policies the
	// longest counts. Default: the agents', 15s.
	// +kubebuilder:validation:Pattern=`^([0-9]+(h|m|s))+$`
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s') && duration(self) <= duration('24h')",message="drain must be 1s to 24h"
	// +optional
	Drain string `json:"drain,omitempty"`

	// NotBefore holds a rollout back from these tenants until then, but for no longer
	// than the rollout lets namespaces (spec.maxHold). One that has begun goes on, and
	// what is taken back is taken back at once.
	// +optional
	NotBefore *metav1.Time `json:"notBefore,omitempty"`

	// Windows are when a rollout may begin with these tenants, within the same bound.
	// Default: at any time.
	// +kubebuilder:validation:MaxItems=14
	// +listType=atomic
	// +optional
	Windows []UpgradeWindow `json:"windows,omitempty"`
}

// Weekday of a window.
//
// +kubebuilder:validation:Enum=Monday;Tuesday;Wednesday;Thursday;Friday;Saturday;Sunday
type Weekday string

// UpgradeWindow is a time of the week.
type UpgradeWindow struct {
	// Days on which it begins. Default: every day.
	// +kubebuilder:validation:MaxItems=7
	// +listType=set
	// +optional
	Days []Weekday `json:"days,omitempty"`
	// Start is when, in UTC: 22:00.
	// +kubebuilder:validation:Pattern=`^([01][0-9]|2[0-3]):[0-5][0-9]$`
	Start string `json:"start"`
	// Duration of it, at most 24h.
	// +kubebuilder:validation:Pattern=`^([0-9]+(h|m))+$`
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('5m') && duration(self) <= duration('24h')",message="duration must be 5m to 24h"
	Duration string `json:"duration"`
}
