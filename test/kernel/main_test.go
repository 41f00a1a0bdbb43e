// Package kernel tests the node's half of the product on this machine's kernel:
// see package lab for what is there.
package kernel

import (
	"testing"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// eachRedirection runs a test with either way to the proxies.
func eachRedirection(t *testing.T, f func(t *testing.T, l *lab.Lab)) {
	for _, r := range []v1alpha1.Redirection{v1alpha1.RedirectionEBPF, v1alpha1.RedirectionNetfilter} {
		t.Run(string(r), func(t *testing.T) { f(t, lab.NewWith(t, lab.Options{Redirection: r})) })
	}
}
