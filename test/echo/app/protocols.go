package app

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

const (
	// idleLimit ends TCP connections that nobody uses any more.
	idleLimit = time.Hour
	// BulkLimit is the most that one bulk transfer carries, in bytes.
	BulkLimit = 4 << 30
)

// newHTTPServer answers any request with an Answer. The query parameters
// status=CODE and delay=DURATION (at most a minute) change how; /healthz is for probes.
func newHTTPServer() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("/", answerHTTP)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 30 * time.Second, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	return server
}

func answerHTTP(w http.ResponseWriter, r *http.Request) {
	a, err := digest(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s := self()
	a.Pod, a.Namespace, a.Node = s.Pod, s.Namespace, s.Node
	a.Protocol, a.Client = r.Proto, r.RemoteAddr
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		a.Local = address(local)
	}
	a.Method, a.Host, a.Path, a.Headers = r.Method, r.Host, r.URL.RequestURI(), r.Header
	code := http.StatusOK
	if text := r.URL.Query().Get("status"); text != "" {
		if code, err = strconv.Atoi(text); err != nil || code < 200 || code > 599 {
			http.Error(w, fmt.Sprintf("status=%s is not a status from 200 to 599", text), http.StatusBadRequest)
			return
		}
	}
	if text := r.URL.Query().Get("delay"); text != "" {
		delay, err := time.ParseDuration(text)
		if err != nil || delay > time.Minute {
			http.Error(w, fmt.Sprintf("delay=%s is not a duration of at most a minute", text), http.StatusBadRequest)
			return
		}
		select {
		case <-time.After(delay):
		case <-r.Context().Done():
			return
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = writeLine(w, a)
}

// newGRPCServer serves UnaryCall of gRPC's own interop test service, whose
// answer's payload is an Answer as JSON, and the health service.
func newGRPCServer() *grpc.Server {
	server := grpc.NewServer()
	testpb.RegisterTestServiceServer(server, &grpcService{})
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	return server
}

type grpcService struct {
	testpb.UnimplementedTestServiceServer
}

func (*grpcService) UnaryCall(ctx context.Context, in *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	if s := in.GetResponseStatus(); s.GetCode() != 0 {
		return nil, status.Error(codes.Code(s.GetCode()), s.GetMessage())
	}
	a, err := digest(strings.NewReader(string(in.GetPayload().GetBody())))
	if err != nil {
		return nil, err
	}
	s := self()
	a.Pod, a.Namespace, a.Node = s.Pod, s.Namespace, s.Node
	a.Protocol, a.Path = "gRPC", testpb.TestService_UnaryCall_FullMethodName
	if p, ok := peer.FromContext(ctx); ok {
		a.Client, a.Local = address(p.Addr), address(p.LocalAddr)
	}
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		a.Headers = md
		if host := md.Get(":authority"); len(host) > 0 {
			a.Host = host[0]
		}
	}
	body, err := json.Marshal(a)
	if err != nil {
		return nil, err
	}
	return &testpb.SimpleResponse{Payload: &testpb.Payload{Body: body}, Hostname: a.Pod}, nil
}

func connAnswer(conn net.Conn) Answer {
	a := self()
	a.Protocol, a.Client, a.Local = "TCP", address(conn.RemoteAddr()), address(conn.LocalAddr())
	return a
}

// serveGreeting speaks first: an Answer as one line of JSON. Then it sends each
// line back as it is.
func serveGreeting(conn net.Conn) error {
	if err := writeLine(conn, connAnswer(conn)); err != nil {
		return err
	}
	r := bufio.NewReaderSize(conn, textLimit)
	for {
		if err := conn.SetReadDeadline(time.Now().Add(idleLimit)); err != nil {
			return err
		}
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if _, err := conn.Write(line); err != nil {
			return err
		}
	}
}

// serveBulk speaks second. "PUT n" and n bytes are answered with an Answer line
// that has their digest, "GET n" with n bytes of the pattern and such a line.
func serveBulk(conn net.Conn) error {
	r := bufio.NewReaderSize(conn, textLimit)
	for {
		if err := conn.SetDeadline(time.Now().Add(idleLimit)); err != nil {
			return err
		}
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		verb, text, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 0 || n > BulkLimit || (verb != "PUT" && verb != "GET") {
			_, err := fmt.Fprintf(conn, "want PUT n or GET n, n at most %d\n", int64(BulkLimit))
			return err
		}
		sum := sha256.New()
		if verb == "PUT" {
			_, err = io.CopyN(sum, r, n)
		} else {
			_, err = io.CopyN(conn, io.TeeReader(pattern(), sum), n)
		}
		if err != nil {
			return err
		}
		a := connAnswer(conn)
		a.Bytes, a.SHA256 = n, hex.EncodeToString(sum.Sum(nil))
		if err := writeLine(conn, a); err != nil {
			return err
		}
	}
}
