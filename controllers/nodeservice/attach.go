package nodeservice

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/validation"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// podRef is a pod as an agent names it.
type podRef struct{ UID, Namespace, Name string }

// String is as long as the names of pods can be at most: an agent can send any.
func (r podRef) String() string {
	return fmt.Sprintf("%.63s/%.253s (%.128s)", r.Namespace, r.Name, r.UID)
}

// memberPod is a pod of the mesh that runs, or is about to, on the caller's node.
type memberPod struct {
	*corev1.Pod
	identity model.Identity
	tenant   model.Tenant
}

// member reads a pod and checks that the caller may act for it.
func (s *Service) member(ctx context.Context, pods Pods, c Caller, ref podRef) (memberPod, error) {
	// Also so that the names are no path of the API server's.
	if len(validation.IsDNS1123Label(ref.Namespace)) > 0 || len(validation.IsDNS1123Subdomain(ref.Name)) > 0 ||
		ref.UID == "" || len(ref.UID) > 128 {
		return memberPod{}, status.Errorf(codes.InvalidArgument, "pod_uid %.64q, pod_namespace %.64q and pod_name %.64q don't name a pod", ref.UID, ref.Namespace, ref.Name)
	}
	pod, err := pods.Live(ctx, ref.Namespace, ref.Name)
	if err != nil {
		if ctx.Err() != nil {
			return memberPod{}, status.FromContextError(ctx.Err()).Err()
		}
		if apierrors.IsNotFound(err) {
			return memberPod{}, status.Errorf(codes.Unavailable, "pod %s isn't visible", ref)
		}
		return memberPod{}, status.Errorf(codes.Unavailable, "read pod %s: %v", ref, err)
	}
	unavailable := func(what string) (memberPod, error) {
		return memberPod{}, status.Errorf(codes.Unavailable, "pod %s %s", ref, what)
	}
	id, tenant, ok := s.o.Mesh.Member(pod)
	denied := func(cause, what string) (memberPod, error) {
		return memberPod{}, refusal(codes.PermissionDenied, cause, id, "pod %s %s", ref, what)
	}
	switch _, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]; {
	case string(pod.UID) != ref.UID:
		return unavailable("isn't visible: another pod of that name is")
	case pod.Spec.NodeName == "":
		return unavailable("isn't bound to a node yet")
	case pod.Spec.NodeName != c.Node:
		return denied(CauseOtherNode, "isn't on node "+c.Node)
	case mirror:
		return denied(CauseMirrorPod, "is a mirror pod: its node made it up")
	case pod.Spec.HostNetwork:
		return denied(CauseHostNetwork, "is in its node's network")
	case finished(pod):
		return denied(CauseFinished, "has finished")
	}
	// A mesh that doesn't know the node doesn't know who is a member either.
	if _, known := s.o.Mesh.NodePodCIDRs(c.Node); !known {
		return unavailable("is on node " + c.Node + ", which isn't visible")
	}
	if !ok || id.IsZero() || tenant.IsZero() {
		return denied(CauseNoMember, "isn't a member of the mesh")
	}
	return memberPod{pod, id, tenant}, nil
}

