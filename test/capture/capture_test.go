package capture

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

func packet4(payload string, mutate func([]byte)) []byte {
	b := make([]byte, 40+len(payload))
	b[0], b[9], b[32] = 0x45, 6, 5<<4
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	copy(b[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	binary.BigEndian.PutUint16(b[20:], 40000)
	binary.BigEndian.PutUint16(b[22:], 15008)
	copy(b[40:], payload)
	if mutate != nil {
		mutate(b)
	}
	return b
}

func TestParse(t *testing.T) {
	want := Flow{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), 40000, 15008}
	flow, payload, ok := parse(packet4("hello", nil))
	if !ok || flow != want || string(payload) != "hello" {
		t.Errorf("got %+v %q %v", flow, payload, ok)
	}
	padded := append(packet4("", nil), 0, 0, 0, 0, 0, 0)
	if _, payload, ok := parse(padded); !ok || len(payload) != 0 {
		t.Errorf("Ethernet padding counted as payload: %q %v", payload, ok)
	}
	for name, b := range map[string][]byte{
		"empty":        nil,
		"short":        packet4("", nil)[:30],
		"udp":          packet4("x", func(b []byte) { b[9] = 17 }),
		"fragment":     packet4("x", func(b []byte) { b[7] = 1 }),
		"tcp offset":   packet4("x", func(b []byte) { b[32] = 15 << 4 }),
		"ip header":    packet4("x", func(b []byte) { b[0] = 0x41 }),
		"not ip":       {0x12, 0x34},
		"ipv6 cut off": {0x60, 0, 0, 0},
	} {
		if flow, _, ok := parse(b); ok {
			t.Errorf("%s: parsed as %+v", name, flow)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(packet4("x", nil))
	f.Fuzz(func(t *testing.T, b []byte) { parse(b) })
}
