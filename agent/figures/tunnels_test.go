package figures

import "testing"

func TestReadTunnelHosts(t *testing.T) {
	for body, want := range map[string]TunnelHosts{
		"dns_cache.tunnels.host_overflow: 7\ndns_cache.tunnels.num_hosts: 16384\n": {16384, 7},
		"dns_cache.tunnels.num_hosts: 3":                                           {3, 0},
		// Whoever has taken a proxy over says what they like.
		"dns_cache.tunnels.num_hosts: -1\ndns_cache.tunnels.host_overflow: 99999999999999999999\n": {},
		"dns_cache.tunnels.host_overflow: 7 8\ndns_cache.other.num_hosts: 5\n: \n\n":               {},
		"": {},
	} {
		if got := ReadTunnelHosts(body); got != want {
			t.Errorf("%q is read as %+v, want %+v", body, got, want)
		}
	}
}
