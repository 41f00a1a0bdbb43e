package relay

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// rawCodec sends bytes as they are.
type rawCodec struct{ encoding.CodecV2 }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

// TestRelayBoundsMemory: what a proxy sends takes a few times its size at most, however
// many objects it stands for.
func TestRelayBoundsMemory(t *testing.T) {
	field := func(number protowire.Number, content []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), content)
	}
	filled := func(with []byte, size int) []byte { return bytes.Repeat(with, size/len(with)) }
	var versions []byte
	for i := 0; len(versions) < maxMessage-1024; i++ {
		versions = append(versions, field(5, field(1, binary.BigEndian.AppendUint32(nil, uint32(i)&0x7f7f7f7f)))...)
	}
	const most = maxMessage - 1024
	// node.metadata.fields[""].list_value.values, all of them empty.
	lists := field(2, field(6, filled(field(1, nil), most)))
	for name, message := range map[string][]byte{
		"names":            filled(field(3, []byte("a")), most),
		"no names":         filled(field(4, []byte("a")), most),
		"initial versions": versions,
		"locators":         filled(field(8, nil), most),
		"node":             field(1, field(3, field(1, lists))),
		"nodes":            filled(field(1, field(3, field(1, nil))), most),
		"error":            field(7, filled(field(3, nil), most)),
	} {
		t.Run(name, func(t *testing.T) {
			f := setUp(t, nil)
			st, err := f.dial(Key{Tenant: teamA}).NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
				discovery.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName, grpc.ForceCodecV2(rawCodec{encoding.GetCodecV2(grpcproto.Name)}))
			if err != nil {
				t.Fatal(err)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			if err := st.SendMsg(message); err != nil {
				t.Fatal(err)
			}
			err = st.RecvMsg(&discovery.DeltaDiscoveryResponse{})
			runtime.ReadMemStats(&after)
			took := after.TotalAlloc - before.TotalAlloc
			t.Logf("%d bytes had %d MiB allocated, in %d objects: %v", len(message), took>>20, after.Mallocs-before.Mallocs, err)
			if err == nil || took > 6*maxMessage || after.Mallocs-before.Mallocs > 100_000 {
				t.Errorf("%d bytes took %d MiB in %d objects: %v", len(message), took>>20, after.Mallocs-before.Mallocs, err)
			}
		})
	}
}

// TestReadRequestsAreBounded: what is read of the largest requests that aren't refused takes
// a few times maxMessage, too, though it is many objects.
func TestReadRequestsAreBounded(t *testing.T) {
	codec := requestCodec{encoding.GetCodecV2(grpcproto.Name)}
	field := func(number protowire.Number, content string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), content)
	}
	repeated := func(times int, f func(i int) []byte) (b []byte) {
		for i := range times {
			b = append(b, f(i)...)
		}
		return b
	}
	for name, message := range map[string][]byte{
		"names": repeated(maxMessageNames, func(i int) []byte { return field(3, fmt.Sprintf("%014d", i)) }),
		"versions": repeated(maxHeld, func(i int) []byte {
			return field(5, string(append(field(1, fmt.Sprintf("%0240d", i)), field(2, strings.Repeat("v", 240))...)))
		}),
		"empty versions": repeated(maxMessageNames, func(i int) []byte { return field(5, string(field(1, fmt.Sprintf("%07d", i)))) }),
	} {
		t.Run(name, func(t *testing.T) {
			if len(message) > maxMessage {
				t.Fatalf("a message of %d bytes", len(message))
			}
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var r discovery.DeltaDiscoveryRequest
			err := codec.Unmarshal(mem.BufferSlice{mem.SliceBuffer(message)}, &r)
			runtime.GC()
			runtime.ReadMemStats(&after)
			took := int64(after.HeapAlloc) - int64(before.HeapAlloc)
			t.Logf("%d bytes take %d KiB: %v", len(message), took>>10, err)
			if took > 3*maxMessage {
				t.Errorf("%d bytes take %d MiB", len(message), took>>20)
			}
			if refused := err != nil; refused != (name == "empty versions") {
				t.Errorf("it is read: %v", err)
			}
			runtime.KeepAlive(&r)
		})
	}
}

// TestRelayServesOneStream: another stream of the same proxy ends the one before, so that
// no more than one takes memory.
func TestRelayServesOneStream(t *testing.T) {
	f := setUp(t, nil)
	former := f.proxy(teamA)
	former.subscribe(TypeCluster)
	up := f.op.stream()
	up.await(t, TypeCluster, "")
	latter := f.proxy(teamA)
	latter.subscribe(TypeCluster)
	if c := grpcstatus.Code(receive(t, "end of the former stream", former.err)); c != codes.Unavailable {
		t.Errorf("it ended with %s", c)
	}
	receive(t, "end of its stream to the operator", up.gone)
	up = f.op.stream()
	up.await(t, TypeCluster, "")
	up.send(t, "1", resource(TypeCluster, "deliver", "1"))
	wantNames(t, latter.next(), "deliver@1")
	if s := f.relay.State(Key{Tenant: teamA}); !s.Connected {
		t.Error("the latter isn't connected")
	}
}

