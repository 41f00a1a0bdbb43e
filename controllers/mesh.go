package controllers

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// mesh is what is known of the cluster now. Each sync method reads one object (or
// its absence) from the cache and brings everything that follows from it up to
// date, in the store too; what follows for other objects goes to triggers. Reads
// happen under the lock, so that of two syncs of an object the later one has the
// newer state. It is safe for concurrent use.
type mesh struct {
	reader client.Reader // the cache
	store  *xds.Store
	log    *slog.Logger
	exempt []string // namespaces that are never members
	now    func() time.Time
	// event tells a pod's owner; it never blocks.
	event func(pod *corev1.ObjectReference, reason, note string)
	// loaded is closed when the first full picture is in the store.
	loaded chan struct{}

	triggers triggers
	// rollingOut says that there are rollouts, and that this replica decides on them.
	rollingOut atomic.Bool

	mu            sync.Mutex
	authorityName string // trust domain of the authority; "" before there is one
	authority     translate.AuthorityView
	topologies    translate.Topologies
	namespaces    map[string]namespaceState
	nodes         map[string]translate.Node
	reports       map[string]nodeReport          // by node
	refusals      map[string][]translate.Refusal // by node, of those that have some
	pods          map[string]*podState           // by UID
	podUIDs       map[types.NamespacedName]string
	namespacePods map[string]map[string]*podState // namespace → UID
	nodePods      map[string]map[string]*podState // node → UID
	proxies       map[model.Tenant]map[string]map[string]*podState
	holders       map[netip.Addr]string
	waiting       map[netip.Addr]map[string]struct{} // UIDs that were refused an address
	services      map[types.NamespacedName][]translate.Ref
	users         map[translate.Ref]map[types.NamespacedName]struct{}
	problems      map[types.NamespacedName]translate.Problem // of services
	// planned are exclusions that were in force before this replica knew the pods,
	// by UID: one whose annotation can't be read keeps them.
	planned map[string][]v1alpha1.Exclusion
	routing routeState
}

// triggers reach the controllers that do what follows from a change.
type triggers struct {
	rollouts   trigger[struct{}]
	topologies trigger[struct{}]
	namespaces trigger[string]
	network    trigger[struct{}]
	pods       trigger[types.NamespacedName]
	services   trigger[types.NamespacedName]
	routings   trigger[model.ServiceKey]

	authority  trigger[struct{}]
	plans      trigger[string]               // node
	tenants    trigger[string]               // namespace
	costs      trigger[string]               // namespace
	policies   trigger[string]               // namespace
	status     trigger[string]               // MeshTopology
	served     trigger[types.NamespacedName] // Service
	membership trigger[struct{}]

	routeStatus trigger[translate.RouteKey]
}

type namespaceState struct {
	translate.Membership
	// lost are younger topologies that select it too.
	lost []string
}

// nodeReport is what a node's agent says.
type nodeReport struct {
	versions    []string
	redirection v1alpha1.Redirection
	// agent: it has reported. trustBundle is a digest of what all of its proxies
	// trust, and notRenewed says why certificates aren't fresh, "" if they are.
	agent                   bool
	trustBundle, notRenewed string
	// readySince is since when the node was Ready of which it told; nil if it doesn't say.
	readySince *metav1.Time
	// notRedirected says why the redirection isn't the planned one; "" if it is.
	notRedirected string
	tenants       map[string]v1alpha1.NodeTenantStatus // without what they cost
	costs         map[string]tenantCost
	// forRollouts is a digest of what rollouts decide by; zero while nobody decides and
	// the node has nothing of a rollout: it takes a while to make.
	forRollouts [sha256.Size]byte
}

// tenantCost is what a node says of a tenant's cost, and who shares it.
type tenantCost struct {
	total  *v1alpha1.NodeCost
	shares []v1alpha1.NamespaceShare
}

