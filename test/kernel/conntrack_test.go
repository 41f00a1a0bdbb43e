package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// tracked are the ports from which a pod's datagrams to an address have entries in its
// node's conntrack.
func tracked(t *testing.T, pod *lab.Host, to netip.AddrPort) map[uint16]bool {
	t.Helper()
	from := map[uint16]bool{}
	pod.Node.Do(t, func() {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		for errors.Is(err, netlink.ErrDumpInterrupted) {
			flows, err = netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		}
		lab.Check(t, err)
		for _, f := range flows {
			source, _ := netip.AddrFromSlice(f.Forward.SrcIP)
			destination, _ := netip.AddrFromSlice(f.Forward.DstIP)
			if f.Forward.Protocol == unix.IPPROTO_UDP && pod.Has(source.Unmap()) && lab.At(destination.Unmap(), f.Forward.DstPort) == to {
				from[f.Forward.SrcPort] = true
			}
		}
	})
	return from
}

// What a tenant's pods send beside its proxy takes no more of the node's conntrack, and of
// the ports that it hides pods behind, than its pace.
func TestDirectFlows(t *testing.T) { eachRedirection(t, testDirectFlows) }

func testDirectFlows(t *testing.T, l *lab.Lab) {
	const rate, flows = 50, 3000
	n := l.Node1
	n.Do(t, func() {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(`table ip cni { chain postrouting { type nat hook postrouting priority 100; ip saddr 10.77.0.0/16 ip daddr != 10.77.0.0/16 masquerade; }; }`)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
		// What nobody answers is there until it is counted, however long that takes.
		lab.Sysctl(t, fmt.Sprint("netfilter/nf_conntrack_udp_timeout=", int(2*lab.Patience.Seconds())))
	})
	const firstPort = 20000
	dropped := func(pod *lab.Host) int { return int(n.Tenant(pod.Tenant.String()).Drops["directTooFast"]) }
	// flood begins flows from a port each, to a port of their own: each has an entry or is
	// dropped as too fast.
	flood := func(from *lab.Host, port uint16, flows int) (entries int, took time.Duration) {
		t.Helper()
		to, was, begun := lab.At(l.Outside.V4, port), dropped(from), time.Now()
		from.Do(t, func() {
			for i := range flows {
				c, err := net.DialUDP("udp", &net.UDPAddr{Port: firstPort + i}, net.UDPAddrFromAddrPort(to))
				lab.Check(t, err)
				_, err = c.Write([]byte("x"))
				lab.Check(t, errors.Join(err, c.Close()))
			}
		})
		took = time.Since(begun)
		// A busy kernel may have some of them to look at yet.
		lab.Eventually(t, "the end of all flows", func() error {
			if entries = len(tracked(t, from, to)); entries+dropped(from)-was != flows {
				return fmt.Errorf("of %d %d have entries, and %d were dropped", flows, entries, dropped(from)-was)
			}
			return nil
		})
		return entries, took
	}

	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, NewDirect: rate})
	neighbour := undisturbed(t, l, 2)
	entries, took := flood(l.B1, 9, flows)
	if most := int(rate*(1+took.Seconds())) + 1; entries == 0 || entries > most {
		t.Errorf("%d entries for %d flows in %s at %d a second, at most %d", entries, flows, took, rate, most)
	}
	if entries, _ := flood(l.A1, 9, 10*rate); entries < 10*rate {
		t.Errorf("a neighbour without a bound has %d entries for %d flows", entries, 10*rate)
	}
	neighbour()
	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30})
	if entries, _ := flood(l.B1, 10, flows); entries < flows {
		t.Errorf("without a bound %d entries for %d flows", entries, flows)
	}
}