func finished(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// AttachPod implements nodev1alpha1.NodeServiceServer.
func (s *Service) AttachPod(ctx context.Context, r *nodev1alpha1.AttachPodRequest) (*nodev1alpha1.AttachPodResponse, error) {
	caller, done, err := s.enter(ctx, "AttachPod", attachesPerNode)
	if err != nil {
		return nil, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, s.o.AttachTimeout)
	defer cancel()
	ref := podRef{UID: r.GetPodUid(), Namespace: r.GetPodNamespace(), Name: r.GetPodName()}
	addrs, err := parseAddrs(r.GetIps())
	if err != nil {
		return nil, s.refused(caller, "AttachPod", ref, err)
	}
	p, err := s.member(ctx, s.o.Pods, caller, ref)
	if err != nil {
		return nil, s.refused(caller, "AttachPod", ref, err)
	}
	if err := s.checkAddrs(ctx, caller, p, addrs); err != nil {
		return nil, s.refused(caller, "AttachPod", ref, err)
	}
	if err := s.o.Mesh.Announce(caller.Node, p.Pod, addrs); err != nil {
		return nil, status.Errorf(codes.Unavailable, "announce pod %s: %v", ref, err)
	}
	if err := s.o.Proxies.WaitServed(ctx, model.ProxyKey{Node: caller.Node, Tenant: p.tenant}, ref.UID); err != nil {
		code := codes.Unavailable
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			code = codes.DeadlineExceeded
		case errors.Is(err, context.Canceled):
			code = codes.Canceled
		}
		return nil, status.Errorf(code, "pod %s: proxy of tenant %s on node %s: %v", ref, p.tenant, caller.Node, err)
	}
	return &nodev1alpha1.AttachPodResponse{Tenant: p.tenant.String()}, nil
}

// parseAddrs takes one or two addresses, as a pod has: at most one of each family.
func parseAddrs(ips []string) ([]netip.Addr, error) {
	if len(ips) == 0 || len(ips) > 2 {
		return nil, status.Errorf(codes.InvalidArgument, "ips: %d addresses, must be one, or one of each family", len(ips))
	}
	var addrs []netip.Addr
	for _, ip := range ips {
		a, err := netip.ParseAddr(ip)
		if err != nil || a.Zone() != "" || a.Is4In6() || !a.IsGlobalUnicast() {
			return nil, status.Errorf(codes.InvalidArgument, "ips: %.64q can't be a pod's address", ip)
		}
		addrs = append(addrs, a)
	}
	if len(addrs) == 2 && addrs[0].Is4() == addrs[1].Is4() {
		return nil, status.Errorf(codes.InvalidArgument, "ips: %s and %s are of one family", addrs[0], addrs[1])
	}
	return addrs, nil
}

// checkAddrs keeps a node from drawing traffic that isn't its own: the addresses
// must be in its ranges, and no other live pod's.
func (s *Service) checkAddrs(ctx context.Context, c Caller, p memberPod, addrs []netip.Addr) error {
	ranges, known := s.o.Mesh.NodePodCIDRs(c.Node)
	if !known {
		return status.Errorf(codes.Unavailable, "node %s isn't visible any more", c.Node)
	}
	for _, a := range addrs {
		if len(ranges) > 0 && !slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(a) }) {
			return refusal(codes.PermissionDenied, CauseForeignRange, p.identity, "address %s isn't in the pod ranges %v of node %s", a, ranges, c.Node)
		}
		for _, h := range s.o.Mesh.Holders(a) {
			if h.UID == string(p.UID) {
				continue
			}
			if err := s.checkHolder(ctx, c, p, a, h); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkHolder returns nil if a pod doesn't hold an address any more.
func (s *Service) checkHolder(ctx context.Context, c Caller, p memberPod, a netip.Addr, h Holder) error {
	pod, err := s.o.Pods.Live(ctx, h.Namespace, h.Name)
	switch {
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return status.Errorf(codes.Unavailable, "read pod %s/%s, which had address %s: %v", h.Namespace, h.Name, a, err)
	case string(pod.UID) != h.UID, finished(pod):
		return nil
	}
	// An address is free again before its pod's object is gone or, when the node
	// made the pod's network anew, changed: this passes.
	if pod.DeletionTimestamp != nil || pod.Spec.NodeName == c.Node {
		return status.Errorf(codes.Unavailable, "address %s is still pod %s/%s's", a, h.Namespace, h.Name)
	}
	return refusal(codes.PermissionDenied, CauseAddressHeld, p.identity, "address %s is pod %s/%s's, on node %s", a, h.Namespace, h.Name, pod.Spec.NodeName)
}
