package agent

import (
	"errors"
	"io/fs"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// hitsPeriod is how often limits' hits are read: a tenant that meets them all the
// time must not have the node's status written more often.
const hitsPeriod = resync - time.Second

// tenantHits are how often a tenant met its limits, and when one of them was last
// seen to rise.
type tenantHits struct {
	isolation.Hits
	shed
	last time.Time
}

// readHits reads them anew, or returns what it read a moment ago. The map isn't
// written any more. Of the loop alone.
func (a *Agent) readHits(p plan) map[model.Tenant]tenantHits {
	now := time.Now()
	if now.Sub(a.hitsAt) < hitsPeriod {
		return a.hits
	}
	hits, dropped := map[model.Tenant]tenantHits{}, a.readShed()
	for _, tp := range p.tenants {
		read, err := a.bulkheads.Hits(tp.tenant)
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				a.log.Error("hits of limits can't be read", "tenant", tp.tenant.String(), "error", err)
			}
			continue
		}
		had, ok := a.hits[tp.tenant]
		h := tenantHits{Hits: read, shed: dropped[tp.tenant], last: had.last}
		if ok && (had.Hits != read || had.shed != h.shed) {
			h.last = now
		}
		hits[tp.tenant] = h
	}
	a.hits, a.hitsAt = hits, now
	return hits
}

// status is nil before the first reading.
func (h tenantHits) status() *v1alpha1.LimitHits {
	if h.Since.IsZero() {
		return nil
	}
	at := func(t time.Time) *metav1.Time {
		if t.IsZero() {
			return nil
		}
		m := metav1.NewTime(t.UTC().Truncate(time.Second))
		return &m
	}
	return &v1alpha1.LimitHits{
		Since: at(h.Since), Last: at(h.last),
		CPUThrottled: int64(h.Throttled), CPUThrottledMillis: h.ThrottledFor.Milliseconds(),
		MemoryHigh: int64(h.MemoryHigh), OOMKills: int64(h.OOMKills), Pids: int64(h.Pids),
		Connections: int64(h.tooMany), NewConnections: int64(h.tooFast), NewDirect: int64(h.directTooFast),
	}
}
