package agent

import (
	"net/netip"
	"strings"
	"testing"
)

func TestParsePlan(t *testing.T) {
	const whole = `
trustDomain: cluster.local
tenants:
- {name: team-a, version: 1.40.0, limits: {memoryMax: 268435456}, canary: {version: 1.39.3, weight: 10}}
pods:
- {uid: a1, namespace: team-a, name: web, serviceAccount: web, tenant: team-a, netns: /run/netns/web}
- {uid: a2, namespace: team-a, name: api, serviceAccount: api, tenant: team-a, hostInterface: veth2, ips: [10.0.0.2, "fd00::2"], mac: "0a:00:00:00:00:02", mtu: 1450}
`
	f, err := parsePlan([]byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	if f.TrustDomain != "cluster.local" || len(f.Tenants) != 1 || f.Tenants[0].Limits.MemoryMax != 256<<20 || f.Tenants[0].Canary.Weight != 10 {
		t.Errorf("got %+v", f)
	}
	if len(f.Pods) != 2 || f.Pods[0].Netns != "/run/netns/web" || f.Pods[0].ServiceAccount != "web" ||
		len(f.Pods[1].IPs) != 2 || f.Pods[1].IPs[1] != netip.MustParseAddr("fd00::2") || f.Pods[1].MTU != 1450 {
		t.Errorf("got pods %+v", f.Pods)
	}
	for name, c := range map[string]struct{ plan, want string }{
		"a field that doesn't exist": {strings.Replace(whole, "weight:", "wait:", 1), "wait"},
		"no YAML":                    {"{", "yaml"},
		"no address":                 {strings.Replace(whole, "10.0.0.2", "10.0.0", 1), "10.0.0"},
	} {
		if _, err := parsePlan([]byte(c.plan)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPlannedSandbox(t *testing.T) {
	good := planPod{HostInterface: "lo", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.2")}, MAC: "0a:00:00:00:00:02", MTU: 1500}
	if r, err := good.sandbox(); err != nil || r.Ifindex != 1 || r.Ifname != "lo" || r.MTU != 1500 || r.MAC.String() != good.MAC {
		t.Errorf("got %+v, %v", r, err)
	}
	for name, c := range map[string]struct {
		change func(*planPod)
		want   string
	}{
		"nothing said":        {func(p *planPod) { *p = planPod{} }, "give netns"},
		"no address":          {func(p *planPod) { p.IPs = nil }, "give netns"},
		"no such link":        {func(p *planPod) { p.HostInterface = "bht-none" }, "bht-none"},
		"bad MAC":             {func(p *planPod) { p.MAC = "0a" }, "mac"},
		"a namespace is gone": {func(p *planPod) { p.Netns = "/proc/self/ns/none" }, "/proc/self/ns/none"},
	} {
		p := good
		c.change(&p)
		if _, err := p.sandbox(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
