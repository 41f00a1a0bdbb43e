package controllers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// announcedFor is for how long a pod is believed in that an agent announced and
// the informers haven't shown.
const announcedFor = time.Minute

const (
	reasonAddressRefused  = "AddressRefused"
	reasonWorkloadRefused = "WorkloadRefused"
)

// podState is a pod that is bound to a node and hasn't finished.
type podState struct {
	translate.Pod
	key types.NamespacedName
	// version of the object that it was read from.
	version string
	// reported addresses are the pod status'.
	reported []netip.Addr
	// announced addresses are an agent's word. They count until the status says
	// anything else than it did then, replaced: a sandbox that is made anew, after a
	// reboot for example, has new addresses while the status still shows the old.
	announced, replaced []netip.Addr
	// announcedAt is set as long as the informers haven't shown the pod.
	announcedAt time.Time
	// held are the addresses that are the pod's, of those it claims.
	held []netip.Addr
	// refused says why others aren't; "" if there are none.
	refused string
	// formers are the pod as it was at proxies that its connections may still be at.
	formers []podState
}

// reference names the pod as it was read.
func (st *podState) reference() *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: st.Namespace, Name: st.Name, UID: types.UID(st.UID), ResourceVersion: st.version}
}

// syncPod brings a pod up to date. after isn't zero if it has to be called again
// then.
func (m *mesh) syncPod(ctx context.Context, key types.NamespacedName) (after time.Duration, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var p corev1.Pod
	found, err := m.get(ctx, key, &p)
	if err != nil {
		return 0, err
	}
	st := m.pods[m.podUIDs[key]]
	if st != nil && !st.announcedAt.IsZero() && (!found || string(p.UID) != st.UID) {
		// An agent's call read the pod from the API server; the cache is behind, or the
		// pod is gone already.
		if left := st.announcedAt.Add(announcedFor).Sub(m.now()); left > 0 {
			return left, nil
		}
	}
	if !found {
		m.removePod(st)
		return 0, nil
	}
	return 0, m.setPod(&p, nil)
}

// setPod takes a pod in. announced addresses come from an agent, with a pod that
// was read from the API server.
func (m *mesh) setPod(p *corev1.Pod, announced []netip.Addr) error {
	key := types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
	if uid := m.podUIDs[key]; uid != "" && uid != string(p.UID) {
		m.removePod(m.pods[uid])
	}
	ns, known := m.namespaces[p.Namespace]
	pod := translate.NewPod(p, ns.Membership)
	if pod.Standing == translate.Absent {
		m.removePod(m.pods[pod.UID])
		return nil
	}
	if !known && pod.Standing == translate.Outside {
		// It can't be told yet; plain text would be wrong if it is a member.
		pod.Standing = translate.Absent
	}
	st := m.pods[pod.UID]
	if st == nil {
		st = &podState{key: key}
		st.Pod.Node = pod.Node
		m.pods[pod.UID], m.podUIDs[key] = st, pod.UID
		add(m.namespacePods, pod.Namespace, pod.UID, st)
		add(m.nodePods, pod.Node, pod.UID, st)
	}
	before := *st
	if pod.Problem.Reason == translate.ReasonExclusionsInvalid {
		if pod.Exclusions = st.Exclusions; st.UID == "" {
			pod.Exclusions = m.planned[pod.UID]
		}
	}
	st.Pod, st.version = pod, p.ResourceVersion
	st.reported = translate.PodAddrs(p.Status.PodIPs)
	if announced != nil {
		st.announced, st.replaced = announced, st.reported
	} else {
		st.announcedAt = time.Time{}
	}
	if len(st.reported) > 0 && (slices.Equal(st.reported, st.announced) || !slices.Equal(st.reported, st.replaced)) {
		st.announced, st.replaced = nil, nil
	}
	return m.settle(st, before)
}

// removePod forgets a pod; nil is none.
func (m *mesh) removePod(st *podState) {
	if st == nil {
		return
	}
	before := *st
	st.Standing, st.Identity, st.Tenant = translate.Absent, model.Identity{}, model.Tenant{}
	st.reported, st.announced, st.replaced = nil, nil, nil
	if err := m.settle(st, before); err != nil {
		m.log.Error("forget pod", "pod", st.key, "error", err)
	}
	if err := m.forgetFormers(st); err != nil {
		m.log.Error("forget pod at its former proxies", "pod", st.key, "error", err)
	}
	delete(m.pods, st.UID)
	if m.podUIDs[st.key] == st.UID {
		delete(m.podUIDs, st.key)
	}
	remove(m.namespacePods, st.Namespace, st.UID)
	remove(m.nodePods, st.Node, st.UID)
}

