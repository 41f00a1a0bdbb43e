package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/agent/cost"
	"github.com/bulkhead-mesh/bulkhead/agent/image"
	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

const maxMessage = 4096 // of 32768 that the API takes

// observation is what the status is made from.
type observation struct {
	agentVersion  string
	agentStarted  time.Time
	proxyVersions []string
	planError     string
	// redirection that pods have.
	redirection v1alpha1.Redirection
	round       round
	now         time.Time
	states      map[model.Tenant]isolation.State
	// connections that are bounded, and what of it can't be.
	connections map[model.Tenant]boundedConnections
	configs     map[relay.Key]relay.State
	// costs as they were told last: a change of them alone is told now and then.
	costs map[model.Tenant]cost.Account
	// figures likewise.
	figures toldFigures
	// trustBundle that all proxies trust, and how the certificates are.
	trustBundle string
	identities  identity.Health
	// limits of all proxies together, as the kernel has them, and what it can't hold.
	limits     isolation.Limits
	unenforced []string
	// images of versions that the node was asked to have.
	images map[string]image.State
}

// boundedConnections are a tenant's bounds as they were read back.
type boundedConnections struct {
	limits     steer.ConnectionLimits
	unenforced []string
}

// makeStatus says how the node is, in the order of the plan. Conditions carry no
// time: the writer knows when they changed.
func makeStatus(o observation) v1alpha1.NodeProxyStatus {
	s := v1alpha1.NodeProxyStatus{
		TrustBundle:        o.trustBundle,
		ObservedGeneration: o.round.plan.generation,
		ReadySince:         o.round.plan.readySince,
		AgentVersion:       o.agentVersion,
		ProxyVersions:      o.proxyVersions,
		Redirection:        o.redirection,
		Limits:             enforcedLimits(o.limits, isolation.Bandwidth{}, steer.ConnectionLimits{}),
		Unenforced:         o.unenforced,
	}
	if !o.agentStarted.IsZero() {
		at := metav1.NewTime(o.agentStarted.UTC().Truncate(time.Second))
		s.AgentStartedAt = &at
	}
	if problem := o.round.limitProblem; problem != "" {
		s.Unenforced = append(slices.Clone(s.Unenforced), problem)
	}
	for _, version := range slices.Sorted(maps.Keys(o.images)) {
		state := o.images[version]
		if state.Ready {
			s.ProxyVersions = append(s.ProxyVersions, version)
		}
		s.Images = append(s.Images, v1alpha1.NodeImageStatus{Version: version, Ready: state.Ready, Reason: state.Reason, Message: shorten(state.Message, 1000)})
	}
	pods, strict, bypassed := map[model.Tenant]int32{}, map[model.Tenant]int32{}, map[model.Tenant]int32{}
	for _, p := range o.round.plan.pods {
		steered, ok := o.steered(p)
		if !ok {
			continue
		}
		pods[p.Tenant]++
		if steered.Strict {
			strict[p.Tenant]++
		}
		if steered.Bypass {
			bypassed[p.Tenant]++
		}
	}
	var waiting []string
	for _, tp := range o.round.plan.tenants {
		t := tenantStatus(tp, o)
		t.Pods, t.StrictPods, t.BypassedPods = pods[tp.tenant], strict[tp.tenant], bypassed[tp.tenant]
		if !t.Ready {
			waiting = append(waiting, t.Name+": "+t.Reason)
		}
		s.Tenants = append(s.Tenants, t)
	}
	condition := metav1.Condition{Type: "Ready", Status: metav1.ConditionTrue, Reason: "Ready",
		Message: fmt.Sprintf("all tenant proxies serve: %d", len(s.Tenants)), ObservedGeneration: s.ObservedGeneration}
	switch {
	case o.planError != "":
		condition.Status, condition.Reason, condition.Message = metav1.ConditionFalse, "InvalidPlan", o.planError
	case len(waiting) > 0:
		condition.Status, condition.Reason, condition.Message = metav1.ConditionFalse, "ProxiesNotReady", strings.Join(waiting, "; ")
	}
	if len(condition.Message) > maxMessage {
		condition.Message = strings.ToValidUTF8(condition.Message[:maxMessage], "") + "…"
	}
	redirected := redirectedCondition(o)
	redirected.ObservedGeneration = s.ObservedGeneration
	renewed := identityCondition(o.identities)
	renewed.ObservedGeneration = s.ObservedGeneration
	s.Conditions = []metav1.Condition{condition, redirected, renewed}
	return s
}

