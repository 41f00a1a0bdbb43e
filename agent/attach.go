package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/agent/cni"
	"github.com/bulkhead-mesh/bulkhead/agent/podnet"
	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
)

// nodePath is a path of the node as this process sees it, which may run in a
// container: the node's init keeps the node's root. /var/run is a link to /run
// everywhere, and an absolute link would lead back into the container.
func nodePath(path string) string {
	if rest, ok := strings.CutPrefix(path, "/var/run/"); ok {
		path = "/run/" + rest
	}
	return "/proc/1/root" + path
}

// Add steers a new pod. It returns when the pod's identity is signed, its proxy
// has acknowledged configuration that serves it, and the programs are on its
// veth; the pod hasn't started before.
func (a *Agent) Add(ctx context.Context, s cni.Sandbox) (bool, error) {
	member, known := a.members.has(s.PodNamespace)
	if !known {
		return false, errors.New("the agent doesn't know yet which namespaces belong to the mesh: is the operator running?")
	}
	if !member {
		return false, nil
	}
	n, err := podnet.Inspect(nodePath(s.Netns), s.Interface)
	if err != nil {
		return false, err
	}
	r := sandboxRecord{ContainerID: s.ContainerID, UID: s.PodUID, Namespace: s.PodNamespace, Name: s.PodName,
		IPs: s.IPs, Ifindex: n.Ifindex, Ifname: n.Ifname, MTU: n.MTU, MAC: n.MAC, Netns: nodePath(s.Netns)}
	for _, ip := range s.IPs {
		if !slices.Contains(n.IPs, ip) {
			return false, fmt.Errorf("the CNI says that the pod has %s, its interface doesn't", ip)
		}
	}
	if err := a.sandboxes.put(r); err != nil {
		return false, err
	}
	a.wake()
	// Each step is named in the error, for it is what the pod's events show.
	if err := a.waitFor(ctx, "the operator to plan it on this node", func() bool {
		_, ok := a.planned(s.PodUID)
		return ok || a.isOutside(s.PodUID)
	}); err != nil {
		return false, err
	}
	if a.isOutside(s.PodUID) {
		return false, nil
	}
	if a.isBypassed(s.PodUID) {
		// The mesh may be what is broken: it needs nobody's answer.
		return true, a.waitFor(ctx, "its programs, in the emergency bypass", func() bool { return a.isSteered(r) })
	}
	if err := a.identities.WaitReady(ctx, s.PodUID); err != nil {
		return false, fmt.Errorf("wait for its certificate: %w", err)
	}
	if err := a.waitFor(ctx, "its programs", func() bool { return a.isSteered(r) }); err != nil {
		return false, err
	}
	if _, err := a.announce(ctx, r); err != nil {
		return false, err
	}
	if err := a.waitFor(ctx, "its tenant's proxy to be ready", func() bool {
		pod, ok := a.planned(s.PodUID)
		return ok && a.isServing(pod.Tenant)
	}); err != nil {
		return false, err
	}
	return true, nil
}

// announce tells the operator the pod's addresses and waits until the proxy
// serves them. It returns the tenant that this is the proxy of.
func (a *Agent) announce(ctx context.Context, r sandboxRecord) (tenant string, err error) {
	req := &nodev1alpha1.AttachPodRequest{PodUid: r.UID, PodNamespace: r.Namespace, PodName: r.Name}
	for _, ip := range r.IPs {
		req.Ips = append(req.Ips, ip.String())
	}
	for {
		answer, err := a.operator.AttachPod(ctx, req)
		switch {
		case err == nil:
			return answer.GetTenant(), nil
		case ctx.Err() != nil || status.Code(err) != codes.Unavailable:
			return "", fmt.Errorf("announce its addresses to the operator: %w", err)
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("announce its addresses to the operator: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Del forgets a sandbox, if it is still its pod's newest.
func (a *Agent) Del(_ context.Context, s cni.Sandbox) error {
	a.sandboxes.dropContainers(func(id string) bool { return id == s.ContainerID })
	a.wake()
	return nil
}

// Check says what isn't as it should be.
func (a *Agent) Check(_ context.Context, s cni.Sandbox) error {
	if member, known := a.members.has(s.PodNamespace); known && !member {
		return nil
	}
	r, ok := a.sandboxes.get(s.PodUID)
	switch {
	case !ok:
		return errors.New("the agent doesn't know this sandbox")
	case !a.isSteered(r):
		return errors.New("the pod isn't steered")
	}
	return nil
}

// GC forgets sandboxes that the runtime doesn't have any more.
func (a *Agent) GC(_ context.Context, valid []string) error {
	a.sandboxes.dropContainers(func(id string) bool { return !slices.Contains(valid, id) })
	a.wake()
	return nil
}

// waitFor waits until ok says so; it is asked again after each round of
// reconcile.
func (a *Agent) waitFor(ctx context.Context, what string, ok func() bool) error {
	for {
		round := a.roundDone()
		if ok() {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited for %s: %w", what, ctx.Err())
		case <-round:
		}
	}
}
