// Package failure measures what tenants have of it when another one's proxy is killed
// again and again, is out of memory or refuses its configuration: with a proxy of their
// own each, with a warm standby besides, and with one proxy that all of the node share.
package failure

import (
	"testing"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
