package controllers

import (
	"k8s.io/apimachinery/pkg/types"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// setProblem remembers what is wrong with a service, to tell its owner.
func (m *mesh) setProblem(key types.NamespacedName, p translate.Problem) {
	if m.problems[key] == p {
		return
	}
	if p == (translate.Problem{}) {
		delete(m.problems, key)
	} else {
		m.problems[key] = p
	}
	m.triggers.served.add(key)
}

// refusedServices are those behind the resources in any of the statuses.
func (m *mesh) refusedServices(statuses ...v1alpha1.NodeTenantStatus) (keys []types.NamespacedName) {
	for _, s := range statuses {
		for _, r := range s.Rejected {
			if ns, name, ok := m.store.ServiceOf(r.Name); ok {
				keys = append(keys, types.NamespacedName{Namespace: ns, Name: name})
			}
		}
	}
	return keys
}

// sources names the services behind resources, for people.
func (m *mesh) sources(refused []v1alpha1.RejectedResource) map[string]string {
	var named map[string]string
	for _, r := range refused {
		if ns, name, ok := m.store.ServiceOf(r.Name); ok {
			if named == nil {
				named = map[string]string{}
			}
			named[r.Name] = "Service " + ns + "/" + name
		}
	}
	return named
}

// tellServed has those told whose pods have proxies on a node: what it says of them counts
// while it is heard.
func (m *mesh) tellServed(node string) {
	served := map[string]bool{}
	for _, p := range m.nodePods[node] {
		if !p.Tenant.IsZero() {
			served[p.Namespace] = true
		}
	}
	m.tellOwners(served)
}

// tellOwners has the owners of namespaces, and of their topologies, told how proxies are.
func (m *mesh) tellOwners(namespaces map[string]bool) {
	for namespace := range namespaces {
		m.triggers.tenants.add(namespace)
		m.triggers.policies.add(namespace)
		if topology := m.namespaces[namespace].Topology; topology != "" {
			m.triggers.status.add(topology)
		}
	}
}

// serviceProblem is what is wrong with a service of a namespace in the mesh:
// others' objects aren't ours to write to.
func (m *mesh) serviceProblem(key types.NamespacedName) (translate.Problem, []translate.Refusal) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.namespaces[key.Namespace].IsMember() {
		return translate.Problem{}, nil
	}
	var refusals []translate.Refusal
	for _, list := range m.refusals {
		for _, r := range list {
			if ns, service, ok := m.store.ServiceOf(r.Resource.Name); ok && ns == key.Namespace && service == key.Name {
				refusals = append(refusals, r)
			}
		}
	}
	return m.problems[key], refusals
}

// setRefusals notes what a tenant's proxy on a node refuses. Nearly all refuse nothing,
// and to look through all of them for each service would take longer than all else.
func (m *mesh) setRefusals(node string, s v1alpha1.NodeTenantStatus) {
	tenant, err := model.ParseTenant(s.Name)
	if err != nil {
		return
	}
	for _, r := range s.Rejected {
		m.refusals[node] = append(m.refusals[node], translate.Refusal{Tenant: tenant, Node: node, Resource: r})
	}
}
