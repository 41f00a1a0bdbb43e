package controllers

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// What agents count comes to the owner, beside what else is told of the proxies.
func TestCostsReachTheOwner(t *testing.T) {
	c := newCluster(t, newTopology("t", "mesh"), newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("one", "n1", "10.0.1.1"))
	w := c.writer()
	c.triggers.costs.delay = 0
	costs, tenants := start(t, &c.triggers.costs), start(t, &c.triggers.tenants)
	for _, err := range []error{w.writePlan(t.Context(), "n1"), w.writeTenant(t.Context(), "a")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	report := func(minute int, cpu int64) {
		t.Helper()
		np := c.nodeProxy("n1")
		np.Status.Tenants = []v1alpha1.NodeTenantStatus{{Name: "a", Ready: true, Cost: &v1alpha1.NodeCost{
			Since: metav1.NewTime(born), At: metav1.NewTime(born.Add(time.Duration(minute) * time.Minute)), Taken: v1alpha1.Taken{CPUMilliseconds: cpu}}}}
		if err := c.Status().Update(t.Context(), np); err != nil {
			t.Fatal(err)
		}
		if err := c.syncReport(t.Context(), "n1"); err != nil {
			t.Fatal(err)
		}
	}
	proxy := func() *v1alpha1.TenantProxy {
		t.Helper()
		p := &v1alpha1.TenantProxy{}
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: "a", Name: "a"}, p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	report(1, 100)
	if costs.Len() != 1 {
		t.Fatal("nobody is to be told of the cost")
	}
	for _, do := range []func() error{func() error { return w.writeCosts(t.Context(), "a") }, func() error { return w.writeTenant(t.Context(), "a") }} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	if p := proxy(); p.Status.Cost == nil || p.Status.Cost.Total.CPUMilliseconds != 100 || p.Status.ReadyProxies != 1 {
		t.Errorf("the owner sees %+v", p.Status)
	}
	if key, _ := tenants.Get(); key == "a" {
		tenants.Done(key)
	}
	// A change of the cost alone isn't news to anybody else.
	report(2, 170)
	if tenants.Len() != 0 {
		t.Error("all of the status is made anew for a cost")
	}
	if err := w.writeCosts(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	p := proxy()
	if p.Status.Cost.Total.CPUMilliseconds != 170 || p.Status.ReadyProxies != 1 {
		t.Errorf("the owner sees %+v", p.Status)
	}
	if err := w.writeCosts(t.Context(), "a"); err != nil || proxy().ResourceVersion != p.ResourceVersion {
		t.Errorf("a cost that stays is written again: %v", err)
	}
}
