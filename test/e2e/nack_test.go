package e2e

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// outsideService is a Service of e2e-b whose endpoints are somewhere outside of the
// mesh.
func outsideService(name string, endpoints ...string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: e2e-b}
spec: {ports: [{name: tcp, port: %[2]d}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s, namespace: e2e-b, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [{name: tcp, port: %[2]d, protocol: TCP}]
endpoints: [{addresses: [%[3]s], conditions: {ready: true}}]
`, name, app.GreetPort, strings.Join(endpoints, "]}, {addresses: ["))
}

// TestEnvoyRefuses has an Envoy that can't read an address which a Service gets, and
// nothing of ours could know: the Service and its tenant are told so, in their
// namespace alone, what was in force serves on without a failed call, and all else
// goes on to change.
func TestEnvoyRefuses(t *testing.T) {
	const name, bad = "e2e-refused", "192.0.2.77"
	for _, tenant := range tenants {
		onlyVersion(t, tenant, newEnvoy)
	}
	registry := startRegistry(t)
	image := brokenEnvoy(t, registry, "1.40.5", "e2e-b", fmt.Sprintf("REFUSES=%q", bad))
	rollOut(t, "e2e-refuses", fmt.Sprintf("version: 1.40.5, image: %q", image), "{weight: 100}")
	phase(t, "e2e-refuses", v1alpha1.RolloutSucceeded)
	_, digest, _ := strings.Cut(image, "@sha256:")
	for _, tenant := range tenants {
		onlyVersion(t, tenant, "1.40.5+"+digest[:12])
	}

	e.removeIn(t, "e2e-b", "service", name)
	apply := func(service string, endpoints ...string) {
		t.Helper()
		if err := e.Apply(t.Context(), outsideService(service, endpoints...)); err != nil {
			t.Fatal(err)
		}
	}
	apply(name, e.pod(webO, 0).IPv4)
	service := hostPort(name+".e2e-b.svc", app.GreetPort)
	reaches := func(from harness.Pod, service string, want harness.Pod) {
		t.Helper()
		e.answers(t, from, func(r app.CallResult) bool { return r.Answer != nil && r.Answer.Pod == want.Name }, "tcp", service)
	}
	for i := range e.nodes {
		reaches(e.pod(webB, i), service, e.pod(webO, 0))
	}
	before := e.processes(t.Context(), t)

	results, over := make(chan loaded, 3), make(chan struct{})
	startLoadUntil(t, results, over, "to the service", e.pod(webB, 0), "--protocol", "tcp", "--connections", "8", "--new-connection-ratio", "0.5", service)
	startLoadUntil(t, results, over, "the tenant's other calls", e.pod(webB, 1), "--connections", "8", "--new-connection-ratio", "0.5", hostPort(e.pod(webA, 0).IPv4, app.HTTPPort))
	startLoadUntil(t, results, over, "another tenant's", e.pod(webA, 1), "--connections", "8", "--new-connection-ratio", "0.5", hostPort(e.pod(webB, 0).IPv4, app.HTTPPort))
	apply(name, e.pod(webO, 0).IPv4, bad)

	served := func(ctx context.Context) (*metav1.Condition, error) {
		s, err := e.Kube.CoreV1().Services("e2e-b").Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionServed), nil
	}
	configured := func(ctx context.Context, tenant string) (*metav1.Condition, error) {
		var p v1alpha1.TenantProxy
		err := e.Client.Get(ctx, client.ObjectKey{Namespace: tenant, Name: tenant}, &p)
		return meta.FindStatusCondition(p.Status.Conditions, v1alpha1.ConditionConfigured), err
	}
	told := func(ctx context.Context, namespace string) (kinds []string, err error) {
		events, err := e.Kube.CoreV1().Events(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, err
		}
		for _, ev := range events.Items {
			if ev.Reason == "ConfigRejected" && ev.Type == corev1.EventTypeWarning {
				kinds = append(kinds, ev.InvolvedObject.Kind+" "+ev.InvolvedObject.Name)
			}
		}
		return kinds, nil
	}
	err := harness.Wait(t.Context(), patience, 100*time.Millisecond, "the Service and its tenant to be told", func(ctx context.Context) error {
		c, err := served(ctx)
		if err != nil {
			return err
		}
		own, err := configured(ctx, "e2e-b")
		if err != nil {
			return err
		}
		for what, c := range map[string]*metav1.Condition{"the Service": c, "the tenant": own} {
			if c == nil || c.Status != metav1.ConditionFalse || c.Reason != "ConfigRejected" || !strings.Contains(c.Message, bad) || what == "the tenant" && !strings.Contains(c.Message, "of Service e2e-b/"+name+": ") {
				return fmt.Errorf("%s: %+v", what, c)
			}
		}
		kinds, err := told(ctx, "e2e-b")
		if all := fmt.Sprint(kinds); err == nil && (!strings.Contains(all, "Service "+name) || !strings.Contains(all, "TenantProxy e2e-b")) {
			err = fmt.Errorf("events are about %s", all)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if c, err := configured(t.Context(), "e2e-a"); err != nil || c == nil || c.Status != metav1.ConditionTrue {
		t.Errorf("another tenant is told %+v, %v", c, err)
	}
	if kinds, err := told(t.Context(), "e2e-a"); err != nil || len(kinds) > 0 {
		t.Errorf("another namespace has events about %v, %v", kinds, err)
	}
	// What is new reaches the same Envoys meanwhile.
	e.removeIn(t, "e2e-b", "service", name+"-other")
	apply(name+"-other", e.pod(webO, 1).IPv4)
	for i := range e.nodes {
		reaches(e.pod(webB, i), hostPort(name+"-other.e2e-b.svc", app.GreetPort), e.pod(webO, 1))
		reaches(e.pod(webB, i), service, e.pod(webO, 0))
	}
	close(over)
	for range cap(results) {
		l := <-results
		if r := l.result; l.err != nil || r.Failures.Total > 0 || r.Exchanges < 25*l.seconds()/2 {
			t.Errorf("%s: %v; %d exchanges, %d failures, first %+v", l.what, l.err, r.Exchanges, r.Failures.Total, r.Failures.First)
		}
	}

	// Mended, it is in force, and nobody is told of it any more.
	apply(name, e.pod(webO, 1).IPv4)
	for i := range e.nodes {
		reaches(e.pod(webB, i), service, e.pod(webO, 1))
	}
	err = harness.Wait(t.Context(), patience, 100*time.Millisecond, "the conditions to go", func(ctx context.Context) error {
		c, err := served(ctx)
		if err != nil {
			return err
		}
		own, err := configured(ctx, "e2e-b")
		if err == nil && (c != nil || own == nil || own.Status != metav1.ConditionTrue) {
			err = fmt.Errorf("the Service has %+v, the tenant %+v", c, own)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if after := e.processes(t.Context(), t); !maps.Equal(before, after) {
		t.Errorf("proxies were %v, are %v", before, after)
	}
	// Back to the version of before, as other tests expect.
	rollOut(t, "e2e-refuses-back", "version: "+newEnvoy, "{weight: 100}")
	phase(t, "e2e-refuses-back", v1alpha1.RolloutSucceeded)
	for _, tenant := range tenants {
		onlyVersion(t, tenant, newEnvoy)
	}
	// In this order, or proxies would begin to follow the first again.
	if _, err := e.Kubectl(t.Context(), "", "delete", "proxyrollout", "e2e-refuses", "e2e-refuses-back"); err != nil {
		t.Fatal(err)
	}
	for _, tenant := range tenants {
		onlyVersion(t, tenant, newEnvoy)
	}
}
