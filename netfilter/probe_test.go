package netfilter

import (
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
	"github.com/bulkhead-mesh/bulkhead/test/oldkernel"
)

// What a kernel lacks is named, and nothing else.
func TestProbe(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	probe := func() error {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return Probe()
	}
	for _, c := range []struct {
		name        string
		lacks       []oldkernel.Call
		says, isnot string
	}{
		{"this", nil, "", ""},
		{"nftables", []oldkernel.Call{{Number: unix.SYS_SOCKET, Argument: 2, Value: unix.NETLINK_NETFILTER, Answer: unix.EPROTONOSUPPORT}},
			"nftables on the way out of a device (CONFIG_NETFILTER_EGRESS), in Linux since 5.16 (", "pidfd_getfd"},
		{"pidfd", []oldkernel.Call{{Number: unix.SYS_PIDFD_GETFD, Argument: -1, Answer: unix.ENOSYS}}, "lacks pidfd_getfd, in Linux since 5.6 (function not implemented)", ";"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := oldkernel.Says(t, probe, c.lacks...)
			if (got == "") != (c.says == "") || !strings.Contains(got, c.says) || c.isnot != "" && strings.Contains(got, c.isnot) || strings.Contains(got, "\n") {
				t.Errorf("it says %q, want %q", got, c.says)
			}
		})
	}
}

// What a kernel may be built without, and rules need, is asked for.
func TestProbeCoversRules(t *testing.T) {
	option := func(e expr.Any) string {
		switch e := e.(type) {
		case *expr.Limit:
			return "CONFIG_NFT_LIMIT"
		case *expr.Log:
			return "CONFIG_NFT_LOG"
		case *expr.Reject:
			return "CONFIG_NFT_REJECT_NETDEV"
		case *expr.TProxy:
			return "CONFIG_NFT_TPROXY"
		case *expr.Socket:
			return "CONFIG_NFT_SOCKET"
		case *expr.Hash:
			return "CONFIG_NFT_HASH"
		case raw:
			if e.name == "fwd" {
				return "CONFIG_NFT_FWD_NETDEV"
			}
		case *expr.Bitwise, *expr.Byteorder, *expr.Cmp, *expr.Counter, *expr.Dynset, *expr.Exthdr, *expr.Immediate, *expr.Lookup, *expr.Meta, *expr.Payload, *expr.Verdict:
		default:
			t.Errorf("which option of the kernel has %T?", e)
		}
		return "" // all of nftables have it
	}
	bounded := innerState{active: [steer.Generations]bool{true, true}, weight: 50, pace: 1, concurrent: 4, own: 1}
	chains := slices.Concat(hostChains(DefaultMark, 1), whose(1, "tenant_1"), accountChains("1", 1, 1), innerChains(bounded),
		[]chain{{"prerouting", preroutingRules(1, bounded)}, {"output", outputRules(bounded)}})
	needed := map[string]bool{}
	for _, c := range chains {
		for _, r := range c.rules {
			for _, e := range r {
				needed[option(e)] = true
				if d, ok := e.(*expr.Dynset); ok {
					for _, each := range d.Exprs {
						needed[option(each)] = true
					}
				}
			}
		}
	}
	delete(needed, "")
	if len(needed) != 7 {
		t.Errorf("rules need %v", needed)
	}
	for o := range needed {
		if !slices.ContainsFunc(features(), func(f steer.Feature) bool { return strings.Contains(f.Name, o) }) {
			t.Errorf("nothing asks for %s", o)
		}
	}
}
