package agent

import "testing"

// The steering's mark is one bit, and not one of those that Netfilter has for itself.
func TestMark(t *testing.T) {
	for mark, ok := range map[uint32]bool{0: true, 4: true, 0x1000: true, 1 << 31: true, 1: false, 2: false, 3: false, 0x3000: false} {
		if _, err := (Options{Node: "n", Mark: mark}).withDefaults(); (err == nil) != ok {
			t.Errorf("%#x: %v", mark, err)
		}
	}
}
