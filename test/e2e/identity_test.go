package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

func serviceAccount(namespace, name string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: %s, namespace: %s}\n", name, namespace)
}

// newIdentity starts a pod of webA's namespace with a service account of its own, and
// returns what it was signed.
func newIdentity(t *testing.T, name string) (harness.Pod, app.WorkloadResult) {
	t.Helper()
	namespace := webA.Namespace
	t.Cleanup(func() {
		if _, err := e.Kubectl(context.Background(), "", "delete", "-n", namespace, "pod/"+name, "serviceaccount/"+name, "--ignore-not-found", "--wait=false"); err != nil {
			t.Error(err)
		}
	})
	if err := e.Apply(t.Context(), serviceAccount(namespace, name)+workloadPod(namespace, name, name, e.nodes[0])); err != nil {
		t.Fatal(err)
	}
	pod := harness.Pod{Pod: waitWorkload(t, namespace, name), Echo: harness.Echo{Namespace: namespace, Name: name}}
	pod.IPv4 = pod.Status.PodIP
	var r app.WorkloadResult
	err := harness.Wait(t.Context(), patience, 500*time.Millisecond, "the SVIDs of "+name, func(ctx context.Context) (err error) {
		if r, err = fetchSVIDs(ctx, namespace, name); err == nil && !r.OK {
			err = fmt.Errorf("%+v", r)
		}
		return err
	})
	if want := pod.Identity(trustDomain); err != nil || r.ID != want {
		t.Fatalf("%s got %+v, %v; want %s", pod, r, err, want)
	}
	return pod, r
}

