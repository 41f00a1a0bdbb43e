package nodeservice

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
)

// guarded serves a world's service behind a door that believes one token.
func guarded(t *testing.T, change func(*Door)) (address string, d *Door) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d = NewDoor()
	if change != nil {
		change(d)
	}
	g := grpc.NewServer(d.ServerOptions()...)
	newWorld(t).service(func(o *Options) { o.Callers, o.Log = d.Callers(oneToken{}), slog.New(slog.DiscardHandler) }).Register(g)
	go g.Serve(d.Listener(l))
	t.Cleanup(g.Stop)
	return l.Addr().String(), d
}

// oneToken is Callers.
type oneToken struct{}

func (oneToken) Authenticate(ctx context.Context) (Caller, error) {
	if token, err := bearer(ctx); err != nil || token != "agent" {
		return Caller{}, status.Error(codes.Unauthenticated, "not an agent's")
	}
	return Caller{Node: "node-1"}, nil
}

func dialFrom(t *testing.T, source, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}).DialContext(ctx, "tcp", address)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func as(t *testing.T, token string) context.Context {
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// sign is a call that an agent's token gets an answer to, of whatever kind.
func sign(ctx context.Context, conn *grpc.ClientConn) codes.Code {
	_, err := nodev1alpha1.NewNodeServiceClient(conn).SignCertificate(ctx, &nodev1alpha1.SignCertificateRequest{PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0"})
	return status.Code(err)
}

// What a stranger sends isn't read before its token is: here it never comes.
func TestStrangersAreRefusedBeforeTheyAreRead(t *testing.T) {
	address, _ := guarded(t, nil)
	stranger := dialFrom(t, "127.0.0.2", address)
	for _, method := range nodev1alpha1.NodeService_ServiceDesc.Methods {
		call, err := stranger.NewStream(as(t, "made up"), &grpc.StreamDesc{ClientStreams: true},
			"/"+nodev1alpha1.NodeService_ServiceDesc.ServiceName+"/"+method.MethodName)
		if err != nil {
			t.Fatal(err)
		}
		if err := call.RecvMsg(&nodev1alpha1.SignCertificateResponse{}); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v", method.MethodName, err)
		}
	}
	if code := sign(as(t, "agent"), dialFrom(t, "127.0.0.1", address)); code != codes.InvalidArgument {
		t.Errorf("an agent without a CSR: %v", code)
	}
	headers := metadata.AppendToOutgoingContext(as(t, "agent"), "x-large", strings.Repeat("x", maxHeaders))
	if code := sign(headers, dialFrom(t, "127.0.0.1", address)); code == codes.InvalidArgument {
		t.Error("headers of any size are read")
	}
}

// A source has so many connections and calls before one has an agent's token, and so
// much time. An agent isn't counted.
func TestStrangersAreFew(t *testing.T) {
	address, _ := guarded(t, func(d *Door) { d.limit, d.stay = strangersPerSource+1, time.Minute })
	connect := func(source string) net.Conn {
		t.Helper()
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}).Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	// A server that has a connection says so in HTTP/2's first frame.
	taken := func(c net.Conn) bool {
		t.Helper()
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err := c.Read(make([]byte, 1))
		if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
			t.Fatal("neither taken nor closed")
		}
		return err == nil
	}
	greet := func(c net.Conn) net.Conn {
		c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
		return c
	}
	agent := dialFrom(t, "127.0.0.9", address)
	if code := sign(as(t, "agent"), agent); code != codes.InvalidArgument {
		t.Fatalf("an agent: %v", code)
	}
	var hostile []net.Conn
	for range strangersPerSource {
		c := greet(connect("127.0.0.2"))
		if !taken(c) {
			t.Fatal("a connection within bounds is closed")
		}
		hostile = append(hostile, c)
	}
	if taken(greet(connect("127.0.0.2"))) {
		t.Error("one source has more connections than it may")
	}
	if !taken(greet(connect("127.0.0.3"))) {
		t.Error("another source has none")
	}
	// All places are taken now: the next makes the first of the many go.
	if code := sign(as(t, "agent"), dialFrom(t, "127.0.0.4", address)); code != codes.InvalidArgument {
		t.Errorf("another agent, with all places taken: %v", code)
	}
	hostile[0].SetReadDeadline(time.Now().Add(10 * time.Second))
	for {
		if _, err := hostile[0].Read(make([]byte, 64)); err != nil {
			if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
				t.Error("the oldest connection of who had most stayed")
			}
			break
		}
	}
	if code := sign(as(t, "agent"), agent); code != codes.InvalidArgument {
		t.Errorf("the agent that was there: %v", code)
	}
	calls := dialFrom(t, "127.0.0.5", address)
	for n := range strangerCalls + 1 {
		want := codes.Unauthenticated
		if n == strangerCalls {
			want = codes.Unavailable
		}
		if code := sign(as(t, "made up"), calls); code != want {
			t.Errorf("call %d of a stranger: %v, want %v", n, code, want)
		}
	}
	for range 2 * strangerCalls {
		if code := sign(as(t, "agent"), agent); code != codes.InvalidArgument {
			t.Fatalf("an agent's call: %v", code)
		}
	}
}

// Who goes on to call although calls are refused loses the connection in the end: gRPC
// keeps a little of each.
func TestStrangersPatience(t *testing.T) {
	address, _ := guarded(t, func(d *Door) { d.stay = time.Minute })
	var dials atomic.Int32
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			dials.Add(1)
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	calls := 0
	for dials.Load() < 2 {
		// A call that finds the connection ended waits for the next one, as those to come do.
		code := sign(as(t, "made up"), conn)
		if calls++; calls > strangerPatience+1000 {
			t.Fatalf("%d calls on one connection, the last was told %v", calls, code)
		}
	}
	if calls <= strangerPatience {
		t.Errorf("the connection has ended after %d calls, which it may have", calls)
	}
}

// Who shows no agent's token in time is cut off, and nothing is kept of it.
func TestStrangersDontStay(t *testing.T) {
	address, d := guarded(t, func(d *Door) { d.stay = 2 * time.Second })
	agent := dialFrom(t, "127.0.0.9", address)
	if code := sign(as(t, "agent"), agent); code != codes.InvalidArgument {
		t.Fatalf("an agent: %v", code)
	}
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(8 * time.Second)) // less than gRPC's own time for a handshake
	for {
		if _, err := c.Read(make([]byte, 64)); err != nil {
			if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
				t.Error("a connection without a call stays")
			}
			break
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.visitors) != 1 || len(d.strangers) != 0 || d.count != 0 {
		t.Errorf("%d connections, strangers of %d sources, %d of them: want the agent's alone", len(d.visitors), len(d.strangers), d.count)
	}
}
