package cost

import (
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

var (
	teamA  = model.NamespaceTenant("team-a")
	teamB  = model.NamespaceTenant("team-b")
	shared = model.Tenant{Scope: model.ScopeNode}
	start  = time.Date(2026, 11, 26, 10, 0, 0, 0, time.UTC)
)

func pod(ns string, sent, received, connections uint64) PodReading {
	return PodReading{Namespace: ns, Traffic: Traffic{sent, received, connections}}
}

// clock reads at whole minutes after start.
func (m *Meter) at(t *testing.T, minute int, r map[model.Tenant]Reading) {
	t.Helper()
	d := time.Duration(minute) * time.Minute
	if err := m.Add(start.Add(d), time.Hour+d, r); err != nil {
		t.Fatal(err)
	}
}

func openMeter(t *testing.T, file string) *Meter {
	t.Helper()
	m, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func account1(t *testing.T, m *Meter, tenant model.Tenant) Account {
	t.Helper()
	a, ok := m.Account(tenant)
	if !ok {
		t.Fatalf("%s has no account", tenant)
	}
	return a
}

func TestCountersOnlyGrow(t *testing.T) {
	file := filepath.Join(t.TempDir(), "costs")
	m := openMeter(t, file)
	// What was counted before the first reading isn't known to belong here.
	m.at(t, 0, map[model.Tenant]Reading{teamA: {CPU: 5 * time.Second, Private: 10, PSS: 20, Pods: map[string]PodReading{"p": pod("team-a", 1000, 100, 10)}}})
	if a := account1(t, m, teamA); a.CPU != 0 || a.BytesSent != 0 || !a.Since.Equal(start) {
		t.Errorf("the first reading was counted: %+v", a)
	}
	m.at(t, 1, map[model.Tenant]Reading{teamA: {CPU: 7 * time.Second, Private: 30, PSS: 20, Pods: map[string]PodReading{"p": pod("team-a", 1500, 100, 11)}}})
	if a := account1(t, m, teamA); a.CPU != 2*time.Second || a.BytesSent != 500 || a.Connections != 1 || a.PrivateByteSeconds != 20*60 || a.PSSByteSeconds != 20*60 {
		t.Errorf("the second reading: %+v", a)
	}

	// Another agent goes on, and what comes while it isn't there is counted.
	m = openMeter(t, file)
	m.at(t, 3, map[model.Tenant]Reading{
		teamA: {CPU: 8 * time.Second, Private: 30, Pods: map[string]PodReading{"p": pod("team-a", 1600, 100, 11), "q": pod("team-a", 7, 0, 1)}},
		teamB: {CPU: time.Second},
	})
	if a := account1(t, m, teamA); a.CPU != 3*time.Second || a.BytesSent != 607 || a.Connections != 2 || !a.Since.Equal(start) {
		t.Errorf("after a restart: %+v", a)
	}
	if b := account1(t, m, teamB); b.CPU != time.Second {
		t.Errorf("a tenant that came: %+v", b)
	}

	// A cgroup made anew, and a pod steered anew.
	m.at(t, 4, map[model.Tenant]Reading{teamA: {CPU: time.Second, Pods: map[string]PodReading{"p": pod("team-a", 50, 0, 1)}}})
	if a := account1(t, m, teamA); a.CPU != 4*time.Second || a.BytesSent != 657 || a.Connections != 3 {
		t.Errorf("after counters began anew: %+v", a)
	}
	if _, ok := m.Account(teamB); ok {
		t.Error("a tenant that left has an account")
	}
}

// A tenant whose reading fails keeps its account, and pays for all of it later.
func TestReadingThatFails(t *testing.T) {
	m := openMeter(t, filepath.Join(t.TempDir(), "costs"))
	m.at(t, 0, map[model.Tenant]Reading{})
	m.at(t, 1, map[model.Tenant]Reading{teamA: {CPU: time.Second, Pods: map[string]PodReading{"p": pod("team-a", 100, 0, 1)}}, teamB: {CPU: time.Second}})
	m.at(t, 2, map[model.Tenant]Reading{teamA: {Unread: true, Pods: map[string]PodReading{"p": pod("team-a", 150, 0, 2)}}, teamB: {CPU: 2 * time.Second}})
	if a, b := account1(t, m, teamA), account1(t, m, teamB); a.CPU != time.Second || a.BytesSent != 100 || b.CPU != 2*time.Second {
		t.Errorf("unread %+v, the other %+v", a, b)
	}
	m.at(t, 3, map[model.Tenant]Reading{teamA: {CPU: 4 * time.Second, Pods: map[string]PodReading{"p": pod("team-a", 170, 0, 3)}}})
	if a := account1(t, m, teamA); a.CPU != 4*time.Second || a.BytesSent != 170 || a.Connections != 3 {
		t.Errorf("read again: %+v", a)
	}
	m.at(t, 4, map[model.Tenant]Reading{teamA: {CPU: 4 * time.Second}, teamB: {Unread: true}})
	if _, ok := m.Account(teamB); ok {
		t.Error("a tenant that was never read has an account")
	}
}

func TestPodThatLeavesOrChangesTenant(t *testing.T) {
	m := openMeter(t, filepath.Join(t.TempDir(), "costs"))
	m.at(t, 0, map[model.Tenant]Reading{})
	m.at(t, 1, map[model.Tenant]Reading{teamA: {Pods: map[string]PodReading{"p": pod("team-a", 100, 0, 1)}}})
	m.Leave(teamA, "p", pod("team-a", 150, 0, 2))
	m.Leave(teamA, "short", pod("team-a", 9, 0, 1)) // lived between two readings
	if a := account1(t, m, teamA); a.BytesSent != 159 || a.Connections != 3 {
		t.Errorf("after two pods left: %+v", a)
	}
	m.Leave(teamA, "p", pod("team-a", 150, 0, 2)) // told twice
	m.at(t, 2, map[model.Tenant]Reading{teamA: {Pods: map[string]PodReading{"q": pod("team-a", 10, 0, 0)}}})
	if a := account1(t, m, teamA); a.BytesSent != 169 {
		t.Errorf("after the next reading: %+v", a)
	}
	m.at(t, 3, map[model.Tenant]Reading{teamB: {Pods: map[string]PodReading{"q": pod("team-a", 15, 0, 0)}}})
	if b := account1(t, m, teamB); b.BytesSent != 5 {
		t.Errorf("the pod's new tenant pays %d bytes, of 5", b.BytesSent)
	}
}

func TestSharedProxyIsSplit(t *testing.T) {
	m := openMeter(t, filepath.Join(t.TempDir(), "costs"))
	m.at(t, 0, map[model.Tenant]Reading{})
	m.at(t, 1, map[model.Tenant]Reading{shared: {CPU: 10 * time.Second, Private: 100, Pods: map[string]PodReading{
		"a": pod("team-a", 3*connectionBytes, 0, 4), "b": pod("team-b", connectionBytes, 0, 2), "idle": pod("team-c", 0, 0, 0)}}})
	a := account1(t, m, shared)
	for ns, want := range map[string]time.Duration{"team-a": 7 * time.Second, "team-b": 3 * time.Second, "team-c": 0} {
		if got := a.Namespaces[ns].CPU; math.Abs(float64(got-want)) > 10 {
			t.Errorf("%s pays %s CPU, of %s", ns, got, want)
		}
	}
	// A pod that left pays for what it had; without any, all pay alike.
	m.Leave(shared, "b", pod("team-b", connectionBytes, 0, 3))
	m.at(t, 2, map[model.Tenant]Reading{shared: {CPU: 11 * time.Second, Private: 100, Pods: map[string]PodReading{"a": pod("team-a", 3*connectionBytes, 0, 4)}}})
	if got := account1(t, m, shared).Namespaces["team-b"]; got.CPU != 4*time.Second || got.Connections != 3 {
		t.Errorf("team-b pays %s for %d connections after its pod left, of 4s for 3", got.CPU, got.Connections)
	}
	m.at(t, 3, map[model.Tenant]Reading{shared: {CPU: 13 * time.Second, Private: 100, Pods: map[string]PodReading{
		"a": pod("team-a", 3*connectionBytes, 0, 4), "idle": pod("team-c", 0, 0, 0)}}})
	a = account1(t, m, shared)
	if got := a.Namespaces["team-c"]; got.CPU != time.Second || got.PrivateByteSeconds != 50*60 || got.Private != 50 {
		t.Errorf("team-c pays %+v of 2s CPU and 100 bytes that two namespaces had idle", got)
	}
	if len(a.Namespaces) != 2 {
		t.Errorf("%d namespaces have accounts, of 2 with pods", len(a.Namespaces))
	}
}

func TestUnreadableFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "costs")
	if err := os.WriteFile(file, []byte("{\"tenants\":"), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := Open(file)
	if err == nil {
		t.Error("an unreadable file isn't told")
	}
	m.at(t, 0, map[model.Tenant]Reading{teamA: {CPU: time.Second}})
	if a := account1(t, m, teamA); a.CPU != 0 {
		t.Errorf("what another agent may have counted is counted again: %s", a.CPU)
	}
}
