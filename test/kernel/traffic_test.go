package kernel

import (
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// What of pods' connections isn't for their proxies: refused in plain text,
// excluded, bypassed.

const nodePort = 30080

// openNodePort leads a port of the node to a pod as kube-proxy does, with the
// node's address as the client's.
func openNodePort(t *testing.T, n *lab.Node, to *lab.Host) {
	t.Helper()
	rules := fmt.Sprintf(`table ip nodeport {
		chain pre { type nat hook prerouting priority dstnat; tcp dport %[1]d dnat to %[2]s:%[3]d; }
		chain post { type nat hook postrouting priority srcnat; ct status dnat masquerade; }
	}
	table ip6 nodeport {
		chain pre { type nat hook prerouting priority dstnat; tcp dport %[1]d dnat to [%[4]s]:%[3]d; }
		chain post { type nat hook postrouting priority srcnat; ct status dnat masquerade; }
	}`, nodePort, to.V4, app.GreetPort, to.V6)
	n.Do(t, func() {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(rules)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
	})
}

// apply makes the plan the node's, and waits until its pods of team-a are so.
func apply(t *testing.T, n *lab.Node, so func(agent.InspectedPod) bool) {
	t.Helper()
	n.WritePlan()
	lab.Eventually(t, "the plan", func() error {
		i, err := n.Inspect()
		if err != nil || i.Problem != "" {
			return fmt.Errorf("%s, %v", i.Problem, err)
		}
		for _, tenant := range i.Tenants {
			for _, p := range tenant.Pods {
				if p.Namespace == "team-a" && !so(p) {
					return fmt.Errorf("pod %+v", p)
				}
			}
		}
		return nil
	})
}

func TestPlainText(t *testing.T) { eachRedirection(t, testPlainText) }

func testPlainText(t *testing.T, l *lab.Lab) {
	n := l.Node1
	openNodePort(t, n, l.A1)
	byNodePort := func(family int) app.CallResult {
		return l.Outside.Call(t, "tcp", "--timeout", "3s", lab.At(n.Of(family), nodePort).String())
	}
	plain := flow{name: "from outside", from: l.Outside, to: l.A1}
	pass := []flow{
		{name: "mesh, same node", from: l.B1, to: l.A1, mesh: true},
		{name: "mesh, same tenant", from: l.A2, to: l.A1, mesh: true},
		{name: "mesh, other node", from: l.B2, to: l.A1, mesh: true},
		{name: "a probe of its node", from: l.Node1.Host, to: l.A1, sees: &lab.Pair{}},
		{name: "to outside", from: l.A1, to: l.Outside},
		{name: "another namespace", from: l.Outside, to: l.B1},
	}
	takes := func(when string) {
		t.Helper()
		eachFamily(t, func(t *testing.T, family int) {
			plain.check(t, family)
			if r := byNodePort(family); !r.OK || r.Answer.Pod != "a1" {
				t.Errorf("%s, by NodePort: %+v", when, r)
			}
		})
	}
	takes("Permissive")
	n.Namespaces = []v1alpha1.NodeNamespace{{Name: "team-a", PlainText: v1alpha1.PlainTextStrict}}
	apply(t, n, func(p agent.InspectedPod) bool { return p.Strict })
	eachFamily(t, func(t *testing.T, family int) {
		for _, c := range []struct {
			name string
			call func() app.CallResult
		}{
			{"from outside", func() app.CallResult {
				return l.Outside.Call(t, "tcp", "--timeout", "3s", lab.At(l.A1.Of(family), app.GreetPort).String())
			}},
			{"by NodePort, masqueraded", func() app.CallResult { return byNodePort(family) }},
		} {
			t.Run(c.name, func(t *testing.T) {
				before := n.Tenant("team-a").Drops["plainText"]
				// The application greets first; not even that gets out.
				if r := c.call(); r.OK || r.Answer != nil || r.Body != "" {
					t.Errorf("%+v", r)
				}
				if after := n.Tenant("team-a").Drops["plainText"]; after <= before {
					t.Errorf("counted %d refusals, had %d before", after, before)
				}
			})
		}
		for _, f := range pass {
			t.Run(f.name, func(t *testing.T) { f.check(t, family) })
		}
	})
	n.Namespaces = nil
	apply(t, n, func(p agent.InspectedPod) bool { return !p.Strict })
	takes("Permissive again")
}

// podOf is what the agent says of a pod of team-a.
func podOf(t *testing.T, n *lab.Node, name string) agent.InspectedPod {
	t.Helper()
	pods := n.Tenant("team-a").Pods
	i := slices.IndexFunc(pods, func(p agent.InspectedPod) bool { return p.Name == name })
	if i < 0 {
		t.Fatalf("the pod %s isn't among %+v", name, pods)
	}
	return pods[i]
}

// repeatedSYNs is how many SYNs the hosts have sent again so far, as a busy machine makes
// them do, which count once more.
func repeatedSYNs(t *testing.T, l *lab.Lab) (sum uint64) {
	t.Helper()
	for _, h := range append([]*lab.Host{l.Outside}, l.Pods...) {
		sum += h.Counter(t, "TcpExt TCPSynRetrans")
	}
	return sum
}

// counts says whether so many connections were counted as there were, of which up to
// repeated may be counted again.
func counts(counted, there, repeated uint64) bool {
	return counted >= there && (counted == there || there > 0 && counted <= there+repeated)
}

func TestExclusionsAndBypass(t *testing.T) { eachRedirection(t, testExclusionsAndBypass) }

func testExclusionsAndBypass(t *testing.T, l *lab.Lab) {
	n := l.Node1
	direct := func() (excluded, bypassed uint64) {
		i := n.Tenant("team-a")
		return i.Excluded, i.Bypassed
	}
	out := v1alpha1.Exclusion{Direction: v1alpha1.DirectionOutbound, CIDR: "172.20.9.0/24"}
	in := v1alpha1.Exclusion{Direction: v1alpha1.DirectionInbound, Port: app.GreetPort, CIDR: "fd20:9::/64"}
	// Who has no tunnel to a1 yet, which has to begin while all of a1's is excluded.
	begins := map[string]*lab.Host{"everything of a pod": l.A3, "bypass": l.B1}
	// What has begun stays where it is, whatever comes.
	held := openAll(t, l, "before")
	for _, c := range []struct {
		name       string
		namespaces []v1alpha1.NodeNamespace
		pods       map[string][]v1alpha1.Exclusion
		so         func(agent.InspectedPod) bool
		// How many of a1's connections out over IPv4 and in over IPv6 pass in the
		// clear, by exclusion and by bypass.
		excluded, bypassed uint64
	}{
		{"none", nil, nil, func(p agent.InspectedPod) bool { return len(p.Excluded) == 0 && !p.Bypass }, 0, 0},
		{"of the namespace", []v1alpha1.NodeNamespace{{Name: "team-a", Exclusions: []v1alpha1.Exclusion{out}}}, nil,
			func(p agent.InspectedPod) bool { return slices.Equal(p.Excluded, []string{"outbound 172.20.9.0/24"}) }, 1, 0},
		{"of the pod", nil, map[string][]v1alpha1.Exclusion{"a1": {out, in}},
			func(p agent.InspectedPod) bool { return (len(p.Excluded) == 2) == (p.Name == "a1") }, 2, 0},
		{"of another pod", nil, map[string][]v1alpha1.Exclusion{"a2": {out, in}},
			func(p agent.InspectedPod) bool { return (len(p.Excluded) == 2) == (p.Name == "a2") }, 0, 0},
		{"of another port", nil, map[string][]v1alpha1.Exclusion{"a1": {{Direction: v1alpha1.DirectionOutbound, Port: 1}, {Direction: v1alpha1.DirectionInbound, Port: 1}}},
			func(p agent.InspectedPod) bool { return (len(p.Excluded) == 2) == (p.Name == "a1") }, 0, 0},
		{"of other networks", nil, map[string][]v1alpha1.Exclusion{"a1": {
			{Direction: v1alpha1.DirectionOutbound, CIDR: "172.20.8.0/24"}, {Direction: v1alpha1.DirectionOutbound, CIDR: "172.20.9.3/32"},
			{Direction: v1alpha1.DirectionInbound, CIDR: "fd20:8::/64"}, {Direction: v1alpha1.DirectionInbound, CIDR: "172.20.9.0/24"}, {Direction: v1alpha1.DirectionOutbound, CIDR: "fd20:9::/64"}}},
			func(p agent.InspectedPod) bool { return (len(p.Excluded) == 5) == (p.Name == "a1") }, 0, 0},
		// Networks in others, of all ports and of one.
		{"several that fit", []v1alpha1.NodeNamespace{{Name: "team-a", Exclusions: []v1alpha1.Exclusion{{Direction: v1alpha1.DirectionOutbound, CIDR: "172.16.0.0/12"}, in}}},
			map[string][]v1alpha1.Exclusion{"a1": {
				out, {Direction: v1alpha1.DirectionOutbound, CIDR: "172.20.9.2/32", Port: app.GreetPort}, {Direction: v1alpha1.DirectionInbound, CIDR: "fd20:9::2/128"},
				{Direction: v1alpha1.DirectionInbound, CIDR: "fc00::/7", Port: app.GreetPort}}},
			func(p agent.InspectedPod) bool { return p.Name != "a1" || len(p.Excluded) == 6 }, 2, 0},
		// A tunnel still ends at the tenant's proxy.
		{"everything of a pod", nil, map[string][]v1alpha1.Exclusion{"a1": {{Direction: v1alpha1.DirectionOutbound, CIDR: "0.0.0.0/0"}, {Direction: v1alpha1.DirectionInbound, CIDR: "::/0"}, {Direction: v1alpha1.DirectionInbound, CIDR: "0.0.0.0/0"}}},
			func(p agent.InspectedPod) bool { return (len(p.Excluded) == 3) == (p.Name == "a1") }, 2, 0},
		{"bypass", []v1alpha1.NodeNamespace{{Name: "team-a", EmergencyBypass: true}}, nil, func(p agent.InspectedPod) bool { return p.Bypass }, 0, 2},
		{"none again", nil, nil, func(p agent.InspectedPod) bool { return len(p.Excluded) == 0 && !p.Bypass }, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			n.Namespaces, n.Exclusions = c.namespaces, c.pods
			apply(t, n, c.so)
			e, b := direct()
			before, repeated := podOf(t, n, "a1"), repeatedSYNs(t, l)
			flow{name: "out", from: l.A1, to: l.Outside}.check(t, 4)
			flow{name: "in", from: l.Outside, to: l.A1}.check(t, 6)
			flow{name: "mesh", from: l.B2, to: l.A1, mesh: true}.check(t, 4)
			flow{name: "mesh", from: l.B1, to: l.A2, mesh: true}.check(t, 6)
			if from := begins[c.name]; from != nil {
				flow{name: "first of a tunnel", from: from, to: l.A1, mesh: true}.check(t, 4)
			}
			repeated = repeatedSYNs(t, l) - repeated
			if excluded, bypassed := direct(); !counts(excluded-e, c.excluded, repeated) || !counts(bypassed-b, c.bypassed, repeated) {
				t.Errorf("%d connections were excluded and %d bypassed, want %d and %d, and %d SYNs were repeated", excluded-e, bypassed-b, c.excluded, c.bypassed, repeated)
			}
			after := podOf(t, n, "a1")
			if !counts(after.Connections["direct"]-before.Connections["direct"], c.excluded+c.bypassed, repeated) ||
				after.BytesSent <= before.BytesSent || after.BytesReceived <= before.BytesReceived {
				t.Errorf("the pod has %+v, had %+v", after, before)
			}
			held.talk(t, c.name)
		})
		if c.excluded+c.bypassed > 0 {
			maps.Copy(held, openAll(t, l, c.name))
		}
	}
	// What the agent serves for Prometheus says the same.
	lab.Eventually(t, "the same in the metrics", func() error { return tellsMetrics(t, n) })
}

func tellsMetrics(t *testing.T, n *lab.Node) error {
	pod, tenant := podOf(t, n, "a1"), n.Tenant("team-a")
	metrics := n.Metrics(t)
	for series, want := range map[string]uint64{
		`bulkhead_pod_connections_total{listener="direct",namespace="team-a",pod="a1"}`:                 pod.Connections["direct"],
		`bulkhead_pod_connections_total{listener="inbound",namespace="team-a",pod="a1"}`:                pod.Connections["inbound"],
		`bulkhead_tenant_unmeshed_connections_total{namespace="team-a",tenant="team-a",why="excluded"}`: tenant.Excluded,
		`bulkhead_tenant_unmeshed_connections_total{namespace="team-a",tenant="team-a",why="bypass"}`:   tenant.Bypassed,
		`bulkhead_tenant_steered_connections_total{generation="0",namespace="team-a",tenant="team-a"}`:  tenant.Steered[0],
	} {
		if line := fmt.Sprintf("%s %d\n", series, want); want == 0 || !strings.Contains(metrics, line) {
			return fmt.Errorf("they lack %q", line)
		}
	}
	return nil
}