func newMesh(reader client.Reader, store *xds.Store, exempt []string, log *slog.Logger) *mesh {
	m := &mesh{
		reader: reader, store: store, exempt: exempt, log: log, now: time.Now, event: func(*corev1.ObjectReference, string, string) {}, loaded: make(chan struct{}),
		namespaces: map[string]namespaceState{}, nodes: map[string]translate.Node{}, reports: map[string]nodeReport{}, refusals: map[string][]translate.Refusal{}, pods: map[string]*podState{},
		podUIDs: map[types.NamespacedName]string{}, namespacePods: map[string]map[string]*podState{}, nodePods: map[string]map[string]*podState{},
		proxies: map[model.Tenant]map[string]map[string]*podState{}, holders: map[netip.Addr]string{}, waiting: map[netip.Addr]map[string]struct{}{},
		services: map[types.NamespacedName][]translate.Ref{}, users: map[translate.Ref]map[types.NamespacedName]struct{}{},
		problems: map[types.NamespacedName]translate.Problem{}, planned: map[string][]v1alpha1.Exclusion{},
		routing: newRouteState(),
	}
	// A plan holds up a new pod, so it waits less than what people read.
	m.triggers.plans.delay = 20 * time.Millisecond
	m.triggers.rollouts.delay = 100 * time.Millisecond
	m.triggers.authority.delay = time.Second
	m.triggers.routings.delay = 20 * time.Millisecond
	m.triggers.routeStatus.delay = 100 * time.Millisecond
	m.triggers.membership.delay = 50 * time.Millisecond
	m.triggers.tenants.delay = 200 * time.Millisecond
	m.triggers.costs.delay = costDelay
	m.triggers.policies.delay = 200 * time.Millisecond
	m.triggers.status.delay = 500 * time.Millisecond
	m.triggers.served.delay = time.Second // rollouts pass through states that nobody need read of
	m.topologies = translate.NewTopologies(nil, "", exempt)
	return m
}

// wait returns when the first picture is complete.
func (m *mesh) wait(ctx context.Context) error {
	select {
	case <-m.loaded:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// get reads an object from the cache. It must not be changed.
func (m *mesh) get(ctx context.Context, key client.ObjectKey, o client.Object) (found bool, err error) {
	if err := m.reader.Get(ctx, key, o); apierrors.IsNotFound(err) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("read %T %s: %w", o, key, err)
	}
	return true, nil
}

// setAuthority says which trust domain the mesh's keys are for.
func (m *mesh) setAuthority(trustDomain string) {
	m.mu.Lock()
	changed := m.authorityName != trustDomain
	m.authorityName = trustDomain
	m.mu.Unlock()
	if changed {
		m.triggers.topologies.add(struct{}{})
	}
	m.triggers.membership.add(struct{}{})
}

// setAuthorityView says how the authority is, and reports whether that is new.
func (m *mesh) setAuthorityView(v translate.AuthorityView) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.authority == v {
		return false
	}
	m.authority = v
	m.triggers.status.add(m.topologies.Names()...)
	return true
}

// syncTopologies matches all namespaces anew.
func (m *mesh) syncTopologies(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list v1alpha1.MeshTopologyList
	if err := m.reader.List(ctx, &list); err != nil {
		return fmt.Errorf("list MeshTopologies: %w", err)
	}
	had, ttl := m.topologies.TrustDomain(), m.topologies.ShortestTTL()
	m.topologies = translate.NewTopologies(list.Items, m.authorityName, m.exempt)
	m.triggers.namespaces.add(slices.Collect(maps.Keys(m.namespaces))...)
	if m.topologies.TrustDomain() != had || m.topologies.ShortestTTL() != ttl {
		if err := m.setNetwork(ctx); err != nil { // before any proxy of it
			return err
		}
		m.triggers.membership.add(struct{}{})
	}
	m.triggers.plans.add(slices.Collect(maps.Keys(m.nodes))...) // the redirection
	m.triggers.status.add(m.topologies.Names()...)
	return nil
}

// syncNamespace matches a namespace with the topologies, and if that changed, has
// its pods looked at again.
func (m *mesh) syncNamespace(ctx context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ns corev1.Namespace
	found, err := m.get(ctx, client.ObjectKey{Name: name}, &ns)
	if err != nil {
		return err
	}
	had, known := m.namespaces[name]
	var now namespaceState
	if found {
		now.Membership, now.lost = m.topologies.Match(&ns)
		m.namespaces[name] = now
	} else {
		delete(m.namespaces, name)
	}
	if known == found && had.Membership == now.Membership && slices.Equal(had.lost, now.lost) {
		return nil
	}
	for _, t := range slices.Concat(had.lost, now.lost, []string{had.Topology, now.Topology}) {
		if t != "" {
			m.triggers.status.add(t)
		}
	}
	if known == found && had.Membership == now.Membership {
		return nil
	}
	for _, p := range m.namespacePods[name] {
		m.triggers.pods.add(p.key)
	}
	if had.Bypass != now.Bypass {
		m.log.Warn("emergency bypass", "namespace", name, "on", now.Bypass, "meshTopology", cmp.Or(now.Topology, had.Topology))
	}
	var errs []error
	for key := range m.proxiesOf(name) {
		m.triggers.plans.add(key.Node) // the version, the bypass
		if found {
			errs = append(errs, m.publishProxy(key)) // the access log
		}
	}
	for key := range m.problems {
		if key.Namespace == name {
			m.triggers.served.add(key) // told to members only
		}
	}
	m.triggers.membership.add(struct{}{})
	m.triggers.tenants.add(name)
	m.triggers.policies.add(name)
	return errors.Join(errs...)
}

