package agent

import (
	"fmt"
	"reflect"
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/bulkhead-mesh/bulkhead/agent/cost"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// fill gives each number in v another value than 0, and each text what a workload could
// have chosen.
func fill(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fill(t, v.Field(i))
			}
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem())
	case reflect.Array:
		for i := range v.Len() {
			fill(t, v.Index(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			fill(t, v.Index(i))
		}
	case reflect.String:
		v.SetString("chosen by a workload")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32, reflect.Int64, reflect.Uint8:
		v.Set(reflect.ValueOf(3).Convert(v.Type()))
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(3)
	case reflect.Float64:
		v.SetFloat(3)
	case reflect.Map:
	default:
		t.Fatalf("%s isn't filled", v.Type())
	}
}

// Whatever a tenant does, its series are as many as the documentation says, and the
// values of their labels are the operator's and this program's.
func TestSeriesOfATenantAreBounded(t *testing.T) {
	const documented = 50 // docs/operating.md, "Who uses what"
	f := tenantFigures{usage: &isolation.Usage{}, account: &cost.Account{}, counters: &steer.Counters{}, tunnels: tunnelHosts{0: {Hosts: 1}, 1: {Refused: 2}}}
	for _, v := range []any{&f.status, f.usage, f.account, f.counters} {
		fill(t, reflect.ValueOf(v).Elem())
	}
	// As many as there can be: processes have generation 0 or 1.
	f.status.Generations = []v1alpha1.GenerationStatus{{Generation: 0, LastExit: "a"}, {Generation: 1, Version: "b", Restarts: 99}}
	for i := range 16 {
		f.status.Rejected = append(f.status.Rejected, v1alpha1.RejectedResource{Type: "cluster", Name: fmt.Sprint("name ", i)})
	}
	c := make(chan prometheus.Metric, 1000)
	tenant := model.Tenant{Scope: model.ScopeServiceAccount, Namespace: "shop", Name: "web"}
	tenantSink{c: c, tenant: tenant}.all(f)
	close(c)
	known := map[string][]string{
		"namespace": {"shop"}, "tenant": {tenant.String()}, "generation": {"0", "1"},
		"kind": {"private", "pss", "charged"}, "resource": {"cpu", "memory", "io"}, "why": {"excluded", "bypass"},
		"listener": {"outbound", "inbound", "plain", "nodePlain"},
		"reason": {"spoofed", "fragment", "malformed", "noTenant", "notThePod", "deliver", "foreign", "protocol", "unsteered", "midstream",
			"flowsFull", "plainText", "tooMany", "tooFast", "directTooFast", "portsTaken"},
	}
	series, seen, described := 0, map[string]bool{}, map[*prometheus.Desc]bool{}
	for m := range c {
		var d dto.Metric
		if err := m.Write(&d); err != nil {
			t.Fatal(err)
		}
		series++
		described[m.Desc()] = true
		key := m.Desc().String()
		for _, l := range d.Label {
			key += " " + l.GetName() + "=" + l.GetValue()
			if !slices.Contains(known[l.GetName()], l.GetValue()) {
				t.Errorf("%s has the label %s with the value %q", m.Desc(), l.GetName(), l.GetValue())
			}
		}
		if seen[key] {
			t.Errorf("twice: %s", key)
		}
		seen[key] = true
	}
	for _, d := range tenantDescs {
		if !described[d] {
			t.Errorf("with everything known there is no %s", d)
		}
	}
	if series > documented || series < documented-5 {
		t.Errorf("a tenant has up to %d series, and %d are documented", series, documented)
	}
}
