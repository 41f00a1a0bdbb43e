package translate

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// maxRolloutMessage is how long the API lets a rollout's message be.
const maxRolloutMessage = 2048

// RolloutInput is what a rollout's next move depends on.
type RolloutInput struct {
	Rollout *v1alpha1.ProxyRollout
	// Older is a rollout that isn't done yet and goes first, "" if there is none.
	Older string
	// From are the versions that tenants have outside of this rollout.
	From []string
	// Nodes have all NodeProxies.
	Nodes []v1alpha1.NodeProxy
	// Policies and Bounds by namespace.
	Policies map[string][]v1alpha1.IsolationPolicy
	Bounds   map[string]Bounds
	// Away are nodes that do nothing that they are told, and why.
	Away map[string]string
	// ReadySince is since when the other nodes are there.
	ReadySince map[string]time.Time
	Now        time.Time
}

// NodeRollout is what a rollout wants of one node. It is all that the rollout owns
// there.
type NodeRollout struct {
	Images   []v1alpha1.NodeImage
	Canaries map[string]v1alpha1.CanaryGeneration
}

// RolloutDecision is a rollout's next move.
type RolloutDecision struct {
	Status v1alpha1.ProxyRolloutStatus
	// Nodes by name; one that isn't here has nothing of the rollout.
	Nodes map[string]NodeRollout
	// After is when to decide again even if nothing happens; 0 for never.
	After time.Duration
}

// RolloutVersion is the version of a target as NodeProxies name it.
func RolloutVersion(t v1alpha1.RolloutTarget) string {
	if _, digest, ok := strings.Cut(t.Image, "@sha256:"); ok && len(digest) >= 12 {
		return t.Version + "+" + digest[:12]
	}
	return t.Version
}

// IsDone reports whether a rollout has nothing more to do on nodes, but for one that
// succeeded to be remembered.
func IsDone(p v1alpha1.RolloutPhase) bool {
	return p == v1alpha1.RolloutSucceeded || p == v1alpha1.RolloutRolledBack || p == v1alpha1.RolloutAborted
}

// rollout is a decision in the making.
type rollout struct {
	RolloutInput
	version string
	status  v1alpha1.ProxyRolloutStatus
	// tenants by name: their place on each node that has them.
	tenants map[string][]placed
	// held are tenants whose namespaces hold the rollout back: until when.
	held  map[string]time.Time
	after time.Duration
}

// placed is a tenant on a node.
type placed struct {
	node   *v1alpha1.NodeProxy
	spec   v1alpha1.NodeTenant
	status *v1alpha1.NodeTenantStatus // nil if the agent says nothing of it
}

// DecideRollout is the whole of what a rollout does: it looks at what nodes report
// and says what they are to have, and what people are to know. It remembers nothing
// but the rollout's own status.
func DecideRollout(in RolloutInput) RolloutDecision {
	r := &rollout{RolloutInput: in, version: RolloutVersion(in.Rollout.Spec.Target), status: *in.Rollout.Status.DeepCopy(), tenants: map[string][]placed{}, held: map[string]time.Time{}}
	r.status.ObservedGeneration, r.status.Version = in.Rollout.Generation, r.version
	// Caches list in any order. What is said must not depend on it: a status that reads
	// otherwise has all decided again.
	nodes := make([]*v1alpha1.NodeProxy, len(in.Nodes))
	for i := range in.Nodes {
		nodes[i] = &in.Nodes[i]
	}
	slices.SortFunc(nodes, func(a, b *v1alpha1.NodeProxy) int { return strings.Compare(a.Name, b.Name) })
	for _, n := range nodes {
		for _, t := range n.Spec.Tenants {
			p := placed{node: n, spec: t}
			if k := slices.IndexFunc(n.Status.Tenants, func(s v1alpha1.NodeTenantStatus) bool { return s.Name == t.Name }); k >= 0 {
				p.status = &n.Status.Tenants[k]
			}
			r.tenants[t.Name] = append(r.tenants[t.Name], p)
		}
	}
	want := r.decide()
	r.status.Conditions = r.available()
	if r.status.Message = cutTo(r.status.Message, maxRolloutMessage); IsDone(r.status.Phase) && r.status.FinishedAt == nil {
		at := metav1.NewTime(in.Now)
		r.status.FinishedAt = &at
	}
	return RolloutDecision{Status: r.status, Nodes: want, After: r.after}
}

func (r *rollout) decide() map[string]NodeRollout {
	s, spec := &r.status, r.Rollout.Spec
	switch {
	case s.Phase == v1alpha1.RolloutSucceeded:
		return r.succeeded()
	case s.Phase == v1alpha1.RolloutRolledBack, s.Phase == v1alpha1.RolloutAborted:
		return nil
	case s.Phase == v1alpha1.RolloutRollingBack, s.Phase == v1alpha1.RolloutAborting:
		return r.takeBack()
	case spec.Abort:
		s.Phase = v1alpha1.RolloutAborting
		return r.takeBack()
	case r.Older != "":
		s.Phase = v1alpha1.RolloutPending
		s.Message = fmt.Sprintf("waits until ProxyRollout %s is done; nothing is changed", r.Older)
		return nil
	}
	if s.StartedAt == nil {
		at := metav1.NewTime(r.Now)
		s.StartedAt, s.Step, s.From = &at, 1, slices.DeleteFunc(slices.Clone(r.From), func(v string) bool { return v == r.version })
	}
	s.Step = min(max(s.Step, 1), int32(len(spec.Steps)))
	if s.Verdict = r.judge(); s.Verdict != nil {
		s.Phase = v1alpha1.RolloutRollingBack
		return r.takeBack()
	}
	nodes := r.proceed()
	tail := r.outlook()
	s.Message = cutTo(s.Message, maxRolloutMessage-len(tail)) + tail
	return nodes
}