// settle does what follows from a pod that was before and is st now.
func (m *mesh) settle(st *podState, before podState) error {
	m.claim(st)
	if st.refused != before.refused && st.refused != "" {
		m.event(st.reference(), reasonAddressRefused, st.refused)
	}
	if st.Problem != before.Problem && st.Problem != (translate.Problem{}) {
		m.event(st.reference(), st.Problem.Reason, st.Problem.Message)
	}
	var errs []error
	// Others hear of an address when the API server says it too.
	public := slices.DeleteFunc(slices.Clone(st.held), func(a netip.Addr) bool { return !slices.Contains(st.reported, a) })
	if len(public) > 0 {
		w := st.Workload(public)
		if st.Bypassed {
			w.Identity, w.Tenant = model.Identity{}, model.Tenant{}
		}
		if err := m.store.SetWorkload(w); err != nil {
			// It stays as it was; trying again would change nothing.
			m.event(st.reference(), reasonWorkloadRefused, err.Error())
		}
	} else {
		m.store.DeleteWorkload(st.UID)
	}
	samePlace := before.Node == st.Node && before.Tenant == st.Tenant
	sameAddrs := slices.Equal(before.held, st.held)
	sameIdentity := before.Standing == st.Standing && before.Identity == st.Identity && before.Bypassed == st.Bypassed
	if !samePlace || !sameAddrs || !sameIdentity {
		if !sameAddrs {
			errs = append(errs, m.forgetFormers(st)) // another pod may get the addresses
		}
		if !samePlace && !before.Tenant.IsZero() {
			errs = append(errs, m.retire(st, before))
		}
		if !st.Tenant.IsZero() {
			errs = append(errs, m.joinProxy(st))
		}
	}
	if !samePlace || !sameIdentity {
		for _, p := range []podState{before, *st} {
			if !p.Tenant.IsZero() {
				m.triggers.plans.add(p.Node)
				m.triggers.tenants.add(p.Namespace)
				m.triggers.policies.add(p.Namespace)
			}
		}
		if t := m.namespaces[st.Namespace].Topology; t != "" {
			m.triggers.status.add(t)
		}
	}
	if !slices.Equal(before.Exclusions, st.Exclusions) || before.OptedOut != st.OptedOut {
		m.triggers.plans.add(st.Node)
	}
	if !sameAddrs || !sameIdentity {
		m.touch(translate.Ref{UID: st.UID})
		for _, a := range slices.Concat(before.held, st.held) {
			m.touch(translate.Ref{Addr: a})
		}
	}
	return errors.Join(errs...)
}

// touch has the services looked at again that asked about something.
func (m *mesh) touch(r translate.Ref) {
	for key := range m.users[r] {
		m.triggers.services.add(key)
	}
}

// claims are the addresses that a pod says it has.
func (st *podState) claims() []netip.Addr {
	switch {
	case st.Standing != translate.Outside && st.Standing != translate.Member:
		return nil
	case len(st.announced) > 0:
		return st.announced
	}
	return st.reported
}

// claim gives a pod the addresses that it claims and can have. Kubelets and agents
// write them, so a node that was taken over could ask for anyone's: an address is
// refused outside of the node's ranges and while another live pod holds it.
func (m *mesh) claim(st *podState) {
	claims := st.claims()
	for _, a := range st.held {
		if !slices.Contains(claims, a) {
			m.release(a)
		}
	}
	for a, uids := range m.waitingOf(st.UID) {
		delete(uids, st.UID)
		if len(uids) == 0 {
			delete(m.waiting, a)
		}
	}
	node, known := m.nodes[st.Node]
	var held []netip.Addr
	var refused []string
	for _, a := range claims {
		holder := m.pods[m.holders[a]]
		switch {
		case !known:
			// Looked at again when the node is known.
		case !translate.InRanges(a, node.PodCIDRs):
			refused = append(refused, fmt.Sprintf("%s isn't in the pod ranges of node %s", a, st.Node))
		case holder != nil && holder != st:
			refused = append(refused, fmt.Sprintf("%s is held by the live pod %s", a, holder.key))
			if m.waiting[a] == nil {
				m.waiting[a] = map[string]struct{}{}
			}
			m.waiting[a][st.UID] = struct{}{}
		default:
			m.holders[a] = st.UID
			held = append(held, a)
			continue
		}
		if slices.Contains(st.held, a) {
			m.release(a)
		}
	}
	st.held, st.refused = held, ""
	if len(refused) > 0 {
		st.refused = "not an address of this pod for the mesh: " + strings.Join(refused, "; ")
	}
}

