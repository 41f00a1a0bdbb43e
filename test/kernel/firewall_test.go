package kernel

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A node whose firewall forwards nothing but what it is told: what goes to proxies,
// and from them to pods, isn't forwarded; what a proxy sends as its pod is, with the
// pod's address. Errors about such connections have to pass as well ("related"): the
// first message of a handshake is larger than the path's MTU.
func TestFirewall(t *testing.T) { eachRedirection(t, testFirewall) }

func testFirewall(t *testing.T, l *lab.Lab) {
	n := l.Node1
	nft := func(commands ...string) (out []byte) {
		t.Helper()
		n.Do(t, func() {
			cmd := exec.Command("nft", "-f", "-")
			cmd.Stdin = strings.NewReader(strings.Join(commands, "\n"))
			var err error
			if out, err = cmd.CombinedOutput(); err != nil {
				t.Fatalf("nft (of the package nftables) %q: %v: %s", commands, err, out)
			}
		})
		return out
	}
	const firewall = "add table inet bht\n" +
		"add chain inet bht forward { type filter hook forward priority 0; policy drop; }\n" +
		"flush chain inet bht forward"
	eachFamily(t, func(t *testing.T, family int) {
		nft(firewall)
		try := func(to *lab.Host) app.CallResult {
			return l.A1.Call(t, "tcp", "--timeout=1s", lab.At(to.Of(family), app.GreetPort).String())
		}
		flow{from: l.A1, to: l.A2}.check(t, family)
		if r := try(l.A3); r.OK {
			t.Error("passed a firewall that drops all")
		}
		allow := map[int]string{4: "ip saddr ", 6: "ip6 saddr "}[family] + l.A1.Of(family).String() + " tcp dport 15008 accept"
		if n.Redirection == v1alpha1.RedirectionEBPF {
			// Policies that go by interface see the pod, too.
			allow = "iifname pod" + l.A1.Name + " " + allow
		}
		nft("add rule inet bht forward ct state established,related accept", "add rule inet bht forward "+allow)
		flow{from: l.A1, to: l.B2}.check(t, family)
		lab.Eventually(t, "the end of the attempts that the firewall has swallowed", func() error {
			if r := try(l.A3); !r.OK {
				return fmt.Errorf("%+v", r.Failure)
			}
			return nil
		})
		// Another pod's aren't meant.
		if r := l.A2.Call(t, "tcp", "--timeout=1s", lab.At(l.B2.Of(family), app.GreetPort).String()); r.OK {
			t.Error("another pod passed the firewall, too")
		}
	})
	// Tools that look at the node's rules can read ours, when these don't change just then.
	lab.Eventually(t, "the ruleset", func() error {
		var out []byte
		var err error
		n.Do(t, func() { out, err = exec.Command("nft", "list", "ruleset").CombinedOutput() })
		if err != nil || n.Redirection == v1alpha1.RedirectionNetfilter && !strings.Contains(string(out), "table netdev bulkhead") {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
}
