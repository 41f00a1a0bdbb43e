package xds

import (
	"testing"
	"time"

	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
)

// The end of tunnels is the network's to say, for each identity that is served.
func TestServersLetGoOfTunnels(t *testing.T) {
	for age, want := range map[time.Duration]time.Duration{0: 30 * time.Minute, 150 * time.Second: 150 * time.Second} {
		n := testNetwork
		n.TunnelAge = age
		listeners, err := Listeners(n, testProxy)
		if err != nil {
			t.Fatal(err)
		}
		managers := 0
		for _, l := range listeners {
			if l.GetName() != listenerInbound {
				continue
			}
			for _, c := range l.GetFilterChains() {
				for _, f := range c.GetFilters() {
					m := &hcmv3.HttpConnectionManager{}
					if !f.GetTypedConfig().MessageIs(m) {
						continue
					}
					if err := f.GetTypedConfig().UnmarshalTo(m); err != nil {
						t.Fatal(err)
					}
					managers++
					if got := m.GetCommonHttpProtocolOptions().GetMaxConnectionDuration().AsDuration(); got != want {
						t.Errorf("with %s, chain %s has %s, want %s", age, c.GetName(), got, want)
					}
				}
			}
		}
		if managers < 2 {
			t.Errorf("%d chains, want one for each identity", managers)
		}
	}
}
