package translate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Reasons of a rollout's verdict.
const (
	VerdictCrashed          = "Crashed"
	VerdictNotReady         = "NotReady"
	VerdictConfigRejected   = "ConfigRejected"
	VerdictDeadlineExceeded = "DeadlineExceeded"
)

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
	Now  time.Time
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
	for i := range in.Nodes {
		n := &in.Nodes[i]
		for _, t := range n.Spec.Tenants {
			p := placed{node: n, spec: t}
			if k := slices.IndexFunc(n.Status.Tenants, func(s v1alpha1.NodeTenantStatus) bool { return s.Name == t.Name }); k >= 0 {
				p.status = &n.Status.Tenants[k]
			}
			r.tenants[t.Name] = append(r.tenants[t.Name], p)
		}
	}
	nodes := r.decide()
	r.status.Conditions = r.available()
	if r.status.Message = cutTo(r.status.Message, 2048); IsDone(r.status.Phase) && r.status.FinishedAt == nil {
		at := metav1.NewTime(in.Now)
		r.status.FinishedAt = &at
	}
	return RolloutDecision{Status: r.status, Nodes: nodes, After: r.after}
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
	return r.proceed()
}

// judge returns why the rollout has to go back, or nil.
func (r *rollout) judge() *v1alpha1.RolloutVerdict {
	at := metav1.NewTime(r.Now)
	within := parseDuration(r.Rollout.Spec.ReadyWithin, 2*time.Minute)
	for _, name := range slices.Sorted(maps.Keys(r.tenants)) {
		for _, p := range r.tenants[name] {
			g := p.generation(r.version)
			if g == nil || !r.owns(p) {
				continue
			}
			if isHeldBack(r.status, name) {
				continue
			}
			v := &v1alpha1.RolloutVerdict{Tenant: name, Node: p.node.Name, At: at}
			others := int32(0)
			for _, other := range p.status.Generations {
				if other.Version != r.version {
					others = max(others, other.Rejected)
				}
			}
			// A new agent doesn't know yet what its predecessor's proxies hold.
			since := g.StartedAt
			if agent := p.node.Status.AgentStartedAt; since != nil && agent != nil && agent.After(since.Time) {
				since = agent
			}
			switch {
			case g.Restarts > 0:
				v.Reason, v.Message = VerdictCrashed, cutTo(fmt.Sprintf("the new proxy ended %d times, limit 0; the last time: %s", g.Restarts, cmp.Or(g.LastExit, "it could not be started")), 1000)
			case g.RefusedAlone != nil && *g.RefusedAlone > 0:
				v.Reason = VerdictConfigRejected
				v.Message = cutTo(fmt.Sprintf("the new proxy refused %d resources that the old one takes: %s", *g.RefusedAlone, rejectedNames(p.status)), 1000)
			case g.RefusedAlone == nil && g.Rejected > others: // by an agent of before
				v.Reason = VerdictConfigRejected
				v.Message = cutTo(fmt.Sprintf("the new proxy refused %d resources, the old one %d: %s", g.Rejected, others, rejectedNames(p.status)), 1000)
			case r.Away[p.node.Name] != "": // what it says last is about what was
				continue
			case !g.Serving && since != nil && r.Now.Sub(since.Time) > within:
				v.Reason = VerdictNotReady
				v.Message = cutTo(fmt.Sprintf("the new proxy takes no connections %s after it or its agent started, limit %s: %s", r.Now.Sub(since.Time).Round(time.Second), within, cmp.Or(p.status.Waits, p.status.Reason, "no reason is known")), 1000)
			default:
				if !g.Serving && since != nil {
					r.again(within - r.Now.Sub(since.Time) + time.Second)
				}
				continue
			}
			if why := r.ownFault(name, p, g, v.Reason); why != "" {
				if r.holdBack(*v, why) {
					continue
				}
				v.Message = cutTo(fmt.Sprintf("%s; %s; %d of %d tenants were left behind for such already", v.Message, why, len(r.status.HeldBack), len(r.tenants)), 1000)
			}
			return v
		}
	}
	if v := r.analyse(); v != nil {
		v.At = at
		return v
	}
	if deadline := parseDuration(r.Rollout.Spec.Deadline, 0); deadline > 0 {
		left := deadline - r.Now.Sub(r.status.StartedAt.Time)
		if left <= 0 {
			return &v1alpha1.RolloutVerdict{Reason: VerdictDeadlineExceeded, At: at, Message: fmt.Sprintf("it wasn't done within %s", deadline)}
		}
		r.again(left)
	}
	return nil
}

