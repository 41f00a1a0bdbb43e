package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// RolloutTarget is the Envoy that a rollout brings.
type RolloutTarget struct {
	// Version of Envoy, 1.39.0 or newer. With an image it is what the image's label
	// org.opencontainers.image.version says; without one, agents must bring it along:
	// see status.proxyVersions of the NodeProxies.
	// +kubebuilder:validation:Pattern=`^[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]{1,24})?$`
	// +kubebuilder:validation:MaxLength=40
	// +kubebuilder:validation:XValidation:rule="int(self.split('.')[0]) > 1 || int(self.split('.')[0]) == 1 && int(self.split('.')[1]) >= 39",message="version must be 1.39.0 or newer: older ones can't be configured"
	Version string `json:"version"`

	// Image that has it, by digest: registry.example/bulkhead/envoy@sha256:….
	// Agents fetch it with the credentials of the Secret bulkhead-registry of the
	// operator's namespace, if there is one. Default: what the agents bring along.
	// +kubebuilder:validation:Pattern=`^[a-z0-9A-Z.:/_\[\]-]+@sha256:[0-9a-f]{64}$`
	// +kubebuilder:validation:MaxLength=512
	// +optional
	Image string `json:"image,omitempty"`
}

// RolloutStep is one step of a rollout. The tenants of the steps before it take part
// as well.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.namespaces) && has(self.tenantsPercent))",message="set namespaces or tenantsPercent, not both"
// +kubebuilder:validation:XValidation:rule="!(has(self.pause) && has(self.approval) && self.approval)",message="set pause or approval, not both"
type RolloutStep struct {
	// Namespaces whose tenants join in this step. Shared proxies of nodes join with
	// the last step.
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=63
	// +listType=set
	// +optional
	Namespaces []string `json:"namespaces,omitempty"`

	// TenantsPercent of all tenants take part from this step on, in an order that
	// stays. Default, without namespaces: all.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	// +optional
	TenantsPercent *int32 `json:"tenantsPercent,omitempty"`

	// Weight is the percentage of new connections that goes to the new version, on
	// every node of the tenants that take part. With 100 the old version finishes
	// what it has, and ends. A tenant's weight never falls from one step to the next.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	Weight int32 `json:"weight"`

	// Pause is for how long to watch after the step is reached everywhere. Default:
	// not at all.
	// +kubebuilder:validation:Pattern=`^([0-9]+(h|m|s))+$`
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:XValidation:rule="duration(self) <= duration('168h')",message="pause must be at most 168h"
	// +optional
	Pause string `json:"pause,omitempty"`

	// Approval has the rollout wait, once the step is reached, until
	// spec.approvedSteps says that it may go on.
	// +optional
	Approval bool `json:"approval,omitempty"`
}