// shorten cuts s to at most n bytes.
func shorten(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// identityCondition warns while there is time to do something.
func identityCondition(h identity.Health) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionIdentityReady, Status: metav1.ConditionFalse}
	why := ""
	if h.LastError != nil {
		why = ": " + h.LastError.Error()
	}
	switch {
	case h.Expired > 0:
		c.Reason = "Expired"
		c.Message = fmt.Sprintf("the certificates of %d of %d identities have ended, %s among them; connections as them fail%s", h.Expired, h.Identities, h.First, why)
	case h.Overdue > 0:
		c.Reason = "NotRenewed"
		c.Message = fmt.Sprintf("the certificates of %d of %d identities should have been renewed; that of %s is the first to end, at %s%s",
			h.Overdue, h.Identities, h.First, h.FirstEnd.UTC().Format(time.RFC3339), why)
	case h.Unkept > 0:
		c.Reason = "NotKept"
		c.Message = fmt.Sprintf("the keys of %d of %d identities can't be written: they are served until the agent starts again, and then have to be signed again; make room in the directory of keys, which is for nothing else: %v",
			h.Unkept, h.Identities, h.KeepError)
	default:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, "Ready", "certificates are renewed in time"
	}
	if len(c.Message) > maxMessage {
		c.Message = strings.ToValidUTF8(c.Message[:maxMessage], "") + "…"
	}
	return c
}

// redirectedCondition says whether pods are redirected as planned.
func redirectedCondition(o observation) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionRedirected, Status: metav1.ConditionTrue, Reason: "AsPlanned", Message: "pods are redirected by " + string(o.redirection)}
	if full := o.round.capacityProblem; full != "" {
		c.Reason, c.Message = "NearlyFull", c.Message+"; "+full
	}
	if want := o.round.plan.redirection; want != o.redirection {
		c.Status, c.Reason = metav1.ConditionFalse, "Unsupported"
		c.Message = fmt.Sprintf("%s; pods stay with %s", cmp.Or(o.round.redirectionProblem, "the redirection isn't known to this agent"), cmp.Or(o.redirection, "none, and closed"))
	}
	return c
}

// steered is how a pod's new connections go to its tenant; of one that is about to
// move there, they don't yet.
func (o observation) steered(p identity.Pod) (steer.Pod, bool) {
	s, ok := o.round.steered[p.UID]
	return s, ok && s.Tenant == o.states[p.Tenant].Index
}

// serves reports whether connections are taken by a process that still runs: it may
// have ended since the round.
func (o observation) serves(t model.Tenant) bool {
	taken, ok := o.round.serving[t]
	return ok && slices.ContainsFunc(o.states[t].Processes, func(p isolation.Process) bool {
		return taken == process{p.PID, p.StartTicks}
	})
}

// takes reports whether connections are led to the process.
func (o observation) takes(t model.Tenant, p isolation.Process) bool {
	taking := o.round.taking[t]
	return p.PID != 0 && slices.Contains(taking[:], process{p.PID, p.StartTicks})
}

