package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// padding is what fields are called that hold nothing.
const padding = "pad"

// migrateMap makes a map of this build with the entries of a pinned one of
// another layout, in its place. Fields are told by their names; new ones are
// zero, which must always be the closed choice. later is for what is written into
// the old one yet.
func migrateMap(path string, old *ebpf.Map, spec *ebpf.MapSpec) (m *ebpf.Map, later *latecomers, err error) {
	convert, err := conversion(old, spec)
	if err != nil {
		return nil, nil, err
	}
	keys, err := keyConversion(old, spec)
	if err != nil {
		return nil, nil, err
	}
	m, err = ebpf.NewMap(spec)
	if err != nil {
		return nil, nil, fmt.Errorf("create BPF map %s: %w", spec.Name, err)
	}
	later = &latecomers{to: m, convert: convert, keys: keys, had: map[string]bool{}}
	if err = copyEntries(m, old, convert, later.first); err == nil {
		err = replacePin(path, m)
	}
	if err != nil {
		m.Close()
		return nil, nil, err
	}
	return m, later, nil
}

var errOtherFields = errors.New("its fields are others")

// sameFields looks behind the sizes, if the kernel says what is in a map.
func sameFields(m *ebpf.Map, spec *ebpf.MapSpec) error {
	types, err := typesOf(m)
	if err != nil {
		return nil
	}
	for _, t := range []btf.Type{spec.Key, spec.Value} {
		s, ok := t.(*btf.Struct)
		if !ok {
			continue
		}
		var former *btf.Struct
		if err := types.TypeByName(s.Name, &former); err != nil || !sameLayout(former, s) {
			return fmt.Errorf("struct %s: %w", s.Name, errOtherFields)
		}
	}
	return nil
}

// replacePin puts a map in the place of another, without a moment in between.
func replacePin(path string, m *ebpf.Map) error {
	// A dot isn't allowed there.
	next := path + "_next"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pinned map: %w", err)
	}
	if err := m.Pin(next); err != nil {
		return fmt.Errorf("pin BPF map %s: %w", path, err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("replace pinned map: %w", err)
	}
	return nil
}

// lookup returns an entry's value, converted, as Put takes it: of a map that has one for
// each CPU, all of them.
func lookup(m *ebpf.Map, key []byte, convert func([]byte) []byte) (any, error) {
	if m.Type() == ebpf.PerCPUHash {
		var values [][]byte
		if err := m.Lookup(key, &values); err != nil {
			return nil, err
		}
		for i := range values {
			values[i] = convert(values[i])
		}
		return values, nil
	}
	value := make([]byte, m.ValueSize())
	if err := m.Lookup(key, value); err != nil {
		return nil, err
	}
	return convert(value), nil
}

// copyEntries puts what keys returns for an entry's key and converted value, the first of
// them at least; nil is the key itself.
func copyEntries(to, from *ebpf.Map, convert func([]byte) []byte, keys func(key, value []byte) [][]byte) error {
	var last any
	type entry struct {
		key   []byte
		value any
	}
	var further []entry
	// Programs may delete entries meanwhile.
	for range 2 * from.MaxEntries() {
		key := make([]byte, from.KeySize())
		err := from.NextKey(last, key)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			for _, e := range further {
				if err := to.Put(e.key, e.value); err != nil {
					return nil // no room for what may be of no use
				}
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("read pinned map: %w", err)
		}
		last = key
		value, err := lookup(from, key, convert)
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			continue
		case err != nil:
			return fmt.Errorf("read pinned map: %w", err)
		}
		if b, ok := value.([]byte); ok && keys != nil {
			all := keys(key, b)
			key = all[0]
			for _, k := range all[1:] {
				further = append(further, entry{k, value})
			}
		}
		if err := to.Put(key, value); err != nil {
			return fmt.Errorf("copy entry of pinned map: %w", fullError(to, "", err))
		}
	}
	return errors.New("copy entries of pinned map: it changes too fast")
}

