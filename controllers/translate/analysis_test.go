package translate

import (
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

type fig = v1alpha1.GenerationFigures

// at is one place where both versions serve.
func at(node string, old, new fig) compared {
	return compared{tenant: "a", node: node, old: old, new: new}
}

// everywhere is the same on n nodes.
func everywhere(n int, old, new fig) (places []compared) {
	for i := range n {
		places = append(places, at(fmt.Sprint("n", i), old, new))
	}
	return places
}

func TestJudge(t *testing.T) {
	spread := func(counts ...int64) []int64 { return counts }
	const mib = 1 << 20
	for name, c := range map[string]struct {
		places []compared
		limits v1alpha1.RolloutAnalysis
		want   v1alpha1.RolloutFigure // "" if it is as good
		node   string
		says   string
	}{
		"nothing happened": {places: []compared{at("n", fig{}, fig{})}},
		"alike":            {places: []compared{at("n", fig{Requests: 800, ServerErrors: 80, RequestConnections: 50}, fig{Requests: 200, ServerErrors: 22, RequestConnections: 50})}},
		"server errors": {places: []compared{at("n", fig{Requests: 80, ServerErrors: 1, RequestConnections: 80}, fig{Requests: 20, ServerErrors: 15, RequestConnections: 18})},
			want: v1alpha1.FigureServerErrors, node: "n", says: "of the new version's 15 of 20 requests were answered with a server error (75.0 %), of the old one's at the same time 1 of 80 (1.2 %); limit: 5 more of 100"},
		"one client's errors": {places: []compared{at("n", fig{Requests: 800, RequestConnections: 20}, fig{Requests: 200, ServerErrors: 200, RequestConnections: 4})}},
		// One connection of eight asks for what fails.
		"one connection's errors": {places: []compared{at("n", fig{Requests: 800, RequestConnections: 32}, fig{Requests: 200, ServerErrors: 25, RequestConnections: 8})}},
		"a tiny sample":           {places: []compared{at("n", fig{Connections: 80}, fig{Connections: 19, Unanswered: 19})}},
		"no old traffic":          {places: []compared{at("n", fig{}, fig{Connections: 1000, Unanswered: 1000})}},
		"little old traffic":      {places: []compared{at("n", fig{Connections: 19}, fig{Connections: 1000, Unanswered: 1000})}},
		"the least sample":        {places: []compared{at("n", fig{Connections: 20}, fig{Connections: 20, Unanswered: 20})}, want: v1alpha1.FigureConnectFailures},
		"a larger one":            {places: []compared{at("n", fig{Connections: 20}, fig{Connections: 20, Unanswered: 20})}, limits: v1alpha1.RolloutAnalysis{MinSample: 21}},
		"chance":                  {places: []compared{at("n", fig{Connections: 80, Resets: 4}, fig{Connections: 20, Resets: 4})}},
		// 6 of 100 is beyond 5 more, but not beyond chance; of ten times as many it is.
		"few":                    {places: []compared{at("n", fig{Connections: 100}, fig{Connections: 100, Resets: 6})}},
		"many":                   {places: []compared{at("n", fig{Connections: 1000}, fig{Connections: 1000, Resets: 60})}, want: v1alpha1.FigureResets, says: "were reset"},
		"significant, but small": {places: []compared{at("n", fig{Connections: 1e6}, fig{Connections: 1e6, Resets: 40000})}},
		"a lower limit": {places: []compared{at("n", fig{Connections: 1e6}, fig{Connections: 1e6, Resets: 40000})},
			limits: v1alpha1.RolloutAnalysis{FailurePercent: 3}, want: v1alpha1.FigureResets},
		"half fail anyway":   {places: []compared{at("n", fig{Connections: 100, Resets: 50}, fig{Connections: 100, Resets: 60})}},
		"fewer than the old": {places: []compared{at("n", fig{Connections: 100, Resets: 100}, fig{Connections: 100})}},
		// The canary has most of its connections where much fails anyway.
		"a bad node": {places: []compared{at("bad", fig{Connections: 100, Unanswered: 50}, fig{Connections: 900, Unanswered: 450}), at("good", fig{Connections: 900}, fig{Connections: 100})}},
		"worst on one node": {places: []compared{at("n1", fig{Connections: 900}, fig{Connections: 100}), at("n2", fig{Connections: 900}, fig{Connections: 100, Unanswered: 60})},
			want: v1alpha1.FigureConnectFailures, node: "n2", says: "60 of 200"},
		"a little on each node": {places: []compared{at("n1", fig{Connections: 400}, fig{Connections: 100, Resets: 10}), at("n2", fig{Connections: 400}, fig{Connections: 100, Resets: 10}), at("n3", fig{Connections: 400}, fig{Connections: 100, Resets: 10})},
			want: v1alpha1.FigureResets},
		"a silent node": {places: []compared{at("silent", fig{}, fig{}), at("n2", fig{Connections: 100}, fig{Connections: 100, Resets: 50})}, want: v1alpha1.FigureResets, node: "n2"},
		"upstreams":     {places: []compared{at("n", fig{Upstreams: 100}, fig{Upstreams: 100, UpstreamFailures: 50})}, want: v1alpha1.FigureConnectFailures, says: "upstreams"},
		"tunnels":       {places: []compared{at("n", fig{Tunnelled: 100, TunnelConnections: 100}, fig{Tunnelled: 100, TunnelErrors: 50, TunnelConnections: 90})}, want: v1alpha1.FigureConnectFailures, says: "tunnelled"},
		// A peer that dials a closed port over and over has one tunnel for it.
		"one peer's tunnel": {places: []compared{at("n", fig{Tunnelled: 800, TunnelConnections: 32}, fig{Tunnelled: 200, TunnelErrors: 25, TunnelConnections: 8})}},
		"too few tunnels":   {places: []compared{at("n", fig{Tunnelled: 800, TunnelConnections: 800}, fig{Tunnelled: 200, TunnelErrors: 200, TunnelConnections: 4})}},
		// Each node has few of them, all nodes together have enough.
		"few tunnels on each node": {places: everywhere(100, fig{Tunnelled: 16, TunnelConnections: 16}, fig{Tunnelled: 4, TunnelErrors: 4, TunnelConnections: 4}), want: v1alpha1.FigureConnectFailures, says: "400 of 400 tunnelled"},
		"few of the old one's":     {places: everywhere(4, fig{Tunnelled: 200, TunnelConnections: 1}, fig{Tunnelled: 50, TunnelErrors: 50, TunnelConnections: 50})},
		"nobody counted them":      {places: []compared{at("n", fig{Tunnelled: 800}, fig{Tunnelled: 200, TunnelErrors: 200})}},
		// A failed handshake counts as none that succeeded.
		"handshakes": {places: []compared{at("n", fig{Handshakes: 100}, fig{HandshakeFailures: 50})}, want: v1alpha1.FigureHandshakeFailures, says: "50 of 50"},
		"ignored": {places: []compared{at("n", fig{Handshakes: 100}, fig{HandshakeFailures: 50})},
			limits: v1alpha1.RolloutAnalysis{Ignore: []v1alpha1.RolloutFigure{v1alpha1.FigureHandshakeFailures}}},
		"more fail than began in the time": {places: []compared{at("n", fig{Connections: 100}, fig{Connections: 30, Resets: 90})}, want: v1alpha1.FigureResets, says: "30 of 30"},

		// Nine of ten below 1 ms, which is bucket 3; slow is above 16 ms, bucket 7.
		"slow":                           {places: []compared{at("n", fig{FirstByte: spread(0, 50, 40, 10)}, fig{FirstByte: spread(0, 0, 0, 10, 0, 0, 0, 0, 90)})}, want: v1alpha1.FigureFirstByte, says: "took longer than 16.384ms to the first byte"},
		"fast enough":                    {places: []compared{at("n", fig{FirstByte: spread(0, 50, 40, 10)}, fig{FirstByte: spread(0, 0, 0, 10, 0, 0, 0, 90)})}},
		"a little slower":                {places: []compared{at("n", fig{FirstByte: spread(0, 0, 0, 0, 0, 0, 0, 0, 100)}, fig{FirstByte: spread(0, 0, 0, 0, 0, 0, 0, 0, 0, 100)})}},
		"twice as slow":                  {places: []compared{at("n", fig{FirstByte: spread(0, 0, 0, 0, 0, 0, 0, 0, 100)}, fig{FirstByte: spread(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 100)})}, want: v1alpha1.FigureFirstByte},
		"slow latency":                   {places: []compared{at("n", fig{Latency: spread(0, 90, 10), RequestConnections: 100}, fig{Latency: spread(0, 50, 0, 0, 50), RequestConnections: 100})}, want: v1alpha1.FigureLatency, says: "requests took longer than 10ms"},
		"one connection's slow requests": {places: []compared{at("n", fig{Latency: spread(0, 90, 10), RequestConnections: 20}, fig{Latency: spread(0, 50, 0, 0, 50), RequestConnections: 6})}},
		"nothing is slower than the old": {places: []compared{at("n", fig{Latency: []int64{15: 100}, RequestConnections: 9}, fig{Latency: []int64{15: 100}, RequestConnections: 9})}},

		"CPU": {places: []compared{at("n", fig{CPUMilliseconds: 4000, Work: 4000, Bytes: 40 * mib}, fig{CPUMilliseconds: 4000, Work: 1000, Bytes: 10 * mib})}, want: v1alpha1.FigureCPU, node: "n", says: "4000 ms of CPU for 1000"},
		// One stream may cost as much as a thousand connections.
		"CPU for a stream": {places: []compared{at("n", fig{CPUMilliseconds: 4000, Work: 4000, Bytes: 40 * mib}, fig{CPUMilliseconds: 8000, Work: 1000, Bytes: 4000 * mib})}},
		"CPU of the start": {places: []compared{at("n", fig{CPUMilliseconds: 100, Work: 4000, Bytes: 40 * mib}, fig{CPUMilliseconds: 2900, Work: 1000, Bytes: 10 * mib})}},
		"an idle old one":  {places: []compared{at("n", fig{Work: 4000, Bytes: 40 * mib}, fig{CPUMilliseconds: 4000, Work: 1000, Bytes: 10 * mib})}, want: v1alpha1.FigureCPU},

		"memory":           {places: []compared{at("n1", fig{PrivateBytes: 20 * mib}, fig{PrivateBytes: 20 * mib}), at("n2", fig{PrivateBytes: 20 * mib}, fig{PrivateBytes: 105 * mib})}, want: v1alpha1.FigureMemory, node: "n2", says: "105 MiB of memory with 0 open connections, the old one 20 MiB with 0; limit: 104 MiB"},
		"its memory":       {places: []compared{at("n", fig{PrivateBytes: 20 * mib}, fig{PrivateBytes: 103 * mib})}},
		"a bound":          {places: []compared{{node: "n", memoryBound: 64 * mib, old: fig{PrivateBytes: 15 * mib}, new: fig{PrivateBytes: 47 * mib}}}, want: v1alpha1.FigureMemory, says: "limit: 46 MiB"},
		"more connections": {places: []compared{at("n", fig{PrivateBytes: 20 * mib, OpenConnections: 100}, fig{PrivateBytes: 300 * mib, OpenConnections: 1000})}},
		// What it is for is what Envoy said before.
		"memory of a silent one": {places: []compared{at("n", fig{Unread: "no answer", PrivateBytes: 20 * mib}, fig{Unread: "no answer", PrivateBytes: 300 * mib})}},
		"CPU of a silent one":    {places: []compared{at("n", fig{Unread: "no answer", CPUMilliseconds: 4000, Work: 4000, Bytes: 40 * mib}, fig{Unread: "no answer", CPUMilliseconds: 4000, Work: 1000, Bytes: 10 * mib})}},
		"memory unknown":         {places: []compared{at("n", fig{}, fig{PrivateBytes: 1000 * mib})}},
	} {
		t.Run(name, func(t *testing.T) {
			got := judge(c.places, AnalysisLimits(&c.limits))
			switch {
			case c.want == "" && got != nil:
				t.Errorf("%+v", *got)
			case c.want == "":
			case got == nil:
				t.Errorf("as good, want %s", c.want)
			case got.reason != c.want || c.node != "" && got.node != c.node || !strings.Contains(got.message, c.says):
				t.Errorf("%s on %s: %s", got.reason, got.node, got.message)
			}
		})
	}
}

// TestAnalysisTakesBack: what a node reports of a canary takes the rollout back, and
// what isn't about the same time doesn't.
func TestAnalysisTakesBack(t *testing.T) {
	bad := func(f *fleet) (old, new *fig) {
		at := metav1.NewTime(f.now)
		return &fig{At: at, Connections: 80}, &fig{At: at, Connections: 20, Unanswered: 20}
	}
	for name, c := range map[string]struct {
		spec   v1alpha1.RolloutAnalysis
		change func(f *fleet, old, new *fig)
		tenant string
		want   string
	}{
		"worse":              {tenant: "a", want: "ConnectFailures"},
		"ignored namespace":  {spec: v1alpha1.RolloutAnalysis{IgnoreNamespaces: []string{"a"}}, tenant: "a"},
		"another is ignored": {spec: v1alpha1.RolloutAnalysis{IgnoreNamespaces: []string{"b"}}, tenant: "a", want: "ConnectFailures"},
		"held back": {change: func(f *fleet, _, _ *fig) {
			f.rollout.Status.HeldBack = []v1alpha1.HeldBackTenant{{Tenant: "a", Reason: "Crashed"}}
		}, tenant: "a"},
		"long ago":                {change: func(f *fleet, old, new *fig) { f.now = f.now.Add(staleFigures + time.Second) }, tenant: "a"},
		"not about the same time": {change: func(_ *fleet, old, _ *fig) { old.At = metav1.NewTime(old.At.Add(-2 * time.Second)) }, tenant: "a"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 20, Pause: "1h"}, {Weight: 100}}, Analysis: &c.spec}, "a", "b")
			f.settle()
			old, new := bad(f)
			if c.change != nil {
				c.change(f, old, new)
			}
			f.figures("n2", c.tenant, old, new)
			s := f.step()
			switch {
			case c.want == "" && s.Verdict != nil:
				t.Errorf("%+v", *s.Verdict)
			case c.want == "":
			case s.Verdict == nil || s.Verdict.Reason != c.want || s.Verdict.Tenant != c.tenant || s.Verdict.Node != "n2" || s.Phase != v1alpha1.RolloutRollingBack:
				t.Errorf("%s, %+v", s.Phase, s.Verdict)
			}
		})
	}
}

