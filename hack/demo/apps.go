package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

const trustDomain = "demo.bulkhead"

var (
	webA = harness.Echo{Namespace: "team-a", Name: "web"}
	jobA = harness.Echo{Namespace: "team-a", Name: "batch"} // a second identity in one tenant
	webB = harness.Echo{Namespace: "team-b", Name: "web"}
	webC = harness.Echo{Namespace: "team-c", Name: "web"}
	webO = harness.Echo{Namespace: "outside", Name: "web"}

	teams    = []string{"team-a", "team-b", "team-c"}
	meshApps = []harness.Echo{webA, jobA, webB, webC}
)

// limits of team-b's proxies, in the policy and as the kernel must show them.
const (
	limitMillis = 300
	limitMemory = 96 << 20
	limitPids   = 128
)

func manifests() string {
	m := harness.EchoNamespace("outside")
	for _, team := range teams {
		m += harness.EchoNamespace(team, `demo.bulkhead.dev/mesh: "true"`)
	}
	m += fmt.Sprintf(`---
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: MeshTopology
metadata: {name: demo}
spec:
  trustDomain: %s
  proxy: {accessLog: Connections}
  rules:
  - namespaceSelector: {matchLabels: {demo.bulkhead.dev/mesh: "true"}}
    isolation: Namespace
---
apiVersion: mesh.bulkhead.dev/v1alpha1
kind: IsolationPolicy
metadata: {name: small, namespace: team-b}
spec:
  cpu: {limit: %dm}
  memory: {max: %d}
  pids: %d
`, trustDomain, limitMillis, limitMemory, limitPids)
	for _, a := range append(slices.Clone(meshApps), webO) {
		m += a.Manifest()
	}
	return m
}

func (d *demo) deploy(ctx context.Context) error {
	d.step("Three teams in the mesh (one namespace each), one namespace outside, pods of each on every node")
	if err := d.Apply(ctx, manifests()); err != nil {
		return err
	}
	d.apps = map[harness.Echo]map[string]harness.Pod{}
	for _, a := range append(slices.Clone(meshApps), webO) {
		pods, err := d.EchoPods(ctx, a, 3*time.Minute)
		if err != nil {
			return err
		}
		d.apps[a] = pods
	}
	d.nodes = slices.Sorted(maps.Keys(d.apps[webA]))
	if len(d.nodes) < 2 {
		return fmt.Errorf("the demo needs pods on two nodes, got %v", d.nodes)
	}
	for _, team := range teams {
		tenant, err := d.WaitTenant(ctx, team, len(d.nodes), time.Minute)
		d.checkErr(err, "%s has a proxy of its own on each of its %d nodes, %d pods behind them", team, len(d.nodes), tenant.Status.Pods)
	}
	var topology v1alpha1.MeshTopology
	err := d.Client.Get(ctx, client.ObjectKey{Name: "demo"}, &topology)
	d.checkErr(err, "MeshTopology demo: %d namespaces, %d pods, %d proxies", topology.Status.Namespaces, topology.Status.Pods, topology.Status.Proxies)
	return nil
}

// pod of an application on the i-th node.
func (d *demo) pod(a harness.Echo, i int) harness.Pod { return d.apps[a][d.nodes[i]] }

// identityOf maps each mesh pod's address to its SPIFFE ID.
func (d *demo) identities() map[string]string {
	m := map[string]string{}
	for _, a := range meshApps {
		for _, p := range d.apps[a] {
			for _, ip := range p.Status.PodIPs {
				m[ip.IP] = p.Identity(trustDomain)
			}
		}
	}
	return m
}

func nodeAddress(n corev1.Node) string {
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			return a.Address
		}
	}
	return ""
}
