package kernel

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// A plan that asks for less takes back what it asked for before, to the last, and
// what leaves the mesh is reached as without it.
func TestPlanTakenBack(t *testing.T) {
	l := newLab(t)
	n := l.node1
	all := []flow{{from: l.outside, to: l.b1}, {from: l.outside, to: l.a1}, {from: l.a1, to: l.a3, mesh: true}}
	n.planned = []*host{l.a1}
	n.plan()
	n.waitReady()
	eventually(t, "the end of team-b", func() error { return n.left("team-b") })
	for _, f := range all {
		f.check(t, 4)
		f.check(t, 6)
	}
	n.planned = nil
	n.plan()
	n.waitReady()
	eventually(t, "the end of all tenants", func() error { return n.left("") })
	for _, f := range all[:2] {
		f.check(t, 4)
		f.check(t, 6)
	}
	n.planned = n.pods
	n.plan()
	n.waitReady()
	for _, f := range all {
		f.check(t, 4)
		f.check(t, 6)
	}
}

// left fails while the kernel still has something of a tenant, "" for any.
func (n *node) left(tenant string) error {
	o := n.isolation()
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
	pods, err := os.ReadDir(filepath.Join(n.pinDir(), "pods"))
	if err != nil {
		return err
	}
	tenants, err := os.ReadDir(filepath.Join(n.pinDir(), "tenants"))
	if err != nil {
		return err
	}
	left := map[string]bool{}
	for _, p := range n.planned {
		left[p.tenant.String()] = true
	}
	if len(found) > 0 || len(pods) != len(n.planned) || len(tenants) != len(left) {
		return fmt.Errorf("%q, %d pods and %d tenants are left", found, len(pods), len(tenants))
	}
	var veths []string
	n.do(n.l.t, func() {
		links, err := netlink.LinkList()
		check(n.l.t, err)
		for _, link := range links {
			if name := link.Attrs().Name; strings.HasPrefix(name, "bh") {
				veths = append(veths, name)
			}
		}
	})
	if len(veths) != len(left) {
		return fmt.Errorf("links %q are left", veths)
	}
	return nil
}
