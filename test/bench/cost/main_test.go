// Package cost measures what tenants are billed against what they had, and the memory of
// a proxy for each tenant, and its CPU for requests, beside a shared one and sidecars.
package cost

import (
	"testing"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
