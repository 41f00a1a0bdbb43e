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
	"net/url"
	"strings"
	"time"
)

// CallResult is what get, grpc, tcp and bulk print.
type CallResult struct {
	OK bool `json:"ok"`
	// Address is where the call went, Local and Remote are the client's view of
	// the connection.
	Address string `json:"address"`
	Local   string `json:"local,omitempty"`
	Remote  string `json:"remote,omitempty"`
	// Latency is from before connecting to the whole answer, in milliseconds.
	Latency float64  `json:"latency_ms"`
	Failure *Failure `json:"failure,omitempty"`
	// Status and Headers are HTTP's; Body is there if it was no Answer.
	Status  int                 `json:"status,omitempty"`
	Headers map[string][]string `json:"headers,omitempty"`
	Body    string              `json:"body,omitempty"`
	// Code is gRPC's status of a failed call.
	Code   string  `json:"code,omitempty"`
	Answer *Answer `json:"answer,omitempty"`
	// Up and Down are what bulk sent and got, in bytes.
	Up   int64 `json:"up,omitempty"`
	Down int64 `json:"down,omitempty"`
}

func (r *CallResult) fail(stage string, err error) {
	r.OK = false
	r.Failure = newFailure(stage, err)
	r.Code = grpcCode(err)
}

// getOptions are the flags of get.
type getOptions struct {
	method, data, protocol string
	header                 http.Header
	timeout                time.Duration
}

// get makes one request on a connection of its own and follows no redirect.
func get(ctx context.Context, target string, opts getOptions) (r CallResult) {
	r.Address = target
	start := time.Now()
	defer func() { r.Latency = milliseconds(time.Since(start)) }()
	ctx, cancel := context.WithTimeout(ctx, opts.timeout)
	defer cancel()
	u, err := url.Parse(target)
	if err != nil {
		r.fail("connect", err)
		return r
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		r.fail("connect", err)
		return r
	}
	s := &session{conn: &watchedConn{Conn: raw}}
	r.Local, r.Remote = address(raw.LocalAddr()), address(raw.RemoteAddr())
	defer s.conn.Close()
	dial := s.once()
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		Protocols:   new(http.Protocols),
	}
	if opts.protocol == "h2c" {
		transport.Protocols.SetUnencryptedHTTP2(true)
	} else {
		transport.Protocols.SetHTTP1(true)
	}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, opts.method, target, strings.NewReader(opts.data))
	if err != nil {
		r.fail("exchange", err)
		return r
	}
	req.Header = opts.header
	if host := opts.header.Get("Host"); host != "" {
		req.Host = host
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		r.fail("exchange", s.conn.cause(err))
		return r
	}
	defer resp.Body.Close()
	r.Status, r.Headers = resp.StatusCode, resp.Header
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4*textLimit))
	if err != nil {
		r.fail("exchange", s.conn.cause(err))
		return r
	}
	var a Answer
	if json.Unmarshal(body, &a) == nil && a.Protocol != "" {
		r.Answer = &a
	} else {
		r.Body = string(body)
	}
	r.OK = resp.StatusCode/100 == 2
	if !r.OK {
		r.Failure = newFailure("exchange", statusError(resp.StatusCode))
	}
	return r
}

// call makes one exchange of a protocol on a connection of its own.
func call(ctx context.Context, protocol, addr, data string, timeout time.Duration) (r CallResult) {
	r.Address = addr
	start := time.Now()
	defer func() { r.Latency = milliseconds(time.Since(start)) }()
	s, err := connect(ctx, protocol, addr, timeout)
	if err != nil {
		r.fail("connect", err)
		return r
	}
	defer s.close()
	r.Local, r.Remote = address(s.conn.LocalAddr()), address(s.conn.RemoteAddr())
	a, err := s.do(ctx, data, timeout)
	if a.Pod != "" {
		r.Answer = &a
	}
	if err != nil {
		r.fail("exchange", err)
		return r
	}
	r.OK = true
	return r
}

// bulk sends up bytes, then gets down bytes, on one connection, and checks both
// digests.
func bulk(ctx context.Context, addr string, up, down int64, timeout time.Duration) (r CallResult) {
	r.Address = addr
	start := time.Now()
	defer func() { r.Latency = milliseconds(time.Since(start)) }()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		r.fail("connect", err)
		return r
	}
	defer conn.Close()
	r.Local, r.Remote = address(conn.LocalAddr()), address(conn.RemoteAddr())
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	in := bufio.NewReaderSize(conn, textLimit)
	if up > 0 {
		a, err := put(conn, in, up)
		r.Answer, r.Up = &a, a.Bytes
		if err != nil {
			r.fail("exchange", err)
			return r
		}
	}
	if down > 0 {
		a, err := fetch(conn, in, down)
		r.Answer, r.Down = &a, a.Bytes
		if err != nil {
			r.fail("exchange", err)
			return r
		}
	}
	r.OK = true
	return r
}

func put(conn io.Writer, in *bufio.Reader, n int64) (a Answer, err error) {
	want, err := patternDigest(n)
	if err != nil {
		return a, err
	}
	if _, err := fmt.Fprintf(conn, "PUT %d\n", n); err != nil {
		return a, err
	}
	if _, err := io.CopyN(conn, pattern(), n); err != nil {
		return a, fmt.Errorf("send: %w", err)
	}
	err = readAnswer(in, &a, n, want)
	return a, err
}

func fetch(conn io.Writer, in *bufio.Reader, n int64) (a Answer, err error) {
	want, err := patternDigest(n)
	if err != nil {
		return a, err
	}
	if _, err := fmt.Fprintf(conn, "GET %d\n", n); err != nil {
		return a, err
	}
	sum := sha256.New()
	if a.Bytes, err = io.CopyN(sum, in, n); err != nil {
		return a, fmt.Errorf("receive: %w", err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		return a, fmt.Errorf("%w: received bytes have sha256 %s, not %s", errMismatch, got, want)
	}
	err = readAnswer(in, &a, n, want)
	return a, err
}

func readAnswer(in *bufio.Reader, a *Answer, n int64, sum string) error {
	line, err := in.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	if err := json.Unmarshal(line, a); err != nil {
		return fmt.Errorf("%w: %.100q", errMismatch, line)
	}
	if a.Bytes != n || a.SHA256 != sum {
		return fmt.Errorf("%w: server counted %d bytes with sha256 %s, not %d with %s", errMismatch, a.Bytes, a.SHA256, n, sum)
	}
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
