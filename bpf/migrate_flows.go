package bpf

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// keyConversion says under which keys of this build an entry of a pinned map is to be, by
// its key and its converted value, the first of them at least; nil is the same one. It
// returns an error if that can't be told.
func keyConversion(old *ebpf.Map, spec *ebpf.MapSpec) (func(key, value []byte) [][]byte, error) {
	key, ok := spec.Key.(*btf.Struct)
	if !ok {
		if old.KeySize() != spec.KeySize {
			return nil, fmt.Errorf("its keys have %d bytes, not %d", old.KeySize(), spec.KeySize)
		}
		return nil, nil
	}
	types, err := typesOf(old)
	if err != nil {
		return nil, err
	}
	var former *btf.Struct
	if err := types.TypeByName(key.Name, &former); err != nil {
		return nil, fmt.Errorf("find the type of its keys: %w", err)
	}
	if former.Size == old.KeySize() && sameLayout(former, key) {
		return nil, nil
	}
	const side = "side"
	had := &btf.Struct{Size: key.Size}
	for _, m := range key.Members {
		if m.Name == side {
			had.Size -= 4
		} else {
			had.Members = append(had.Members, m)
		}
	}
	if spec.Name != datapathMapFlows || former.Size != old.KeySize() || !sameLayout(former, had) {
		return nil, fmt.Errorf("its keys, struct %s, have other fields", key.Name)
	}
	var state *btf.Struct
	if err := types.TypeByName(spec.Value.TypeName(), &state); err != nil {
		return nil, fmt.Errorf("find the type of its values: %w", err)
	}
	knowsLed := false
	for _, m := range state.Members {
		knowsLed = knowsLed || m.Name == "led"
	}
	return func(key, value []byte) (all [][]byte) {
		var f datapathFlow
		var s datapathFlowState
		// Both have the sizes of this build.
		_ = binary.Read(bytes.NewReader(append(bytes.Clone(key), 0, 0, 0, 0)), binary.NativeEndian, &f)
		_ = binary.Read(bytes.NewReader(value), binary.NativeEndian, &s)
		for _, side := range sidesOf(f, s, knowsLed) {
			all = append(all, binary.NativeEndian.AppendUint32(bytes.Clone(key), uint32(side)))
		}
		return all
	}, nil
}

// sidesOf are where a flow can be that a former version wrote down without its side. What
// the agent had read may be on either.
func sidesOf(f datapathFlow, s datapathFlowState, knowsLed bool) []datapathSide {
	const pod, wire = datapathSideSIDE_POD, datapathSideSIDE_WIRE
	dialled := s.Led != 0 && s.Outbound != 0
	switch {
	case s.Tenant == 0:
		return []datapathSide{wire}
	case (f.PodPort == hbonePort || f.PeerPort == hbonePort) && !dialled:
		return []datapathSide{wire} // a tunnel
	case s.Learned == 0 || !knowsLed:
		return []datapathSide{wire, pod}
	case dialled || s.Led == 0 && s.Outbound == 0: // the pod opened it, or its tenant, to the pod
		return []datapathSide{pod}
	}
	return []datapathSide{wire}
}