// identityReady waits until the topology's condition has one of the reasons and says
// so, and returns how long that took.
func identityReady(t *testing.T, timeout time.Duration, says string, reasons ...string) time.Duration {
	t.Helper()
	began := time.Now()
	err := harness.Wait(t.Context(), timeout, 100*time.Millisecond, fmt.Sprintf("IdentityReady to be %s", reasons), func(ctx context.Context) error {
		var o v1alpha1.MeshTopology
		if err := e.Client.Get(ctx, client.ObjectKey{Name: "e2e"}, &o); err != nil {
			return err
		}
		c := meta.FindStatusCondition(o.Status.Conditions, v1alpha1.ConditionIdentityReady)
		if c == nil || !slices.Contains(reasons, c.Reason) || !strings.Contains(c.Message, says) {
			return fmt.Errorf("it is %+v", c)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return time.Since(began)
}

// secret reads one of the operator's namespace.
func secret(t *testing.T, name string) *corev1.Secret {
	t.Helper()
	s, err := e.Kube.CoreV1().Secrets(harness.SystemNamespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// spoil changes a Secret until the test ends or the function that it returns is
// called. Nobody else may have changed it meanwhile.
func spoil(t *testing.T, name string, change map[string][]byte) (restore func()) {
	t.Helper()
	secrets := e.Kube.CoreV1().Secrets(harness.SystemNamespace)
	var s *corev1.Secret
	var good map[string][]byte
	if err := retry.RetryOnConflict(retry.DefaultRetry, func() (err error) {
		s = secret(t, name)
		good = maps.Clone(s.Data)
		maps.Copy(s.Data, change)
		s, err = secrets.Update(t.Context(), s, metav1.UpdateOptions{})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	restore = sync.OnceFunc(func() {
		s.Data = good // of the version that was written
		if _, err := secrets.Update(context.Background(), s, metav1.UpdateOptions{}); err != nil {
			t.Errorf("Secret %s isn't what was written into it any more: %v", name, err)
		}
	})
	t.Cleanup(restore)
	return restore
}

// told waits for an event about a Secret.
func told(t *testing.T, secret, reason, says string) {
	t.Helper()
	if err := harness.Wait(t.Context(), patience, 200*time.Millisecond, reason+" of "+secret, func(ctx context.Context) error {
		list, err := e.Kube.EventsV1().Events(harness.SystemNamespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var others []string
		for _, event := range list.Items {
			if event.Regarding.Kind != "Secret" || event.Regarding.Name != secret {
				continue
			}
			if event.Reason == reason && strings.Contains(event.Note, says) {
				return nil
			}
			others = append(others, event.Reason+" "+event.Note)
		}
		return fmt.Errorf("there are %q", others)
	}); err != nil {
		t.Error(err)
	}
}

// Certificates live as long as the MeshTopology says, from the next one on.
func TestCertificateTTL(t *testing.T) {
	set := func(ctx context.Context, ttl string) {
		if _, err := e.Kubectl(ctx, "", "patch", "meshtopology", "e2e", "--type=merge", "--patch", `{"spec":{"identity":{"certificateTTL":`+ttl+`}}}`); err != nil {
			t.Error(err)
		}
	}
	life := func(name string) time.Duration {
		t.Helper()
		_, r := newIdentity(t, name)
		return time.Until(r.Expires)
	}
	if got := life("lives-an-hour"); got < 50*time.Minute || got > time.Hour {
		t.Errorf("by default it lives for another %s", got)
	}
	t.Cleanup(func() { set(context.Background(), "null") })
	set(t.Context(), `"5m"`)
	// The operator's replicas know it a moment later.
	got := life("lives-minutes")
	for i := 0; i < 5 && got > 6*time.Minute; i++ {
		got = life(fmt.Sprint("lives-minutes-", i))
	}
	if got < time.Minute || got > 5*time.Minute {
		t.Errorf("with a TTL of 5m it lives for another %s", got)
	}
	if _, err := e.Kubectl(t.Context(), "", "patch", "meshtopology", "e2e", "--type=merge", "--patch", `{"spec":{"identity":{"certificateTTL":"4m"}}}`); err == nil || !strings.Contains(err.Error(), "5m to 720h") {
		t.Errorf("a TTL of 4m: %v", err)
	}
}

// A Secret of the authority that can't be read is told, and changes nothing else.
func TestUnreadableAuthority(t *testing.T) {
	restore := spoil(t, "bulkhead-ca", map[string][]byte{"intermediate.crt": []byte("not a certificate")})
	version := secret(t, "bulkhead-ca").ResourceVersion
	identityReady(t, patience, "restore it from a backup", "InvalidAuthority")
	told(t, "bulkhead-ca", "InvalidAuthority", "intermediate.crt")
	pod, _ := newIdentity(t, "signed-as-before")
	mustCall(t, pod, pod.IPv4, "tcp", hostPort(e.pod(webB, 1).IPv4, app.GreetPort))
	if now := secret(t, "bulkhead-ca").ResourceVersion; now != version {
		t.Error("the Secret was overwritten")
	}
	restore()
	identityReady(t, patience, "", "Ready", "ChangingRoots")
}

// TestFiftyPodsAtOnce creates pods of as many service accounts on one node, and tells
// how long each waits for a certificate that its peers take: from the request that
// creates the pod, over the API server, the operator's plan, the agent's watch of it,
// the key, and the operator's checks by TokenReview and a live read of the pod, to the
// agent's word that it is there. Scheduling and sandboxes aren't in it.
func TestFiftyPodsAtOnce(t *testing.T) {
	const count = 50
	// Two seconds on two CPUs that also start the fifty pods: none may wait for the others.
	const limit = 90 * time.Second
	namespace, node := webA.Namespace, e.nodes[0]
	name := func(i int) string { return fmt.Sprint("at-once-", i) }
	t.Cleanup(func() {
		soon := int64(1) // not at once: then they were gone before the node has ended them
		all := metav1.ListOptions{LabelSelector: "app=at-once"}
		if err := e.Kube.CoreV1().Pods(namespace).DeleteCollection(context.Background(), metav1.DeleteOptions{GracePeriodSeconds: &soon}, all); err != nil {
			t.Error(err)
		}
		// The next test's times aren't to be those of a node that ends fifty pods.
		if err := harness.Wait(context.Background(), 2*patience, time.Second, "their end", func(ctx context.Context) error {
			left, err := e.Kube.CoreV1().Pods(namespace).List(ctx, all)
			if err == nil && len(left.Items) > 0 {
				err = fmt.Errorf("%d are left", len(left.Items))
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		if err := e.Kube.CoreV1().ServiceAccounts(namespace).DeleteCollection(context.Background(), metav1.DeleteOptions{}, all); err != nil {
			t.Error(err)
		}
	})
	labels := map[string]string{"app": "at-once"}
	// each does something for all of them at the same time.
	each := func(do func(i int) error) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range count {
			wg.Go(func() {
				if err := do(i); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	each(func(i int) error {
		_, err := e.Kube.CoreV1().ServiceAccounts(namespace).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name(i), Labels: labels}}, metav1.CreateOptions{})
		return err
	})
	no, grace := false, int64(1)
	var mu sync.Mutex
	created := map[string]time.Time{}
	began := time.Now()
	each(func(i int) error {
		asked := time.Now()
		p, err := e.Kube.CoreV1().Pods(namespace).Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name(i), Labels: labels}, Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: name(i), AutomountServiceAccountToken: &no, TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{Name: "echo", Image: harness.EchoImage, ImagePullPolicy: corev1.PullIfNotPresent, Args: []string{"serve"}}},
		}}, metav1.CreateOptions{})
		mu.Lock()
		defer mu.Unlock()
		created[string(p.UID)] = asked
		return err
	})
	all := time.Since(began)
	agent := e.readyAgents(t)[node]
	var waits []time.Duration
	err := harness.Wait(t.Context(), patience, time.Second, "certificates", func(ctx context.Context) error {
		log, err := e.Kube.CoreV1().Pods(agent.Namespace).GetLogs(agent.Name, &corev1.PodLogOptions{SinceTime: &metav1.Time{Time: began}}).DoRaw(ctx)
		if err != nil {
			return err
		}
		waits = nil
		signed := map[string]bool{} // one may be signed for again
		for line := range strings.Lines(string(log)) {
			var l struct {
				Time   time.Time `json:"time"`
				Msg    string    `json:"msg"`
				PodUID string    `json:"pod_uid"`
			}
			if json.Unmarshal([]byte(line), &l) != nil || l.Msg != "certificate signed" {
				continue
			}
			if asked, ok := created[l.PodUID]; ok && !signed[l.PodUID] {
				signed[l.PodUID] = true
				waits = append(waits, l.Time.Sub(asked))
			}
		}
		if len(waits) != count {
			return fmt.Errorf("%d of %d are there", len(waits), count)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(waits)
	t.Logf("%d pods created within %s: a usable certificate after %s (first), %s (half), %s (99 %%: all)", count, all, waits[0], waits[count/2-1], waits[count-1])
	if waits[count-1] > limit || waits[count/2-1] > limit/3 {
		t.Errorf("one waited for its certificate for %s, half of them up to %s; longer than %s and %s", waits[count-1], waits[count/2-1], limit, limit/3)
	}
}
