package relay

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
)

// TestRelayBoundsLog: a proxy that refuses everything, for ever and with many
// words, fills neither the log nor what is kept of it.
func TestRelayBoundsLog(t *testing.T) {
	var log bytes.Buffer // closed before it is read
	f := setUp(t, func(o *Options) { o.Log = slog.New(slog.NewJSONHandler(&log, nil)) })
	p := f.proxy(teamA)
	p.subscribe(TypeCluster, "vip|a")
	up := f.op.stream()
	up.await(t, TypeCluster, "vip|a")
	const refusals = 2000
	for i := range refusals {
		up.send(t, fmt.Sprint(i), resource(TypeCluster, fmt.Sprintf("vip|%d", i), "1"), resource(TypeCluster, "vip|a", fmt.Sprint(i)))
		r := receive(t, "response", p.responses)
		p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResponseNonce: r.Nonce, ErrorDetail: &status.Status{Code: 13, Message: strings.Repeat("no\n", 2_000)}})
		receive(t, "refusal", up.requests)
	}
	state := f.relay.State(Key{Tenant: teamA})
	if n := len(state.Rejections); n == 0 || n > maxRejections {
		t.Errorf("%d rejections are kept", n)
	}
	for _, r := range state.Rejections {
		if len(r.Message) > 300 {
			t.Errorf("%d bytes are kept of what a proxy says", len(r.Message))
		}
	}
	f.relay.Shutdown()
	lines := strings.Count(log.String(), "proxy rejected configuration")
	if lines < 10 || lines > 2*linesAtOnce || log.Len() > 2*linesAtOnce*4096 {
		t.Errorf("%d refusals made %d lines of log, %d bytes in all", refusals, lines, log.Len())
	}
}
