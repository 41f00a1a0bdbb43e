package translate

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"
	"sigs.k8s.io/yaml"

	"github.com/bulkhead-mesh/bulkhead/model"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

// routeObjects is what a test puts into the cluster.
type routeObjects struct {
	services map[model.ServiceKey][]ServicePort
	routes   []*Route
	grants   []*gatewayv1beta1.ReferenceGrant
	had      map[RouteKey][]gatewayv1.RouteParentStatus
}

func (o *routeObjects) references() References {
	return References{
		Ports: func(k model.ServiceKey) ([]ServicePort, bool) { p, ok := o.services[k]; return p, ok },
		Grants: func(namespace string) (out []*gatewayv1beta1.ReferenceGrant) {
			for _, g := range o.grants {
				if g.Namespace == namespace {
					out = append(out, g)
				}
			}
			return out
		},
	}
}

func readObjects(t *testing.T, file string) *routeObjects {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	o := &routeObjects{services: map[model.ServiceKey][]ServicePort{}, had: map[RouteKey][]gatewayv1.RouteParentStatus{}}
	for _, doc := range bytes.Split(content, []byte("\n---\n")) {
		var m metav1.TypeMeta
		decode := func(into any) {
			if err := yaml.UnmarshalStrict(doc, into); err != nil {
				t.Fatalf("%s: %v\n%s", file, err, doc)
			}
		}
		if err := yaml.Unmarshal(doc, &m); err != nil {
			t.Fatal(err)
		}
		switch m.Kind {
		case "Service":
			var s corev1.Service
			decode(&s)
			o.services[model.ServiceKey{Namespace: s.Namespace, Name: s.Name}] = ServicePorts(&s)
		case KindHTTPRoute:
			var h gatewayv1.HTTPRoute
			decode(&h)
			r := HTTPRoute(&h)
			o.routes, o.had[r.Key] = append(o.routes, r), h.Status.Parents
		case KindGRPCRoute:
			var g gatewayv1.GRPCRoute
			decode(&g)
			r := GRPCRoute(&g)
			o.routes, o.had[r.Key] = append(o.routes, r), g.Status.Parents
		case "ReferenceGrant":
			var g gatewayv1beta1.ReferenceGrant
			decode(&g)
			o.grants = append(o.grants, &g)
		default:
			t.Fatalf("%s has the kind %q", file, m.Kind)
		}
	}
	return o
}

// all are the routings of every parent, and the status of every route.
func (o *routeObjects) all() (routings map[string][]model.Routing, status map[string][]gatewayv1.RouteParentStatus) {
	parents := map[model.ServiceKey]bool{}
	for _, r := range o.routes {
		list, _ := r.Services()
		for _, p := range list {
			parents[p] = true
		}
	}
	routings = map[string][]model.Routing{}
	outcomes := map[RouteKey][]Outcome{}
	for _, p := range slices.SortedFunc(maps.Keys(parents), func(a, b model.ServiceKey) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) }) {
		r, out := Routings(p, o.routes, o.references())
		if len(r) > 0 {
			routings[p.Namespace+"/"+p.Name] = r
		}
		for k, list := range out {
			outcomes[k] = append(outcomes[k], list...)
		}
	}
	status = map[string][]gatewayv1.RouteParentStatus{}
	for _, r := range o.routes {
		status[r.Key.String()] = RouteStatus(r, outcomes[r.Key], o.had[r.Key], metav1.NewTime(born))
	}
	return routings, status
}

