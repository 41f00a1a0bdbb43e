package translate

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

const (
	// DefaultPids is how many threads and processes a proxy may have where nobody says.
	DefaultPids = 512
	// DefaultNodePids is that of all proxies of a node together: some 32 for each of
	// 500 tenants, half of the smallest pid_max of a node.
	DefaultNodePids = 16384
	// normalWeight is the kernel's where none is set.
	normalWeight = 100
)

// Bounds are what a MeshTopology says of each of its proxies. It is comparable;
// its zero value bounds nothing.
type Bounds struct {
	// Defaults hold where no policy says; Ceilings whatever policies say.
	Defaults, Ceilings v1alpha1.Limits
	// Standby is the default of warm standby, NoStandby forbids it.
	Standby, NoStandby bool
}

// Standby says whether the proxies of a namespace have a warm standby: if one of its
// policies wants it, or none says and the topology does.
func Standby(policies []v1alpha1.IsolationPolicy, b Bounds) bool {
	wanted, said := false, false
	for _, p := range policies {
		if s := p.Spec.WarmStandby; s != nil {
			wanted, said = wanted || *s, true
		}
	}
	return !b.NoStandby && (wanted || !said && b.Standby)
}

// Limits are the strictest of the policies of a namespace, within the bounds of
// its topology; weights count as limits: the smallest wins.
func Limits(policies []v1alpha1.IsolationPolicy, b Bounds) v1alpha1.Limits {
	var l v1alpha1.Limits
	for _, p := range policies {
		stricter(&l, proxyLimits(&p.Spec.ProxyLimits))
	}
	defaults := b.Defaults
	defaults.Pids = cmp.Or(defaults.Pids, DefaultPids)
	for _, f := range fields {
		*f.of(&l) = cmp.Or(*f.of(&l), *f.of(&defaults))
	}
	l.CPUWeight = cmp.Or(l.CPUWeight, normalWeight)
	stricter(&l, b.Ceilings)
	if l.CPUWeight == normalWeight {
		l.CPUWeight = 0 // as the kernel has it
	}
	if l.MemoryMax != 0 && l.MemoryHigh > l.MemoryMax {
		// From two sources: the smaller is the stricter.
		l.MemoryHigh = l.MemoryMax
	}
	return l
}

// bounds reads what a topology says. A default that nothing says more of is a
// ceiling, too: a namespace can only be stricter.
func bounds(t *v1alpha1.TopologyLimits) Bounds {
	if t == nil {
		return Bounds{}
	}
	b := Bounds{Defaults: proxyLimits(t.Defaults), Ceilings: proxyLimits(t.Ceilings)}
	for _, f := range fields {
		*f.of(&b.Ceilings) = cmp.Or(*f.of(&b.Ceilings), *f.of(&b.Defaults))
	}
	if d := t.Defaults; d != nil && d.WarmStandby != nil {
		b.Standby = *d.WarmStandby
	}
	if c := t.Ceilings; c != nil && c.WarmStandby != nil {
		b.NoStandby = !*c.WarmStandby
	}
	return b
}

// nodeLimits reads what a topology says of all proxies together.
func nodeLimits(t *v1alpha1.TopologyLimits) v1alpha1.Limits {
	l := v1alpha1.Limits{Pids: DefaultNodePids}
	if t == nil || t.Node == nil {
		return l
	}
	n := t.Node
	of := proxyLimits(&v1alpha1.ProxyLimits{CPU: n.CPU, Pids: n.Pids})
	if n.MemoryMax != nil {
		of.MemoryMax = n.MemoryMax.Value()
	}
	of.Pids = cmp.Or(of.Pids, l.Pids)
	return of
}

// capped names what of a policy is cut by the ceilings of its topology, and to what.
func capped(p *v1alpha1.ProxyLimits, b Bounds) string {
	want := proxyLimits(p)
	var cut []string
	for _, f := range fields {
		if have, most := *f.of(&want), *f.of(&b.Ceilings); have != 0 && most != 0 && have > most {
			cut = append(cut, fmt.Sprintf("%s %s is cut to %s", f.name, f.says(have), f.says(most)))
		}
	}
	if p.WarmStandby != nil && *p.WarmStandby && b.NoStandby {
		cut = append(cut, "warmStandby isn't allowed")
	}
	return strings.Join(cut, ", ")
}

// boundsProxies reports whether a policy says anything of its namespace's own proxies.
func boundsProxies(s *v1alpha1.ProxyLimits) bool {
	return s.WarmStandby != nil || proxyLimits(s) != (v1alpha1.Limits{})
}

