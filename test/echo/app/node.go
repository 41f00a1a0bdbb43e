package app

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/nodestate"
)

// NodeReport is what the command node prints.
type NodeReport struct {
	// Found of a mesh on the node, one line each; see package nodestate.
	Found []string `json:"found"`
	// Mounts are the node's mount points, but for those of its pods.
	Mounts []string `json:"mounts"`
	// Counts say how much of a mesh there is, by what is counted.
	Counts map[string]int `json:"counts"`
}

// node looks at the node that it runs on, as root and in the node's namespaces.
func (c *command) node() error {
	root := c.flags.String("root", "/", "where the node's root directory is")
	if _, err := c.parse(""); err != nil {
		return err
	}
	found, err := nodestate.Find(*root)
	if err != nil {
		return fmt.Errorf("look at the node: %w", err)
	}
	mounts, err := nodestate.Mounts()
	if err != nil {
		return fmt.Errorf("look at the node's mounts: %w", err)
	}
	counts, err := nodestate.Count(*root)
	if err != nil {
		return fmt.Errorf("count what is on the node: %w", err)
	}
	return c.finish(true, NodeReport{Found: found, Mounts: mounts, Counts: counts})
}

// KillReport is what the command kill prints: the processes' ids.
type KillReport struct {
	Killed []int `json:"killed"`
}

// kill ends the node's processes of a program, as root and in the node's namespaces.
func (c *command) kill() error {
	program, err := c.parse("PROGRAM")
	if err != nil {
		return err
	}
	pids, err := nodestate.Processes(program)
	if err != nil {
		return fmt.Errorf("look for %s: %w", program, err)
	}
	r := KillReport{Killed: []int{}}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
		r.Killed = append(r.Killed, pid)
	}
	return c.finish(true, r)
}
