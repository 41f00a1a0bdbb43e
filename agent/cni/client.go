package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"syscall"
	"time"
)

// ErrAgentAway is returned by Ask if nobody listens on the socket.
var ErrAgentAway = errors.New("the node's agent doesn't run")

// Ask sends one request and waits for the answer, at most for the request's
// timeout and a second.
func Ask(socket string, r Request) (Response, error) {
	c, err := net.DialTimeout("unix", socket, 2*time.Second)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EAGAIN) {
			err = ErrAgentAway
		}
		return Response{}, fmt.Errorf("connect to agent at %s: %w", socket, err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(r.Timeout + time.Second)); err != nil {
		return Response{}, fmt.Errorf("ask agent: %w", err)
	}
	if err := json.NewEncoder(c).Encode(r); err != nil {
		return Response{}, fmt.Errorf("ask agent: %w", err)
	}
	var a Response
	if err := readMessage(c, &a); err != nil {
		return Response{}, fmt.Errorf("read agent's answer: %w", err)
	}
	return a, nil
}

// Membership says which namespaces belong to the mesh. The agent keeps it on
// disk for the plugin, which must know while the agent is away.
type Membership struct {
	TrustDomain string   `json:"trustDomain"`
	Namespaces  []string `json:"namespaces"`
}

// Has reports whether namespace belongs to the mesh.
func (m Membership) Has(namespace string) bool { return slices.Contains(m.Namespaces, namespace) }
