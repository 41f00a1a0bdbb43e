// Command cni is the chained CNI plugin: it lets a pod of the mesh start only
// once the node's agent has steered it. It holds no logic but what has to be
// decided while the agent is away.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/bulkhead-mesh/bulkhead/agent/cni"
)

// config is the plugin's entry in the conflist. The agent writes it.
type config struct {
	types.PluginConf
	// Socket of the agent. Default /run/bulkhead/cni.sock.
	Socket string `json:"socket"`
	// Membership is the file that says which namespaces belong to the mesh.
	// Default /var/lib/bulkhead/cni/membership.json.
	Membership string `json:"membership"`
	// TimeoutSeconds that a pod may wait for its steering. Default 30.
	TimeoutSeconds int `json:"timeoutSeconds"`
}

// podArgs are what the kubelet says through the runtime.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAMESPACE types.UnmarshallableString
	K8S_POD_NAME      types.UnmarshallableString
	K8S_POD_UID       types.UnmarshallableString
}

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Del: del, Check: check, GC: gc, Status: status},
		version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"), "Bulkhead: steers a pod to its tenant's proxy before it starts")
}

func parse(b []byte) (*config, error) {
	c := &config{Socket: cni.DefaultSocket, Membership: "/var/lib/bulkhead/cni/membership.json", TimeoutSeconds: 30}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("parse configuration: %w", err)
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, fmt.Errorf("parse result of the plugins before: %w", err)
	}
	return c, nil
}

func sandbox(args *skel.CmdArgs) (cni.Sandbox, error) {
	var k podArgs
	k.IgnoreUnknown = true
	if err := types.LoadArgs(args.Args, &k); err != nil {
		return cni.Sandbox{}, fmt.Errorf("parse CNI_ARGS: %w", err)
	}
	return cni.Sandbox{
		ContainerID: args.ContainerID, Netns: args.Netns, Interface: args.IfName,
		PodUID: string(k.K8S_POD_UID), PodNamespace: string(k.K8S_POD_NAMESPACE), PodName: string(k.K8S_POD_NAME),
	}, nil
}

func (c *config) timeout() time.Duration { return time.Duration(c.TimeoutSeconds) * time.Second }

func add(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	if c.PrevResult == nil {
		return errors.New("no result of a plugin before: bulkhead-cni must come last in a chain")
	}
	s, err := sandbox(args)
	if err != nil {
		return err
	}
	if s.PodNamespace != "" { // else it isn't a pod of Kubernetes
		result, err := current.NewResultFromResult(c.PrevResult)
		if err != nil {
			return fmt.Errorf("convert result of the plugins before: %w", err)
		}
		for _, ip := range result.IPs {
			// An address without an interface is the container's, by the specification.
			if i := ip.Interface; i != nil && *i >= 0 && *i < len(result.Interfaces) && result.Interfaces[*i].Sandbox == "" {
				continue
			}
			if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
				s.IPs = append(s.IPs, a.Unmap())
			}
		}
		if err := ask(c, cni.OpAdd, s); err != nil {
			return err
		}
	}
	return types.PrintResult(c.PrevResult, c.CNIVersion)
}

// ask has the agent steer or check the pod. Without an agent a pod of the mesh is
// refused: the kubelet tries again.
func ask(c *config, op string, s cni.Sandbox) error {
	a, err := cni.Ask(c.Socket, cni.Request{Op: op, Sandbox: s, Timeout: c.timeout()})
	if err == nil {
		if a.Error != "" {
			return fmt.Errorf("steer pod %s/%s: %s", s.PodNamespace, s.PodName, a.Error)
		}
		return nil
	}
	member, merr := isMember(c.Membership, s.PodNamespace)
	if merr != nil {
		return errors.Join(err, merr)
	}
	if member {
		return fmt.Errorf("pod %s/%s belongs to the mesh and can't be steered: %w", s.PodNamespace, s.PodName, err)
	}
	return nil
}

// isMember reads the membership that the agent left. Before the agent has ever
// known one there is no file, and no pod of the mesh.
func isMember(file, namespace string) (bool, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read membership: %w", err)
	}
	var m cni.Membership
	if err := json.Unmarshal(b, &m); err != nil {
		return false, fmt.Errorf("parse membership %s: %w", file, err)
	}
	return m.Has(namespace), nil
}

// del never fails: what an agent that is away misses, it finds out by itself.
func del(args *skel.CmdArgs) error {
	c := &config{Socket: cni.DefaultSocket}
	_ = json.Unmarshal(args.StdinData, c) // the socket's default will do
	s, err := sandbox(args)
	if err != nil {
		s = cni.Sandbox{ContainerID: args.ContainerID}
	}
	_, _ = cni.Ask(c.Socket, cni.Request{Op: cni.OpDel, Sandbox: s, Timeout: 5 * time.Second})
	return nil
}

func check(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	s, err := sandbox(args)
	if err != nil || s.PodNamespace == "" {
		return err
	}
	return ask(c, cni.OpCheck, s)
}

func gc(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	var valid []string
	for _, a := range c.ValidAttachments {
		valid = append(valid, a.ContainerID)
	}
	if _, err := cni.Ask(c.Socket, cni.Request{Op: cni.OpGC, Valid: valid, Timeout: 10 * time.Second}); err != nil && !errors.Is(err, cni.ErrAgentAway) {
		return err
	}
	return nil
}

// status is always well: without an agent only pods of the mesh are refused, and
// the agent's own pod must be able to start.
func status(*skel.CmdArgs) error { return nil }