func TestRoutingsGolden(t *testing.T) {
	inputs, err := filepath.Glob("testdata/routes/in/*.yaml")
	if err != nil || len(inputs) == 0 {
		t.Fatalf("no inputs: %v", err)
	}
	wanted := map[string]bool{}
	for _, in := range inputs {
		wanted[filepath.Base(in)] = true
		t.Run(strings.TrimSuffix(filepath.Base(in), ".yaml"), func(t *testing.T) {
			routings, status := readObjects(t, in).all()
			got, err := yaml.Marshal(prune(t, map[string]any{"routings": routings, "status": status}))
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata/routes/out", filepath.Base(in))
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("%s differs; if that is right: go test ./controllers/translate -run TestRoutingsGolden -update\n%s", file, diff)
			}
		})
	}
	outputs, _ := filepath.Glob("testdata/routes/out/*.yaml")
	for _, out := range outputs {
		switch {
		case wanted[filepath.Base(out)]:
		case *update:
			os.Remove(out)
		default:
			t.Errorf("%s has no input", out)
		}
	}
}

// prune leaves out zero values, so that golden files show what was decided.
func prune(t *testing.T, v any) any {
	t.Helper()
	j, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	var tree any
	if err := json.Unmarshal(j, &tree); err != nil {
		t.Fatal(err)
	}
	var walk func(any) any
	walk = func(v any) any {
		switch v := v.(type) {
		case map[string]any:
			for k, x := range v {
				if x = walk(x); x == nil || x == "" || x == 0.0 || x == false {
					delete(v, k)
				} else {
					v[k] = x
				}
			}
			if len(v) == 0 {
				return nil
			}
		case []any:
			for i := range v {
				v[i] = walk(v[i])
			}
			if len(v) == 0 {
				return nil
			}
		}
		return v
	}
	return walk(tree)
}

// Thousands of routes on one port: the oldest ones count, and each route hears.
func TestManyRoutes(t *testing.T) {
	o := &routeObjects{services: map[model.ServiceKey][]ServicePort{{Namespace: "a", Name: "web"}: {{Port: 80, Protocol: model.ProtocolHTTP}}}}
	const n = 5000
	for i := range n {
		path := gatewayv1.HTTPPathMatch{Value: new(fmt.Sprintf("/p%d", i))}
		o.routes = append(o.routes, HTTPRoute(&gatewayv1.HTTPRoute{
			ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: fmt.Sprintf("r%d", i), CreationTimestamp: metav1.NewTime(born.Add(time.Duration(n-i) * time.Second))},
			Spec: gatewayv1.HTTPRouteSpec{
				CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{{Group: new(gatewayv1.Group("")), Kind: new(gatewayv1.Kind("Service")), Name: "web"}}},
				Rules: []gatewayv1.HTTPRouteRule{{Matches: []gatewayv1.HTTPRouteMatch{{Path: &path}}, BackendRefs: []gatewayv1.HTTPBackendRef{{
					BackendRef: gatewayv1.BackendRef{BackendObjectReference: gatewayv1.BackendObjectReference{Name: "web", Port: new(gatewayv1.PortNumber(80))}},
				}}}},
			},
		}))
	}
	began := time.Now()
	routings, outcomes := Routings(model.ServiceKey{Namespace: "a", Name: "web"}, o.routes, o.references())
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("it took %s", took)
	}
	if len(routings) != 1 || len(routings[0].Rules) != MaxMatches {
		t.Fatalf("%d routings, the first with %d rules", len(routings), len(routings[0].Rules))
	}
	for i := range n {
		got := outcomes[RouteKey{KindHTTPRoute, "a", fmt.Sprintf("r%d", i)}]
		want := refusal{}
		if i < n-MaxMatches {
			want.reason = ReasonLimitExceeded
		}
		if len(got) != 1 || got[0].accepted.reason != want.reason {
			t.Fatalf("route %d, of which the last are the oldest: %+v", i, got)
		}
	}
}

