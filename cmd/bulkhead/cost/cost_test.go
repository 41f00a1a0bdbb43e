package cost

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// now is at 10:30.
var now = time.Date(2026, 11, 26, 10, 30, 0, 0, time.UTC)

func proxy(namespace string, since time.Duration, cost v1alpha1.TenantCost) v1alpha1.TenantProxy {
	cost.Since, cost.At = metav1.NewTime(now.Add(-since)), metav1.NewTime(now)
	return v1alpha1.TenantProxy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: namespace},
		Status: v1alpha1.TenantProxyStatus{Tenant: namespace, Cost: &cost}}
}

func took(start time.Time, cpu int64) v1alpha1.CostPeriod {
	return v1alpha1.CostPeriod{Start: metav1.NewTime(start), Taken: v1alpha1.Taken{CPUMilliseconds: cpu, PSSMebibyteSeconds: 3600}}
}

func TestReport(t *testing.T) {
	hour, day := now.Truncate(time.Hour), now.Truncate(24*time.Hour)
	old := proxy("team-a", 50*time.Hour, v1alpha1.TenantCost{Total: v1alpha1.Taken{CPUMilliseconds: 9000},
		Hours: []v1alpha1.CostPeriod{took(hour.Add(-2*time.Hour), 1000), took(hour.Add(-time.Hour), 2000), took(hour, 3000)},
		Days:  []v1alpha1.CostPeriod{took(day.Add(-48*time.Hour), 1000), took(day.Add(-24*time.Hour), 2000), took(day, 6000)}})
	young := proxy("team-b", 10*time.Minute, v1alpha1.TenantCost{Total: v1alpha1.Taken{CPUMilliseconds: 1000}, Hours: []v1alpha1.CostPeriod{took(hour, 1000)}, Days: []v1alpha1.CostPeriod{took(day, 1000)}})
	silent := v1alpha1.TenantProxy{ObjectMeta: metav1.ObjectMeta{Namespace: "team-c"}}
	for _, c := range []struct {
		since        string
		a, b, aShare float64
		fromA, fromB time.Time
		pssA         float64
	}{
		{"", 9, 1, 0.9, now.Add(-50 * time.Hour), now.Add(-10 * time.Minute), 0},
		{"30m", 3, 1, 0.75, hour, now.Add(-10 * time.Minute), 2},
		{"31m", 5, 1, 5.0 / 6, hour.Add(-time.Hour), now.Add(-10 * time.Minute), 7200.0 / 5400},
		{"2d", 9, 1, 0.9, now.Add(-50 * time.Hour), now.Add(-10 * time.Minute), 3 * 3600.0 / 180000},
		{"25h", 8, 1, 8.0 / 9, day.Add(-24 * time.Hour), now.Add(-10 * time.Minute), 2 * 3600.0 / (34.5 * 3600)},
	} {
		back, err := parseSince(c.since)
		if err != nil {
			t.Fatal(err)
		}
		rows := Report([]v1alpha1.TenantProxy{old, young, silent}, back, now)
		if len(rows) != 2 {
			t.Fatalf("%d rows", len(rows))
		}
		a, b := rows[0], rows[1]
		near := func(x, y float64) bool { return x-y < 1e-9 && y-x < 1e-9 }
		if a.CPUSeconds != c.a || b.CPUSeconds != c.b || !near(a.CPUShare, c.aShare) || !a.From.Equal(c.fromA) || !b.From.Equal(c.fromB) || !near(a.PSSMebibytes, c.pssA) {
			t.Errorf("since %q: %+v and %+v", c.since, a, b)
		}
	}
	for _, bad := range []string{"1", "-1h", "0d", "32d", "1w"} {
		if _, err := parseSince(bad); err == nil || !strings.Contains(err.Error(), "6h or 7d") {
			t.Errorf("since %q: %v", bad, err)
		}
	}
}

func TestRun(t *testing.T) {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	a := proxy("team-a", time.Hour, v1alpha1.TenantCost{Estimated: true, Total: v1alpha1.Taken{CPUMilliseconds: 1500, BytesSent: 3 << 20, BytesReceived: 12, Connections: 7}})
	b := proxy("team-b", time.Hour, v1alpha1.TenantCost{Total: v1alpha1.Taken{CPUMilliseconds: 500}})
	young := v1alpha1.TenantProxy{ObjectMeta: metav1.ObjectMeta{Namespace: "team-c", Name: "team-c"}}
	reader := fake.NewClientBuilder().WithScheme(scheme).WithObjects(&a, &b, &young).Build()
	run := func(namespace, output string) string {
		var w bytes.Buffer
		if err := Run(context.Background(), reader, namespace, Options{Output: output}, &w); err != nil {
			t.Fatal(err)
		}
		return w.String()
	}
	out := run("", "table")
	if strings.Contains(out, "nothing yet") {
		t.Errorf("of an hour:\n%s", out)
	}
	first := proxy("team-d", 0, v1alpha1.TenantCost{})
	began := fake.NewClientBuilder().WithScheme(scheme).WithObjects(&first, &b).Build()
	var w bytes.Buffer
	if err := Run(t.Context(), began, "", Options{Output: "table"}, &w); err != nil || strings.Count(w.String(), "nothing yet") != 1 || !strings.Contains(w.String(), "tenant team-d of namespace team-d: counting began at 10:30:00Z; nothing yet") {
		t.Errorf("when counting begins: %v\n%s", err, &w)
	}
	for _, part := range []string{"~1.5s", "~75.0", "3.0Mi", "team-b", "25.0", "~ estimated", "2026-11-26 09:30Z"} {
		if !strings.Contains(out, part) {
			t.Errorf("the table lacks %q:\n%s", part, out)
		}
	}
	if one := run("team-b", "table"); strings.Contains(one, "team-a") || strings.Contains(one, "~") {
		t.Errorf("of team-b:\n%s", one)
	}
	records, err := csv.NewReader(strings.NewReader(run("", "csv"))).ReadAll()
	if err != nil || len(records) != 3 || records[1][5] != "1.500" || records[1][9] != "3145728" {
		t.Errorf("csv: %v %v", records, err)
	}
	var rows []Row
	if err := json.Unmarshal([]byte(run("", "json")), &rows); err != nil || len(rows) != 2 || rows[0].Connections != 7 || !rows[0].Estimated {
		t.Errorf("json: %+v %v", rows, err)
	}
	for _, c := range []struct {
		namespace string
		o         Options
		want      string
	}{{"", Options{Output: "yaml"}, "table, csv or json"}, {"team-z", Options{Output: "csv"}, "no TenantProxy in namespace team-z"},
		{"team-c", Options{Output: "csv"}, "namespace team-c yet"}, {"", Options{Output: "csv", Since: "x"}, "since"}} {
		if err := Run(context.Background(), reader, c.namespace, c.o, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
