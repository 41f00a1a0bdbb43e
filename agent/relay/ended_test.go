package relay

import (
	"io"
	"log/slog"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// endedUpstream is a stream that the operator ended as soon as it began, as it does to
// a tenant that it doesn't know any more.
type endedUpstream struct{ upstreamClient }

func (endedUpstream) Send(*discovery.DeltaDiscoveryRequest) error { return io.EOF }

// An operator's stream that ends while it is told what the proxy has, of several types,
// ends nothing else: the proxy has its subscriptions, and the next stream is told all.
func TestStreamEndsWhileItIsTold(t *testing.T) {
	r := New(Options{Secrets: newSecrets(), Log: slog.New(slog.DiscardHandler)})
	s := newStream(r, &endpoint{key: Key{Tenant: teamA}, log: slog.DiscardHandler}, &fakeDownstream{})
	for _, typeURL := range []string{TypeListener, TypeCluster, TypeRoute} {
		s.subs[typeURL] = newSubscription()
		must(s.subs[typeURL].apply(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"one"}}, true))
	}
	if err := s.event(upstreamEvent{stream: endedUpstream{}}); err != nil || s.up != nil {
		t.Fatalf("after it ended: stream %v, error %v", s.up, err)
	}
	told := &countingUpstream{}
	if err := s.event(upstreamEvent{stream: told}); err != nil || told.n != len(s.subs) {
		t.Errorf("the next one is told %d types, want %d; error %v", told.n, len(s.subs), err)
	}
}

type countingUpstream struct {
	upstreamClient
	n int
}

func (u *countingUpstream) Send(*discovery.DeltaDiscoveryRequest) error { u.n++; return nil }
