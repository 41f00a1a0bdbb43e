package steer

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestLacking(t *testing.T) {
	says := func(text string) func() error { return func() error { return errors.New(text) } }
	fine := Feature{Name: "sockets", Since: "2.0", Probe: func() error { return nil }}
	if err := Lacking([]Feature{fine, fine}); err != nil {
		t.Errorf("nothing lacks: %v", err)
	}
	err := Lacking([]Feature{fine, {Name: "time machines", Since: "9.1", Probe: says("no flux\nand more")}, {Name: "wings", Since: "7", Probe: says("no air")}})
	if err == nil || !strings.HasSuffix(err.Error(), "lacks time machines, in Linux since 9.1 (no flux); wings, in Linux since 7 (no air)") {
		t.Errorf("it says %v", err)
	}
}

func TestNearlyFull(t *testing.T) {
	err := NearlyFull([]Usage{{Map: "map a", Entries: 90, Max: 100}, {Map: "map b", Entries: 91, Max: 100}, {Map: "map c", Entries: 100, Max: 100}})
	if !errors.Is(err, ErrNearlyFull) || strings.Contains(err.Error(), "map a") || !strings.Contains(err.Error(), "map b has 91 of 100 entries") || !strings.Contains(err.Error(), "map c") {
		t.Errorf("it says %v", err)
	}
	if err := NearlyFull([]Usage{{Map: "map a", Entries: 90, Max: 100}}); err != nil {
		t.Errorf("nine tenths: %v", err)
	}
}

func TestExclusion(t *testing.T) {
	for text, e := range map[string]Exclusion{
		"outbound 10.0.0.0/8:443": {Port: 443, Peer: netip.MustParsePrefix("10.0.0.0/8")}, "inbound *:8080": {Inbound: true, Port: 8080}, "outbound *": {},
	} {
		if got := e.String(); got != text || e.Validate() != nil {
			t.Errorf("%q, want %q; %v", got, text, e.Validate())
		}
	}
	for _, p := range []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr("10.0.0.1"), 8), netip.MustParsePrefix("::ffff:10.0.0.0/104"), netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), 40)} {
		if (Exclusion{Peer: p}).Validate() == nil {
			t.Errorf("%s is accepted", p)
		}
	}
}