// waitingOf is few: only what a pod claims and others hold.
func (m *mesh) waitingOf(uid string) map[netip.Addr]map[string]struct{} {
	out := map[netip.Addr]map[string]struct{}{}
	if len(m.waiting) == 0 {
		return out
	}
	for a, uids := range m.waiting {
		if _, ok := uids[uid]; ok {
			out[a] = uids
		}
	}
	return out
}

// release gives an address back; those who were refused it may try again.
func (m *mesh) release(a netip.Addr) {
	delete(m.holders, a)
	for uid := range m.waiting[a] {
		if p := m.pods[uid]; p != nil {
			m.triggers.pods.add(p.key)
		}
	}
}

// joinProxy adds or updates a pod at its proxy.
func (m *mesh) joinProxy(st *podState) error {
	nodes := m.proxies[st.Tenant]
	if nodes == nil {
		nodes = map[string]map[string]*podState{}
		m.proxies[st.Tenant] = nodes
	}
	st.formers = slices.DeleteFunc(st.formers, func(f podState) bool { return f.Tenant == st.Tenant })
	add(nodes, st.Node, st.UID, st)
	return m.publishProxy(model.ProxyKey{Node: st.Node, Tenant: st.Tenant})
}

// retire leaves a pod that lives on at the proxy that it was at: without its
// chains there, that would end the connections that began there. New ones don't
// get there. It goes with the pod.
func (m *mesh) retire(st *podState, was podState) error {
	if st.Standing == translate.Absent || st.Node != was.Node {
		return m.leaveProxy(was)
	}
	was.formers = nil
	st.formers = append(st.formers, was)
	add(m.proxies[was.Tenant], was.Node, was.UID, &was)
	return m.publishProxy(model.ProxyKey{Node: was.Node, Tenant: was.Tenant})
}

// forgetFormers takes a pod from the proxies that it was at.
func (m *mesh) forgetFormers(st *podState) error {
	var errs []error
	for _, former := range st.formers {
		errs = append(errs, m.leaveProxy(former))
	}
	st.formers = nil
	return errors.Join(errs...)
}

// leaveProxy takes a pod, as it was, from its proxy.
func (m *mesh) leaveProxy(was podState) error {
	nodes := m.proxies[was.Tenant]
	remove(nodes, was.Node, was.UID)
	if len(nodes) == 0 {
		delete(m.proxies, was.Tenant)
	}
	return m.publishProxy(model.ProxyKey{Node: was.Node, Tenant: was.Tenant})
}

// publishProxy puts a proxy into the store as it is now; none without pods.
func (m *mesh) publishProxy(key model.ProxyKey) error {
	pods := m.proxies[key.Tenant][key.Node]
	if len(pods) == 0 {
		m.store.DeleteProxy(key)
		return nil
	}
	var workloads []model.Workload
	for _, p := range pods {
		if len(p.held) > 0 {
			workloads = append(workloads, p.Workload(p.held))
		}
	}
	return m.store.SetProxy(translate.Proxy(key, m.nodes[key.Node].Zone(), m.membershipOf(key.Tenant, pods), workloads))
}

// membershipOf is what decides how a tenant's proxy is: of one for a whole node,
// that of the oldest topology which has pods there.
func (m *mesh) membershipOf(t model.Tenant, pods map[string]*podState) (out translate.Membership) {
	if t.Scope != model.ScopeNode {
		return m.namespaces[t.Namespace].Membership
	}
	names := m.topologies.Names()
	oldest := len(names)
	for _, p := range pods {
		ns := m.namespaces[p.Namespace].Membership
		if i := slices.Index(names, ns.Topology); i >= 0 && (i < oldest || out == (translate.Membership{})) {
			oldest, out = i, ns
		}
	}
	return out
}

// optedOut are pods of a node that could be members and aren't.
func (m *mesh) optedOut(node string) []translate.Pod {
	var out []translate.Pod
	for p := range maps.Values(m.nodePods[node]) {
		if p.OptedOut {
			out = append(out, p.Pod)
		}
	}
	return out
}

// add puts v into a map of maps.
func add[V any](m map[string]map[string]V, outer, inner string, v V) {
	if m[outer] == nil {
		m[outer] = map[string]V{}
	}
	m[outer][inner] = v
}

func remove[V any](m map[string]map[string]V, outer, inner string) {
	delete(m[outer], inner)
	if len(m[outer]) == 0 {
		delete(m, outer)
	}
}

// members of a node, in no order.
func (m *mesh) members(node string) []translate.Pod {
	var out []translate.Pod
	for p := range maps.Values(m.nodePods[node]) {
		if p.Standing == translate.Member {
			out = append(out, p.Pod)
		}
	}
	return out
}
