package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

func nodeProxy() *v1alpha1.NodeProxy {
	return &v1alpha1.NodeProxy{
		ObjectMeta: metav1.ObjectMeta{Name: "node1", Generation: 7},
		Spec: v1alpha1.NodeProxySpec{
			TrustDomain: "cluster.local",
			ReadySince:  &metav1.Time{Time: time.Unix(9e8, 0)},
			Tenants: []v1alpha1.NodeTenant{
				{Name: "team-b", Version: "1.40.0"},
				{Name: "team-a", Version: "1.39.3", DrainSeconds: 90, Limits: v1alpha1.Limits{CPUMillis: 500},
					Canary: &v1alpha1.CanaryGeneration{Version: "1.40.0", Weight: 25}},
			},
			Pods: []v1alpha1.NodePod{
				{UID: "2", Namespace: "team-b", Name: "web", ServiceAccount: "web", Tenant: "team-b"},
				{UID: "1", Namespace: "team-a", Name: "api", ServiceAccount: "default", Tenant: "team-a"},
			},
		},
	}
}

func TestMakePlan(t *testing.T) {
	p, err := makePlan(nodeProxy())
	if err != nil {
		t.Fatal(err)
	}
	if p.generation != 7 || len(p.tenants) != 2 || len(p.pods) != 2 {
		t.Fatalf("plan is %+v", p)
	}
	a := p.tenants[0]
	if a.tenant != model.NamespaceTenant("team-a") || a.limits.CPUMillis != 500 ||
		a.version != "1.39.3" || a.drain != 90*time.Second || a.canary == nil || *a.canary != (canaryPlan{version: "1.40.0", weight: 25}) {
		t.Errorf("team-a is planned as %+v", a)
	}
	pod, ok := p.pod("2")
	if !ok || pod.Identity.String() != "spiffe://cluster.local/ns/team-b/sa/web" || pod.Tenant != model.NamespaceTenant("team-b") {
		t.Errorf("pod 2 is %+v, %v", pod, ok)
	}
	np := nodeProxy()
	np.Spec.Tenants[0].Standby, np.Spec.Tenants[0].Limits = true, v1alpha1.Limits{Concurrency: 3, Connections: 9, NewConnections: 5}
	np.Spec.Tenants[1].Standby = true // it has a canary
	if p, err = makePlan(np); err != nil {
		t.Fatal(err)
	}
	if b := p.tenants[1]; b.canary == nil || *b.canary != (canaryPlan{version: "1.40.0", standby: true}) || b.workers != 3 || b.connections != (steer.ConnectionLimits{Concurrent: 9, NewPerSecond: 5}) {
		t.Errorf("team-b is planned as %+v", b)
	}
	if a := p.tenants[0]; a.canary == nil || a.canary.standby || a.canary.weight != 25 {
		t.Errorf("a canary gives way to a standby: %+v", a)
	}
	np.Spec.Tenants[0].Limits.MemoryMax = 64 << 20
	if p, _ = makePlan(np); p.tenants[1].canary != nil || p.tenants[1].standby == "" {
		t.Errorf("a standby without memory for it: %+v", p.tenants[1])
	}
	if _, ok := p.pod("3"); ok {
		t.Error("a pod that isn't planned was found")
	}
}

// TestMakePlanRedirection shows that a word that isn't known changes nothing.
func TestMakePlanRedirection(t *testing.T) {
	np := nodeProxy()
	if p, err := makePlan(np); err != nil || p.redirection != v1alpha1.RedirectionEBPF {
		t.Errorf("none is %q, %v", p.redirection, err)
	}
	np.Spec.Redirection = "iptables"
	if p, err := makePlan(np); err == nil || p.redirection != "" || len(p.pods) != 2 {
		t.Errorf("a redirection that isn't known is %q, %v, with %d pods", p.redirection, err, len(p.pods))
	}
}