func proxyLimits(s *v1alpha1.ProxyLimits) v1alpha1.Limits {
	var l v1alpha1.Limits
	if s == nil {
		return l
	}
	if c := s.CPU; c != nil {
		if c.Weight != nil {
			l.CPUWeight = *c.Weight
		}
		if c.Limit != nil {
			l.CPUMillis = c.Limit.MilliValue()
		}
	}
	if m := s.Memory; m != nil {
		if m.High != nil {
			l.MemoryHigh = m.High.Value()
		}
		if m.Max != nil {
			l.MemoryMax = m.Max.Value()
		}
	}
	if s.Pids != nil {
		l.Pids = *s.Pids
	}
	if c := s.Connections; c != nil {
		if c.Concurrent != nil {
			l.Connections = *c.Concurrent
		}
		if c.NewPerSecond != nil {
			l.NewConnections = *c.NewPerSecond
		}
		if c.NewDirectPerSecond != nil {
			l.NewDirect = *c.NewDirectPerSecond
		}
	}
	if b := s.Bandwidth; b != nil {
		if b.Egress != nil {
			l.Egress = b.Egress.Value()
		}
		if b.Ingress != nil {
			l.Ingress = b.Ingress.Value()
		}
	}
	if s.Concurrency != nil {
		l.Concurrency = *s.Concurrency
	}
	return l
}

// limitField is a field of Limits, under its name in a policy, and how a policy writes a
// value of it. 0 is no limit; else the smaller is the stricter.
type limitField struct {
	name string
	of   func(*v1alpha1.Limits) *int64
	says func(int64) string
}

func inCPUs(millis int64) string {
	return resource.NewMilliQuantity(millis, resource.DecimalSI).String()
}
func inBytes(n int64) string  { return resource.NewQuantity(n, resource.BinarySI).String() }
func inNumber(n int64) string { return strconv.FormatInt(n, 10) }

var fields = []limitField{
	{"cpu.weight", func(l *v1alpha1.Limits) *int64 { return &l.CPUWeight }, inNumber},
	{"cpu.limit", func(l *v1alpha1.Limits) *int64 { return &l.CPUMillis }, inCPUs},
	{"memory.high", func(l *v1alpha1.Limits) *int64 { return &l.MemoryHigh }, inBytes},
	{"memory.max", func(l *v1alpha1.Limits) *int64 { return &l.MemoryMax }, inBytes},
	{"pids", func(l *v1alpha1.Limits) *int64 { return &l.Pids }, inNumber},
	{"connections.concurrent", func(l *v1alpha1.Limits) *int64 { return &l.Connections }, inNumber},
	{"connections.newPerSecond", func(l *v1alpha1.Limits) *int64 { return &l.NewConnections }, inNumber},
	{"connections.newDirectPerSecond", func(l *v1alpha1.Limits) *int64 { return &l.NewDirect }, inNumber},
	{"bandwidth.egress", func(l *v1alpha1.Limits) *int64 { return &l.Egress }, inBytes},
	{"bandwidth.ingress", func(l *v1alpha1.Limits) *int64 { return &l.Ingress }, inBytes},
	{"concurrency", func(l *v1alpha1.Limits) *int64 { return &l.Concurrency }, inNumber},
}

func stricter(l *v1alpha1.Limits, by v1alpha1.Limits) {
	for _, f := range fields {
		if to, from := f.of(l), *f.of(&by); from != 0 && (*to == 0 || from < *to) {
			*to = from
		}
	}
}

// pages are the largest that a kernel counts memory in, in bytes.
const pages = 64 << 10

// enforces reports whether a proxy has what was wanted, neither more nor less, but for
// what its node says that it can't hold. The kernel of cgroup v1 counts CPU shares in
// other units.
func enforces(n v1alpha1.NodeTenantStatus, want v1alpha1.Limits) bool {
	const weightSlack = 1
	have := n.Limits
	told := func(what string) bool {
		return slices.ContainsFunc(n.Unenforced, func(s string) bool { return strings.HasPrefix(s, what) })
	}
	lacks := func(controller string, have int64) bool { return have == 0 && told(controller+":") }
	same := func(have, want int64) bool { return have == want || have == 0 && len(n.Unenforced) > 0 }
	weight := want.CPUWeight == 0 || lacks("cpu", have.CPUWeight) || have.CPUWeight >= want.CPUWeight-weightSlack && have.CPUWeight <= want.CPUWeight+weightSlack
	// Version 1 has no quota above that of all proxies together, which is told as well.
	cpu := have.CPUMillis == want.CPUMillis || lacks("cpu", have.CPUMillis) || have.CPUMillis < want.CPUMillis && have.CPUMillis != 0 && told("cpu limit")
	inPages := func(have, want int64) bool { return have <= want && want-have < pages }
	return weight && cpu && (inPages(have.MemoryMax, want.MemoryMax) || lacks("memory", have.MemoryMax)) &&
		(have.Pids == want.Pids || lacks("pids", have.Pids)) && (have.MemoryHigh == 0 || inPages(have.MemoryHigh, want.MemoryHigh)) &&
		same(have.Connections, want.Connections) && same(have.NewConnections, want.NewConnections) && same(have.NewDirect, want.NewDirect) &&
		same(have.Egress, want.Egress) && same(have.Ingress, want.Ingress)
}

// notHeld are limits that nodes can't hold as they are meant, one line a node.
func notHeld(nodes []NodeView) []string {
	var told []string
	for _, n := range nodes {
		if len(n.Status.Unenforced) > 0 {
			told = append(told, n.Node+": "+strings.Join(n.Status.Unenforced, "; "))
		}
	}
	slices.Sort(told)
	return slices.Compact(told)
}
