package figures

import (
	"net/url"
	"strconv"
	"strings"
)

// FirstByteBuckets and LatencyBuckets are how many a histogram has.
const (
	FirstByteBuckets = 16
	LatencyBuckets   = 16
)

// Counts only ever rise while a process lives.
type Counts struct {
	// Of the kernel.
	Connections, Unanswered, Resets uint64
	FirstByte                       [FirstByteBuckets]uint64
	// Of Envoy.
	Upstreams, UpstreamFailures                uint64
	Handshakes, HandshakeFailures              uint64
	Tunnelled, TunnelConnections, TunnelErrors uint64
	Requests, RequestConnections, ServerErrors uint64
	Latency                                    [LatencyBuckets]uint64
	// Work is what the process took: connections, tunnelled ones, requests.
	Work, Bytes uint64
	// CPU in milliseconds.
	CPU uint64
}

// Levels rise and fall.
type Levels struct {
	OpenConnections, OpenRequestConnections int64
	OpenTunnelConnections                   int64
	PrivateBytes                            int64
}

// passthrough is the cluster of what goes out of the mesh.
const passthrough = "passthrough"

// AdminPath asks Envoy for what ReadEnvoy reads, and for nothing else: what was never
// used has no line.
var AdminPath = "/stats?usedonly&histogram_buckets=disjoint&filter=" + url.QueryEscape(
	`^(listener\.[^.]+\.(downstream_cx_active|downstream_cx_total|ssl\.(handshake|connection_error|fail_verify_[a-z_]+))`+
		`|cluster\..*\.(upstream_cx_total|upstream_cx_connect_fail|ssl\.(handshake|connection_error|fail_verify_[a-z_]+))`+
		`|cluster\.`+passthrough+`\.(upstream_rq_total|upstream_cx_connect_attempts_exceeded)`+
		`|http\.(inbound|l7)\.downstream_(rq_completed|rq_5xx|rq_time|cx_total|cx_active|cx_rx_bytes_total|cx_tx_bytes_total)`+
		`|tcp\.tcp\.downstream_cx_(rx|tx)_bytes_total)$`)

// ReadEnvoy reads what Envoy answered. It is the proxy's own word, which may be
// anything: what can't be read counts for nothing.
func ReadEnvoy(body string, c *Counts, l *Levels) {
	for line := range strings.Lines(body) {
		// Names of clusters have colons.
		i := strings.LastIndex(line, ": ")
		if i < 0 {
			continue
		}
		name, value := line[:i], strings.TrimSpace(line[i+2:])
		if name == "http.l7.downstream_rq_time" {
			readHistogram(value, &c.Latency)
			continue
		}
		n, err := strconv.ParseUint(value, 10, 62)
		if err != nil {
			continue
		}
		if kind, rest, _ := strings.Cut(name, "."); kind == "listener" || kind == "cluster" {
			readConnections(kind, rest, n, c, l)
			continue
		}
		switch name {
		case "http.inbound.downstream_rq_completed":
			c.Tunnelled, c.Work = c.Tunnelled+n, c.Work+n
		case "http.inbound.downstream_rq_5xx":
			c.TunnelErrors += n
		case "http.inbound.downstream_cx_total":
			c.TunnelConnections += n
		case "http.inbound.downstream_cx_active":
			l.OpenTunnelConnections += int64(n)
		case "http.l7.downstream_rq_completed":
			c.Requests, c.Work = c.Requests+n, c.Work+n
		case "http.l7.downstream_rq_5xx":
			c.ServerErrors += n
		case "http.l7.downstream_cx_total":
			c.RequestConnections += n
		case "http.l7.downstream_cx_active":
			l.OpenRequestConnections += int64(n)
		case "http.inbound.downstream_cx_rx_bytes_total", "http.inbound.downstream_cx_tx_bytes_total",
			"http.l7.downstream_cx_rx_bytes_total", "http.l7.downstream_cx_tx_bytes_total",
			"tcp.tcp.downstream_cx_rx_bytes_total", "tcp.tcp.downstream_cx_tx_bytes_total":
			c.Bytes += n
		}
	}
}

// delivers reports whether a cluster leads to the tenant's own pods.
func delivers(cluster string) bool {
	return cluster == "deliver" || cluster == "deliver-node" || cluster == "deliver-http"
}

// readConnections reads a line of a listener or of a cluster.
func readConnections(kind, name string, n uint64, c *Counts, l *Levels) {
	if strings.HasPrefix(name, "admin.") || strings.HasPrefix(name, "xds.") {
		return
	}
	stat := name[strings.LastIndexByte(name, '.')+1:]
	switch {
	case stat == "handshake":
		c.Handshakes += n
	case stat == "connection_error", strings.HasPrefix(stat, "fail_verify_"):
		c.HandshakeFailures += n
	case kind == "cluster" && delivers(strings.TrimSuffix(name, "."+stat)):
		// Who sent the connection chose the port, and the pod whether it listens.
	case kind == "cluster" && strings.TrimSuffix(name, "."+stat) == passthrough:
		// Not by attempts: how many a connection has is its listener's, and may be another
		// number in the process that it is compared with.
		switch stat {
		case "upstream_rq_total": // connected
			c.Upstreams += n
		case "upstream_cx_connect_attempts_exceeded": // not even at the last
			c.Upstreams, c.UpstreamFailures = c.Upstreams+n, c.UpstreamFailures+n
		}
	case kind == "cluster" && stat == "upstream_cx_total":
		c.Upstreams += n
	case kind == "cluster" && stat == "upstream_cx_connect_fail":
		c.UpstreamFailures += n
	case kind == "listener" && stat == "downstream_cx_active":
		l.OpenConnections += int64(n)
	case kind == "listener" && stat == "downstream_cx_total":
		c.Work += n
	}
}

// readHistogram reads "B0.5(1,6) B1(0,2)": what the last seconds added, and all. What
// lies beyond our last bound comes to the rest.
func readHistogram(value string, into *[LatencyBuckets]uint64) {
	for i, bucket := range strings.Fields(value) {
		_, all, ok := strings.Cut(strings.TrimSuffix(bucket, ")"), ",")
		n, err := strconv.ParseUint(all, 10, 62)
		if ok && err == nil {
			into[min(i, LatencyBuckets-1)] += n
		}
	}
}