// TestMakePlanTraffic shows what of pods' connections isn't for their proxies.
func TestMakePlanTraffic(t *testing.T) {
	np := nodeProxy()
	out := v1alpha1.Exclusion{Direction: v1alpha1.DirectionOutbound, CIDR: "10.0.0.0/8"}
	in := v1alpha1.Exclusion{Direction: v1alpha1.DirectionInbound, Port: 9090}
	np.Spec.Namespaces = []v1alpha1.NodeNamespace{{Name: "team-a", Exclusions: []v1alpha1.Exclusion{out}, PlainText: v1alpha1.PlainTextStrict, EmergencyBypass: true}}
	np.Spec.Pods[0].Exclusions = []v1alpha1.Exclusion{in}
	np.Spec.Pods[1].Exclusions = []v1alpha1.Exclusion{in}
	p, err := makePlan(np)
	if err != nil {
		t.Fatal(err)
	}
	say := func(x traffic) (all []string) {
		for _, e := range x.exclusions {
			all = append(all, e.String())
		}
		if x.strict {
			all = append(all, "strict")
		}
		if x.bypass {
			all = append(all, "bypass")
		}
		return all
	}
	if got := say(p.traffic["1"]); !slices.Equal(got, []string{"outbound 10.0.0.0/8", "inbound *:9090", "strict", "bypass"}) {
		t.Errorf("pod of team-a: %q", got)
	}
	if got := say(p.traffic["2"]); !slices.Equal(got, []string{"inbound *:9090"}) {
		t.Errorf("pod of team-b: %q", got)
	}
	for name, c := range map[string]struct {
		change func(*v1alpha1.NodeProxySpec)
		wrong  string
		want   []string
	}{
		"direction": {func(s *v1alpha1.NodeProxySpec) { s.Namespaces[0].Exclusions[0].Direction = "Sideways" }, "Sideways", []string{"inbound *:9090", "strict", "bypass"}},
		"network":   {func(s *v1alpha1.NodeProxySpec) { s.Namespaces[0].Exclusions[0].CIDR = "10.0.0.1/8" }, "10.0.0.1/8", []string{"inbound *:9090", "strict", "bypass"}},
		"nothing":   {func(s *v1alpha1.NodeProxySpec) { s.Pods[1].Exclusions[0].Port = 0 }, "team-a/api", []string{"outbound 10.0.0.0/8", "strict", "bypass"}},
		"port":      {func(s *v1alpha1.NodeProxySpec) { s.Pods[1].Exclusions[0].Port = 70000 }, "70000", []string{"outbound 10.0.0.0/8", "strict", "bypass"}},
		"closed":    {func(s *v1alpha1.NodeProxySpec) { s.Namespaces[0].PlainText = "Stricter" }, "Stricter", []string{"outbound 10.0.0.0/8", "inbound *:9090", "strict", "bypass"}},
	} {
		t.Run(name, func(t *testing.T) {
			np := np.DeepCopy()
			c.change(&np.Spec)
			p, err := makePlan(np)
			if err == nil || !strings.Contains(err.Error(), c.wrong) {
				t.Errorf("error %v doesn't name %s", err, c.wrong)
			}
			if got := say(p.traffic["1"]); !slices.Equal(got, c.want) || len(p.pods) != 2 {
				t.Errorf("%q are left, want %q", got, c.want)
			}
		})
	}
}