// typesOf is what a map says of its keys and values.
func typesOf(m *ebpf.Map) (*btf.Spec, error) {
	handle, err := m.Handle()
	if err != nil {
		return nil, fmt.Errorf("it doesn't say what is in it: %w", err)
	}
	defer handle.Close()
	types, err := handle.Spec(nil)
	if err != nil {
		return nil, fmt.Errorf("read its types: %w", err)
	}
	return types, nil
}

// conversion says how a value of a pinned map becomes one of this build, or why
// it can't.
func conversion(old *ebpf.Map, spec *ebpf.MapSpec) (func([]byte) []byte, error) {
	switch {
	case old.Type() != spec.Type:
		return nil, fmt.Errorf("it is a %s, not a %s", old.Type(), spec.Type)
	case spec.Type != ebpf.Hash && spec.Type != ebpf.PerCPUHash && spec.Type != ebpf.LPMTrie && spec.Type != ebpf.Array:
		return nil, fmt.Errorf("entries of a %s can't be carried over", spec.Type)
	}
	types, err := typesOf(old)
	if err != nil {
		return nil, err
	}
	value, ok := spec.Value.(*btf.Struct)
	if !ok {
		if old.ValueSize() != spec.ValueSize {
			return nil, fmt.Errorf("its values have %d bytes, not %d", old.ValueSize(), spec.ValueSize)
		}
		return func(b []byte) []byte { return b }, nil
	}
	var former *btf.Struct
	if err := types.TypeByName(value.Name, &former); err != nil {
		return nil, fmt.Errorf("find the type of its values: %w", err)
	}
	if former.Size != old.ValueSize() || value.Size != spec.ValueSize {
		return nil, fmt.Errorf("its values, struct %s, have %d bytes, and the map %d", value.Name, former.Size, old.ValueSize())
	}
	fill, err := fields(value, former)
	if err != nil {
		return nil, err
	}
	return func(b []byte) []byte {
		converted := make([]byte, value.Size)
		fill(converted, b)
		return converted
	}, nil
}

// fields says how a struct is filled from a former one, also the structs in it.
func fields(now, former *btf.Struct) (func(to, from []byte), error) {
	var each []func(to, from []byte)
	for _, m := range now.Members {
		for _, f := range former.Members {
			if m.Name != f.Name || m.Name == padding {
				continue
			}
			into, out := m.Offset.Bytes(), f.Offset.Bytes()
			if sameType(f.Type, m.Type) {
				n, _ := btf.Sizeof(m.Type)
				each = append(each, func(to, from []byte) { copy(to[into:], from[out:][:n]) })
				continue
			}
			inner, ok := btf.UnderlyingType(m.Type).(*btf.Struct)
			had, was := btf.UnderlyingType(f.Type).(*btf.Struct)
			if !ok || !was {
				return nil, fmt.Errorf("field %s of its values is of another type", m.Name)
			}
			fill, err := fields(inner, had)
			if err != nil {
				return nil, fmt.Errorf("field %s of its values: %w", m.Name, err)
			}
			each = append(each, func(to, from []byte) { fill(to[into:], from[out:]) })
		}
	}
	return func(to, from []byte) {
		for _, fill := range each {
			fill(to, from)
		}
	}, nil
}

func sameLayout(a, b *btf.Struct) bool {
	if a.Size != b.Size || len(a.Members) != len(b.Members) {
		return false
	}
	for i := range a.Members {
		if a.Members[i].Name != b.Members[i].Name || a.Members[i].Offset != b.Members[i].Offset || !sameType(a.Members[i].Type, b.Members[i].Type) {
			return false
		}
	}
	return true
}

// sameType says whether two fields of a name hold the same.
func sameType(a, b btf.Type) bool {
	a, b = btf.UnderlyingType(a), btf.UnderlyingType(b)
	if s, ok := a.(*btf.Struct); ok {
		t, ok := b.(*btf.Struct)
		return ok && sameLayout(s, t)
	}
	n, err := btf.Sizeof(a)
	if err != nil {
		return false
	}
	m, err := btf.Sizeof(b)
	return err == nil && n == m
}
