package kernel

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// tracked is how many entries a node's conntrack has.
func tracked(t *testing.T, n *lab.Node) (entries int) {
	t.Helper()
	n.Do(t, func() {
		b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		lab.Check(t, err)
		_, err = fmt.Sscan(string(b), &entries)
		lab.Check(t, err)
	})
	return entries
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
	})
	to := lab.At(l.Outside.V4, 9).String()
	flood := func(from *lab.Host, flows int) (entries int, took time.Duration) {
		t.Helper()
		before, begun := tracked(t, n), time.Now()
		from.Do(t, func() {
			for range flows {
				c, err := net.Dial("udp", to)
				lab.Check(t, err)
				_, err = c.Write([]byte("x"))
				c.Close()
				// The kernel tells the next of that an ICMP error of the former.
				if err != nil && !strings.Contains(err.Error(), "refused") {
					t.Fatal(err)
				}
			}
		})
		return tracked(t, n) - before, time.Since(begun)
	}
	dropped := func() int { return int(n.Tenant("team-b").Drops["directTooFast"]) }

	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, NewDirect: rate})
	neighbour := undisturbed(t, l, 2)
	entries, took := flood(l.B1, flows)
	if most := int(rate*(1+took.Seconds())) + 50; entries > most || dropped() < flows-most {
		t.Errorf("%d entries for %d flows in %s at %d a second, at most %d; %d were dropped", entries, flows, took, rate, most, dropped())
	}
	if entries, _ := flood(l.A1, 10*rate); entries < 9*rate {
		t.Errorf("a neighbour without a bound has %d entries for %d flows", entries, 10*rate)
	}
	neighbour()
	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30})
	was := dropped()
	entries, _ = flood(l.B1, flows)
	t.Logf("without a bound: %d entries for %d flows", entries, flows)
	if entries < flows*9/10 || dropped() != was {
		t.Errorf("without a bound %d entries for %d flows, %d were dropped", entries, flows, dropped()-was)
	}
}
