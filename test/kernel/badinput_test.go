package kernel

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A plan with a pod whose network isn't there names it, and all else goes on.
func TestNetworkIsGone(t *testing.T) { eachRedirection(t, testNetworkIsGone) }

func testNetworkIsGone(t *testing.T, l *lab.Lab) {
	n := l.Node1
	gone := *l.A2
	gone.Namespace = &lab.Namespace{Path: filepath.Join(n.Dir, "nothing")}
	gone.Name = "gone"
	n.Planned = append([]*lab.Host{&gone}, n.Pods...)
	n.WritePlan()
	lab.Eventually(t, "the word of it", func() error {
		i, err := n.Inspect()
		if err == nil && (!strings.Contains(i.Problem, "pod team-a/gone") || !strings.Contains(i.Problem, gone.Path)) {
			err = fmt.Errorf("the problem is %q", i.Problem)
		}
		return err
	})
	check := func() {
		t.Helper()
		for _, f := range flows(l) {
			f.check(t, 4)
		}
		lab.Eventually(t, "the pods in the kernel", func() error {
			if pods, tenants, err := steered(t, n); err != nil || pods != len(n.Pods) || tenants != 2 {
				return fmt.Errorf("%d pods and %d tenants are steered, %v", pods, tenants, err)
			}
			return nil
		})
	}
	check()
	// Nor does one that is there to an agent that comes later.
	n.Kill()
	n.Start()
	lab.Eventually(t, "the other pods", func() error {
		i, err := n.Inspect()
		steered := 0
		for _, tenant := range i.Tenants {
			steered += len(tenant.Pods)
		}
		if err == nil && steered != len(n.Pods) {
			err = fmt.Errorf("%d pods are steered: %s", steered, i.Problem)
		}
		return err
	})
	check()
	n.Planned = n.Pods
	n.WritePlan()
	n.WaitReady()
}

// Interfaces are known by their numbers: with another name, even one that was another's,
// they are what they were, to the agent that runs and to the next one. Where the kernel
// goes by names (nftables, since Linux 6.16) the agent hears of it at once.
func TestInterfaceRenamed(t *testing.T) { eachRedirection(t, testInterfaceRenamed) }

func testInterfaceRenamed(t *testing.T, l *lab.Lab) {
	n := l.Node1
	held := openAll(t, l, "before")
	type names struct{ from, to string }
	var took []time.Duration
	rename := func(all ...names) {
		t.Helper()
		begin := time.Now()
		n.Do(t, func() {
			for _, r := range all {
				link, err := netlink.LinkByName(r.from)
				lab.Check(t, err)
				lab.Check(t, netlink.LinkSetName(link, r.to))
			}
		})
		if n.Redirection != v1alpha1.RedirectionNetfilter {
			return
		}
		lab.Eventually(t, "the chains of the new names", func() error {
			var out []byte
			var err error
			n.Do(t, func() { out, err = exec.Command("nft", "list", "table", "netdev", "bulkhead").CombinedOutput() })
			first, last := all[0].to, all[len(all)-1].from
			if err == nil && (!strings.Contains(string(out), `"`+first+`"`) || strings.Contains(string(out), `"`+last+`"`)) {
				err = fmt.Errorf("the table is %s", out)
			}
			return err
		})
		took = append(took, time.Since(begin))
	}
	check := func(when string) {
		t.Helper()
		n.WritePlan()
		n.WaitReady()
		held.talk(t, when)
		eachFamily(t, func(t *testing.T, family int) {
			for _, f := range flows(l) {
				f.check(t, family)
			}
		})
		lab.Eventually(t, "the pods in the kernel, "+when, func() error {
			if pods, tenants, err := steered(t, n); err != nil || pods != len(n.Pods) || tenants != 2 {
				return fmt.Errorf("%d pods and %d tenants are steered, %v", pods, tenants, err)
			}
			return nil
		})
	}
	// What sends something before the agent has heard of it is cut, and an acknowledgement
	// may be late.
	lab.Eventually(t, "the last acknowledgements", func() error {
		return errors.Join(acknowledged(t, l.A1.Namespace), acknowledged(t, n.Proxy("team-a")))
	})
	rename(names{"poda1", "other0"})
	rename(names{"other0", "poda1"})
	rename(names{"poda1", "other1"})
	rename(names{"other1", "other0"}, names{"podb1", "poda1"})
	if n.Redirection == v1alpha1.RedirectionNetfilter {
		atOnce(t, "chains of the new names", took)
	}
	check("renamed")
	n.Kill()
	n.Start()
	check("with another agent")
	// A pod leaves by its other name.
	n.Planned = []*lab.Host{l.A2, l.B1}
	n.WritePlan()
	held.close()
	lab.Eventually(t, "the pod's leave", func() error { return onlyPlanned(t, n) })
}

// acknowledged fails while something that was sent from a network namespace isn't.
func acknowledged(t *testing.T, n *lab.Namespace) (err error) {
	t.Helper()
	n.Do(t, func() {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, listErr := netlink.SocketDiagTCPInfo(family)
			err = errors.Join(err, listErr)
			for _, s := range sockets {
				if s.TCPInfo != nil && s.TCPInfo.Unacked > 0 {
					err = errors.Join(err, fmt.Errorf("%s:%d has sent to %s:%d", s.InetDiagMsg.ID.Source, s.InetDiagMsg.ID.SourcePort, s.InetDiagMsg.ID.Destination, s.InetDiagMsg.ID.DestinationPort))
				}
			}
		}
	})
	return err
}