// TestMakePlanBadInput shows that what makes no sense is named and doesn't take
// the rest with it.
func TestMakePlanBadInput(t *testing.T) {
	for name, c := range map[string]struct {
		change  func(*v1alpha1.NodeProxySpec)
		wrong   string
		tenants int
		pods    int
	}{
		"tenant's name":    {func(s *v1alpha1.NodeProxySpec) { s.Tenants[0].Name = "../etc" }, "../etc", 1, 1},
		"no version":       {func(s *v1alpha1.NodeProxySpec) { s.Tenants[0].Version = "" }, "team-b", 1, 2},
		"unknown tenant":   {func(s *v1alpha1.NodeProxySpec) { s.Pods[0].Tenant = "team-c" }, "team-c", 2, 1},
		"no identity":      {func(s *v1alpha1.NodeProxySpec) { s.Pods[1].ServiceAccount = "" }, "team-a/api", 2, 1},
		"no trust domain":  {func(s *v1alpha1.NodeProxySpec) { s.TrustDomain = "" }, "team-a/api", 2, 0},
		"identity escapes": {func(s *v1alpha1.NodeProxySpec) { s.Pods[1].ServiceAccount = "x/../y" }, "x/../y", 2, 1},
	} {
		t.Run(name, func(t *testing.T) {
			np := nodeProxy()
			c.change(&np.Spec)
			p, err := makePlan(np)
			if err == nil || !strings.Contains(err.Error(), c.wrong) {
				t.Errorf("error %v doesn't name %s", err, c.wrong)
			}
			if len(p.tenants) != c.tenants || len(p.pods) != c.pods {
				t.Errorf("%d tenants and %d pods are left, want %d and %d", len(p.tenants), len(p.pods), c.tenants, c.pods)
			}
		})
	}
}

