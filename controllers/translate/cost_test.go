package translate

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

var costStart = time.Date(2026, 11, 26, 10, 58, 0, 0, time.UTC)

func counted(node string, since, at time.Duration, cpu int64) NodeView {
	return NodeView{Node: node, Tenant: model.NamespaceTenant("team-a"), Cost: &v1alpha1.NodeCost{
		Since: metav1.NewTime(costStart.Add(since)), At: metav1.NewTime(costStart.Add(at)), Taken: v1alpha1.Taken{CPUMilliseconds: cpu}}}
}

func TestTenantCost(t *testing.T) {
	at := func(d time.Duration) metav1.Time { return metav1.NewTime(costStart.Add(d)) }
	if got := TenantCost("team-a", []NodeView{{Node: "n1", Tenant: model.NamespaceTenant("team-a")}}, nil, at(0)); got != nil {
		t.Errorf("a cost of nothing: %+v", got)
	}
	one := TenantCost("team-a", []NodeView{counted("n1", 0, time.Minute, 100), counted("n2", 0, time.Minute, 50)}, nil, at(time.Minute))
	if one.Total.CPUMilliseconds != 150 || len(one.Hours) != 1 || one.Estimated || len(one.Nodes) != 2 {
		t.Errorf("first: %+v", one)
	}
	if again := TenantCost("team-a", []NodeView{counted("n2", 0, time.Minute, 50), counted("n1", 0, time.Minute, 100)}, one, at(2*time.Minute)); again != one {
		t.Errorf("the same counters are new: %+v", again)
	}
	// In the next hour n1 goes on, n2 was counted anew, n3 comes.
	two := TenantCost("team-a", []NodeView{counted("n1", 0, 3*time.Minute, 130), counted("n2", 2*time.Minute, 3*time.Minute, 7), counted("n3", 2*time.Minute, 3*time.Minute, 1)}, one, at(3*time.Minute))
	if two.Total.CPUMilliseconds != 188 || len(two.Hours) != 2 || two.Hours[1].CPUMilliseconds != 38 || two.Hours[0].CPUMilliseconds != 150 || len(two.Days) != 1 || two.Days[0].CPUMilliseconds != 188 {
		t.Errorf("second: %+v", two)
	}
	// One whose view was away for a moment isn't counted twice.
	three := TenantCost("team-a", []NodeView{counted("n2", 2*time.Minute, 4*time.Minute, 8)}, two, at(4*time.Minute))
	four := TenantCost("team-a", []NodeView{counted("n1", 0, 5*time.Minute, 140)}, three, at(5*time.Minute))
	if three.Total.CPUMilliseconds != 189 || four.Total.CPUMilliseconds != 199 {
		t.Errorf("after n1 was away: %d and %d", three.Total.CPUMilliseconds, four.Total.CPUMilliseconds)
	}
	late := TenantCost("team-a", []NodeView{counted("n1", 0, 2*time.Hour, 150)}, four, at(2*time.Hour))
	if len(late.Nodes) != 1 || late.Total.CPUMilliseconds != 209 {
		t.Errorf("nodes that are gone stay: %+v", late)
	}
}

// A node that lies adds to the bill at most: it takes nothing away from what others tell.
func TestTenantCostOfALiar(t *testing.T) {
	at := metav1.NewTime(costStart.Add(time.Minute))
	for _, lie := range []int64{math.MinInt64, -1, math.MaxInt64} {
		had := TenantCost("team-a", []NodeView{counted("n1", 0, 0, 100)}, nil, at)
		for round := range 3 {
			since := time.Duration(round) * time.Second
			had = TenantCost("team-a", []NodeView{counted("n1", 0, since+1, 100+int64(round)), counted("n2", since, since, lie)}, had, at)
		}
		if had.Total.CPUMilliseconds < 102 || had.Days[0].CPUMilliseconds < 102 {
			t.Errorf("%d: %+v", lie, had)
		}
	}
}

func TestTenantCostOfASharedProxy(t *testing.T) {
	n := NodeView{Node: "n1", Tenant: model.Tenant{Scope: model.ScopeNode}, Cost: &v1alpha1.NodeCost{Taken: v1alpha1.Taken{CPUMilliseconds: 100}},
		Shares: []v1alpha1.NamespaceShare{{Name: "team-a", Cost: v1alpha1.NodeCost{Taken: v1alpha1.Taken{CPUMilliseconds: 30}}}}}
	now := metav1.NewTime(costStart)
	if got := TenantCost("team-a", []NodeView{n}, nil, now); got == nil || got.Total.CPUMilliseconds != 30 || !got.Estimated {
		t.Errorf("share: %+v", got)
	}
	if got := TenantCost("team-b", []NodeView{n}, nil, now); got != nil {
		t.Errorf("a namespace without a share pays %+v", got)
	}
}

// Whatever is lost on the way, periods and total agree with what nodes counted, and
// the object stays within its bounds.
func TestTenantCostAddsUp(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	type node struct {
		since time.Duration
		cpu   int64
	}
	nodes := map[string]*node{}
	var cost *v1alpha1.TenantCost
	var truth int64
	for minute := range 40 * 24 * 60 / 10 {
		now := time.Duration(minute*10) * time.Minute
		for i := range 3 {
			name := fmt.Sprintf("n%d", i)
			if nodes[name] == nil || r.IntN(200) == 0 {
				nodes[name] = &node{since: now}
			}
			more := r.Int64N(50)
			nodes[name].cpu += more
			truth += more
		}
		var views []NodeView
		for name, n := range nodes {
			views = append(views, counted(name, n.since, now, n.cpu))
		}
		next := TenantCost("team-a", views, cost, metav1.NewTime(costStart.Add(now)))
		if r.IntN(10) == 0 { // an operator that ended before it wrote, and one with an old cache
			next = TenantCost("team-a", views, cost, metav1.NewTime(costStart.Add(now)))
		}
		cost = next
	}
	if cost.Total.CPUMilliseconds != truth {
		t.Errorf("total is %d, of %d", cost.Total.CPUMilliseconds, truth)
	}
	if len(cost.Hours) != costHours || len(cost.Days) != costDays {
		t.Errorf("%d hours and %d days are kept", len(cost.Hours), len(cost.Days))
	}
	var hours, days int64
	for _, h := range cost.Hours[1:] {
		hours += h.CPUMilliseconds
	}
	last := cost.Days[len(cost.Days)-1]
	for _, h := range cost.Hours {
		if !h.Start.Before(&last.Start) {
			days += h.CPUMilliseconds
		}
	}
	if days != last.CPUMilliseconds || hours == 0 {
		t.Errorf("the hours of today have %d, the day has %d", days, last.CPUMilliseconds)
	}
	if before := cost.DeepCopy(); !equality.Semantic.DeepEqual(before, TenantCost("team-a", nil, cost, metav1.NewTime(costStart))) {
		t.Error("no news changed it")
	}
}