// TestAnalysisOfAll: what is too little to be seen of any tenant is seen of all.
func TestAnalysisOfAll(t *testing.T) {
	var tenants []string
	for i := range 20 {
		tenants = append(tenants, fmt.Sprintf("t%02d", i))
	}
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 20, Pause: "1h"}, {Weight: 100}}}, tenants...)
	f.settle()
	now := metav1.NewTime(f.now)
	for _, name := range tenants {
		f.figures("n1", name, &fig{At: now, Connections: 40}, &fig{At: now, Connections: 10, Resets: 2})
	}
	s := f.step()
	if v := s.Verdict; v == nil || v.Reason != "Resets" || v.Tenant != "" || !strings.Contains(v.Message, "all tenants together") || !strings.Contains(v.Message, "40 of 200") {
		t.Errorf("%+v", v)
	}
}

// What one tenant shows isn't said of all.
func TestAnalysisNamesTheTenant(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 20, Pause: "1h"}, {Weight: 100}}}, "a", "b")
	f.settle()
	now := metav1.NewTime(f.now)
	f.figures("n1", "a", &fig{At: now, Connections: 50}, &fig{At: now, Connections: 15})
	f.figures("n1", "b", &fig{At: now, Connections: 50}, &fig{At: now, Connections: 15, Resets: 12})
	if s := f.step(); s.Verdict != nil {
		t.Errorf("before there is enough to say whose it is: %+v", s.Verdict)
	}
	f.figures("n1", "b", &fig{At: now, Connections: 80}, &fig{At: now, Connections: 20, Resets: 16})
	if v := f.step().Verdict; v == nil || v.Tenant != "b" || v.Node != "n1" {
		t.Errorf("%+v", v)
	}
}

