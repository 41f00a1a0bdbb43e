package agent

import (
	"encoding/json"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/VictoriaMetrics/metricsql"
	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/yaml"
)

// What dashboards and alerts ask for must be there, and be asked for properly.
func TestDashboardsAndAlerts(t *testing.T) {
	metricsOf(&Agent{}) // panics if two collectors have one name
	labels := describedLabels(t, append(slices.Clone(tenantDescs), bypassedDesc))
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct{ Name, Query string }
		}
	}
	readFile(t, "../config/monitoring/tenants.json", json.Unmarshal, &dashboard)
	asked := map[string]bool{}
	check := func(what, expr string) {
		t.Helper()
		for name := range checkQuery(t, labels, what, expr) {
			asked[name] = true
		}
	}
	variables := strings.NewReplacer("$namespace", ".*", "$tenant", ".*", "$__rate_interval", "5m")
	for _, p := range dashboard.Panels {
		if len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			check(p.Title, variables.Replace(target.Expr))
		}
	}
	values := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`)
	for _, v := range dashboard.Templating.List {
		if m := values.FindStringSubmatch(v.Query); m != nil {
			check(v.Name, "count by ("+m[2]+") ("+variables.Replace(m[1])+")")
		}
	}
	for name := range labels {
		if !asked[name] && strings.HasPrefix(name, "bulkhead_tenant_") && name != "bulkhead_tenant_threads" && name != "bulkhead_tenant_steered_connections_total" {
			t.Errorf("no panel shows %s", name)
		}
	}

	var alerts struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr string
				Annotations map[string]string
			}
		}
	}
	readFile(t, "../config/monitoring/alerts.yaml", func(b []byte, v any) error { return yaml.Unmarshal(b, v) }, &alerts)
	for _, g := range alerts.Groups {
		for _, r := range g.Rules {
			check(r.Alert, r.Expr)
			if r.Annotations["summary"] == "" {
				t.Errorf("alert %s doesn't say what is wrong", r.Alert)
			}
		}
	}
	if len(alerts.Groups) == 0 || len(dashboard.Panels) == 0 {
		t.Error("there are no alerts or panels")
	}
}

func readFile(t *testing.T, file string, unmarshal func([]byte, any) error, v any) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err == nil {
		err = unmarshal(b, v)
	}
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// describedLabels are the labels of each metric.
func describedLabels(t *testing.T, descs []*prometheus.Desc) map[string][]string {
	t.Helper()
	format := regexp.MustCompile(`fqName: "([^"]+)".*variableLabels: \{([^}]*)\}`)
	labels := map[string][]string{}
	for _, d := range descs {
		m := format.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("%s has no name", d)
		}
		labels[m[1]] = append(strings.Split(m[2], ","), "instance") // Prometheus adds it
	}
	return labels
}

// checkQuery returns the metrics of a query, all of which must be there with the
// labels that it names.
func checkQuery(t *testing.T, labels map[string][]string, what, expr string) map[string]bool {
	t.Helper()
	parsed, err := metricsql.Parse(expr)
	if err != nil {
		t.Errorf("%s: %q: %v", what, expr, err)
		return nil
	}
	names := map[string]bool{}
	var used []string
	metricsql.VisitAll(parsed, func(e metricsql.Expr) {
		switch e := e.(type) {
		case *metricsql.MetricExpr:
			for _, filters := range e.LabelFilterss {
				name := ""
				for _, f := range filters {
					if f.Label == "__name__" {
						name = f.Value
						names[name] = true
						if labels[name] == nil {
							t.Errorf("%s: there is no metric %s", what, name)
						}
					} else if labels[name] != nil && !slices.Contains(labels[name], f.Label) {
						t.Errorf("%s: %s has no label %s", what, name, f.Label)
					}
				}
			}
		case *metricsql.AggrFuncExpr:
			used = append(used, e.Modifier.Args...)
		case *metricsql.BinaryOpExpr:
			used = append(used, e.GroupModifier.Args...)
		}
	})
	for _, label := range used {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(names)), func(name string) bool { return slices.Contains(labels[name], label) }) {
			t.Errorf("%s: nothing that it asks for has the label %s", what, label)
		}
	}
	return names
}
