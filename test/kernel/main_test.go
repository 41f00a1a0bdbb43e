// Package kernel tests the node's half of the product on this machine's kernel:
// see package lab for what is there.
package kernel

import (
	"testing"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
