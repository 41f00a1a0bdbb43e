package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/identity/attest"
	"github.com/bulkhead-mesh/bulkhead/identity/workloadapi"
)

// openWorkloadAPI makes what serves the node's applications.
func (a *Agent) openWorkloadAPI() error {
	var pods attest.PodCgroups
	var err error
	if a.o.PodCgroups != "" {
		if pods, err = attest.NewPodCgroups(a.o.PodCgroups); err != nil {
			return err
		}
	} else if pods, err = attest.OwnPodCgroups(); err != nil {
		// The mesh works without; pods stays empty, so every caller is refused.
		a.log.Error("the Workload API refuses everybody: it can't tell pods", "error", err)
	}
	a.workloads, err = workloadapi.New(workloadapi.Options{
		Socket: a.o.workloadSocket(), Identities: a.identities, Signer: signer{a.operator}, Pods: pods, Log: a.log,
		Netns: func(uid string) string {
			r, _ := a.sandboxes.get(uid)
			return r.Netns
		},
	})
	if err != nil {
		return err
	}
	for _, c := range a.workloads.Collectors() {
		if err := prometheus.Register(c); err != nil {
			return fmt.Errorf("register metrics of the Workload API: %w", err)
		}
	}
	return nil
}

// setBundle takes the keys of JWT-SVIDs from a bundle in the SPIFFE format, "" if
// there is none yet.
func (a *Agent) setBundle(trustDomain, document string) {
	if document == "" {
		return
	}
	err := a.workloads.SetBundle(trustDomain, []byte(document))
	switch {
	case errors.Is(err, workloadapi.ErrNoKeys):
		a.log.Info("the operator hasn't published keys of JWT-SVIDs")
	case err != nil:
		a.log.Error("keys of JWT-SVIDs stay as they were", "error", fmt.Errorf("bundle of ConfigMap %s: %w", trustBundleConfigMap, err))
	}
}

// SignJWT implements workloadapi.JWTSigner.
func (s signer) SignJWT(ctx context.Context, pod identity.Pod, audiences []string) (string, error) {
	r, err := s.operator.SignJWT(ctx, &nodev1alpha1.SignJWTRequest{
		PodUid: pod.UID, PodNamespace: pod.Namespace, PodName: pod.Name, Audiences: audiences})
	return r.GetToken(), err
}
