package agent

import (
	"log/slog"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// placedPods is a datapath that has pods.
type placedPods struct {
	datapath
	places map[string]model.Placement
}

func (p placedPods) Placements() (map[string]model.Placement, error) { return p.places, nil }

// A tenant stays while the kernel leads a pod to it, whether or not this round could
// do anything with the pod: its index would be another's otherwise.
func TestTenantStaysWithItsPods(t *testing.T) {
	a, err := newAgent(Options{Node: "n", Operator: "localhost:1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	a.datapath = steering{datapath: placedPods{places: map[string]model.Placement{
		"stuck": {Tenant: 5}, "moved": {Tenant: 6, Formers: []uint16{7}}, "released": {},
	}}}
	used, err := a.usedTenants()
	if err != nil || !used[5] || !used[6] || used[7] {
		t.Errorf("%v, %v", used, err)
	}
}
