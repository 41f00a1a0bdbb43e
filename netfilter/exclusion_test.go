package netfilter

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// The kernel takes no ranges that overlap: of those of a port only the widest are left.
func TestExclusionKeys(t *testing.T) {
	keys := keysOf(7, []steer.Exclusion{
		{Peer: prefix("10.1.0.0/16")}, {Peer: prefix("10.0.0.0/8")}, {Peer: prefix("10.0.0.0/16")}, {Peer: prefix("10.1.0.0/16"), Port: 443},
		{Peer: prefix("11.0.0.0/30"), Port: 443}, {Peer: prefix("fd00::/126"), Inbound: true}, {Inbound: true, Port: 80}, {Inbound: true, Port: 80, Peer: prefix("10.0.0.0/8")},
	})
	var got []string
	for set, ranges := range keys {
		for first, last := range ranges {
			length := len(first) - 8
			a, _ := netip.AddrFromSlice([]byte(first[8:]))
			b, _ := netip.AddrFromSlice([]byte(last[8:]))
			if length != 4 && length != 16 || first[:8] != last[:8] || first[:4] != string(native(7)) {
				t.Errorf("%s: %x to %x", set, first, last)
			}
			got = append(got, set+" "+netip.AddrPortFrom(a, binary.BigEndian.Uint16([]byte(first[4:]))).String()+" "+b.String())
		}
	}
	slices.Sort(got)
	want := []string{
		"excluded_in4 0.0.0.0:80 255.255.255.255", "excluded_in6 [::]:80 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "excluded_in6 [fd00::]:0 fd00::3",
		"excluded_out4 10.0.0.0:0 10.255.255.255", "excluded_out4 10.1.0.0:443 10.1.255.255", "excluded_out4 11.0.0.0:443 11.0.0.3",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A pod's exclusions become others in one step, also such that overlap with the former
// ones, by this process or the next, and go with it.
func TestExclusionsChange(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, d.UpdateTenant(tenant(t, 1)))
		a, b := pod(t, "a", 1, "10.0.0.1"), pod(t, "b", 1, "10.0.0.2")
		b.Exclusions = []steer.Exclusion{{Peer: prefix("10.0.0.0/8")}}
		check(t, d.UpdatePod(b))
		elements := func(set string) (list []nftables.SetElement) {
			c, err := open(0)
			check(t, err)
			list, err = c.GetSetElements(d.sets[set])
			check(t, err)
			return list
		}
		for _, c := range []struct {
			exclusions []steer.Exclusion
			bypass     bool
			out, in    int
		}{
			{[]steer.Exclusion{{Peer: prefix("10.0.0.0/16")}, {Peer: prefix("10.1.0.0/16"), Inbound: true}}, false, 1, 1},
			{[]steer.Exclusion{{Peer: prefix("10.0.0.0/8")}}, false, 1, 0},
			{[]steer.Exclusion{{Peer: prefix("10.0.0.0/8")}, {Peer: prefix("10.0.0.0/9")}, {Port: 80}}, true, 2, 0},
			{[]steer.Exclusion{{Peer: prefix("10.0.0.0/9")}, {Peer: prefix("10.128.0.0/9")}}, false, 2, 0},
			{nil, true, 0, 0}, {nil, false, 0, 0},
			{[]steer.Exclusion{{Peer: prefix("10.0.0.0/8")}, {Peer: prefix("10.0.0.0/8"), Inbound: true}}, true, 1, 1},
		} {
			for range 2 {
				a.Exclusions, a.Bypass = c.exclusions, c.bypass
				check(t, d.UpdatePod(a))
				// The other pod's stay.
				if out, in := len(elements(setExcludedOut+"4")), len(elements(setExcludedIn+"4")); out != c.out+1 || in != c.in {
					t.Errorf("%v: %d and %d ranges, want %d and %d", c.exclusions, out, in, c.out+1, c.in)
				}
				for set, ranges := range keysOf(uint32(a.Ifindex), c.exclusions) {
					for _, e := range elements(set) {
						if last, ok := ranges[string(e.Key)]; ok && last == string(e.KeyEnd) {
							delete(ranges, string(e.Key))
						}
					}
					if len(ranges) > 0 {
						t.Errorf("%v: %s lacks %x", c.exclusions, set, ranges)
					}
				}
				if n := len(elements(setBypassed)); n == 1 != c.bypass {
					t.Errorf("%d pods are bypassed", n)
				}
				if n := len(elements(setExempt)); n == 2 != (c.bypass || len(c.exclusions) > 0) {
					t.Errorf("%v: %d pods are exempt", c.exclusions, n)
				}
				d, err = Open(Options{})
				check(t, err)
			}
		}
		check(t, errors.Join(d.DeletePod("a"), d.DeletePod("b")))
		for _, set := range []string{setExcludedOut + "4", setExcludedOut + "6", setExcludedIn + "4", setExempt, setBypassed} {
			if n := len(elements(set)); n > 0 {
				t.Errorf("%d elements of %s are left", n, set)
			}
		}
	})
}
