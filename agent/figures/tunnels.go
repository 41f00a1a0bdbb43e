package figures

import (
	"net/url"
	"strconv"
	"strings"
)

// TunnelHosts are what a process has for tunnels to endpoints.
type TunnelHosts struct {
	// Hosts are endpoints that it has a place for, of 16,384.
	Hosts uint64
	// Refused are connections that it closed because all places were taken.
	Refused uint64
}

const (
	hostsStat    = "dns_cache.tunnels.num_hosts"
	overflowStat = "dns_cache.tunnels.host_overflow"
)

// TunnelHostsPath asks Envoy for what ReadTunnelHosts reads.
var TunnelHostsPath = "/stats?filter=" + url.QueryEscape(`^dns_cache\.tunnels\.(num_hosts|host_overflow)$`)

// ReadTunnelHosts reads what Envoy answered. It is the proxy's own word, as for ReadEnvoy.
func ReadTunnelHosts(body string) (t TunnelHosts) {
	for line := range strings.Lines(body) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		n, err := strconv.ParseUint(value, 10, 62)
		if err != nil {
			continue
		}
		switch name {
		case hostsStat:
			t.Hosts = n
		case overflowStat:
			t.Refused = n
		}
	}
	return t
}
