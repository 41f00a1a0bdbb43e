package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// A tenant that ends while all are read, or can't be read, doesn't keep the others'
// readings from being counted.
func TestOneReadingFails(t *testing.T) {
	gone, broken, fine := model.Tenant{Scope: model.ScopeNamespace, Namespace: "gone"}, model.Tenant{Scope: model.ScopeNamespace, Namespace: "broken"}, model.Tenant{Scope: model.ScopeNamespace, Namespace: "fine"}
	fault := errors.New("no answer")
	usages, readings, err := readUsages([]model.Tenant{gone, broken, fine}, func(t model.Tenant) (isolation.Usage, error) {
		switch t {
		case gone:
			return isolation.Usage{}, fmt.Errorf("read usage: %w", fs.ErrNotExist)
		case broken:
			return isolation.Usage{}, fault
		}
		return isolation.Usage{CPU: 7, PSS: 8}, nil
	})
	if !errors.Is(err, fault) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the error is %v", err)
	}
	if len(usages) != 1 || len(readings) != 2 || !readings[broken].Unread || readings[fine].CPU != 7 || readings[fine].PSS != 8 || readings[fine].Unread {
		t.Errorf("usages %+v, readings %+v", usages, readings)
	}
}

// SYNs, which anybody can send, are billed only where handshakes aren't told.
func TestBilledConnections(t *testing.T) {
	var c steer.PodCounters
	c.Outbound, c.Inbound, c.Plain, c.NodePlain, c.Accepted = 1, 20, 300, 4000, 5
	for handshakes, want := range map[bool]uint64{true: 5, false: 4321} {
		if got := podReading(identity.Pod{Namespace: "team-a"}, c, handshakes); got.Connections != want || got.Namespace != "team-a" {
			t.Errorf("handshakes told %v: billed %+v, want %d connections", handshakes, got, want)
		}
	}
}
