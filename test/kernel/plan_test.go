package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A plan that asks for less takes back what it asked for before, to the last, and
// what leaves the mesh is reached as without it.
func TestPlanTakenBack(t *testing.T) { eachRedirection(t, testPlanTakenBack) }

func testPlanTakenBack(t *testing.T, l *lab.Lab) {
	n := l.Node1
	all := []flow{{from: l.Outside, to: l.B1}, {from: l.Outside, to: l.A1}, {from: l.A1, to: l.A3, mesh: true}}
	n.Planned = []*lab.Host{l.A1}
	n.WritePlan()
	n.WaitReady()
	lab.Eventually(t, "the end of team-b", func() error { return left(t, n, "team-b") })
	for _, f := range all {
		f.check(t, 4)
		f.check(t, 6)
	}
	n.Planned = nil
	n.WritePlan()
	n.WaitReady()
	lab.Eventually(t, "the end of all tenants", func() error { return left(t, n, "") })
	for _, f := range all[:2] {
		f.check(t, 4)
		f.check(t, 6)
	}
	n.Planned = n.Pods
	n.WritePlan()
	n.WaitReady()
	for _, f := range all {
		f.check(t, 4)
		f.check(t, 6)
	}
}

// left fails while the kernel still has something of a tenant, "" for any.
func left(t *testing.T, n *lab.Node, tenant string) error {
	o := n.Isolation()
	var found []string
	for _, pattern := range []string{
		"/sys/fs/cgroup/" + o.CgroupName + "/" + tenant, "/sys/fs/cgroup/*/" + o.CgroupName + "/" + tenant,
		filepath.Join(o.RunDir, "netns", tenant), filepath.Join(o.RunDir, "state", tenant), filepath.Join(o.RunDir, "tenants", tenant),
	} {
		if tenant == "" {
			pattern = filepath.Join(pattern, "team-*")
		}
		match, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		found = append(found, match...)
	}
	pods, tenants, err := steered(t, n)
	if err != nil {
		return err
	}
	left := map[string]bool{}
	for _, p := range n.Planned {
		left[p.Tenant.String()] = true
	}
	if len(found) > 0 || pods != len(n.Planned) || tenants != len(left) {
		return fmt.Errorf("%q, %d pods and %d tenants are left", found, pods, tenants)
	}
	var veths []string
	n.Do(t, func() {
		var links []netlink.Link
		links, err = netlink.LinkList() // interrupted, while the agent removes one
		for _, link := range links {
			if name := link.Attrs().Name; strings.HasPrefix(name, "bh") {
				veths = append(veths, name)
			}
		}
	})
	if err != nil || len(veths) != len(left) {
		return fmt.Errorf("links %q are left, %v", veths, err)
	}
	return nil
}

// steered counts what the kernel has of pods and tenants.
func steered(t *testing.T, n *lab.Node) (pods, tenants int, err error) {
	if n.Redirection == v1alpha1.RedirectionNetfilter {
		n.Do(t, func() {
			var tables []*nftables.Table
			if tables, err = (&nftables.Conn{}).ListTablesOfFamily(nftables.TableFamilyNetdev); err != nil || len(tables) != 1 {
				err = errors.Join(err, fmt.Errorf("%d tables of devices", len(tables)))
				return
			}
			var chains []*nftables.Chain
			chains, err = (&nftables.Conn{}).ListChainsOfTableFamily(nftables.TableFamilyNetdev)
			for _, c := range chains {
				switch {
				case strings.HasPrefix(c.Name, "out_") && c.Hooknum != nil:
					pods++
				case strings.HasPrefix(c.Name, "tenant_"):
					tenants++
				}
			}
		})
		return pods, tenants, err
	}
	for folder, count := range map[string]*int{"pods": &pods, "tenants": &tenants} {
		entries, err := os.ReadDir(filepath.Join(n.PinDir(), folder))
		if err != nil {
			return 0, 0, err
		}
		*count = len(entries)
	}
	return pods, tenants, nil
}