// An Envoy that doesn't say how it fares is told of, and judged by the kernel's word.
func TestAnalysisWithoutEnvoy(t *testing.T) {
	f := newFleet(t, v1alpha1.ProxyRolloutSpec{Steps: []v1alpha1.RolloutStep{{Weight: 20, Pause: "1h"}, {Weight: 100}}}, "a", "b")
	f.settle()
	now := metav1.NewTime(f.now)
	f.figures("n1", "a", &fig{At: now, Unread: "no answer", Connections: 50}, &fig{At: now, Unread: "no answer", Connections: 15})
	if s := f.step(); s.Verdict != nil || !strings.Contains(s.Message, "the kernel's figures alone: a on n1 (no answer)") {
		t.Errorf("%+v, %s", s.Verdict, s.Message)
	}
	for i := range f.nodes {
		if f.nodes[i].Name == "n1" {
			f.nodes[i].Status.Redirection = v1alpha1.RedirectionNetfilter
		}
	}
	f.figures("n1", "a", &fig{At: now, Unread: "no answer"}, &fig{At: now, Unread: "no answer"})
	if s := f.step(); !strings.Contains(s.Message, "; compared by nothing, as Netfilter counts no connections: a on n1 (no answer)") || strings.Contains(s.Message, "the kernel's") {
		t.Error(s.Message)
	}
	f.figures("n1", "a", &fig{At: now, Unread: "no answer", Connections: 80}, &fig{At: now, Unread: "no answer", Connections: 20, Unanswered: 20})
	if s := f.step(); s.Verdict == nil {
		t.Errorf("%+v", s)
	}
}

// figures has a node say how a tenant's processes fare.
func (f *fleet) figures(node, tenant string, old, new *fig) {
	f.t.Helper()
	said := 0
	for i := range f.nodes {
		for k := range f.nodes[i].Status.Tenants {
			s := &f.nodes[i].Status.Tenants[k]
			if f.nodes[i].Name != node || s.Name != tenant {
				continue
			}
			for g := range s.Generations {
				switch s.Generations[g].Role {
				case v1alpha1.RoleFirst:
					s.Generations[g].Figures = old
					said++
				case v1alpha1.RoleCanary:
					s.Generations[g].Figures = new
					said++
				}
			}
		}
	}
	if said != 2 {
		f.t.Fatalf("%s has %d processes of %s", node, said, tenant)
	}
}
