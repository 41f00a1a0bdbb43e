package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// showProxies prints each tenant's Envoy on each node as the kernel shows it.
func (d *demo) showProxies(ctx context.Context) error {
	d.step("Each team's Envoy on each node, read back from the kernel")
	fmt.Printf("       %-8s %-16s %-8s %-11s %-34s %s\n", "team", "node", "pid", "uid", "cgroup", "limits in force")
	var all []harness.Proxy
	for _, team := range teams {
		for _, node := range d.nodes {
			p, err := d.Proxy(ctx, node, team)
			if err != nil {
				return err
			}
			if len(p.Generations) != 1 {
				return fmt.Errorf("%s has %d Envoys on %s, want 1", team, len(p.Generations), node)
			}
			g := p.Generations[0]
			fmt.Printf("       %-8s %-16s %-8d %-11d %-34s %s\n", team, node, g.PID, g.UID, g.Cgroup, limits(p.Limits))
			all = append(all, p)
		}
	}
	distinct := map[string]bool{}
	var privileged, unconfined, shared, limited, roots []string
	for _, p := range all {
		g := p.Generations[0]
		name := p.Tenant + "@" + p.Node
		for _, key := range []string{"pid", "uid", "cgroup"} {
			id := map[string]string{"pid": fmt.Sprint(g.PID), "uid": fmt.Sprint(g.UID), "cgroup": g.Cgroup}[key]
			if k := p.Node + " " + key + " " + id; distinct[k] {
				shared = append(shared, name+" shares "+key+" "+id)
			} else {
				distinct[k] = true
			}
		}
		for kind, id := range g.Namespaces {
			if k := p.Node + " " + kind + " " + id; distinct[k] || id == p.HostNamespaces[kind] {
				shared = append(shared, name+" shares its "+kind+" namespace")
			} else {
				distinct[k] = true
			}
		}
		for set, bits := range g.Capabilities {
			if strings.Trim(bits, "0") != "" {
				privileged = append(privileged, name+" has "+set+"="+bits)
			}
		}
		if len(g.Capabilities) != 5 || len(g.Namespaces) < 6 {
			privileged = append(privileged, name+": its capabilities or namespaces couldn't be read")
		}
		if !g.NoNewPrivs || g.Seccomp != 2 {
			unconfined = append(unconfined, fmt.Sprintf("%s: no_new_privs %t, seccomp mode %d", name, g.NoNewPrivs, g.Seccomp))
		}
		if g.UID == 0 {
			roots = append(roots, name)
		}
		want := harness.Limits{}
		if p.Tenant == webB.Namespace {
			want = harness.Limits{CPUMillis: limitMillis, MemoryMax: limitMemory, Pids: limitPids}
			if p.Limits.CPUMillis != want.CPUMillis || p.Limits.MemoryMax != want.MemoryMax || p.Limits.Pids != want.Pids {
				limited = append(limited, fmt.Sprintf("%s: %s", name, limits(p.Limits)))
			}
		} else if p.Limits.CPUMillis != 0 || p.Limits.MemoryMax != 0 {
			limited = append(limited, fmt.Sprintf("%s: %s", name, limits(p.Limits)))
		}
	}
	d.checkErr(joined(shared), "every Envoy has a pid, uid, cgroup, and network, mount, pid, ipc, uts and cgroup namespace of its own")
	d.checkErr(joined(append(privileged, roots...)), "none is root, none has a capability in any of its five sets")
	d.checkErr(joined(unconfined), "all have no_new_privs and a seccomp filter")
	d.checkErr(joined(limited), "team-b's IsolationPolicy is in force in the kernel (%s), nobody else is limited",
		limits(harness.Limits{CPUMillis: limitMillis, MemoryMax: limitMemory, Pids: limitPids}))
	return nil
}

func limits(l harness.Limits) string {
	var parts []string
	if l.CPUMillis > 0 {
		parts = append(parts, fmt.Sprintf("cpu %dm", l.CPUMillis))
	}
	if l.MemoryMax > 0 {
		parts = append(parts, fmt.Sprintf("memory %d MiB", l.MemoryMax>>20))
	}
	if l.Pids > 0 {
		parts = append(parts, fmt.Sprintf("pids %d", l.Pids))
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}
