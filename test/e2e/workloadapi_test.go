package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

const workloadName = "workload"

// workloadPod is a pod that has the Workload API's directory mounted.
func workloadPod(namespace, name, account, node string) string {
	return strings.NewReplacer("NAMESPACE", namespace, "NAME", name, "ACCOUNT", account, "NODE", node, "IMAGE", harness.EchoImage).Replace(`---
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: NAMESPACE, labels: {app: NAME}}
spec:
  nodeName: NODE
  serviceAccountName: ACCOUNT
  terminationGracePeriodSeconds: 1
  securityContext: {runAsUser: 65532, runAsGroup: 65532, runAsNonRoot: true}
  containers:
  - name: echo
    image: IMAGE
    imagePullPolicy: IfNotPresent
    args: [serve]
    env:
    - {name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///run/workload-api/socket"}
    volumeMounts:
    - {name: workload-api, mountPath: /run/workload-api, readOnly: true}
  volumes:
  - name: workload-api
    hostPath: {path: /run/bulkhead/workload-api, type: Directory}
`)
}

// fetchSVIDs runs the client, which is go-spiffe's, in a pod.
func fetchSVIDs(ctx context.Context, namespace, name string) (app.WorkloadResult, error) {
	var r app.WorkloadResult
	err := e.ExecJSON(ctx, &r, namespace, name, "echo", "workload", "--audience", "e2e")
	if r.Failure != "" || r.OK {
		return r, nil
	}
	return r, err
}

func waitWorkload(t *testing.T, namespace, name string) (pod corev1.Pod) {
	t.Helper()
	if err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "pod "+namespace+"/"+name, func(ctx context.Context) error {
		pods, err := e.Pods(ctx, namespace, "app="+name)
		if err == nil && len(pods) != 1 {
			err = fmt.Errorf("%d pods are ready", len(pods))
		}
		if err == nil {
			pod = pods[0]
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return pod
}

// TestWorkloadAPI is an application that fetches its SVIDs on a real node: real
// cgroups of a real kubelet, and a mount that outlives the agent.
func TestWorkloadAPI(t *testing.T) {
	node := e.nodes[0]
	namespaces := []string{webA.Namespace, webB.Namespace, webO.Namespace}
	t.Cleanup(func() {
		for _, namespace := range namespaces {
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: workloadName}}
			if err := client.IgnoreNotFound(e.Client.Delete(context.Background(), p)); err != nil {
				t.Error(err)
			}
		}
	})
	for _, namespace := range namespaces {
		if err := e.Apply(t.Context(), workloadPod(namespace, workloadName, "web", node)); err != nil {
			t.Fatal(err)
		}
	}
	for _, namespace := range namespaces {
		waitWorkload(t, namespace, workloadName)
	}
	// A pod may run a moment before its certificate is there.
	mustFetch := func(echo harness.Echo) (r app.WorkloadResult) {
		t.Helper()
		err := harness.Wait(t.Context(), patience, 500*time.Millisecond, "the SVIDs of a pod of "+echo.Namespace, func(ctx context.Context) (err error) {
			if r, err = fetchSVIDs(ctx, echo.Namespace, workloadName); err == nil && !r.OK {
				err = fmt.Errorf("%+v", r)
			}
			return err
		})
		if want := (harness.Pod{Echo: echo}).Identity(trustDomain); err != nil || r.ID != want || r.Subject != want {
			t.Errorf("a pod of %s got %+v, %v; want %s", echo.Namespace, r, err, want)
		}
		return r
	}
	got := mustFetch(webA)
	mustFetch(webB)
	// Whoever reads the published bundle verifies the token.
	var m corev1.ConfigMap
	if err := e.Client.Get(t.Context(), client.ObjectKey{Namespace: "bulkhead-system", Name: "bulkhead-trust-bundle"}, &m); err != nil {
		t.Fatal(err)
	}
	bundle, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString(trustDomain), []byte(m.Data["bundle.json"]))
	if err != nil {
		t.Fatal(err)
	}
	if svid, err := jwtsvid.ParseAndValidate(got.Token, bundle, []string{"e2e"}); err != nil {
		t.Errorf("the token isn't what the bundle verifies: %v", err)
	} else if life := time.Until(svid.Expiry); life > 5*time.Minute || life < time.Minute {
		t.Errorf("it lives %s", life)
	}
	if _, err := jwtsvid.ParseAndValidate(got.Token, bundle, []string{"other"}); err == nil {
		t.Error("another audience takes it")
	}
	if r, err := fetchSVIDs(t.Context(), webO.Namespace, workloadName); err != nil || r.OK || r.ID != "" || !strings.Contains(r.Failure, "PermissionDenied") {
		t.Errorf("a pod outside of the mesh got %+v, %v", r, err)
	}
	// The next agent's socket is in the same directory.
	former := e.readyAgents(t)[node]
	if err := e.Client.Delete(t.Context(), &former); err != nil {
		t.Fatal(err)
	}
	if err := harness.Wait(t.Context(), patience, time.Second, "the next agent", func(ctx context.Context) error {
		agents, err := e.Agents(ctx)
		if err != nil {
			return err
		}
		if next, ok := agents[node]; !ok || next.UID == former.UID {
			return errors.New("it isn't ready")
		}
		r, err := fetchSVIDs(ctx, webA.Namespace, workloadName)
		if err == nil && !r.OK {
			err = fmt.Errorf("%s", r.Failure)
		}
		if err == nil && r.Serial != got.Serial {
			t.Errorf("the certificate %s is another than %s: the next agent didn't find it", r.Serial, got.Serial)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
