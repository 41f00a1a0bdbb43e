package app

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

// Protocols that a session can speak.
var protocols = []string{"tcp", "http", "h2c", "grpc"}

// session is one connection on which exchanges happen one after the other. None
// is ever repeated and no connection is made again behind the caller's back:
// what got lost must be seen.
type session struct {
	conn     *watchedConn
	greeting Answer
	exchange func(ctx context.Context, payload string) (Answer, error)
	close    func()
}

// connect makes a session within timeout.
func connect(ctx context.Context, protocol, addr string, timeout time.Duration) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &session{conn: &watchedConn{Conn: raw}}
	s.close = func() { s.conn.Close() }
	switch protocol {
	case "tcp":
		err = s.startTCP(ctx)
	case "http":
		s.startHTTP(addr)
	case "h2c":
		s.startH2C(addr)
	case "grpc":
		err = s.startGRPC(addr)
	default:
		err = fmt.Errorf("protocol %q is none of %s", protocol, strings.Join(protocols, ", "))
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// do sends the payload and returns the server's answer to it, within timeout.
func (s *session) do(ctx context.Context, payload string, timeout time.Duration) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	a, err := s.exchange(ctx, payload)
	if err != nil {
		return a, s.conn.cause(err)
	}
	if a.Received != payload {
		return a, fmt.Errorf("%w: sent %.100q, server received %.100q", errMismatch, payload, a.Received)
	}
	return a, nil
}

// once hands out the session's connection a single time.
func (s *session) once() func(context.Context) (net.Conn, error) {
	var used atomic.Bool
	return func(context.Context) (net.Conn, error) {
		if used.Swap(true) {
			return nil, errLost
		}
		return s.conn, nil
	}
}

// bound makes reads and writes end with ctx, until stop.
func (s *session) bound(ctx context.Context) (stop func() bool, err error) {
	deadline, _ := ctx.Deadline()
	if err := s.conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	return context.AfterFunc(ctx, func() { s.conn.SetDeadline(time.Unix(1, 0)) }), nil
}

func (s *session) startTCP(ctx context.Context) error {
	r := bufio.NewReaderSize(s.conn, textLimit)
	stop, err := s.bound(ctx)
	if err != nil {
		return err
	}
	defer stop()
	line, err := r.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	if err := json.Unmarshal(line, &s.greeting); err != nil {
		return fmt.Errorf("%w: greeting %.100q", errMismatch, line)
	}
	s.exchange = func(ctx context.Context, payload string) (Answer, error) {
		a := s.greeting
		stop, err := s.bound(ctx)
		if err != nil {
			return a, err
		}
		defer stop()
		if _, err := io.WriteString(s.conn, payload+"\n"); err != nil {
			return a, err
		}
		line, err := r.ReadString('\n')
		a.Received = strings.TrimSuffix(line, "\n")
		return a, err
	}
	return nil
}

// startHTTP speaks HTTP/1.1 by itself: an http.Transport gives a connection up
// when its writing goroutine doesn't report within 50 ms, which is no loss of the
// network's (maxWriteWaitBeforeConnReuse in net/http).
func (s *session) startHTTP(addr string) {
	r := bufio.NewReader(s.conn)
	s.exchange = func(ctx context.Context, payload string) (Answer, error) {
		req, err := http.NewRequest(http.MethodPost, "http://"+addr+"/", strings.NewReader(payload))
		if err != nil {
			return Answer{}, err
		}
		stop, err := s.bound(ctx)
		if err != nil {
			return Answer{}, err
		}
		defer stop()
		if err := req.Write(s.conn); err != nil {
			return Answer{}, err
		}
		resp, err := http.ReadResponse(r, req)
		if err != nil {
			return Answer{}, err
		}
		return readHTTPAnswer(resp)
	}
}

func (s *session) startH2C(addr string) {
	dial := s.once()
	transport := &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		MaxConnsPerHost:    1,
		DisableCompression: true,
		Protocols:          new(http.Protocols),
	}
	transport.Protocols.SetUnencryptedHTTP2(true)
	s.close = func() {
		transport.CloseIdleConnections()
		s.conn.Close()
	}
	s.exchange = func(ctx context.Context, payload string) (Answer, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/", strings.NewReader(payload))
		if err != nil {
			return Answer{}, err
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return Answer{}, err
		}
		return readHTTPAnswer(resp)
	}
}

// readHTTPAnswer reads a response to its end and closes it.
func readHTTPAnswer(resp *http.Response) (a Answer, err error) {
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4*textLimit))
	if err != nil {
		return a, fmt.Errorf("read answer: %w", err)
	}
	if resp.StatusCode/100 != 2 {
		return a, statusError(resp.StatusCode)
	}
	if err := json.Unmarshal(body, &a); err != nil {
		return a, fmt.Errorf("%w: %.100q", errMismatch, body)
	}
	return a, nil
}

func (s *session) startGRPC(addr string) error {
	dial := s.once()
	client, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(), grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }))
	if err != nil {
		return fmt.Errorf("make gRPC client: %w", err)
	}
	s.close = func() {
		client.Close()
		s.conn.Close()
	}
	service := testpb.NewTestServiceClient(client)
	s.exchange = func(ctx context.Context, payload string) (Answer, error) {
		out, err := service.UnaryCall(ctx, &testpb.SimpleRequest{Payload: &testpb.Payload{Body: []byte(payload)}})
		if err != nil {
			if ctx.Err() != nil {
				err = errors.Join(ctx.Err(), err)
			}
			return Answer{}, err
		}
		var a Answer
		if err := json.Unmarshal(out.GetPayload().GetBody(), &a); err != nil {
			return a, fmt.Errorf("%w: %.100q", errMismatch, out.GetPayload().GetBody())
		}
		return a, nil
	}
	return nil
}

// grpcCode is the status of a failed call, "" if the error has none.
func grpcCode(err error) string {
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return s.GRPCStatus().Code().String()
	}
	return ""
}