func tenantStatus(tp tenantPlan, o observation) v1alpha1.NodeTenantStatus {
	state, running := o.states[tp.tenant]
	t := v1alpha1.NodeTenantStatus{
		Name:   tp.tenant.String(),
		Ready:  o.serves(tp.tenant) && o.round.problems[tp.tenant] == "",
		Limits: enforcedLimits(state.Limits, state.Bandwidth, o.connections[tp.tenant].limits), Unenforced: slices.Concat(state.Unenforced, o.connections[tp.tenant].unenforced), Hits: o.round.hits[tp.tenant].status(),
		Weight: int32(o.round.weights[tp.tenant]),
		Waits:  o.round.placed[tp.tenant].waits,
	}
	var more []string
	t.Limits.Concurrency, more = threads(tp, state)
	if tp.standby != "" {
		more = append(more, tp.standby)
	}
	t.Unenforced = append(t.Unenforced, more...)
	for _, p := range state.Processes {
		g := v1alpha1.GenerationStatus{Generation: int32(p.Generation), Version: p.Version, PID: int32(p.PID),
			Role: o.round.placed[tp.tenant].role(p), Serving: o.takes(tp.tenant, p),
			Ready: p.Live, Restarts: int32(p.Restarts), LastExit: p.LastExit,
			Rejected: refusals(o.configs[relay.Key{Tenant: tp.tenant, Generation: p.Generation}].Rejections)}
		if role := g.Role; role == v1alpha1.RoleFirst || role == v1alpha1.RoleCanary {
			g.Figures = o.figures[process{p.PID, p.StartTicks}]
		}
		alone := o.refusedAlone(tp.tenant, p.Generation)
		g.RefusedAlone = &alone
		if !p.DrainUntil.IsZero() {
			until := metav1.NewTime(p.DrainUntil.UTC().Truncate(time.Second))
			g.DrainUntil = &until
		}
		if !p.StartedAt.IsZero() {
			at := metav1.NewTime(p.StartedAt.UTC().Truncate(time.Second))
			g.StartedAt = &at
		}
		t.Generations = append(t.Generations, g)
	}
	t.Rejected, t.Failure = rejected(o, tp.tenant), failure(state, o.now)
	if account, ok := o.costs[tp.tenant]; ok {
		t.Cost, t.Shares = costOf(account)
	}
	config := o.configs[relay.Key{Tenant: tp.tenant}]
	switch {
	case o.round.problems[tp.tenant] != "":
		t.Reason = o.round.problems[tp.tenant]
	case state.Problem != "":
		t.Reason = state.Problem
	case len(config.Rejections) > 0:
		t.Reason = "configuration refused: " + config.Rejections[0].String()
	case t.Ready:
	case !running || len(state.Processes) == 0 || !state.Processes[0].Live:
		t.Reason = "Envoy is starting"
	case !config.Connected:
		t.Reason = "Envoy hasn't asked for configuration yet"
	case config.Listeners == 0:
		t.Reason = "Envoy has no listeners yet: is the operator running?"
	default:
		t.Reason = "Envoy's listeners are being taken"
	}
	return t
}

// refusals counts resources that a process refused. What pods dial in vain says
// nothing of its version.
func refusals(rejections []relay.Rejection) (n int32) {
	for _, r := range rejections {
		if !r.InVain() {
			n++
		}
	}
	return n
}

// refusedAlone counts what a process refuses that one of another version takes.
func (o observation) refusedAlone(t model.Tenant, generation int) (n int32) {
	for _, r := range o.configs[relay.Key{Tenant: t, Generation: generation}].Rejections {
		if alone, _ := o.round.refused[t][resource{r.Type, r.Name}].told(o.now); alone {
			n++
		}
	}
	return n
}

// rejected is what the tenant's generations refused, each resource once.
func rejected(o observation, t model.Tenant) []v1alpha1.RejectedResource {
	const most = 16 // that the API takes
	var out []v1alpha1.RejectedResource
	for g := range 2 {
		for _, r := range o.configs[relay.Key{Tenant: t, Generation: g}].Rejections {
			same := func(x v1alpha1.RejectedResource) bool { return x.Type == r.Type && x.Name == r.Name }
			if len(out) < most && !slices.ContainsFunc(out, same) {
				out = append(out, v1alpha1.RejectedResource{Type: r.Type, Name: r.Name, Message: r.Message,
					Shared: o.round.refused[t][resource{r.Type, r.Name}].shared})
			}
		}
	}
	return out
}

