package agent

import (
	"fmt"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
)

// moment is how a tenant's two generations are: each a version, "" for none, and what
// it refuses; nil is one that isn't connected.
type moment struct {
	versions [2]string
	refused  [2][]string
	after    time.Duration
	// alone are resources that count against one version now.
	alone []string
}

func TestCompareRefusals(t *testing.T) {
	const old, fresh = "1.39.3", "1.40.0"
	both, onlyNew := [2]string{old, fresh}, [2]string{"", fresh}
	none := []string{}
	x := []string{"x"}
	for name, moments := range map[string][]moment{
		"the new one alone": {
			{versions: both, refused: [2][]string{none, x}},
			{versions: both, refused: [2][]string{none, x}, after: refusedFor, alone: x},
			{versions: onlyNew, refused: [2][]string{nil, x}, after: time.Second, alone: x},
			{versions: onlyNew, refused: [2][]string{nil, none}, after: time.Second},
		},
		"both": {
			{versions: both, refused: [2][]string{x, x}},
			{versions: both, refused: [2][]string{x, x}, after: time.Minute},
			{versions: onlyNew, refused: [2][]string{nil, x}, after: time.Minute},
		},
		"the old one a moment later": {
			{versions: both, refused: [2][]string{none, x}},
			{versions: both, refused: [2][]string{x, x}, after: time.Second},
			{versions: onlyNew, refused: [2][]string{nil, x}, after: time.Minute},
		},
		"the old one refuses it no more": {
			{versions: both, refused: [2][]string{x, x}},
			{versions: both, refused: [2][]string{none, x}, after: time.Minute},
		},
		"when the old one is gone": {
			{versions: onlyNew, refused: [2][]string{nil, x}},
			{versions: onlyNew, refused: [2][]string{nil, x}, after: time.Minute},
		},
		"the old one hasn't connected yet": {
			{versions: both, refused: [2][]string{nil, x}},
			{versions: both, refused: [2][]string{nil, x}, after: time.Minute},
			{versions: both, refused: [2][]string{none, x}, after: time.Minute},
			{versions: both, refused: [2][]string{none, x}, after: refusedFor, alone: x},
		},
		"the new one connects anew": {
			{versions: both, refused: [2][]string{x, x}},
			{versions: onlyNew, refused: [2][]string{nil, nil}, after: time.Minute},
			{versions: onlyNew, refused: [2][]string{nil, x}, after: time.Minute},
			{versions: both, refused: [2][]string{none, x}, after: time.Minute},
			{versions: both, refused: [2][]string{none, x}, after: time.Minute},
		},
		"taken, and refused again": {
			{versions: both, refused: [2][]string{x, x}},
			{versions: both, refused: [2][]string{none, none}, after: time.Second},
			{versions: both, refused: [2][]string{none, x}, after: time.Second},
			{versions: both, refused: [2][]string{none, x}, after: refusedFor, alone: x},
		},
		"a standby of the same version": {
			{versions: [2]string{fresh, fresh}, refused: [2][]string{none, x}},
			{versions: [2]string{fresh, fresh}, refused: [2][]string{none, x}, after: time.Minute},
		},
		"what pods dial in vain": {
			{versions: both, refused: [2][]string{none, {"*"}}},
			{versions: both, refused: [2][]string{none, {"*"}}, after: time.Minute},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var had map[resource]refusal
			now := time.Unix(1e9, 0)
			for i, m := range moments {
				now = now.Add(m.after)
				processes, configs := m.node()
				had = compareRefusals(had, processes, configs, now)
				var alone []string
				for k, r := range had {
					if is, _ := r.told(now); is {
						alone = append(alone, k.name)
					}
				}
				if fmt.Sprint(alone) != fmt.Sprint(m.alone) {
					t.Errorf("moment %d: %v count, want %v: %+v", i, alone, m.alone, had)
				}
			}
		})
	}
}

func (m moment) node() (processes []isolation.Process, configs [generations]relay.State) {
	for g, version := range m.versions {
		if version == "" {
			continue
		}
		processes = append(processes, isolation.Process{Generation: g, Version: version, PID: 40 + g})
		if m.refused[g] == nil {
			continue
		}
		configs[g] = relay.State{Connected: true, Listeners: 6}
		for _, name := range m.refused[g] {
			configs[g].Rejections = append(configs[g].Rejections, relay.Rejection{Type: "CDS", Name: name})
		}
	}
	return processes, configs
}

// What two versions refused is known to the next agent, and a process that comes and
// goes with other names each time fills nothing.
func TestRefusalsAreRemembered(t *testing.T) {
	told := v1alpha1.NodeProxyStatus{Tenants: []v1alpha1.NodeTenantStatus{{Name: "team-a", Rejected: []v1alpha1.RejectedResource{
		{Type: "CDS", Name: "x", Shared: true}, {Type: "CDS", Name: "y"}}}}}
	had := rememberedRefusals(told)["team-a"]
	now := time.Unix(1e9, 0)
	starting := moment{versions: [2]string{"", "1.40.0"}}
	processes, configs := starting.node()
	had = compareRefusals(had, processes, configs, now)
	if len(had) != 1 || !had[resource{"CDS", "x"}].shared {
		t.Fatalf("before the proxy is back: %+v", had)
	}
	for i := range 1000 {
		m := moment{versions: [2]string{"1.39.3", "1.40.0"}, refused: [2][]string{nil, {fmt.Sprint(i)}}}
		processes, configs := m.node()
		had = compareRefusals(had, processes, configs, now)
	}
	if len(had) > maxRefusals+1 {
		t.Errorf("%d are remembered", len(had))
	}
}
