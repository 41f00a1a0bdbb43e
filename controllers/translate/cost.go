package translate

import (
	"math"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// What TenantCost keeps, as the type allows: one more than a day and a month, so
	// that the last of each is whole.
	costHours = 25
	costDays  = 32
	// forgetNode is for how long the counters of a node that tells none are kept: a
	// tenant that comes back later than its agent lingers is counted anew.
	forgetNode = time.Hour
)

// TenantCost adds to had what the nodes have counted since. It depends on nothing
// else, so that an operator that is ended between any two steps loses and doubles
// nothing. nil is nothing known, and had itself nothing new.
func TenantCost(namespace string, nodes []NodeView, had *v1alpha1.TenantCost, now metav1.Time) *v1alpha1.TenantCost {
	next := &v1alpha1.TenantCost{Since: now}
	if had != nil {
		next = had.DeepCopy()
	}
	last := map[string]v1alpha1.NodeCost{}
	for _, n := range next.Nodes {
		last[n.Node] = n.Cost
	}
	next.Nodes = nil
	var added v1alpha1.Taken
	told := false
	for _, n := range byNode(nodes) {
		read, ok := costAt(namespace, n)
		if !ok {
			continue
		}
		if was, known := last[n.Node]; !known || !was.Since.Equal(&read.Since) {
			plus(&added, read.Taken, 1)
			told = true
		} else if was.At.Before(&read.At) {
			since := read.Taken
			plus(&since, was.Taken, -1)
			plus(&added, since, 1)
			told = true
		} else {
			read = was
		}
		delete(last, n.Node)
		next.Nodes = append(next.Nodes, v1alpha1.CostOfNode{Node: n.Node, Cost: read})
		next.Estimated = next.Estimated || n.Tenant.Scope == model.ScopeNode
	}
	if !told {
		return had
	}
	for node, was := range last {
		if now.Sub(was.At.Time) < forgetNode {
			next.Nodes = append(next.Nodes, v1alpha1.CostOfNode{Node: node, Cost: was})
		}
	}
	slices.SortFunc(next.Nodes, func(a, b v1alpha1.CostOfNode) int { return strings.Compare(a.Node, b.Node) })
	next.At = now
	plus(&next.Total, added, 1)
	next.Hours = addTo(next.Hours, now.UTC().Truncate(time.Hour), added, costHours)
	next.Days = addTo(next.Days, now.UTC().Truncate(24*time.Hour), added, costDays)
	return next
}

// costAt is what a node has counted of a namespace's tenant.
func costAt(namespace string, n NodeView) (v1alpha1.NodeCost, bool) {
	if n.Tenant.Scope == model.ScopeNode {
		for _, s := range n.Shares {
			if s.Name == namespace {
				return s.Cost, true
			}
		}
		return v1alpha1.NodeCost{}, false
	}
	if n.Cost == nil {
		return v1alpha1.NodeCost{}, false
	}
	return *n.Cost, true
}

// plus adds n times what was taken, with n 1 or -1; an agent that counted back, or
// tells of less than nothing or more than fits, takes nothing away from what others told.
func plus(to *v1alpha1.Taken, t v1alpha1.Taken, n int64) {
	for _, f := range []struct {
		to *int64
		by int64
	}{
		{&to.CPUMilliseconds, t.CPUMilliseconds}, {&to.PrivateMebibyteSeconds, t.PrivateMebibyteSeconds}, {&to.PSSMebibyteSeconds, t.PSSMebibyteSeconds},
		{&to.BytesSent, t.BytesSent}, {&to.BytesReceived, t.BytesReceived}, {&to.Connections, t.Connections},
	} {
		by := min(max(0, f.by), math.MaxInt64-max(0, n)**f.to)
		*f.to = max(0, *f.to+n*by)
	}
}

// addTo adds to the period that begins at start, and keeps the last most of them.
func addTo(periods []v1alpha1.CostPeriod, start time.Time, t v1alpha1.Taken, most int) []v1alpha1.CostPeriod {
	if len(periods) == 0 || periods[len(periods)-1].Start.Time.Before(start) {
		periods = append(periods, v1alpha1.CostPeriod{Start: metav1.NewTime(start)})
	}
	plus(&periods[len(periods)-1].Taken, t, 1) // also of a clock that went back
	return periods[max(0, len(periods)-most):]
}