// A route that is one too many on one of its ports is in force on the other, and says so.
func TestLimitOnOnePort(t *testing.T) {
	web := model.ServiceKey{Namespace: "a", Name: "web"}
	o := &routeObjects{services: map[model.ServiceKey][]ServicePort{web: {{Port: 80, Protocol: model.ProtocolHTTP}, {Port: 81, Protocol: model.ProtocolHTTP}}}}
	add := func(name string, age, matches int, port *gatewayv1.PortNumber) {
		rule := gatewayv1.HTTPRouteRule{}
		for i := range matches {
			rule.Matches = append(rule.Matches, gatewayv1.HTTPRouteMatch{Path: &gatewayv1.HTTPPathMatch{Value: new(fmt.Sprintf("/p%d", i))}})
		}
		o.routes = append(o.routes, HTTPRoute(&gatewayv1.HTTPRoute{
			ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name, CreationTimestamp: metav1.NewTime(born.Add(time.Duration(-age) * time.Second))},
			Spec: gatewayv1.HTTPRouteSpec{
				CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{{Group: new(gatewayv1.Group("")), Kind: new(gatewayv1.Kind("Service")), Name: "web", Port: port}}},
				Rules:           []gatewayv1.HTTPRouteRule{rule},
			},
		}))
	}
	add("old", 2, MaxMatches, new(gatewayv1.PortNumber(80)))
	add("both", 1, 1, nil)
	add("one", 0, 1, new(gatewayv1.PortNumber(80)))
	_, status := o.all()
	for name, want := range map[string]struct {
		status  metav1.ConditionStatus
		message string
	}{
		"both": {metav1.ConditionTrue, "in force on port 81; not on port 80: older routes have most"},
		"one":  {metav1.ConditionFalse, "older routes have most"},
	} {
		got := status[RouteKey{KindHTTPRoute, "a", name}.String()]
		if len(got) != 1 || got[0].Conditions[0].Status != want.status || !strings.HasPrefix(got[0].Conditions[0].Message, want.message) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestRegex(t *testing.T) {
	for expression, ok := range map[string]bool{
		"/a/[0-9]+": true, `\d{1,100}`: true, "(": false, "(a+)+": true, `\pL{300}`: false, "(((a{10}){10}){10}){10}": false, `(?=x)`: false, "a{1001}": false,
		// What Go knows and RE2 doesn't.
		`\p{Lu}\P{^Greek}\pN\p{Any}`: true, `\p{Letter}`: false, `\p{greek}`: false, `[^\p{ LU }]`: false, `\P{^LC}`: false, `\p{Cn}`: false, `\p{ASCII}`: false,
		`\\p{Letter}`: true, `\Q\p{Letter}\E`: true, `\Qa\E\p{Letter}`: false,
		// About the largest that there may be.
		`(a|b){250}`: true, `(a|b){600}`: false, `a{450}(b{450}c?)*`: true, `(?i:k{500})`: true, `(?i:k{1000})`: false, `[^\pL]{10}`: false, "": false,
	} {
		r := &routeReader{}
		r.regex("field", expression)
		if r.refused.isZero() != ok {
			t.Errorf("%q: %+v", expression, r.refused)
		}
	}
}

// A route can have hundreds of expressions of some kilobytes, each of which would be
// hundreds of megabytes as a program. It is refused without much ado.
func TestManyRegexes(t *testing.T) {
	h := &gatewayv1.HTTPRoute{Spec: gatewayv1.HTTPRouteSpec{CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{
		{Group: new(gatewayv1.Group("")), Kind: new(gatewayv1.Kind("Service")), Name: "web"},
	}}}}
	match := gatewayv1.HTTPRouteMatch{}
	for i := range 16 {
		match.Headers = append(match.Headers, gatewayv1.HTTPHeaderMatch{
			Type: new(gatewayv1.HeaderMatchRegularExpression), Name: gatewayv1.HTTPHeaderName(fmt.Sprint("x-", i)), Value: strings.Repeat("(a|b|c){1000}", 300),
		})
	}
	for range 16 {
		h.Spec.Rules = append(h.Spec.Rules, gatewayv1.HTTPRouteRule{Matches: []gatewayv1.HTTPRouteMatch{match}})
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	r := HTTPRoute(h)
	runtime.ReadMemStats(&after)
	if r.refused.reason != string(gatewayv1.RouteReasonUnsupportedValue) {
		t.Errorf("it is %+v", r.refused)
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > 16<<20 {
		t.Errorf("it took %d MiB to see that", took>>20)
	}
}
