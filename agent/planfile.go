package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"sigs.k8s.io/yaml"

	"github.com/bulkhead-mesh/bulkhead/agent/podnet"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

// planPeriod is how often a plan file is read, and what it asks for in vain is
// tried again.
const planPeriod = 250 * time.Millisecond

// planFile is a plan for a node without Kubernetes, YAML or JSON: what a
// NodeProxy's spec says, and what the node otherwise learns elsewhere.
//
//	trustDomain: cluster.local
//	trustBundle: |            # of the operator, and of the pods' peers
//	  -----BEGIN CERTIFICATE-----
//	bundle: |                 # in the SPIFFE format: what verifies JWT-SVIDs
//	  {"keys": []}
//	tenants:
//	- {name: team-a, version: 1.40.0, limits: {memoryMax: 268435456}, canary: {version: 1.39.3, weight: 10}}
//	pods:
//	- {uid: a1, namespace: team-a, name: web, serviceAccount: web, tenant: team-a, netns: /run/netns/web}
type planFile struct {
	v1alpha1.NodeProxySpec `json:",inline"`
	TrustBundle            string    `json:"trustBundle,omitempty"`
	Bundle                 string    `json:"bundle,omitempty"`
	Pods                   []planPod `json:"pods,omitempty"`
}

// planPod is a pod with its network: a namespace in which to look, or all of it.
type planPod struct {
	v1alpha1.NodePod `json:",inline"`
	// Netns is the path of its network namespace, Interface the name of its veth in
	// there, default eth0.
	Netns     string `json:"netns,omitempty"`
	Interface string `json:"interface,omitempty"`
	// HostInterface is the node's end of its veth; without Netns all four are needed.
	HostInterface string       `json:"hostInterface,omitempty"`
	IPs           []netip.Addr `json:"ips,omitempty"`
	MAC           string       `json:"mac,omitempty"`
	MTU           int          `json:"mtu,omitempty"`
}

// RunPlan runs the agent until ctx ends, by a plan in a file, which is read again
// when it changes; no Kubernetes is asked for anything, and there is no CNI
// plugin. What it made goes on without it; a plan without tenants removes it.
// Configuration and signatures come from the operator at Options.Operator, or
// whoever speaks its protocol there. `agent inspect` tells what came of the plan.
func RunPlan(ctx context.Context, file string, o Options) error {
	if _, err := readPlan(file); err != nil {
		return err
	}
	a, err := newAgent(o)
	if err != nil {
		return err
	}
	a.nodeProc = "/proc/self" // it isn't in a container
	if err := a.open(); err != nil {
		return errors.Join(err, a.close())
	}
	return errors.Join(a.run(ctx, task{"plan", func(ctx context.Context) error { a.followPlan(ctx, file); return nil }}), a.close())
}

func readPlan(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read plan: %w", err)
	}
	if _, err := parsePlan(b); err != nil {
		return nil, fmt.Errorf("plan %s: %w", file, err)
	}
	return b, nil
}

func parsePlan(b []byte) (planFile, error) {
	var f planFile
	err := yaml.UnmarshalStrict(b, &f)
	return f, err
}

// followPlan applies the plan, again when the file is another one, and until all of
// it can be done. A file that can't be read leaves the plan as it was.
func (a *Agent) followPlan(ctx context.Context, file string) {
	var applied []byte
	told := ""
	for {
		b, err := readPlan(file)
		if err == nil && (a.lacksNetwork() || !bytes.Equal(b, applied)) {
			if err = a.applyPlan(b); err == nil {
				applied = b
			}
		}
		problem := ""
		if err != nil {
			problem = err.Error()
		}
		if problem != "" && problem != told {
			a.log.Error("the plan isn't in force as a whole", "file", file, "error", problem)
		}
		told = problem
		select {
		case <-ctx.Done():
			return
		case <-time.After(planPeriod):
		}
	}
}

// lacksNetwork reports whether a pod has lost its veth since the plan was applied:
// it may have a new one.
func (a *Agent) lacksNetwork() bool {
	p, _ := a.currentPlan()
	return slices.ContainsFunc(p.pods, func(pod identity.Pod) bool {
		_, known := a.sandboxes.get(pod.UID)
		return !known
	})
}

// applyPlan makes the file's plan the agent's. A pod whose network isn't there
// (yet) stays in the plan, and isn't steered; the error names it.
func (a *Agent) applyPlan(b []byte) error {
	f, err := parsePlan(b)
	if err != nil {
		return err
	}
	var errs []error
	if f.TrustBundle != "" {
		if err := a.setRoots(f.TrustDomain, []byte(f.TrustBundle)); err != nil {
			errs = append(errs, fmt.Errorf("trust bundle: %w", err))
		}
	}
	a.setBundle(f.TrustDomain, f.Bundle)
	for _, pod := range f.Pods {
		f.NodeProxySpec.Pods = append(f.NodeProxySpec.Pods, pod.NodePod)
		r, err := pod.sandbox()
		if err == nil {
			err = a.sandboxes.put(r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err))
		}
	}
	p, err := makePlan(&v1alpha1.NodeProxy{Spec: f.NodeProxySpec})
	problem := ""
	if err = errors.Join(append(errs, err)...); err != nil {
		problem = err.Error()
	}
	a.setPlan(p, problem)
	return err
}

// sandbox is the pod's network. It must be called in the node's network namespace.
func (p planPod) sandbox() (sandboxRecord, error) {
	r := sandboxRecord{UID: p.UID, Namespace: p.Namespace, Name: p.Name, IPs: p.IPs, MTU: p.MTU}
	if p.Netns != "" {
		name := p.Interface
		if name == "" {
			name = "eth0"
		}
		n, err := podnet.Inspect(p.Netns, name)
		if err != nil {
			return r, err
		}
		r.IPs, r.Ifindex, r.Ifname, r.MTU, r.MAC, r.Netns = n.IPs, n.Ifindex, n.Ifname, n.MTU, n.MAC, p.Netns
		return r, nil
	}
	if p.HostInterface == "" || len(p.IPs) == 0 || p.MTU == 0 {
		return r, errors.New("give netns, or all of hostInterface, ips, mac and mtu")
	}
	var err error
	if r.MAC, err = net.ParseMAC(p.MAC); err != nil {
		return r, fmt.Errorf("mac: %w", err)
	}
	link, err := netlink.LinkByName(p.HostInterface)
	if err != nil {
		return r, fmt.Errorf("find %s: %w", p.HostInterface, err)
	}
	r.Ifindex, r.Ifname = link.Attrs().Index, link.Attrs().Name
	return r, nil
}
