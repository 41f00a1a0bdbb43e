// Package datapath measures what a connection's way costs: how it is steered to
// a proxy, and the whole way from pod to pod.
package datapath

import (
	"testing"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