// syncNode has the node's pods looked at again if its ranges changed.
func (m *mesh) syncNode(ctx context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var n corev1.Node
	found, err := m.get(ctx, client.ObjectKey{Name: name}, &n)
	if err != nil {
		return err
	}
	had, known := m.nodes[name]
	var now translate.Node
	if found {
		now = translate.NewNode(&n)
		m.nodes[name] = now
	} else {
		delete(m.nodes, name)
	}
	if known != found || had.UID != now.UID || had.Linux != now.Linux || !maps.Equal(had.Labels, now.Labels) {
		m.triggers.plans.add(name)
		m.triggers.status.add(m.topologies.Names()...)
	}
	since := !had.ReadySince.Equal(now.ReadySince)
	if since {
		m.triggers.plans.add(name) // the plans' controller may have had this event first
	}
	if known != found || since || had.Away != now.Away {
		m.triggers.rollouts.add(struct{}{})
		m.tellServed(name)
	}
	var errs []error
	if known && found && had.Zone() != now.Zone() {
		for tenant, nodes := range m.proxies {
			if nodes[name] != nil {
				errs = append(errs, m.publishProxy(model.ProxyKey{Node: name, Tenant: tenant}))
			}
		}
	}
	if known == found && slices.Equal(had.PodCIDRs, now.PodCIDRs) {
		return errors.Join(errs...)
	}
	m.triggers.network.add(struct{}{})
	m.triggers.status.add(m.topologies.Names()...)
	for _, p := range m.nodePods[name] {
		m.triggers.pods.add(p.key)
	}
	return errors.Join(errs...)
}

// syncNetwork tells the store the ranges of the cluster.
func (m *mesh) syncNetwork(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.setNetwork(ctx)
}

func (m *mesh) setNetwork(ctx context.Context) error {
	var list networkingv1.ServiceCIDRList
	if err := m.reader.List(ctx, &list); err != nil {
		return fmt.Errorf("list ServiceCIDRs: %w", err)
	}
	if m.topologies.TrustDomain() == "" {
		return nil // without a mesh there are no proxies
	}
	return m.store.SetNetwork(translate.Network(m.topologies, slices.Collect(maps.Values(m.nodes)), list.Items))
}

// syncService translates a service with its endpoints.
func (m *mesh) syncService(ctx context.Context, key types.NamespacedName) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var s corev1.Service
	found, err := m.get(ctx, key, &s)
	if err != nil {
		return err
	}
	service := model.ServiceKey{Namespace: key.Namespace, Name: key.Name}
	if !found {
		m.setRefs(key, nil)
		delete(m.problems, key)
		m.setPorts(service, nil, false)
		m.store.DeleteService(key.Namespace, key.Name)
		return nil
	}
	m.setPorts(service, translate.ServicePorts(&s), true)
	slicesOf, err := m.endpointSlices(ctx, key)
	if err != nil {
		return err
	}
	svc, refs := translate.Service(&s, slicesOf, directory{m})
	m.setRefs(key, refs)
	problem := translate.ServiceProblem(svc, slicesOf)
	if err := m.store.SetService(svc); err != nil {
		// It stays as it was; trying again would change nothing.
		problem = translate.Problem{Reason: translate.ReasonInvalid, Message: err.Error()}
	}
	m.setProblem(key, problem)
	return nil
}

// setRefs remembers whom a service has to be asked about.
func (m *mesh) setRefs(key types.NamespacedName, refs []translate.Ref) {
	for _, r := range m.services[key] {
		delete(m.users[r], key)
		if len(m.users[r]) == 0 {
			delete(m.users, r)
		}
	}
	delete(m.services, key)
	if len(refs) == 0 {
		return
	}
	m.services[key] = refs
	for _, r := range refs {
		if m.users[r] == nil {
			m.users[r] = map[types.NamespacedName]struct{}{}
		}
		m.users[r][key] = struct{}{}
	}
}

// directory answers for a mesh whose lock is held.
type directory struct{ *mesh }

func (d directory) ByAddr(a netip.Addr) (translate.Standing, model.Identity) {
	return d.ByUID(d.holders[a])
}

func (d directory) ByUID(uid string) (translate.Standing, model.Identity) {
	if p := d.pods[uid]; p != nil {
		if p.Bypassed {
			return translate.Outside, model.Identity{}
		}
		return p.Standing, p.Identity
	}
	return translate.Absent, model.Identity{}
}

