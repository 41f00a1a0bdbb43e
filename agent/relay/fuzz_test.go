package relay

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
)

// fakeDownstream takes what is sent to a proxy.
type fakeDownstream struct {
	downstream
	sent int
}

func (d *fakeDownstream) Send(*discovery.DeltaDiscoveryResponse) error { d.sent++; return nil }

// fakeUpstream checks what would reach the operator.
type fakeUpstream struct {
	upstreamClient
	t *testing.T
}

func (u *fakeUpstream) Send(r *discovery.DeltaDiscoveryRequest) error {
	kind := kinds[r.TypeUrl]
	if kind.short == "" || r.TypeUrl == TypeSecret {
		u.t.Errorf("type %q reaches the operator", r.TypeUrl)
	}
	for _, n := range append(r.ResourceNamesSubscribe, r.ResourceNamesUnsubscribe...) {
		if n != wildcard && checkName(n) != nil {
			u.t.Errorf("name %q reaches the operator", n)
		}
	}
	if r.Node != nil && r.Node.Id != "team-a/0" {
		u.t.Errorf("node %v reaches the operator", r.Node)
	}
	if m := r.ErrorDetail.GetMessage(); m != printable(m, 4096) {
		u.t.Errorf("message %q reaches the operator", m)
	}
	return nil
}

func (u *fakeUpstream) CloseSend() error { return io.EOF }

// conversation writes messages as FuzzRequests reads them.
func conversation(rs ...*discovery.DeltaDiscoveryRequest) []byte {
	var b bytes.Buffer
	for _, r := range rs {
		m, _ := proto.Marshal(r)
		binary.Write(&b, binary.BigEndian, uint16(len(m)))
		b.Write(m)
	}
	return b.Bytes()
}

// FuzzRequests is all that a tenant's Envoy can say once it is somebody else's: any
// messages in any order. The relay must go on, keep its bounds, and pass nothing on
// that an Envoy wouldn't send.
func FuzzRequests(f *testing.F) {
	f.Add(conversation(
		&discovery.DeltaDiscoveryRequest{Node: envoyNode, TypeUrl: TypeCluster},
		&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResponseNonce: "1"},
		&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResourceNamesSubscribe: []string{"vip|10.96.0.1:80", "*"}},
		&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResourceNamesUnsubscribe: []string{"vip|10.96.0.1:80", "*", "*"}},
		&discovery.DeltaDiscoveryRequest{TypeUrl: TypeSecret, ResourceNamesSubscribe: []string{"ROOTCA", "spiffe://td/ns/team-b/sa/x"}},
	))
	f.Add(conversation(
		&discovery.DeltaDiscoveryRequest{TypeUrl: TypeListener, InitialResourceVersions: map[string]string{"outbound": "1", "x": ""}},
		&discovery.DeltaDiscoveryRequest{TypeUrl: TypeListener, ResponseNonce: "1", ErrorDetail: &status.Status{Code: 13, Message: "a\nb\x00\u2028"}},
		&discovery.DeltaDiscoveryRequest{TypeUrl: TypeEndpoints, ResourceNamesSubscribe: []string{""}},
	))
	f.Add(conversation(&discovery.DeltaDiscoveryRequest{TypeUrl: "evil"}))
	f.Add([]byte{0, 3, 0xff, 0xff, 0xff})
	r := New(Options{Secrets: newSecrets(), Log: slog.New(slog.DiscardHandler), NamesPerSecond: 1e9})
	f.Fuzz(func(t *testing.T, in []byte) {
		down := &fakeDownstream{}
		e := &endpoint{key: Key{Tenant: teamA}, socket: Socket{Version: "1.40.0"}, limiter: rate.NewLimiter(rate.Inf, 1), log: slog.DiscardHandler, rejected: map[rejectionKey]Rejection{}}
		r.endpoints[e.key] = e
		s := newStream(r, e, down)
		s.up, s.epoch, s.started = &fakeUpstream{t: t}, 1, map[string]bool{}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		for len(in) >= 2 {
			n := int(binary.BigEndian.Uint16(in))
			n, in = min(n, len(in)-2), in[2:]
			m := &discovery.DeltaDiscoveryRequest{}
			err := proto.Unmarshal(in[:n], m)
			in = in[n:]
			if err != nil {
				continue
			}
			if s.request(ctx, m) != nil {
				break // the stream would end
			}
			// The operator answers what the proxy asked for, so that it has something to
			// acknowledge or refuse.
			if sub := s.subs[m.TypeUrl]; sub != nil && m.TypeUrl != TypeSecret && len(s.unacked) < maxUnacked {
				name := append(m.ResourceNamesSubscribe, "outbound")[0]
				s.forward(&discovery.DeltaDiscoveryResponse{TypeUrl: m.TypeUrl, Nonce: "op", Resources: []*discovery.Resource{resource(m.TypeUrl, name, "1")}})
			}
		}
		if len(s.unacked) > maxUnacked {
			t.Errorf("%d unanswered responses are kept", len(s.unacked))
		}
		for typeURL, sub := range s.subs {
			bytes := 0
			for name := range sub.names {
				bytes += len(name)
			}
			if bytes != sub.bytes || bytes > maxNameBytes {
				t.Errorf("%s: %d bytes of names, %d counted", typeURL, bytes, sub.bytes)
			}
			if len(sub.names) > maxNames || len(sub.held) > 2*maxNames+maxWildcard || len(sub.vain) > len(sub.names) || len(sub.waiting) > len(sub.names)+1 {
				t.Errorf("%s: %d names, %d held, %d vain, %d waiting", typeURL, len(sub.names), len(sub.held), len(sub.vain), len(sub.waiting))
			}
		}
	})
}
