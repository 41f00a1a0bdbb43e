package agent

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// eventBuffer is how many connection events wait for a watcher that is slow.
const eventBuffer = 4096

// ConnectionEvent is a line of `agent events`: what happened to a pod's connection.
type ConnectionEvent struct {
	Time time.Time `json:"time"`
	// Event is opened, closed or denied.
	Event string `json:"event"`
	// Way is outbound or inbound between a pod or its peer and its tenant's proxy,
	// upstream or delivered between the proxy and the other side of that, and
	// direct-… in the clear. Unknown: with Netfilter, of what opened before anybody
	// watched.
	Way    string `json:"way"`
	Tenant string `json:"tenant,omitempty"`
	// Namespace and Name of the pod, empty if the plan doesn't have it (any more).
	Namespace string         `json:"namespace,omitempty"`
	Name      string         `json:"name,omitempty"`
	PodUID    string         `json:"podUID,omitempty"`
	Pod       netip.AddrPort `json:"pod"`
	Peer      netip.AddrPort `json:"peer"`
	// PeerUID is of the peer if it is a pod of the mesh on this node. Pods that share
	// an identity are told apart by it.
	PeerUID string `json:"peerUID,omitempty"`
	// BytesSent are by the pod; of a connection that was closed.
	BytesSent     uint64 `json:"bytesSent,omitempty"`
	BytesReceived uint64 `json:"bytesReceived,omitempty"`
	// Reason why it was denied.
	Reason string `json:"reason,omitempty"`
}

// serveEvents writes connection events as they come, until the client goes. They
// are read only while somebody watches: each one read is work for each
// connection. streams is held meanwhile.
func (a *Agent) serveEvents(streams *sync.WaitGroup) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var only model.Tenant
		if name := r.FormValue("tenant"); name != "" {
			var err error
			if only, err = model.ParseTenant(name); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
		}
		streams.Add(1)
		defer streams.Done()
		now, redirected := a.redirection()
		if now.datapath == nil {
			http.Error(w, "the node has no plan yet, so nothing is redirected", http.StatusConflict)
			return
		}
		// While the node changes its redirection both tell, each of the pods that it has.
		events, err := now.Events(eventBuffer)
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		former := steer.NewEventReader(nil, func() error { return nil })
		defer func() { a.logClosed(events.Close(), former.Close()) }()
		w.Header().Set("Content-Type", "application/jsonl")
		flush := http.NewResponseController(w).Flush
		lines := json.NewEncoder(w)
		for {
			if err := flush(); err != nil {
				return
			}
			var e steer.Event
			ok := true
			select {
			case <-r.Context().Done():
				return
			case <-redirected:
				now, redirected = a.redirection()
				next, err := now.Events(eventBuffer)
				if err != nil {
					a.log.Error("connection events end with the former redirection", "redirection", now.kind, "error", err)
					return
				}
				a.logClosed(former.Close())
				events, former = next, events
				continue
			case e, ok = <-events.C:
				if !ok {
					events.C = nil // its datapath has been closed
				}
			case e, ok = <-former.C:
				if !ok {
					former.C = nil
				}
			}
			if !ok {
				continue
			}
			line := ConnectionEvent{Time: e.Time, Event: e.Kind.String(), Way: e.Way.String(), PodUID: e.PodUID, Pod: e.Pod, Peer: e.Peer,
				BytesSent: e.BytesSent, BytesReceived: e.BytesReceived, Reason: e.Reason}
			if s, ok := a.tenantOf(e.Tenant); ok {
				line.Tenant = s.Tenant.String()
			}
			if only != (model.Tenant{}) && line.Tenant != only.String() {
				continue
			}
			if pod, ok := a.planned(e.PodUID); ok {
				line.Namespace, line.Name = pod.Namespace, pod.Name
			}
			line.PeerUID = a.sandboxes.at(e.Peer.Addr())
			if err := lines.Encode(line); err != nil {
				return
			}
		}
	}
}

// logClosed is of readers of events, when nobody is there to tell.
func (a *Agent) logClosed(errs ...error) {
	if err := errors.Join(errs...); err != nil {
		a.log.Warn("connection events aren't closed", "error", err)
	}
}