// syncReport takes in what a node's agent says, and has those told whom it is
// about.
func (m *mesh) syncReport(ctx context.Context, node string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var np v1alpha1.NodeProxy
	found, err := m.get(ctx, client.ObjectKey{Name: node}, &np)
	if err != nil {
		return err
	}
	had := m.reports[node]
	now := nodeReport{versions: np.Status.ProxyVersions, readySince: np.Status.ReadySince, redirection: np.Status.Redirection, tenants: map[string]v1alpha1.NodeTenantStatus{}, costs: map[string]tenantCost{}}
	if c := meta.FindStatusCondition(np.Status.Conditions, v1alpha1.ConditionRedirected); c != nil && c.Status == metav1.ConditionFalse {
		now.notRedirected = c.Message
	}
	if m.rollingOut.Load() || hasRollout(np) {
		now.forRollouts = forRollouts(&np)
	}
	now.agent, now.trustBundle = np.Status.AgentVersion != "", np.Status.TrustBundle
	if c := meta.FindStatusCondition(np.Status.Conditions, v1alpha1.ConditionIdentityReady); c != nil && c.Status == metav1.ConditionFalse {
		now.notRenewed = c.Message
	}
	if !found || now.forRollouts != had.forRollouts {
		m.triggers.rollouts.add(struct{}{})
	}
	if now.notRenewed != had.notRenewed {
		m.triggers.status.add(m.topologies.Names()...)
	}
	if now.trustBundle != had.trustBundle || now.agent != had.agent {
		m.triggers.authority.add(struct{}{})
	}
	if now.redirection != had.redirection || now.notRedirected != had.notRedirected {
		m.triggers.status.add(m.topologies.Names()...)
	}
	delete(m.refusals, node)
	for _, t := range np.Status.Tenants {
		m.setRefusals(node, t)
		now.costs[t.Name] = tenantCost{t.Cost, t.Shares}
		t.Cost, t.Shares, t.Generations = nil, nil, withoutFigures(t.Generations) // they change all the time
		now.tenants[t.Name] = t
	}
	if found {
		m.reports[node] = now
	} else {
		delete(m.reports, node)
	}
	names := maps.Clone(now.tenants)
	maps.Copy(names, had.tenants)
	m.costsChanged(node, had.costs, now.costs)
	for name := range names {
		if sameTenantStatus(had.tenants, now.tenants, name) && slices.Equal(had.versions, now.versions) && had.readySince.Equal(now.readySince) {
			continue
		}
		t, err := model.ParseTenant(name)
		if err != nil {
			continue
		}
		concerned := m.namespacesOf(node, t)
		m.triggers.served.add(m.refusedServices(had.tenants[name], now.tenants[name])...)
		m.tellOwners(concerned)
	}
	return nil
}

// withoutFigures leaves out what rollouts alone read, from the nodes themselves.
func withoutFigures(generations []v1alpha1.GenerationStatus) []v1alpha1.GenerationStatus {
	generations = slices.Clone(generations)
	for i := range generations {
		generations[i].Figures = nil
	}
	return generations
}

// costsChanged has the owners told of what their tenants have taken of a node.
func (m *mesh) costsChanged(node string, had, now map[string]tenantCost) {
	for name, c := range now {
		t, err := model.ParseTenant(name)
		if was := had[name].total; err != nil || c.total == nil || was != nil && was.At.Equal(&c.total.At) {
			continue
		}
		for namespace := range m.namespacesOf(node, t) {
			m.triggers.costs.add(namespace)
		}
	}
}

// namespacesOf are those with pods of the tenant on a node.
func (m *mesh) namespacesOf(node string, t model.Tenant) map[string]bool {
	if t.Scope != model.ScopeNode {
		return map[string]bool{t.Namespace: true}
	}
	all := map[string]bool{}
	for _, p := range m.nodePods[node] {
		if p.Tenant == t {
			all[p.Namespace] = true
		}
	}
	return all
}

func sameTenantStatus(a, b map[string]v1alpha1.NodeTenantStatus, name string) bool {
	x, inA := a[name]
	y, inB := b[name]
	return inA == inB && equality.Semantic.DeepEqual(x, y)
}

func (m *mesh) endpointSlices(ctx context.Context, service types.NamespacedName) ([]discoveryv1.EndpointSlice, error) {
	var list discoveryv1.EndpointSliceList
	err := m.reader.List(ctx, &list, client.InNamespace(service.Namespace), client.MatchingFields{sliceService: service.Name}, client.UnsafeDisableDeepCopy)
	if err != nil {
		return nil, fmt.Errorf("list EndpointSlices of %s: %w", service, err)
	}
	return list.Items, nil
}