// TestRelayPacesRequests: a proxy that says what needs no answer, such as that it refuses
// what it was never sent, is read at its pace and no faster. It asks for a name each time
// as well, for what the operator hears has been read: windows and buffers hold a lot more.
func TestRelayPacesRequests(t *testing.T) {
	const perSecond = 500
	f := setUp(t, func(o *Options) { o.RequestsPerSecond, o.NamesPerSecond = perSecond, 1e9 })
	p := f.proxy(teamA)
	p.subscribe(TypeCluster)
	up, n := f.op.stream(), 0
	up.await(t, TypeCluster, "")
	endless := &discovery.DeltaDiscoveryRequest{
		TypeUrl: TypeCluster, ResourceNamesSubscribe: []string{"vip|a"},
		ResponseNonce: strings.Repeat("9", 1024), ErrorDetail: &status.Status{Code: 13, Message: "no"},
	}
	begin, stopped := time.Now(), make(chan struct{})
	go func() {
		defer close(stopped)
		for p.st.Send(endless) == nil {
		}
	}()
	// What is measured is a rate; a machine that stands still may make it a slow one.
	for over, ever := time.After(2*time.Second), time.After(testTime); over != nil || ever != nil && n < perSecond*4; {
		select {
		case <-up.requests:
			n++
		case <-over:
			over = nil
		case <-ever:
			ever = nil
		}
	}
	took := time.Since(begin).Seconds()
	f.relay.Close(Key{Tenant: teamA})
	<-stopped
	for ended := false; !ended; {
		select {
		case <-up.requests:
		case <-up.gone:
			ended = true
		}
	}
	if most := int(perSecond*(took+4)) + 1; n > most || n < perSecond*4 {
		t.Errorf("%d requests in %.1f s, at most %d", n, took, most)
	}
}

// TestRelayPacesStreams: a proxy that begins streams in a loop has few of them.
func TestRelayPacesStreams(t *testing.T) {
	var changes atomic.Int64
	f := setUp(t, func(o *Options) { o.Changed = func(model.Tenant) { changes.Add(1) } })
	client, begin := discovery.NewAggregatedDiscoveryServiceClient(f.dial(Key{Tenant: teamA})), time.Now()
	for over := 2 * time.Second; time.Since(begin) < over || time.Since(begin) < testTime && changes.Load() < 2*opensAtOnce; {
		ctx, cancel := context.WithTimeout(t.Context(), over)
		st, err := client.DeltaAggregatedResources(ctx)
		if err == nil {
			err = st.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: "evil"})
		}
		if err == nil {
			_, err = st.Recv()
		}
		cancel()
		if err == nil {
			t.Fatal("it is answered")
		}
	}
	// One as each begins, and one as it ends.
	n, took := changes.Load(), time.Since(begin).Seconds()
	if most := 2 * int64(opensAtOnce+opensPerSecond*(took+1)); n > most || n < 2*opensAtOnce {
		t.Errorf("%d changes in %.1f s, at most %d", n, took, most)
	}
}

// TestSocketPaces: neither connections in a loop nor whatever is sent through them are
// taken faster than an Envoy needs.
func TestSocketPaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := listenUnix(path, uint32(os.Getuid()))
	if err != nil {
		t.Fatal(err)
	}
	accepted, closed := make(chan net.Conn, 1000), make(chan error, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				closed <- err
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	begin := time.Now()
	in := dial()
	out := receive(t, "connection", accepted)
	defer out.Close()
	const sent = bytesAtOnce + 2*bytesPerSecond
	go in.Write(make([]byte, sent))
	if n, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{io.LimitReader(out, sent)}, make([]byte, 16<<10)); n != sent {
		t.Fatalf("%d bytes came: %v", n, err)
	}
	if took := time.Since(begin); took < 1900*time.Millisecond {
		t.Errorf("%d bytes took %s", sent, took)
	}
	begin = time.Now()
	for range 200 {
		dial().Close()
	}
	for range opensAtOnce + opensPerSecond {
		receive(t, "connection", accepted).Close()
	}
	if took := time.Since(begin); took < 900*time.Millisecond {
		t.Errorf("%d connections took %s", opensAtOnce+opensPerSecond, took)
	}
	// It is waiting for its pace now.
	l.Close()
	if err := receive(t, "end", closed); !errors.Is(err, net.ErrClosed) {
		t.Errorf("it ended with %v", err)
	}
}

// TestRelayBoundsNameBytes: as many names as may be are held, but not all of the longest.
func TestRelayBoundsNameBytes(t *testing.T) {
	s := newSubscription()
	held := func() (n int) {
		for name := range s.names {
			n += len(name)
		}
		return n
	}
	names := make([]string, maxNames)
	for i := range names {
		names[i] = fmt.Sprintf("%0*d", maxName, i)
	}
	c, err := s.apply(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResourceNamesSubscribe: names}, false)
	if err != nil {
		t.Fatal(err)
	}
	const room = maxNameBytes / maxName
	if len(c.subscribe) != room || len(c.dropped) != maxNames-room || held() != maxNameBytes {
		t.Errorf("%d are held, %d dropped, %d bytes", len(c.subscribe), len(c.dropped), held())
	}
	// What doesn't exist makes room, and so does what is let go.
	s.answered(nil, names[:2])
	c, err = s.apply(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResourceNamesSubscribe: []string{names[room], "short"}, ResourceNamesUnsubscribe: names[2:3]}, false)
	if err != nil || len(c.dropped) > 0 || len(c.unsubscribe) != 2 || held() != s.bytes || held() > maxNameBytes {
		t.Errorf("dropped %d, unsubscribed %d, %d bytes held and %d counted: %v", len(c.dropped), len(c.unsubscribe), held(), s.bytes, err)
	}
}
