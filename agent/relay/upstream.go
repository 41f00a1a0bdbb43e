package relay

import (
	"context"
	"math/rand/v2"
	"strconv"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// Metadata of each stream to the operator. The operator takes the tenant from
// here, where the agent writes it, and never from Envoy's node.
const (
	MetadataTenant     = "bulkhead-tenant"
	MetadataGeneration = "bulkhead-generation"
)

type upstreamClient = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// upstreamEvent has one field set, or end besides stream.
type upstreamEvent struct {
	stream   upstreamClient
	end      context.CancelFunc // ends stream, so that another one follows
	response *discovery.DeltaDiscoveryResponse
	err      error
}

// Backoff is the time between attempts to open a stream that the operator
// refused or ended: from Min, doubling to Max, each with up to half of jitter.
type Backoff struct {
	Min time.Duration // default 200 ms
	Max time.Duration // default 10 s
}

func (b Backoff) delay(attempt int) time.Duration {
	d := b.Max
	if attempt < 16 {
		d = min(b.Max, b.Min<<attempt)
	}
	return d/2 + rand.N(d/2+1)
}

// upstreamLoop keeps one stream to the operator until ctx ends. It waits while
// there is no connection and reads no faster than its events are taken.
func upstreamLoop(ctx context.Context, client discovery.AggregatedDiscoveryServiceClient, key Key, backoff Backoff, events chan<- upstreamEvent) {
	emit := func(e upstreamEvent) bool {
		select {
		case events <- e:
			return true
		case <-ctx.Done():
			return false
		}
	}
	attempt := 0
	for {
		answered, err := func() (bool, error) {
			ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx,
				MetadataTenant, key.Tenant.String(), MetadataGeneration, strconv.Itoa(key.Generation)))
			defer cancel()
			st, err := client.DeltaAggregatedResources(ctx, grpc.WaitForReady(true))
			if err != nil {
				return false, err
			}
			if !emit(upstreamEvent{stream: st, end: cancel}) {
				return false, ctx.Err()
			}
			answered := false
			for {
				r, err := st.Recv()
				if err != nil {
					return answered, err
				}
				answered = true
				if !emit(upstreamEvent{response: r}) {
					return answered, ctx.Err()
				}
			}
		}()
		if !emit(upstreamEvent{err: err}) {
			return
		}
		if answered {
			attempt = 0
		}
		select {
		case <-time.After(backoff.delay(attempt)):
			attempt++
		case <-ctx.Done():
			return
		}
	}
}
