package control

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/xds"
)

// startPatience is for how long all streams together may take to have what they use.
const startPatience = 4 * time.Minute

// fleet is the agents with their streams.
type fleet struct {
	conns   []*grpc.ClientConn
	cancel  context.CancelFunc
	streams []*stream
	// acks has one for each later version that a stream acknowledged.
	acks chan ack
	// ended has the error of each stream that ended by itself.
	ended chan error
	// others counts the bytes that came to streams for services that they don't use.
	others atomic.Int64
}

type ack struct {
	stream int
	name   string
	bytes  int
	at     time.Time
}

// stream is one proxy's.
type stream struct {
	uses    map[string]bool // names
	missing atomic.Int64    // of their clusters and endpoints, that didn't come yet
	ready   chan struct{}   // closed when none is missing
}

func name(service int) string { return fmt.Sprintf("vip|%s:15001", vip(service)) }

// connect opens a stream for each node and tenant, which use some services each, and
// returns when all have what they use.
func connect(b *testing.B, path string, nodes, tenants int, uses func(stream int) []int) *fleet {
	b.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	f := &fleet{cancel: cancel, acks: make(chan ack, 1<<20), ended: make(chan error, nodes*tenants)}
	for node := range nodes {
		cc, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithReadBufferSize(8<<10), grpc.WithWriteBufferSize(8<<10))
		if err != nil {
			b.Fatal(err)
		}
		f.conns = append(f.conns, cc)
		for t := range tenants {
			if err := f.open(ctx, cc, node, t, uses(len(f.streams))); err != nil {
				f.close()
				b.Fatalf("open stream %d of node %d: %v", t, node, err)
			}
		}
	}
	f.wait(b)
	return f
}

func (f *fleet) open(ctx context.Context, cc *grpc.ClientConn, node, tenant int, uses []int) error {
	s, n := &stream{uses: map[string]bool{}, ready: make(chan struct{})}, len(f.streams)
	f.streams = append(f.streams, s)
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(metadata.AppendToOutgoingContext(ctx,
		xds.MetadataTenant, tenantOf(tenant).String(), xds.MetadataGeneration, "0", "node", fmt.Sprintf("node-%d", node)))
	if err != nil {
		return err
	}
	var names []string
	for _, i := range uses {
		names = append(names, name(i))
		s.uses[name(i)] = true
	}
	s.missing.Store(int64(2 * len(s.uses)))
	for _, r := range []*discoveryv3.DeltaDiscoveryRequest{
		{TypeUrl: xds.TypeCluster, ResourceNamesSubscribe: append([]string{"*"}, names...)},
		{TypeUrl: xds.TypeListener, ResourceNamesSubscribe: []string{"*"}},
		{TypeUrl: xds.TypeEndpoints, ResourceNamesSubscribe: names},
	} {
		if err := ads.Send(r); err != nil {
			return err
		}
	}
	go func() {
		if err := f.read(ads, n, s); ctx.Err() == nil {
			f.ended <- fmt.Errorf("stream %d of node %d ended: %w", tenant, node, err)
		}
	}()
	return nil
}

// wait waits until no stream misses anything, and says which do.
func (f *fleet) wait(b *testing.B) {
	b.Helper()
	late := time.After(startPatience)
	for _, s := range f.streams {
		select {
		case <-s.ready:
			continue
		case err := <-f.ended:
			f.close()
			b.Fatal(err)
		case <-late:
		}
		streams, missing, first := 0, int64(0), -1
		for n, s := range f.streams {
			if m := s.missing.Load(); m > 0 {
				if streams, missing = streams+1, missing+m; first < 0 {
					first = n
				}
			}
		}
		f.close()
		b.Fatalf("%d of %d streams, stream %d first, miss %d clusters and endpoints after %s", streams, len(f.streams), first, missing, startPatience)
	}
}

func (f *fleet) read(ads discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient, n int, s *stream) error {
	type key struct{ typeURL, name string }
	seen := map[key]bool{}
	for {
		r, err := ads.Recv()
		if err != nil {
			return err
		}
		if err := ads.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}); err != nil {
			return err
		}
		if len(r.RemovedResources) > 0 {
			return fmt.Errorf("%s are said to be gone", r.RemovedResources)
		}
		for _, resource := range r.Resources {
			k := key{r.TypeUrl, resource.Name}
			first := !seen[k]
			seen[k] = true
			switch {
			case !s.uses[k.name] && strings.HasPrefix(k.name, "vip|"), !s.uses[k.name] && !first:
				f.others.Add(int64(proto.Size(r)))
			case !s.uses[k.name]: // what every proxy has
			case !first:
				f.acks <- ack{n, k.name, proto.Size(r), time.Now()}
			case s.missing.Add(-1) == 0:
				close(s.ready)
			}
		}
	}
}

// holders counts the streams that use a service.
func (f *fleet) holders(service int) (n int) {
	for _, s := range f.streams {
		if s.uses[name(service)] {
			n++
		}
	}
	return n
}

func (f *fleet) close() {
	f.cancel()
	for _, cc := range f.conns {
		cc.Close()
	}
}