// proceed brings the tenants to the step, and leaves it when it may.
func (r *rollout) proceed() map[string]NodeRollout {
	s, spec := &r.status, r.Rollout.Spec
	lacking := r.lacking()
	if s.Weight != spec.Steps[s.Step-1].Weight {
		s.ReachedAt = nil // another step, or the step is another
	}
	for {
		step := spec.Steps[s.Step-1]
		taking := r.taking(int(s.Step))
		if spec.Paused {
			taking = r.begun()
		}
		waiting := r.count(taking, lacking)
		s.Weight, s.Tenants = step.Weight, int32(len(taking))
		last := int(s.Step) == len(spec.Steps)
		of := fmt.Sprintf("step %d of %d: Envoy %s gets %d %% of new connections of %d tenants", s.Step, len(spec.Steps), r.version, step.Weight, len(taking)) + r.without()
		switch {
		case spec.Paused:
			s.Phase, s.Message = v1alpha1.RolloutPaused, of+"; paused: set spec.paused to false to go on, or spec.abort to true to go back"
		case len(lacking) > int(spec.MaxUnavailable):
			// A step that was reached stays so: a node or a pod that comes later, or an
			// agent that starts anew, holds it up but doesn't have it begin again.
			s.Phase = v1alpha1.RolloutProgressing
			s.Message = fmt.Sprintf("%s; nodes that lack it or say nothing: %s (at most %d may)", of, describe(lacking), spec.MaxUnavailable)
			if s.Step == 1 {
				// Nothing begins anywhere before the version is where it is needed. What has
				// begun stays: a node may have joined since.
				return r.nodes(r.begun())
			}
		case len(waiting) > 0:
			s.Phase = v1alpha1.RolloutProgressing
			s.Message = of + "; waiting for " + listed(waiting)
		case last:
			s.Phase = v1alpha1.RolloutSucceeded
			return r.succeeded()
		default:
			if s.ReachedAt == nil {
				at := metav1.NewTime(r.Now)
				s.ReachedAt = &at
			}
			pause := parseDuration(step.Pause, 0)
			left := pause - r.Now.Sub(s.ReachedAt.Time)
			approved := !step.Approval || spec.ApprovedSteps >= s.Step
			if left <= 0 && approved {
				s.Step, s.ReachedAt = s.Step+1, nil
				continue
			}
			s.Phase = v1alpha1.RolloutWaiting
			if !approved {
				s.Message = fmt.Sprintf("%s; reached everywhere, waits for approval: set spec.approvedSteps to %d", of, s.Step)
			} else {
				s.Message = fmt.Sprintf("%s; reached everywhere, goes on at %s", of, s.ReachedAt.Add(pause).UTC().Format(time.RFC3339))
				r.again(left)
			}
		}
		return r.nodes(taking)
	}
}

// taking are the tenants that take part in a step, with their weights: a tenant's
// never falls.
func (r *rollout) taking(step int) map[string]int32 {
	// Who takes part stays, whoever comes after: a tenant that joins the mesh must not
	// take another one's place. Those that are held back are the last.
	rank := map[string]int{}
	for name := range r.tenants {
		if isHeldBack(r.status, name) {
			continue
		}
		switch until := r.heldUntil(name); {
		case r.has(name):
			rank[name] = -1
		case until.After(r.Now):
			rank[name], r.held[name] = 1, until
		}
	}
	names := slices.SortedFunc(maps.Keys(r.tenants), func(a, b string) int {
		return cmp.Or(cmp.Compare(rank[a], rank[b]), strings.Compare(a, b))
	})
	names = slices.DeleteFunc(names, func(name string) bool { return isHeldBack(r.status, name) })
	all := map[string]int32{}
	for _, s := range r.Rollout.Spec.Steps[:step] {
		n := len(names)
		switch {
		case len(s.Namespaces) > 0:
			n = 0
			for _, name := range names {
				if t, err := model.ParseTenant(name); err == nil && slices.Contains(s.Namespaces, t.Namespace) {
					all[name] = max(all[name], s.Weight)
				}
			}
		case s.TenantsPercent != nil:
			n = min(n, (len(r.tenants)*int(*s.TenantsPercent)+99)/100)
		}
		for _, name := range names[:n] {
			all[name] = max(all[name], s.Weight)
		}
		for name, had := range all {
			all[name] = max(had, s.Weight)
		}
	}
	return all
}

// has reports whether a tenant takes part already.
func (r *rollout) has(tenant string) bool {
	return slices.ContainsFunc(r.tenants[tenant], r.owns)
}

// begun are the tenants that take part already, with the weights that they have.
func (r *rollout) begun() map[string]int32 {
	out := map[string]int32{}
	for name, places := range r.tenants {
		for _, p := range places {
			if r.owns(p) && !isHeldBack(r.status, name) {
				out[name] = max(out[name], p.spec.Canary.Weight)
			}
		}
	}
	return out
}

// heldUntil is when the rollout may begin with a tenant; its namespace can't hold it
// back for longer than the rollout lets it.
func (r *rollout) heldUntil(tenant string) time.Time {
	t, err := model.ParseTenant(tenant)
	if err != nil || t.Scope == model.ScopeNode || r.status.StartedAt == nil {
		return time.Time{}
	}
	until, _ := hold(r.Rollout.Spec, r.status.StartedAt.Time, r.Policies[t.Namespace], r.Now)
	return until
}

