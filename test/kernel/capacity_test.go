package kernel

import (
	"encoding/binary"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A map that will be full soon is told of, by name, and what is in it goes on.
func TestNearlyFullIsTold(t *testing.T) {
	l := lab.New(t)
	n := l.Node1
	m, err := ebpf.LoadPinnedMap(filepath.Join(n.PinDir(), "maps", "pods"), nil)
	lab.Check(t, err)
	defer m.Close()
	// Addresses of nobody.
	keys := make([]byte, 0, int(m.MaxEntries())*int(m.KeySize()))
	count := int(m.MaxEntries()) * 91 / 100
	for i := range count {
		key := make([]byte, m.KeySize())
		key[0] = 0xfe
		binary.BigEndian.PutUint32(key[len(key)-4:], uint32(i))
		keys = append(keys, key...)
	}
	value := make([]byte, m.ValueSize())
	for i := range count {
		lab.Check(t, m.Put(keys[i*int(m.KeySize()):(i+1)*int(m.KeySize())], value))
	}
	problem := func() string {
		i, err := n.Inspect()
		lab.Check(t, err)
		return i.Problem
	}
	lab.Eventually(t, "the word of it", func() error {
		if p := problem(); !strings.Contains(p, "map pods") || !strings.Contains(p, "nearly full") || !strings.Contains(p, "move pods") {
			return fmt.Errorf("the problem is %q", p)
		}
		return nil
	})
	flow{from: l.A1, to: l.B2}.check(t, 4)
	for i := range count {
		lab.Check(t, m.Delete(keys[i*int(m.KeySize()):(i+1)*int(m.KeySize())]))
	}
	lab.Eventually(t, "its end", func() error {
		if p := problem(); p != "" {
			return fmt.Errorf("the problem is %q", p)
		}
		return nil
	})
}
