package translate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Defaults of MeshTopology, for objects that were stored without them.
const (
	DefaultTrustDomain  = "cluster.local"
	DefaultProxyVersion = "1.40.0"
	// DefaultCertificateTTL is identity's.
	DefaultCertificateTTL = time.Hour
)

// Topologies are all MeshTopologies, ready to be matched with namespaces. It is
// immutable.
type Topologies struct {
	trustDomain string
	exempt      []string
	items       []topology // the oldest first
}

type topology struct {
	name        string
	trustDomain string
	version     string
	accessLog   bool
	ttl         time.Duration
	issuer      string
	noEgress    bool
	rules       []rule
	redirection v1alpha1.Redirection
	nodes       []nodeRedirection
	exclusions  []v1alpha1.Exclusion
	strict      bool
	ofPods      bool // exclusions by annotation
	bypass      map[string]v1alpha1.EmergencyBypass
	bounds      Bounds
	nodeLimits  v1alpha1.Limits
	problem     string // of selectors
}

type rule struct {
	selector labels.Selector // nil if it is invalid
	scope    model.Scope
}

var scopes = map[v1alpha1.Isolation]model.Scope{
	v1alpha1.IsolationNode: model.ScopeNode, v1alpha1.IsolationNamespace: model.ScopeNamespace, "": model.ScopeNamespace,
	v1alpha1.IsolationServiceAccount: model.ScopeServiceAccount, v1alpha1.IsolationPod: model.ScopePod,
}

type nodeRedirection struct {
	selector    labels.Selector
	redirection v1alpha1.Redirection
}

// Membership is a namespace's place in the mesh. The zero value is none. It is
// comparable.
type Membership struct {
	// Topology that put it there.
	Topology    string
	TrustDomain string
	// Version of Envoy that its proxies run.
	Version   string
	AccessLog bool
	// CertificateTTL of its workloads.
	CertificateTTL time.Duration
	// RejectOutside closes what leaves the cluster.
	RejectOutside bool
	// Scope of its tenants.
	Scope model.Scope
	// Strict pods take no plain text, whatever the namespace's policies say.
	Strict bool
	// PodExclusions says whether pods may exclude connections of their own.
	PodExclusions bool
	// Bypass is the emergency bypass.
	Bypass bool
	// Bounds of its proxies' limits.
	Bounds Bounds
}

// IsMember reports whether the namespace belongs to the mesh.
func (m Membership) IsMember() bool { return m.Topology != "" }

// NewTopologies prepares topologies. exempt namespaces never match. trustDomain is
// the mesh's; a topology with another one selects nothing. If it is empty, the
// oldest topology's is taken.
func NewTopologies(list []v1alpha1.MeshTopology, trustDomain string, exempt []string) Topologies {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b v1alpha1.MeshTopology) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
	t := Topologies{trustDomain: trustDomain, exempt: slices.Clone(exempt)}
	for i := range list {
		o := &list[i]
		item := topology{
			name: o.Name, trustDomain: cmp.Or(o.Spec.TrustDomain, DefaultTrustDomain), version: cmp.Or(o.Spec.Proxy.Version, DefaultProxyVersion),
			accessLog:   o.Spec.Proxy.AccessLog == v1alpha1.AccessLogConnections,
			noEgress:    o.Spec.Egress == v1alpha1.EgressReject,
			redirection: cmp.Or(o.Spec.Redirection, v1alpha1.RedirectionEBPF),
			ttl:         DefaultCertificateTTL, issuer: o.Spec.Identity.IssuerSecret,
			exclusions: slices.Clone(o.Spec.Exclusions),
			strict:     o.Spec.PlainText == v1alpha1.PlainTextStrict,
			ofPods:     o.Spec.PodExclusions == v1alpha1.PodExclusionsAllow,
			bypass:     map[string]v1alpha1.EmergencyBypass{},
			bounds:     bounds(o.Spec.Limits),
			nodeLimits: nodeLimits(o.Spec.Limits),
		}
		if d, err := time.ParseDuration(o.Spec.Identity.CertificateTTL); err == nil && d > 0 {
			item.ttl = d // the API server takes no other but ""
		}
		for _, b := range o.Spec.EmergencyBypass {
			item.bypass[b.Namespace] = b
		}
		t.trustDomain = cmp.Or(t.trustDomain, item.trustDomain)
		for n := range o.Spec.Rules {
			s, err := metav1.LabelSelectorAsSelector(&o.Spec.Rules[n].NamespaceSelector)
			if err != nil {
				s = nil
				item.problem = fmt.Sprintf("spec.rules[%d].namespaceSelector: %v; the rule selects nothing", n, err)
			}
			item.rules = append(item.rules, rule{s, scopes[o.Spec.Rules[n].Isolation]})
		}
		for n := range o.Spec.NodeRedirections {
			s, err := metav1.LabelSelectorAsSelector(&o.Spec.NodeRedirections[n].NodeSelector)
			if err != nil {
				item.problem = fmt.Sprintf("spec.nodeRedirections[%d].nodeSelector: %v; the entry selects nothing", n, err)
				continue
			}
			item.nodes = append(item.nodes, nodeRedirection{s, o.Spec.NodeRedirections[n].Redirection})
		}
		t.items = append(t.items, item)
	}
	return t
}