// hold is until when policies hold a rollout back that started then, and until when
// they can at most.
func hold(spec v1alpha1.ProxyRolloutSpec, startedAt time.Time, policies []v1alpha1.IsolationPolicy, now time.Time) (until, most time.Time) {
	most = startedAt.Add(parseDuration(spec.MaxHold, 168*time.Hour))
	if until = MayBegin(policies, now); until.After(most) {
		until = most
	}
	return until, most
}

// owns reports whether a tenant on a node has the rollout's canary.
func (r *rollout) owns(p placed) bool {
	return p.spec.Canary != nil && p.spec.Canary.Rollout == r.Rollout.Name && p.spec.Canary.Version == r.version
}

// count returns which tenants haven't reached the step, and on which nodes.
func (r *rollout) count(taking map[string]int32, lacking map[string]string) (waiting []string) {
	r.status.ReachedTenants = 0
	for _, name := range slices.Sorted(maps.Keys(taking)) {
		if until, held := r.held[name]; held {
			waiting = append(waiting, fmt.Sprintf("%s, which its namespace holds back until %s", name, until.UTC().Format(time.RFC3339)))
			r.again(until.Sub(r.Now))
			continue
		}
		reached := true
		for _, p := range r.tenants[name] {
			if lacking[p.node.Name] == "" && !p.reached(r.version, taking[name]) {
				waiting = append(waiting, name+" on "+p.node.Name)
				reached = false
			}
		}
		if reached {
			r.status.ReachedTenants++
		}
	}
	return waiting
}

// reached reports whether the node says that the version has its weight there.
func (p placed) reached(version string, weight int32) bool {
	g := p.generation(version)
	if g == nil || !g.Serving {
		return false
	}
	if weight == 100 {
		return g.Role == v1alpha1.RoleFirst
	}
	return g.Role == v1alpha1.RoleCanary && p.status.Weight == weight || g.Role == v1alpha1.RoleFirst
}

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
			if _, held := r.held[name]; taking[name] > 0 && !held {
				weight := taking[name]
				n.Canaries[name] = v1alpha1.CanaryGeneration{Version: r.version, Weight: weight, Promoted: weight == 100, Rollout: r.Rollout.Name}
			}
			out[p.node.Name] = n
		}
	}
	return out
}

// silence is how long an agent may say nothing of what it is told before a rollout
// that goes back doesn't wait for it.
const silence = 30 * time.Second

// takeBack gives all connections back, and says when that is so.
func (r *rollout) takeBack() map[string]NodeRollout {
	s := &r.status
	if s.StoppedAt == nil {
		at := metav1.NewTime(r.Now)
		s.StoppedAt = &at
	}
	var waiting []string
	away := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(r.tenants)) {
		for _, p := range r.tenants[name] {
			if p.spec.Version == r.version {
				continue // its own by now
			}
			g := p.generation(r.version)
			switch left := silence - r.Now.Sub(s.StoppedAt.Time); {
			case !r.owns(p) && (g == nil || !g.Serving):
			case r.Away[p.node.Name] != "":
				away[p.node.Name] = r.Away[p.node.Name]
			case left <= 0 && !r.owns(p) && p.node.Status.ObservedGeneration < p.node.Generation:
				away[p.node.Name] = "its agent says nothing"
			default:
				waiting = append(waiting, name+" on "+p.node.Name)
				if left > 0 {
					r.again(left)
				}
			}
		}
	}
	why := "it was aborted"
	done, doing := v1alpha1.RolloutAborted, v1alpha1.RolloutAborting
	if v := s.Verdict; v != nil {
		done, doing = v1alpha1.RolloutRolledBack, v1alpha1.RolloutRollingBack
		why = v.Message
		if v.Tenant != "" {
			why = fmt.Sprintf("%s on %s: %s", v.Tenant, v.Node, v.Message)
		}
	}
	if s.Phase, s.Message = done, "all new connections go to the version before; "+why; len(waiting) > 0 {
		s.Phase, s.Message = doing, fmt.Sprintf("going back (%s); still to do: %s", why, listed(waiting))
	}
	if len(away) > 0 {
		s.Message += "; follow when they are back: " + describe(away)
	}
	s.Weight, s.ReachedAt = 0, nil
	return nil
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
	s.Message = fmt.Sprintf("all %d tenants run Envoy %s", have, r.version) + r.without()
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

func rejectedNames(s *v1alpha1.NodeTenantStatus) string {
	var names []string
	for _, r := range s.Rejected {
		if r.Shared {
			continue
		}
		names = append(names, fmt.Sprintf("%s %s: %s", r.Type, r.Name, r.Message))
	}
	return listed(names)
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