// observe gathers what makeStatus needs.
func (a *Agent) observe() observation {
	a.mu.Lock()
	o := observation{agentVersion: a.o.Version, agentStarted: a.started, planError: a.planError, redirection: a.datapath.kind, round: a.last,
		now: time.Now(), states: map[model.Tenant]isolation.State{}, connections: map[model.Tenant]boundedConnections{}, configs: map[relay.Key]relay.State{}, costs: a.toldCosts, figures: a.toldFigures}
	a.mu.Unlock()
	o.identities = a.identities.Health()
	o.images = a.images.States()
	o.limits, o.unenforced = a.bulkheads.AllLimits()
	digest, version := a.identities.Bundle()
	trusted := digest != "" && a.relay.Trusts(version)
	a.mu.Lock()
	if trusted {
		// What all proxies acknowledged last stays so until they have the next.
		a.trusted = digest
	}
	o.trustBundle = a.trusted
	a.mu.Unlock()
	entries, err := os.ReadDir(a.o.EnvoyDir)
	if err != nil {
		a.log.Error("Envoy's versions can't be listed", "error", err)
	}
	for _, e := range entries {
		o.proxyVersions = append(o.proxyVersions, e.Name())
	}
	for _, tp := range o.round.plan.tenants {
		if s, ok := a.bulkheads.State(tp.tenant); ok {
			o.states[tp.tenant] = s
			var b boundedConnections
			b.limits, b.unenforced = a.enforcedConnections(tp, s)
			o.connections[tp.tenant] = b
		}
		for g := range 2 {
			key := relay.Key{Tenant: tp.tenant, Generation: g}
			o.configs[key] = a.relay.State(key)
		}
	}
	return o
}

// reportStatus has the status written as it is then. Any goroutine may ask for it.
func (a *Agent) reportStatus() {
	if a.status != nil {
		a.status.again()
	}
}

// currentStatus is what the last round came to; ok is false before the first.
func (a *Agent) currentStatus() (s v1alpha1.NodeProxyStatus, ok bool) {
	o := a.observe()
	if !o.round.known {
		return s, false
	}
	return makeStatus(o), true
}

// statusWriter writes NodeProxy.status on change, and not more than five times a
// second. It alone looks at how the node is for that, so that what it writes is never
// older than what it wrote.
type statusWriter struct {
	kube client.Client
	node string
	log  *slog.Logger

	// read returns the status of now, and false while there is none.
	read    func() (v1alpha1.NodeProxyStatus, bool)
	changed chan struct{}
}

func newStatusWriter(kube client.Client, node string, read func() (v1alpha1.NodeProxyStatus, bool), log *slog.Logger) *statusWriter {
	return &statusWriter{kube: kube, node: node, read: read, log: log, changed: make(chan struct{}, 1)}
}

// run writes until ctx ends.
func (w *statusWriter) run(ctx context.Context) {
	var written *v1alpha1.NodeProxyStatus
	const pause, maxBackoff = 200 * time.Millisecond, 10 * time.Second
	backoff := pause
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.changed:
		}
		now, ok := w.read()
		if !ok {
			continue
		}
		s := now.DeepCopy() // it shares what costs and figures were told by
		if written != nil {
			keepTransitionTimes(s, written)
		}
		for i := range s.Conditions {
			if c := &s.Conditions[i]; c.LastTransitionTime.IsZero() {
				c.LastTransitionTime = metav1.NewTime(time.Now().UTC().Truncate(time.Second))
			}
		}
		wait := pause
		if written == nil || !equality.Semantic.DeepEqual(s, written) {
			if err := w.write(ctx, s); err != nil {
				if ctx.Err() == nil {
					w.log.Error("status isn't written", "node", w.node, "error", err)
				}
				backoff = min(2*backoff, maxBackoff)
				wait = backoff
				w.again()
			} else {
				written, backoff = s, pause
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// again has it looked at anew.
func (w *statusWriter) again() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// keepTransitionTimes lets a condition that is as it was keep its time.
func keepTransitionTimes(s, before *v1alpha1.NodeProxyStatus) {
	for i := range s.Conditions {
		c := &s.Conditions[i]
		if old := meta.FindStatusCondition(before.Conditions, c.Type); old != nil && old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
	}
}

// write applies the status on the server's side: what this agent's field manager had
// written and doesn't any more goes. A merge patch would leave what only a newer agent
// knew, as readySince after a downgrade, which rollouts would take for this one's word.
func (w *statusWriter) write(ctx context.Context, s *v1alpha1.NodeProxyStatus) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	status, err := runtime.DefaultUnstructuredConverter.ToUnstructured(s)
	if err != nil {
		return fmt.Errorf("convert the status: %w", err)
	}
	u := &unstructured.Unstructured{Object: map[string]any{"status": status}}
	u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("NodeProxy"))
	u.SetName(w.node)
	return w.kube.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(u),
		client.FieldOwner("bulkhead-agent"), client.ForceOwnership)
}
