// Package l7 measures what it costs when proxies read requests, beside passing
// connections on and beside an Envoy that is configured by hand.
package l7

import (
	"testing"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
