// Package fairness measures what one tenant's clients have of it when another tenant
// of the node misbehaves: with a proxy of their own each, and with one that they share.
package fairness

import (
	"testing"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
