package translate

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Standing is what a pod is to the mesh.
type Standing uint8

const (
	// Absent pods have no address of their own now: not bound to a node, or finished.
	Absent Standing = iota
	// Host pods use their node's network; they are the node.
	Host
	// Outside pods are reached in plain text.
	Outside
	// Member pods are workloads of the mesh.
	Member
)

// Pod is what the mesh knows of a pod, without its addresses.
type Pod struct {
	UID, Namespace, Name, Node, ServiceAccount string
	Standing                                   Standing
	// Identity and Tenant of members.
	Identity model.Identity
	Tenant   model.Tenant
	// OptedOut pods of a namespace in the mesh aren't members.
	OptedOut bool
	// Bypassed members pass the mesh by for now; others reach them in plain text.
	Bypassed bool
	// Exclusions of its own.
	Exclusions []v1alpha1.Exclusion
	// Problem of its annotations.
	Problem Problem
}

// NewPod says what a pod is to the mesh, by the membership of its namespace.
func NewPod(p *corev1.Pod, m Membership) Pod {
	pod := Pod{UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, Node: p.Spec.NodeName, ServiceAccount: cmp.Or(p.Spec.ServiceAccountName, "default")}
	switch {
	case pod.Node == "" || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed:
		pod.Standing = Absent
	case p.Spec.HostNetwork:
		pod.Standing = Host
	case !m.IsMember() || p.Annotations[corev1.MirrorPodAnnotationKey] != "":
		// A mirror pod's fields are its kubelet's word: no identity comes of them.
		pod.Standing = Outside
	case p.Labels[v1alpha1.LabelOptOut] == "true":
		pod.Standing, pod.OptedOut = Outside, true
	default:
		pod.Standing = Member
		pod.Identity = model.Identity{TrustDomain: m.TrustDomain, Namespace: p.Namespace, ServiceAccount: pod.ServiceAccount}
		pod.Tenant = m.Tenant(p.Namespace, pod.ServiceAccount, p.Name)
		pod.Bypassed = m.Bypass
		pod.readExclusions(p, m)
	}
	return pod
}

func (p *Pod) readExclusions(o *corev1.Pod, m Membership) {
	switch list, err := parseExclusions(o.Annotations); {
	case err != nil:
		p.Problem = Problem{ReasonExclusionsInvalid, "its exclusions stay as they were: " + err.Error()}
	case len(list) > 0 && !m.PodExclusions:
		p.Problem = Problem{ReasonExclusionsDenied, fmt.Sprintf("its exclusions don't count: MeshTopology %s has podExclusions: Deny", m.Topology)}
	default:
		p.Exclusions = list
	}
}

// Workload of the pod with these addresses.
func (p Pod) Workload(ips []netip.Addr) model.Workload {
	return model.Workload{UID: p.UID, Namespace: p.Namespace, Name: p.Name, Node: p.Node, Identity: p.Identity, Tenant: p.Tenant, IPs: ips}
}

// PodAddrs are the addresses in a pod's status, sorted; what is no address of a
// pod is left out.
func PodAddrs(ips []corev1.PodIP) []netip.Addr {
	var addrs []netip.Addr
	for _, ip := range ips {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			addrs = append(addrs, a)
		}
	}
	return ValidAddrs(addrs)
}

// ValidAddrs are the addresses that a pod or service can have, unmapped, sorted
// and each once.
func ValidAddrs(addrs []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range addrs {
		if a = a.Unmap(); a.IsValid() && a.Zone() == "" && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// InRanges reports whether addr is in one of the node's pod ranges. A node without
// ranges has an address manager that Kubernetes knows nothing of: all addresses
// are possible.
func InRanges(addr netip.Addr, ranges []netip.Prefix) bool {
	return len(ranges) == 0 || slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// Proxy is one tenant's proxy on one node with the workloads that have addresses.
func Proxy(key model.ProxyKey, zone string, m Membership, workloads []model.Workload) model.Proxy {
	workloads = slices.Clone(workloads)
	slices.SortFunc(workloads, func(a, b model.Workload) int { return strings.Compare(a.UID, b.UID) })
	return model.Proxy{Node: key.Node, Tenant: key.Tenant, Zone: zone, Workloads: workloads, RejectOutside: m.RejectOutside, AccessLog: m.AccessLog}
}
