package kernel

import (
	"encoding/binary"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/netfilter"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// Where something else sets the bit of the mark that is the steering's by default, it
// is given another one, and pods stay closed.
func TestMark(t *testing.T) { eachRedirection(t, testMark) }

func testMark(t *testing.T, l *lab.Lab) {
	const mark = 0x40000
	n := l.Node1
	n.Kill()
	n.Args = []string{"--mark", "0x40000"}
	n.Start()
	n.WaitReady()
	if n.Redirection == v1alpha1.RedirectionEBPF {
		m, err := ebpf.LoadPinnedMap(filepath.Join(n.PinDir(), "maps", "config"), &ebpf.LoadPinOptions{ReadOnly: true})
		lab.Check(t, err)
		defer m.Close()
		settings, err := m.LookupBytes(uint32(0))
		lab.Check(t, err)
		if got := [2]uint32{binary.NativeEndian.Uint32(settings), binary.NativeEndian.Uint32(settings[4:])}; got != [2]uint32{mark, mark} {
			t.Errorf("the programs' mark and mask are %#x", got)
		}
	}
	// Behind all that reads the mark on the way in, before all that does on the way out.
	n.Do(t, func() {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader("add table inet other\nadd chain inet other forward { type filter hook forward priority 0; }\n" +
			fmt.Sprintf("add rule inet other forward meta mark set meta mark | %#x", netfilter.DefaultMark))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft (of the package nftables): %v: %s", err, out)
		}
	})
	taken := func() (n uint64) {
		for _, p := range l.Node1.Tenant(l.A1.Tenant.String()).Pods {
			n += p.Connections["plain"]
		}
		return n
	}
	eachFamily(t, func(t *testing.T, family int) {
		before := taken()
		flow{from: l.Outside, to: l.A1}.check(t, family)
		if taken() == before {
			t.Error("a connection from outside has come to the pod past its proxy")
		}
		for _, f := range flows(l) {
			t.Run(f.name, func(t *testing.T) { f.check(t, family) })
		}
	})
}
