package agent

import (
	"context"
	"net/http"

	"github.com/bulkhead-mesh/bulkhead/agent/debug"
	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// askProxy looks into a tenant's proxy.
func (a *Agent) askProxy(ctx context.Context, q debug.Request) ([]byte, error) {
	if q.Generation == debug.Serving {
		q.Generation = a.servingGeneration(q.Tenant)
	}
	return debug.Ask(ctx, a.bulkheads, q)
}

// servingGeneration is the one that serves a tenant, or is to; of a tenant that has
// none it is 0.
func (a *Agent) servingGeneration(t model.Tenant) int {
	a.mu.Lock()
	serving, placed := a.last.serving[t], a.last.placed[t]
	a.mu.Unlock()
	state, _ := a.bulkheads.State(t)
	for _, p := range state.Processes {
		if p.PID != 0 && serving == (process{p.PID, p.StartTicks}) {
			return p.Generation
		}
	}
	return max(placed.first, 0)
}

// serveDebug does so for root of the node, over the control socket.
func (a *Agent) serveDebug(w http.ResponseWriter, r *http.Request) {
	q, err := debug.Parse(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	body, err := a.askProxy(r.Context(), q)
	debug.Answer(w, q, body, err)
}

// newDebug is what serves it to owners; nil if nobody is to.
func (a *Agent) newDebug() *debug.Server {
	if a.o.DebugAddress == DebugOff {
		return nil
	}
	return debug.New(debug.Options{
		Node: a.o.Node, Address: a.o.DebugAddress, Reviews: a.kube, Ask: a.askProxy, Roots: a.roots.Pool, Log: a.log,
		Metrics: metricsOf(a),
		Sign: func(ctx context.Context, csr []byte) ([][]byte, error) {
			r, err := a.operator.SignServerCertificate(ctx, &nodev1alpha1.SignServerCertificateRequest{Csr: csr})
			return r.GetChain(), err
		},
	})
}

func (a *Agent) runDebug(ctx context.Context) error {
	if a.debug == nil {
		return nil
	}
	return a.debug.Run(ctx)
}
