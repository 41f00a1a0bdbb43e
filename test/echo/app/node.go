package app

import (
	"fmt"

	"github.com/bulkhead-mesh/bulkhead/test/nodestate"
)

// NodeReport is what the command node prints.
type NodeReport struct {
	// Found of a mesh on the node, one line each; see package nodestate.
	Found []string `json:"found"`
	// Mounts are the node's mount points, but for those of its pods.
	Mounts []string `json:"mounts"`
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
	return c.finish(true, NodeReport{Found: found, Mounts: mounts})
}
