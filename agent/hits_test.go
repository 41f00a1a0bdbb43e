package agent

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
)

// Each kind of hit is told as what it is, and since when.
func TestHitsAreTold(t *testing.T) {
	since, last := time.Unix(1_700_000_000, 0), time.Unix(1_700_000_100, 0)
	h := tenantHits{
		Hits: isolation.Hits{Since: since, Throttled: 1, ThrottledFor: 2 * time.Millisecond, MemoryHigh: 3, OOMKills: 4, Pids: 5},
		shed: shed{tooMany: 6, tooFast: 7, directTooFast: 8}, last: last,
	}
	told := h.status()
	if told == nil || !told.Since.Time.Equal(since) || !told.Last.Time.Equal(last) {
		t.Fatalf("told is %+v", told)
	}
	told.Since, told.Last = nil, nil
	if want := (v1alpha1.LimitHits{CPUThrottled: 1, CPUThrottledMillis: 2, MemoryHigh: 3, OOMKills: 4, Pids: 5, Connections: 6, NewConnections: 7, NewDirect: 8}); *told != want {
		t.Errorf("told is %+v, want %+v", *told, want)
	}
	h.last = time.Time{}
	if never := h.status().Last; never != (*metav1.Time)(nil) {
		t.Errorf("what was never met was met at %s", never)
	}
	if told := (tenantHits{}).status(); told != nil {
		t.Errorf("before the first reading is told %+v", told)
	}
}