// ProxyRolloutSpec says how another version of Envoy comes to all tenants.
//
// +kubebuilder:validation:XValidation:rule="self.steps[self.steps.size()-1].weight == 100 && !has(self.steps[self.steps.size()-1].namespaces) && (!has(self.steps[self.steps.size()-1].tenantsPercent) || self.steps[self.steps.size()-1].tenantsPercent == 100)",message="the last step must bring all tenants to weight 100"
// +kubebuilder:validation:XValidation:rule="self.target == oldSelf.target",message="target can't be changed: create another ProxyRollout"
type ProxyRolloutSpec struct {
	// Target is what is rolled out.
	Target RolloutTarget `json:"target"`

	// Steps, one after another. Each is reached when all nodes of its tenants say so.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	Steps []RolloutStep `json:"steps"`

	// ReadyWithin is how long a new proxy may take, from its start, until it holds
	// what the one before it holds and takes connections. One that takes longer ends
	// the rollout.
	// +kubebuilder:default="2m"
	// +kubebuilder:validation:Pattern=`^([0-9]+(h|m|s))+$`
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('5s') && duration(self) <= duration('1h')",message="readyWithin must be 5s to 1h"
	// +optional
	ReadyWithin string `json:"readyWithin,omitempty"`

	// MaxUnavailable is how many nodes may lag behind, because they lack the version,
	// aren't Ready, or their agents say nothing, without holding up the others.
	// +kubebuilder:default=0
	// +kubebuilder:validation:Minimum=0
	// +optional
	MaxUnavailable int32 `json:"maxUnavailable,omitempty"`

	// MaxHold is for how long, from the rollout's start, namespaces may hold it back
	// from their tenants (IsolationPolicy spec.upgrades). Then it begins there as well.
	// +kubebuilder:default="168h"
	// +kubebuilder:validation:Pattern=`^([0-9]+(h|m|s))+$`
	// +kubebuilder:validation:MaxLength=20
	// +optional
	MaxHold string `json:"maxHold,omitempty"`

	// MaxHeldBackPercent of the namespaces may have tenants that are left at the version
	// before because of a fault of their own (see status.heldBack) before all are taken
	// back; one always may, unless it is 0. At most 64.
	// +kubebuilder:default=10
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100
	// +optional
	MaxHeldBackPercent *int32 `json:"maxHeldBackPercent,omitempty"`

	// Deadline of all of it, from its start: what isn't done by then is rolled back.
	// Default: none.
	// +kubebuilder:validation:Pattern=`^([0-9]+(h|m|s))+$`
	// +kubebuilder:validation:MaxLength=20
	// +optional
	Deadline string `json:"deadline,omitempty"`

	// Analysis is by how much the new version may fare worse than the old one. Default:
	// as its fields say. It takes its time: give steps a pause.
	// +optional
	Analysis *RolloutAnalysis `json:"analysis,omitempty"`

	// Paused keeps everything as it is. Verdicts still roll back.
	// +optional
	Paused bool `json:"paused,omitempty"`

	// ApprovedSteps is how many steps from the first on may be left; it counts where
	// a step asks for approval.
	// +kubebuilder:validation:Minimum=0
	// +optional
	ApprovedSteps int32 `json:"approvedSteps,omitempty"`

	// Abort gives all connections back to the version before, on every node. It can't
	// be taken back.
	// +kubebuilder:validation:XValidation:rule="self || !oldSelf",message="abort can't be taken back: create another ProxyRollout"
	// +optional
	Abort bool `json:"abort,omitempty"`
}

// RolloutPhase is how far a rollout is.
//
// +kubebuilder:validation:Enum=Pending;Progressing;Waiting;Paused;RollingBack;RolledBack;Aborting;Aborted;Succeeded
type RolloutPhase string

// The values of RolloutPhase.
const (
	// RolloutPending waits for another rollout.
	RolloutPending RolloutPhase = "Pending"
	// RolloutProgressing brings proxies to the step.
	RolloutProgressing RolloutPhase = "Progressing"
	// RolloutWaiting has reached the step and waits for its pause or approval.
	RolloutWaiting RolloutPhase = "Waiting"
	// RolloutPaused stays as it is by spec.paused.
	RolloutPaused RolloutPhase = "Paused"
	// RolloutRollingBack and RolloutRolledBack follow a verdict.
	RolloutRollingBack RolloutPhase = "RollingBack"
	RolloutRolledBack  RolloutPhase = "RolledBack"
	// RolloutAborting and RolloutAborted follow spec.abort.
	RolloutAborting RolloutPhase = "Aborting"
	RolloutAborted  RolloutPhase = "Aborted"
	// RolloutSucceeded: the version is that of all tenants.
	RolloutSucceeded RolloutPhase = "Succeeded"
)

// RolloutVerdict is why a rollout was rolled back.
type RolloutVerdict struct {
	// Reason: Crashed, NotReady, ConfigRejected, DeadlineExceeded, or a figure by which
	// the new version fared worse: ConnectFailures, Resets, HandshakeFailures, FirstByte,
	// ServerErrors, Latency, CPU, Memory.
	Reason string `json:"reason"`
	// Tenant and Node where it was seen; "" for the deadline, and for what all tenants
	// together show. Of a figure it is the node where it is worst.
	// +optional
	Tenant string `json:"tenant,omitempty"`
	// +optional
	Node string `json:"node,omitempty"`
	// Message says which figure was beyond which limit.
	// +kubebuilder:validation:MaxLength=1024
	Message string `json:"message"`
	// At is when it was judged.
	At metav1.Time `json:"at"`
}

// HeldBackTenant is a tenant that the rollout goes on without.
type HeldBackTenant struct {
	// Tenant that stays at the version before; the namespace, with all of its tenants,
	// where a second one had to.
	// +kubebuilder:validation:MaxLength=330
	Tenant string `json:"tenant"`
	// Node where it was seen.
	Node string `json:"node"`
	// Reason: Crashed or NotReady.
	Reason string `json:"reason"`
	// Message says what was seen, and why that is the tenant's own fault.
	// +kubebuilder:validation:MaxLength=1024
	Message string `json:"message"`
	// At is when it was judged.
	At metav1.Time `json:"at"`
}

