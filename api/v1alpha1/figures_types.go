package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// GenerationFigures are how one process of a tenant fared in the same time as the one
// beside it. They are there while a canary has a share of the connections. Where they
// are of the kernel the proxy can't gloss over them; the others are Envoy's own word.
type GenerationFigures struct {
	// At is when they were read, Seconds how much of the time before that they cover:
	// the last minute, or up to an hour if little happened in it.
	At metav1.Time `json:"at"`
	// +optional
	Seconds int64 `json:"seconds,omitempty"`
	// Unread says why what Envoy counts, CPU and memory end before At, of either: one of
	// them doesn't answer. What the kernel counts is.
	// +kubebuilder:validation:MaxLength=300
	// +optional
	Unread string `json:"unread,omitempty"`

	// Connections in TCP that the process got, tunnels left out; how many of them it
	// closed or reset before a byte came back, though the client had not; and how many
	// it reset later. Of the kernel; 0 with Netfilter.
	// +optional
	Connections int64 `json:"connections,omitempty"`
	// +optional
	Unanswered int64 `json:"unanswered,omitempty"`
	// +optional
	Resets int64 `json:"resets,omitempty"`
	// FirstByte counts connections by the time from their SYN to the first byte that
	// came back: below 128 µs, 256 µs, and so on in powers of two, the last one being the
	// rest. Of the kernel, from 10 s after the canary took its first connection on: a
	// new process has its tunnels to open.
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	// +optional
	FirstByte []int64 `json:"firstByte,omitempty"`

	// Upstreams are connections that it opened, and UpstreamFailures those that failed
	// before they were there; without those to the tenant's pods, whose ports peers chose.
	// +optional
	Upstreams int64 `json:"upstreams,omitempty"`
	// +optional
	UpstreamFailures int64 `json:"upstreamFailures,omitempty"`
	// Handshakes of TLS, to either side, and those of them that failed.
	// +optional
	Handshakes int64 `json:"handshakes,omitempty"`
	// +optional
	HandshakeFailures int64 `json:"handshakeFailures,omitempty"`
	// Tunnelled connections that peers asked it to deliver, in how many tunnels, and
	// those that it answered with a server error.
	// +optional
	Tunnelled int64 `json:"tunnelled,omitempty"`
	// +optional
	TunnelConnections int64 `json:"tunnelConnections,omitempty"`
	// +optional
	TunnelErrors int64 `json:"tunnelErrors,omitempty"`
	// Requests in HTTP that it read, on how many connections, and how many were answered
	// with 5xx, by whomever.
	// +optional
	Requests int64 `json:"requests,omitempty"`
	// +optional
	RequestConnections int64 `json:"requestConnections,omitempty"`
	// +optional
	ServerErrors int64 `json:"serverErrors,omitempty"`
	// Latency counts requests by how long they took in milliseconds: up to 0.5, 1, 5,
	// 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000 and more. From
	// 10 s after the canary took its first connection on.
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	// +optional
	Latency []int64 `json:"latency,omitempty"`

	// CPUMilliseconds that the process took, from 10 s after the canary took its first
	// connection on, and what it did in that: connections and requests, and bytes.
	// +optional
	CPUMilliseconds int64 `json:"cpuMilliseconds,omitempty"`
	// +optional
	Work int64 `json:"work,omitempty"`
	// +optional
	Bytes int64 `json:"bytes,omitempty"`
	// PrivateBytes of memory and OpenConnections that it has now.
	// +optional
	PrivateBytes int64 `json:"privateBytes,omitempty"`
	// +optional
	OpenConnections int64 `json:"openConnections,omitempty"`
}

// RolloutFigure is what a new version is compared by with the old one.
//
// +kubebuilder:validation:Enum=ConnectFailures;Resets;HandshakeFailures;FirstByte;ServerErrors;Latency;CPU;Memory
type RolloutFigure string

// The values of RolloutFigure; they are reasons of verdicts too.
const (
	FigureConnectFailures   RolloutFigure = "ConnectFailures"
	FigureResets            RolloutFigure = "Resets"
	FigureHandshakeFailures RolloutFigure = "HandshakeFailures"
	FigureFirstByte         RolloutFigure = "FirstByte"
	FigureServerErrors      RolloutFigure = "ServerErrors"
	FigureLatency           RolloutFigure = "Latency"
	FigureCPU               RolloutFigure = "CPU"
	FigureMemory            RolloutFigure = "Memory"
)

// RolloutAnalysis is by how much a new version may fare worse than the old one, on the
// same nodes at the same time, for a tenant or for all together, before the rollout is
// taken back. Crashes and refused configuration need no limit.
type RolloutAnalysis struct {
	// MinSample is how many connections, handshakes or requests each of the two must
	// have had, for a tenant to be judged by them.
	// +kubebuilder:default=20
	// +kubebuilder:validation:Minimum=10
	// +kubebuilder:validation:Maximum=100000
	// +optional
	MinSample int32 `json:"minSample,omitempty"`

	// FailurePercent is how many more of 100 connections, handshakes or requests may
	// fail. The difference must be beyond chance as well.
	// +kubebuilder:default=5
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	// +optional
	FailurePercent int32 `json:"failurePercent,omitempty"`

	// SlowPercent is how many more of 100 connections or requests may be slow, which is
	// more than twice as long as nine of ten take with the old version, and more than
	// 10 ms. The difference must be beyond chance as well.
	// +kubebuilder:default=20
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	// +optional
	SlowPercent int32 `json:"slowPercent,omitempty"`

	// CPUPercent is what a connection or request may take of what it takes with the old
	// version, and so a byte: both must be beyond it.
	// +kubebuilder:default=300
	// +kubebuilder:validation:Minimum=110
	// +kubebuilder:validation:Maximum=10000
	// +optional
	CPUPercent int32 `json:"cpuPercent,omitempty"`

	// MemoryPercent is what a process may have of what the old one has, for as many
	// open connections. A quarter of the tenant's memory.high, or else of its
	// memory.max, at most 64 MiB, comes on top.
	// +kubebuilder:default=200
	// +kubebuilder:validation:Minimum=110
	// +kubebuilder:validation:Maximum=10000
	// +optional
	MemoryPercent int32 `json:"memoryPercent,omitempty"`

	// Ignore has figures by which nothing is judged.
	// +kubebuilder:validation:MaxItems=8
	// +listType=set
	// +optional
	Ignore []RolloutFigure `json:"ignore,omitempty"`

	// IgnoreNamespaces have no say: what their tenants' traffic shows takes nothing
	// back. For those whose pods could make a new version look bad.
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=63
	// +listType=set
	// +optional
	IgnoreNamespaces []string `json:"ignoreNamespaces,omitempty"`
}
