package relay

import (
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Secrets is where a tenant's certificates come from.
type Secrets interface {
	// Secret returns the secret that the tenant may have under that name. Without
	// one, denied says whether that is final (the tenant has no such workload here)
	// or may change soon (not signed yet), in which case the proxy is left waiting.
	Secret(tenant model.Tenant, name string) (r *discovery.Resource, denied bool)
	// Changed returns a channel that is closed once anything that Secret may
	// return for the tenant has changed since the call.
	Changed(tenant model.Tenant) <-chan struct{}
}

// secretWatch is one proxy's secret subscriptions.
type secretWatch struct {
	source Secrets
	tenant model.Tenant
	// versions sent by name; "" before the first answer and after a removal.
	versions map[string]string
	answered map[string]bool
	signal   <-chan struct{}
}

type secretUpdate struct {
	name     string
	resource *discovery.Resource // nil: removed
}

func newSecretWatch(source Secrets, tenant model.Tenant) *secretWatch {
	return &secretWatch{source: source, tenant: tenant, versions: map[string]string{}, answered: map[string]bool{}}
}

// want changes the set of names. Asking again for a name sends it again.
func (w *secretWatch) want(subscribe, unsubscribe []string) {
	for _, name := range unsubscribe {
		delete(w.versions, name)
		delete(w.answered, name)
	}
	for _, name := range subscribe {
		w.versions[name], w.answered[name] = "", false
	}
}

// changed fires when updates may have something; never before the first call of
// updates, and never without a name.
func (w *secretWatch) changed() <-chan struct{} {
	if len(w.versions) == 0 {
		return nil
	}
	return w.signal
}

// updates returns at most limit answers that the proxy doesn't have yet and
// whether there may be more.
func (w *secretWatch) updates(limit int) []secretUpdate {
	if len(w.versions) == 0 {
		return nil
	}
	w.signal = w.source.Changed(w.tenant) // before the reads, or a change is lost
	var out []secretUpdate
	for name, had := range w.versions {
		if len(out) >= limit {
			closed := make(chan struct{})
			close(closed)
			w.signal = closed
			break
		}
		r, denied := w.source.Secret(w.tenant, name)
		switch {
		case r != nil && (r.Version != had || !w.answered[name]):
			w.versions[name] = r.Version
		case r == nil && denied && (had != "" || !w.answered[name]):
			w.versions[name] = ""
		default:
			continue
		}
		w.answered[name] = true
		out = append(out, secretUpdate{name, r})
	}
	return out
}
