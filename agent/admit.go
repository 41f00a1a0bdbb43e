package agent

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// admission is a running pod's wait for a proxy that it isn't at yet: its new
// connections go on where they went until that one has acknowledged listeners which
// serve the pod.
type admission struct {
	tenant model.Tenant
	record sandboxRecord
	cancel context.CancelFunc
	// done is closed at the end, with err set if the proxy doesn't serve the pod.
	done chan struct{}
	err  error
}

// admissionPause is between two attempts of one that was refused.
const admissionPause = time.Second

// canMove reports whether a pod can go to its tenant, or else when to look again. One
// that begins waits in the CNI plugin, which asks for itself.
func (a *Agent) canMove(ctx context.Context, pod identity.Pod, record sandboxRecord, begins bool, serving map[model.Tenant]process) (ready bool, again time.Duration, err error) {
	if _, ok := serving[pod.Tenant]; !ok {
		return false, soon, nil
	}
	if begins {
		return true, resync, nil
	}
	ready, err = a.admitted(ctx, pod, record)
	return ready, resync, err
}

// admitted reports whether a running pod's proxy serves it. It is asked again until
// it does; a round of reconcile follows when that may have changed.
func (a *Agent) admitted(ctx context.Context, pod identity.Pod, record sandboxRecord) (bool, error) {
	ad := a.admissions[pod.UID]
	if ad != nil && (ad.tenant != pod.Tenant || ad.record.Ifindex != record.Ifindex) {
		a.forgetAdmission(pod.UID)
		ad = nil
	}
	if ad == nil {
		ctx, cancel := context.WithCancel(ctx)
		ad = &admission{tenant: pod.Tenant, record: record, cancel: cancel, done: make(chan struct{})}
		a.admissions[pod.UID] = ad
		a.admitting.Go(func() { a.admit(ctx, ad) })
	}
	select {
	case <-ad.done:
	default:
		return false, nil
	}
	if ad.err != nil {
		a.forgetAdmission(pod.UID) // and asked again in the next round
		return false, fmt.Errorf("wait for its proxy to serve it: %w", ad.err)
	}
	return true, nil
}

// admit asks the operator, who follows what proxies acknowledge.
func (a *Agent) admit(ctx context.Context, ad *admission) {
	defer a.wake()
	defer close(ad.done)
	tenant, err := a.announce(ctx, ad.record)
	switch {
	case status.Code(err) == codes.Unimplemented, err == nil && (tenant == "" || tenant == ad.tenant.String()):
		return // also an operator of before, which can't tell
	case err == nil:
		err = fmt.Errorf("the operator has it in tenant %s by now", tenant)
	}
	select {
	case <-ctx.Done():
	case <-time.After(admissionPause):
	}
	ad.err = err
}

func (a *Agent) forgetAdmission(uid string) {
	if ad := a.admissions[uid]; ad != nil {
		ad.cancel()
		delete(a.admissions, uid)
	}
}

// setIdentities says which pods there are, and which tenants have connections of
// them to finish. It goes by the newest plan: a round may have begun with another, and
// who was told that a pod is planned waits for its certificate.
func (a *Agent) setIdentities(places map[string]model.Placement) {
	a.planning.Lock()
	defer a.planning.Unlock()
	p, _ := a.currentPlan()
	tenants := map[uint16]model.Tenant{}
	for _, t := range a.bulkheads.Tenants() {
		if s, ok := a.bulkheads.State(t); ok {
			tenants[s.Index] = t
		}
	}
	formers := map[model.Tenant][]model.Identity{}
	for _, pod := range p.pods {
		place := places[pod.UID]
		for _, index := range append(place.Formers, place.Tenant) {
			if t, ok := tenants[index]; ok && t != pod.Tenant {
				formers[t] = append(formers[t], pod.Identity)
			}
		}
	}
	a.identities.SetFormers(formers)
	a.identities.SetPods(p.pods)
}
