package netfilter

import (
	"errors"
	"net/netip"
	"os/exec"
	"testing"
)

// nft aborts on a whole ruleset for one rule that it can't name: nobody could list a
// node's rules any more.
func TestNftListsTheRules(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		p, _ := wire(t, "a", 1)
		check(t, errors.Join(d.SetNodeAddresses([]netip.Addr{wireNode}), d.UpdateTenant(tenant(t, 1)), d.UpdatePod(p)))
		if out, err := exec.Command("nft", "list", "ruleset").CombinedOutput(); err != nil {
			t.Errorf("nft (of the package nftables): %v: %.2000s", err, out[max(0, len(out)-2000):])
		}
	})
}