func TestMakeStatus(t *testing.T) {
	p, err := makePlan(nodeProxy())
	if err != nil {
		t.Fatal(err)
	}
	a, b := model.NamespaceTenant("team-a"), model.NamespaceTenant("team-b")
	live := func(generation int, version string) isolation.Process {
		return isolation.Process{Generation: generation, Version: version, PID: 40 + generation, Live: true}
	}
	good := func() observation {
		return observation{
			redirection: v1alpha1.RedirectionEBPF, agentStarted: time.Unix(1e9, 5),
			round: round{plan: p, known: true, serving: map[model.Tenant]process{a: {pid: 40}, b: {pid: 40}}, problems: map[model.Tenant]string{},
				steered: map[string]steer.Pod{"1": {}, "2": {}}, weights: map[model.Tenant]int{a: 25}},
			states: map[model.Tenant]isolation.State{
				a: {Limits: isolation.Limits{CPUMillis: 500}, Processes: []isolation.Process{live(0, "1.39.3"), live(1, "1.40.0")}},
				b: {Processes: []isolation.Process{live(0, "1.40.0")}},
			},
			configs: map[relay.Key]relay.State{{Tenant: a}: {Connected: true, Listeners: 6}, {Tenant: b}: {Connected: true, Listeners: 6}},
		}
	}
	s := makeStatus(good())
	if c := meta.FindStatusCondition(s.Conditions, "Ready"); c == nil || c.Status != metav1.ConditionTrue {
		t.Errorf("conditions are %+v", s.Conditions)
	}
	if got := s.Tenants[0]; !got.Ready || got.Pods != 1 || got.Weight != 25 || got.Limits.CPUMillis != 500 || len(got.Generations) != 2 {
		t.Errorf("team-a's status is %+v", got)
	}
	if c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionRedirected); s.Redirection != v1alpha1.RedirectionEBPF || c == nil || c.Status != metav1.ConditionTrue {
		t.Errorf("redirection %q, conditions %+v", s.Redirection, s.Conditions)
	}
	if s.AgentStartedAt == nil || s.AgentStartedAt.Unix() != 1e9 {
		t.Errorf("the agent started at %s", s.AgentStartedAt)
	}
	if !s.ReadySince.Equal(nodeProxy().Spec.ReadySince) {
		t.Errorf("it speaks of the node that is Ready since %s", s.ReadySince)
	}
	vain := good()
	vain.configs[relay.Key{Tenant: a, Generation: 1}] = relay.State{Rejections: []relay.Rejection{{Type: "CDS", Name: "*", Message: "100 or more names"}, {Type: "CDS", Name: "x", Message: "bad"}}}
	if s := makeStatus(vain).Tenants[0]; s.Generations[1].Rejected != 1 || len(s.Rejected) != 2 {
		t.Errorf("refused by generation 1: %d, of all: %+v", s.Generations[1].Rejected, s.Rejected)
	}
	flags := good()
	flags.round.steered["1"] = steer.Pod{Strict: true, Bypass: true}
	if s := makeStatus(flags); s.Tenants[0].StrictPods != 1 || s.Tenants[0].BypassedPods != 1 || s.Tenants[1].StrictPods != 0 || s.Tenants[1].BypassedPods != 0 {
		t.Errorf("strict and bypassed pods: %+v", s.Tenants)
	}
	other := good()
	other.round.plan.redirection = ""
	if c := meta.FindStatusCondition(makeStatus(other).Conditions, v1alpha1.ConditionRedirected); c.Status != metav1.ConditionFalse || !strings.Contains(c.Message, "EBPF") {
		t.Errorf("a redirection that can't be had: %+v", c)
	}
	for reason, h := range map[string]identity.Health{
		"Ready":      {Identities: 3},
		"NotRenewed": {Identities: 3, Overdue: 2, First: "spiffe://td/ns/a/sa/b", LastError: errors.New("operator is away")},
		"NotKept":    {Identities: 3, Unkept: 2, KeepError: errors.New("no space left")},
		"Expired":    {Identities: 3, Overdue: 2, Expired: 1, Unkept: 1, KeepError: errors.New("no space left"), First: "spiffe://td/ns/a/sa/b", LastError: errors.New("operator is away")},
	} {
		o := good()
		o.identities, o.trustBundle = h, "digest"
		s := makeStatus(o)
		c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionIdentityReady)
		if s.TrustBundle != "digest" || c.Reason != reason || (c.Status == metav1.ConditionTrue) != (reason == "Ready") {
			t.Errorf("%s: trusts %q, %+v", reason, s.TrustBundle, c)
		}
		if h.First != "" && (!strings.Contains(c.Message, h.First) || !strings.Contains(c.Message, "operator is away")) {
			t.Errorf("%s: %q", reason, c.Message)
		}
		if reason == "NotKept" && (!strings.Contains(c.Message, "2 of 3") || !strings.Contains(c.Message, "no space left")) {
			t.Errorf("%q", c.Message)
		}
	}
	for name, c := range map[string]struct {
		change func(*observation)
		reason string
	}{
		"starting": {func(o *observation) { delete(o.round.serving, b); o.states[b] = isolation.State{} }, "starting"},
		"started again": {func(o *observation) {
			o.states[b] = isolation.State{Processes: []isolation.Process{{Version: "1.40.0", PID: 41, Live: true}}}
		}, "being taken"},
		"not connected": {func(o *observation) { delete(o.round.serving, b); o.configs[relay.Key{Tenant: b}] = relay.State{} }, "asked"},
		"no operator": {func(o *observation) {
			delete(o.round.serving, b)
			o.configs[relay.Key{Tenant: b}] = relay.State{Connected: true}
		}, "operator"},
		"rejected": {func(o *observation) {
			o.configs[relay.Key{Tenant: b}] = relay.State{Connected: true, Listeners: 6, Rejections: []relay.Rejection{{Type: "CDS", Name: "vip|10.96.0.1:80", Message: "bad thing"}}}
		}, "bad thing"},
		"problem": {func(o *observation) { o.round.problems[b] = "version 9.9.9 isn't there" }, "9.9.9"},
	} {
		t.Run(name, func(t *testing.T) {
			o := good()
			c.change(&o)
			s := makeStatus(o)
			if got := s.Tenants[1].Reason; !strings.Contains(got, c.reason) {
				t.Errorf("reason is %q, want %q in it", got, c.reason)
			}
			if s.Tenants[0].Reason != "" || !s.Tenants[0].Ready {
				t.Errorf("the other tenant is %+v", s.Tenants[0])
			}
		})
	}
}
