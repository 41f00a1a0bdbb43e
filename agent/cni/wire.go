// Package cni is the conversation between the CNI plugin, which the container
// runtime starts for each sandbox, and the agent: one JSON request and one JSON
// response per connection to a Unix socket that only root may use.
package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// Operations of a Request.
const (
	OpAdd   = "add"
	OpDel   = "del"
	OpCheck = "check"
	OpGC    = "gc"
)

// maxMessage bounds a request or response, in bytes. A GC request names every
// sandbox of the node.
const maxMessage = 1 << 20

// DefaultSocket is where the agent listens.
const DefaultSocket = "/run/bulkhead/cni.sock"

// Request is what the runtime asks for.
type Request struct {
	Op string `json:"op"`
	// Sandbox that it is about; unset for OpGC.
	Sandbox Sandbox `json:"sandbox"`
	// Timeout that is left for the answer.
	Timeout time.Duration `json:"timeout"`
	// Valid are the container IDs that still exist, for OpGC.
	Valid []string `json:"valid,omitempty"`
}

// Sandbox is a pod's network as the plugins before ours made it.
type Sandbox struct {
	// ContainerID of the sandbox: the key of everything kept about it.
	ContainerID string `json:"containerID"`
	// Netns is the path of its network namespace.
	Netns string `json:"netns,omitempty"`
	// Interface inside of the namespace.
	Interface string `json:"interface,omitempty"`
	// PodUID, PodNamespace and PodName as the kubelet says.
	PodUID       string `json:"podUID,omitempty"`
	PodNamespace string `json:"podNamespace,omitempty"`
	PodName      string `json:"podName,omitempty"`
	// IPs of the interface.
	IPs []netip.Addr `json:"ips,omitempty"`
}

// Response is the agent's answer.
type Response struct {
	// Error is empty on success. The runtime shows it in the pod's events.
	Error string `json:"error,omitempty"`
	// Steered says that the pod belongs to the mesh and is steered.
	Steered bool `json:"steered,omitempty"`
}

// validate refuses what no plugin of ours would send.
func (r Request) validate() error {
	switch r.Op {
	case OpAdd:
		if r.Sandbox.Netns == "" || r.Sandbox.Interface == "" || len(r.Sandbox.IPs) == 0 {
			return errors.New("add wants a network namespace, an interface and addresses")
		}
	case OpDel, OpCheck:
	case OpGC:
		return nil
	default:
		return fmt.Errorf("operation %q isn't known", r.Op)
	}
	if !validID(r.Sandbox.ContainerID) {
		return fmt.Errorf("container ID %q isn't one", r.Sandbox.ContainerID)
	}
	return nil
}

// validID reports whether id is a container ID of the CNI specification, and so
// safe as a file name.
func validID(id string) bool {
	if id == "" || len(id) > 128 {
		return false
	}
	for i, c := range []byte(id) {
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return true
}

func readMessage(r io.Reader, v any) error {
	d := json.NewDecoder(io.LimitReader(r, maxMessage))
	return d.Decode(v)
}