// TrustDomain of the mesh; "" if there is neither a topology nor an authority.
func (t Topologies) TrustDomain() string { return t.trustDomain }

// LongestTTL is the longest that any workload's certificates are to live.
func (t Topologies) LongestTTL() time.Duration {
	longest := time.Duration(0)
	for _, i := range t.items {
		if i.trustDomain == t.trustDomain {
			longest = max(longest, i.ttl)
		}
	}
	return cmp.Or(longest, DefaultCertificateTTL)
}

// ShortestTTL is the shortest that any workload's certificates are to live.
func (t Topologies) ShortestTTL() time.Duration {
	shortest := time.Duration(0)
	for _, i := range t.items {
		if i.trustDomain == t.trustDomain && (shortest == 0 || i.ttl < shortest) {
			shortest = i.ttl
		}
	}
	return cmp.Or(shortest, DefaultCertificateTTL)
}

// Issuer is the name of the Secret that the mesh's issuer is in, "" for one of its
// own, and the topology that says so, the oldest of the mesh's trust domain.
func (t Topologies) Issuer() (secret, topology string) {
	for _, i := range t.items {
		if i.trustDomain == t.trustDomain {
			return i.issuer, i.name
		}
	}
	return "", ""
}

// Redirection of a node with these labels, and the topology that says so, the
// oldest of the mesh's trust domain. Without one it is "".
func (t Topologies) Redirection(node map[string]string) (r v1alpha1.Redirection, topology string) {
	for _, i := range t.items {
		if i.trustDomain != t.trustDomain {
			continue
		}
		for _, n := range i.nodes {
			if n.selector.Matches(labels.Set(node)) {
				return n.redirection, i.name
			}
		}
		return i.redirection, i.name
	}
	return "", ""
}

// NodeLimits bound all proxies of a node together, as the oldest topology of the
// mesh's trust domain says.
func (t Topologies) NodeLimits() v1alpha1.Limits {
	for _, i := range t.items {
		if i.trustDomain == t.trustDomain {
			return i.nodeLimits
		}
	}
	return v1alpha1.Limits{}
}

// own is what one topology asks for on a node, whether it counts or not.
func (t Topologies) own(name string, node map[string]string) v1alpha1.Redirection {
	for _, i := range t.items {
		if i.name == name {
			r, _ := Topologies{trustDomain: i.trustDomain, items: []topology{i}}.Redirection(node)
			return r
		}
	}
	return ""
}

// Bypasses that a topology asks for, by namespace.
func (t Topologies) Bypasses(name string) []v1alpha1.EmergencyBypass {
	for _, i := range t.items {
		if i.name == name {
			return slices.SortedFunc(maps.Values(i.bypass), func(a, b v1alpha1.EmergencyBypass) int { return strings.Compare(a.Namespace, b.Namespace) })
		}
	}
	return nil
}

// Exclusions of all namespaces of a topology.
func (t Topologies) Exclusions(name string) []v1alpha1.Exclusion {
	for _, i := range t.items {
		if i.name == name {
			return i.exclusions
		}
	}
	return nil
}

// Names of all topologies, the oldest first.
func (t Topologies) Names() []string {
	var names []string
	for _, i := range t.items {
		names = append(names, i.name)
	}
	return names
}

// Match finds the topology that a namespace belongs to, and the names of younger
// ones that select it too.
func (t Topologies) Match(ns *corev1.Namespace) (m Membership, overlapped []string) {
	if slices.Contains(t.exempt, ns.Name) {
		return m, nil
	}
	for _, i := range t.items {
		scope := i.selects(ns)
		if i.trustDomain != t.trustDomain || scope == model.ScopeNone {
			continue
		}
		if m.IsMember() {
			overlapped = append(overlapped, i.name)
			continue
		}
		_, bypass := i.bypass[ns.Name]
		m = Membership{Topology: i.name, TrustDomain: t.trustDomain, Version: i.version, AccessLog: i.accessLog, CertificateTTL: i.ttl, RejectOutside: i.noEgress,
			Scope: scope, Strict: i.strict, PodExclusions: i.ofPods, Bypass: bypass, Bounds: i.bounds}
	}
	return m, overlapped
}

// selects is the scope of the first rule that selects a namespace.
func (i topology) selects(ns *corev1.Namespace) model.Scope {
	for _, r := range i.rules {
		if r.selector != nil && r.selector.Matches(labels.Set(ns.Labels)) {
			return r.scope
		}
	}
	return model.ScopeNone
}

// Tenant that a pod of the namespace belongs to.
func (m Membership) Tenant(namespace, serviceAccount, pod string) model.Tenant {
	switch m.Scope {
	case model.ScopeNode:
		return model.Tenant{Scope: model.ScopeNode}
	case model.ScopeServiceAccount:
		return model.Tenant{Scope: m.Scope, Namespace: namespace, Name: serviceAccount}
	case model.ScopePod:
		return model.Tenant{Scope: m.Scope, Namespace: namespace, Name: pod}
	case model.ScopeNamespace:
		return model.NamespaceTenant(namespace)
	}
	return model.Tenant{}
}