// owns reports whether a tenant on a node has the rollout's canary, and not that of one
// that was deleted and had its name. One without a UID is of an operator of before.
func (r *rollout) owns(p placed) bool {
	c := p.spec.Canary
	return c != nil && c.Rollout == r.Rollout.Name && c.Version == r.version && (c.RolloutUID == "" || c.RolloutUID == string(r.Rollout.UID))
}

// isAnothers reports whether a node's last word is of a process of the version that
// isn't this rollout's but of one before it, which was over without that node: it is
// away, or its agent is silent. How that process fared, and that it serves, says nothing
// of this rollout, so the canary comes when the node has let go of it.
func (r *rollout) isAnothers(p placed) bool {
	g := p.generation(r.version)
	byHand := p.spec.Canary != nil && p.spec.Canary.Rollout == ""
	if g == nil || p.spec.Version == r.version || byHand || r.owns(p) {
		return false
	}
	// What serves because the plan's own version can't be had stays for good.
	stays := g.Role == v1alpha1.RoleFormer && g.Restarts == 0 && p.isUpToDate()
	return !stays
}

// awaited is what a rollout waits for where isAnothers: for people, after the place.
func (r *rollout) awaited(p placed) string {
	g := p.generation(r.version)
	if g.Role == v1alpha1.RoleFormer && p.isUpToDate() && !slices.Contains(p.node.Status.ProxyVersions, p.spec.Version) {
		// Nobody lets go of it, and a canary would be judged by how it has ended.
		return fmt.Sprintf(", where Envoy %s serves because the planned %s can't be had, and has ended (restarts: %d): set spec.proxy.version of the MeshTopology to one that the node has",
			r.version, p.spec.Version, g.Restarts)
	}
	return ", which hasn't said that the process of the rollout before is gone"
}

// isUpToDate reports whether the node's agent speaks of what it is told now.
func (p placed) isUpToDate() bool { return p.node.Status.ObservedGeneration >= p.node.Generation }

// generation is the process of a version that is to serve, nil if there is none.
func (p placed) generation(version string) *v1alpha1.GenerationStatus {
	if p.status == nil {
		return nil
	}
	for i, g := range p.status.Generations {
		switch g.Role {
		case v1alpha1.RoleFirst, v1alpha1.RoleCanary, v1alpha1.RoleFormer:
		default:
			continue // it leaves, or stands by
		}
		if g.Version == version {
			return &p.status.Generations[i]
		}
	}
	return nil
}

// nodes are what nodes are to have for tenants at their weights. The image is
// fetched ahead of it, by all.
func (r *rollout) nodes(taking map[string]int32) map[string]NodeRollout {
	out := map[string]NodeRollout{}
	for name, places := range r.tenants {
		for _, p := range places {
			n := out[p.node.Name]
			if image := r.Rollout.Spec.Target.Image; image != "" {
				n.Images = []v1alpha1.NodeImage{{Version: r.version, Image: image, Rollout: r.Rollout.Name}}
			}
			if n.Canaries == nil {
				n.Canaries = map[string]v1alpha1.CanaryGeneration{}
			}
			if _, held := r.held[name]; taking[name] > 0 && !held && !r.isAnothers(p) {
				weight := taking[name]
				n.Canaries[name] = v1alpha1.CanaryGeneration{Version: r.version, Weight: weight, Promoted: weight == 100, Rollout: r.Rollout.Name, RolloutUID: string(r.Rollout.UID)}
			}
			out[p.node.Name] = n
		}
	}
	return out
}

// succeeded keeps tenants at the version until their plan itself says so.
func (r *rollout) succeeded() map[string]NodeRollout {
	s := &r.status
	have := 0
	for name := range r.tenants {
		if !isHeldBack(*s, name) {
			have++
		}
	}
	s.Weight, s.Tenants, s.ReachedTenants, s.ReachedAt = 100, int32(have), int32(have), nil
	s.Message = fmt.Sprintf("all tenants (%d) run Envoy %s", have, r.version) + r.without()
	switch {
	case len(s.From) == 0:
	case r.Rollout.Spec.Target.Image != "":
		s.Message += fmt.Sprintf(". It decides in the place of MeshTopologies that ask for %s, and has its image fetched: keep it", strings.Join(s.From, ", "))
	default:
		s.Message += fmt.Sprintf(". It decides in the place of MeshTopologies that ask for %s: set their spec.proxy.version before you delete it", strings.Join(s.From, ", "))
	}
	stay, planned := map[string]int32{}, map[string]bool{}
	for name, places := range r.tenants {
		for _, p := range places {
			// Until the plan has it. What people ask for since goes before it.
			if r.owns(p) && slices.Contains(s.From, p.spec.Version) && !isHeldBack(*s, name) {
				stay[name] = 100
			}
			planned[p.node.Name] = planned[p.node.Name] || p.spec.Version == r.version
		}
	}
	nodes := r.nodes(stay)
	// Its image stays where its version does: all that ever succeeded would soon be
	// more than a node takes.
	for name, n := range nodes {
		if len(n.Canaries) == 0 && !planned[name] {
			delete(nodes, name)
		}
	}
	return nodes
}

// again has it decided again after d at the latest.
func (r *rollout) again(d time.Duration) {
	if d = max(d, 100*time.Millisecond); r.after == 0 || d < r.after {
		r.after = d
	}
}

func describe(nodes map[string]string) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		out = append(out, name+" ("+nodes[name]+")")
	}
	return listed(out)
}

func parseDuration(s string, otherwise time.Duration) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		return otherwise
	}
	return d
}

func cutTo(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n-3], "") + "…"
}
