package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// latecomers are connections that the programs of a former build write down in their own
// map, after it was carried over and before they are replaced: without them, the next packet
// of one would go elsewhere than its SYN.
type latecomers struct {
	from, to *ebpf.Map
	convert  func([]byte) []byte
	keys     func(key, value []byte) [][]byte
	// had are the keys that were copied already: what has ended since isn't to come back.
	had map[string]bool
}

// first is what copyEntries asks for keys.
func (l *latecomers) first(key, value []byte) [][]byte {
	l.had[string(key)] = true
	if l.keys == nil {
		return [][]byte{key}
	}
	return l.keys(key, value)
}

func (l *latecomers) copy() error {
	var last any
	// Programs may delete entries meanwhile.
	for range 2 * l.from.MaxEntries() {
		key := make([]byte, l.from.KeySize())
		switch err := l.from.NextKey(last, key); {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return nil
		case err != nil:
			return err
		}
		last = key
		if l.had[string(key)] {
			continue
		}
		value := make([]byte, l.from.ValueSize())
		switch err := l.from.Lookup(key, value); {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			continue
		case err != nil:
			return err
		}
		value = l.convert(value)
		for _, k := range l.first(key, value) {
			if err := l.to.Update(k, value, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
				return fmt.Errorf("copy entry of pinned map: %w", fullError(l.to, datapathMapFlows, err))
			}
		}
	}
	return errors.New("it changes too fast")
}

// copyLate copies what has come since the last time.
func (d *Datapath) copyLate() {
	if d.late == nil {
		return
	}
	if err := d.late.copy(); err != nil {
		d.log.Warn("Connections that began while programs were replaced may end", "error", err)
	}
}

func (d *Datapath) endLate() {
	if d.late != nil {
		d.late.from.Close()
		d.late = nil
	}
}
