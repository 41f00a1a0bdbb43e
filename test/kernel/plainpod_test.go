package kernel

import (
	"testing"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A pod outside of the mesh is reached at its own address, and sees who calls.
func TestPodOutsideOfTheMesh(t *testing.T) { eachRedirection(t, testPodOutsideOfTheMesh) }

func testPodOutsideOfTheMesh(t *testing.T, l *lab.Lab) {
	p := l.AddPod(l.Node2, "c1", 16)
	l.Serve(p)
	lab.Check(t, l.Store.SetWorkload(model.Workload{UID: p.Name, Namespace: "team-c", Name: p.Name, Node: p.Node.Name, IPs: p.Both()}))
	eachFamily(t, func(t *testing.T, family int) {
		for range 3 { // the tunnel that its own proxy takes off again is shared
			flow{from: l.A1, to: p}.check(t, family)
			flow{from: l.A2, to: p}.check(t, family)
			flow{from: l.B2, to: p}.check(t, family)
		}
	})
}
