package kernel

import (
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/nftables"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A map that will be full soon is told of, by name, and what is in it goes on.
func TestNearlyFullIsTold(t *testing.T) { eachRedirection(t, testNearlyFullIsTold) }

func testNearlyFullIsTold(t *testing.T, l *lab.Lab) {
	n := l.Node1
	name, fill := "BPF map pods", fillMap
	if n.Redirection == v1alpha1.RedirectionNetfilter {
		name, fill = "nftables set learn4", fillSet
	}
	empty := fill(t, n)
	problem := func() string {
		i, err := n.Inspect()
		lab.Check(t, err)
		return i.Problem
	}
	lab.Eventually(t, "the word of it", func() error {
		if p := problem(); !strings.Contains(p, name) || !strings.Contains(p, "nearly full") || !strings.Contains(p, "move pods") {
			return fmt.Errorf("the problem is %q", p)
		}
		return nil
	})
	flow{from: l.A1, to: l.B2}.check(t, 4)
	empty()
	lab.Eventually(t, "its end", func() error {
		if p := problem(); p != "" {
			return fmt.Errorf("the problem is %q", p)
		}
		return nil
	})
}

// almostAll is how many of a map's entries the tests fill, with addresses of nobody.
func almostAll(size uint32) uint32 { return size * 91 / 100 }

func fillMap(t *testing.T, n *lab.Node) (empty func()) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(n.PinDir(), "maps", "pods"), nil)
	lab.Check(t, err)
	t.Cleanup(func() { m.Close() })
	key := func(i uint32) []byte {
		k := make([]byte, m.KeySize())
		k[0] = 0xfe
		binary.BigEndian.PutUint32(k[len(k)-4:], i)
		return k
	}
	value := make([]byte, m.ValueSize())
	for i := range almostAll(m.MaxEntries()) {
		lab.Check(t, m.Put(key(i), value))
	}
	return func() {
		for i := range almostAll(m.MaxEntries()) {
			lab.Check(t, m.Delete(key(i)))
		}
	}
}

func fillSet(t *testing.T, n *lab.Node) (empty func()) {
	const size = 4096
	set := &nftables.Set{Table: &nftables.Table{Name: "bulkhead", Family: nftables.TableFamilyNetdev}, Name: "learn4", KeyType: nftables.TypeIPAddr}
	var elements []nftables.SetElement
	for i := range almostAll(size) {
		elements = append(elements, nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, 198<<24|18<<16|i)})
	}
	change := func(f func(*nftables.Conn) func(*nftables.Set, []nftables.SetElement) error) {
		n.Do(t, func() {
			c := &nftables.Conn{}
			for part := range slices.Chunk(elements, 256) {
				lab.Check(t, f(c)(set, part))
			}
			lab.Check(t, c.Flush())
		})
	}
	change(func(c *nftables.Conn) func(*nftables.Set, []nftables.SetElement) error { return c.SetAddElements })
	return func() {
		change(func(c *nftables.Conn) func(*nftables.Set, []nftables.SetElement) error { return c.SetDeleteElements })
	}
}