// ProxyRolloutStatus tells what a rollout came to.
type ProxyRolloutStatus struct {
	// ObservedGeneration of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions: VersionAvailable (True with reason Available; False with Fetching,
	// NodesAway, UnknownProxyVersion, or what an image can't be had for: ImageNotFound,
	// Unauthorized, RegistryUnreachable, DigestMismatch, InvalidImage, TooOld, DiskFull,
	// Failed). Of a rollout that is over they stay as they were.
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Phase of the rollout.
	// +optional
	Phase RolloutPhase `json:"phase,omitempty"`
	// Message says in words what is happening, what it waits for, and what can be done.
	// +kubebuilder:validation:MaxLength=2048
	// +optional
	Message string `json:"message,omitempty"`
	// Version as NodeProxies name it: with an image, its digest's beginning is part
	// of it.
	// +optional
	Version string `json:"version,omitempty"`
	// From are the versions that tenants had when it began, but for this one. Where a
	// MeshTopology asks for one of them, a rollout that succeeded decides in its place.
	// +kubebuilder:validation:MaxItems=32
	// +listType=set
	// +optional
	From []string `json:"from,omitempty"`
	// Step that is being reached or was, from 1.
	// +optional
	Step int32 `json:"step,omitempty"`
	// Weight of the step.
	// +optional
	Weight int32 `json:"weight,omitempty"`
	// Tenants that take part, and those of them that have reached the step on all of
	// their nodes.
	// +optional
	Tenants int32 `json:"tenants,omitempty"`
	// +optional
	ReachedTenants int32 `json:"reachedTenants,omitempty"`
	// StartedAt is when it began, ReachedAt when its step was reached, and FinishedAt
	// when it ended.
	// +optional
	StartedAt *metav1.Time `json:"startedAt,omitempty"`
	// +optional
	ReachedAt *metav1.Time `json:"reachedAt,omitempty"`
	// +optional
	FinishedAt *metav1.Time `json:"finishedAt,omitempty"`
	// StoppedAt is when it began to go back.
	// +optional
	StoppedAt *metav1.Time `json:"stoppedAt,omitempty"`
	// HeldBack are tenants whose new proxies failed by a fault of their own: they stay
	// at the version before until another ProxyRollout, and the others go on.
	// +kubebuilder:validation:MaxItems=64
	// +listType=map
	// +listMapKey=tenant
	// +optional
	HeldBack []HeldBackTenant `json:"heldBack,omitempty"`
	// Verdict that rolled it back.
	// +optional
	Verdict *RolloutVerdict `json:"verdict,omitempty"`
}

// ProxyRollout brings another version of Envoy to all tenants, step by step, and
// takes it back by itself where it fails. One at a time is at work, the oldest.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=prollout,categories=bulkhead
// +kubebuilder:printcolumn:name="Version",type=string,JSONPath=`.spec.target.version`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Step",type=integer,JSONPath=`.status.step`
// +kubebuilder:printcolumn:name="Weight",type=integer,JSONPath=`.status.weight`
// +kubebuilder:printcolumn:name="Tenants",type=integer,JSONPath=`.status.tenants`
// +kubebuilder:printcolumn:name="Reached",type=integer,JSONPath=`.status.reachedTenants`
// +kubebuilder:printcolumn:name="Verdict",type=string,JSONPath=`.status.verdict.reason`
// +kubebuilder:printcolumn:name="HeldBack",type=string,JSONPath=`.status.heldBack[*].tenant`
// +kubebuilder:printcolumn:name="Since",type=date,JSONPath=`.status.startedAt`
// +kubebuilder:printcolumn:name="Ended",type=date,JSONPath=`.status.finishedAt`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.message`,priority=1
type ProxyRollout struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   ProxyRolloutSpec   `json:"spec"`
	Status ProxyRolloutStatus `json:"status,omitempty"`
}

// ProxyRolloutList is a list of ProxyRollout.
//
// +kubebuilder:object:root=true
type ProxyRolloutList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ProxyRollout `json:"items"`
}
