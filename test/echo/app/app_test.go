package app

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// patience with what takes milliseconds on an idle machine.
const patience = 30 * time.Second

// start runs a server on free ports until the test ends or stop is called.
func start(t *testing.T, host string) (addresses map[string]string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan map[string]string, 1), make(chan error, 1)
	free := net.JoinHostPort(host, "0")
	opts := ServerOptions{
		HTTP: free, GRPC: free, Greet: free, Bulk: free, Grace: 100 * time.Millisecond,
		ready: func(a map[string]string) { ready <- a },
	}
	go func() { done <- Serve(ctx, opts) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	select {
	case addresses = <-ready:
	case err := <-done:
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return addresses, stop
}

// runCommand runs one command and decodes the last line that it prints.
func runCommand[T any](t *testing.T, args ...string) (result T, err error) {
	t.Helper()
	var out, messages bytes.Buffer
	err = Main(t.Context(), args, nil, &out, &messages)
	lines := bytes.Split(bytes.TrimSpace(out.Bytes()), []byte("\n"))
	if jsonErr := json.Unmarshal(lines[len(lines)-1], &result); jsonErr != nil {
		t.Fatalf("%v printed %q (%v): %v", args, out.String(), err, jsonErr)
	}
	return result, err
}

func TestEveryProtocolTellsWhatItSaw(t *testing.T) {
	t.Setenv("POD_NAME", "pod-7")
	t.Setenv("POD_NAMESPACE", "team-a")
	for _, host := range []string{"127.0.0.1", "::1"} {
		// The server listens on all addresses of both families, as in a pod.
		addresses, _ := start(t, "")
		at := func(name string) string {
			_, port, _ := net.SplitHostPort(addresses[name])
			return net.JoinHostPort(host, port)
		}
		for want, args := range map[string][]string{
			"HTTP/1.1": {"get", "--data", "some text", "--header", "X-Team: a", "http://" + at("http") + "/a?b=c"},
			"HTTP/2.0": {"get", "--protocol", "h2c", "--data", "some text", "http://" + at("http") + "/a?b=c"},
			"gRPC":     {"grpc", "--data", "some text", at("grpc")},
			"TCP":      {"tcp", "--data", "some text", at("tcp")},
		} {
			r, err := runCommand[CallResult](t, args...)
			if err != nil || !r.OK || r.Answer == nil {
				t.Errorf("%v: %v: %+v", args, err, r)
				continue
			}
			a := *r.Answer
			if a.Protocol != want || a.Pod != "pod-7" || a.Namespace != "team-a" || a.Received != "some text" {
				t.Errorf("%v: answer %+v", args, a)
			}
			if a.Client != r.Local || a.ClientIP() != host || a.Local != r.Remote {
				t.Errorf("%v: server saw %s → %s, client is %s → %s", args, a.Client, a.Local, r.Local, r.Remote)
			}
			if want == "HTTP/1.1" && (a.Path != "/a?b=c" || a.Method != "POST" || a.Headers["X-Team"][0] != "a") {
				t.Errorf("%v: answer %+v", args, a)
			}
		}
	}
}

func TestStatusIsAFailure(t *testing.T) {
	addresses, _ := start(t, "127.0.0.1")
	url := "http://" + addresses["http"]
	r, err := runCommand[CallResult](t, "get", url+"/?status=503")
	if err == nil || r.OK || r.Status != 503 || r.Failure.Kind != "exchange status 503" {
		t.Errorf("%v: %+v", err, r)
	}
	for _, query := range []string{"status=99", "status=x", "delay=2h"} {
		if r, _ := runCommand[CallResult](t, "get", url+"/?"+query); r.Status != 400 {
			t.Errorf("%s: status %d, wanted 400", query, r.Status)
		}
	}
	if r, err := runCommand[CallResult](t, "get", "--timeout", "50ms", url+"/?delay=10s"); err == nil || r.Failure.Kind != "exchange timeout" {
		t.Errorf("slow answer: %v: %+v", err, r)
	}
	if r, err := runCommand[CallResult](t, "get", url+"/healthz"); err != nil || r.Body != "ok\n" {
		t.Errorf("healthz: %v: %+v", err, r)
	}
}

func TestBulk(t *testing.T) {
	addresses, _ := start(t, "127.0.0.1")
	const up, down = 5<<20 + 3, 3<<20 + 1
	r, err := runCommand[CallResult](t, "bulk", "--up", "5242883", "--down", "3145729", addresses["bulk"])
	if err != nil || r.Up != up || r.Down != down {
		t.Fatalf("%v: %+v", err, r)
	}
	// One changed byte in either direction is noticed.
	for _, args := range [][]string{{"--up", "1000000"}, {"--down", "1000000"}} {
		proxy := tamper(t, addresses["bulk"], 500000)
		r, err := runCommand[CallResult](t, append(append([]string{"bulk"}, args...), proxy)...)
		if err == nil || r.Failure == nil || r.Failure.Kind != "exchange mismatch" {
			t.Errorf("%v through a proxy that changes a byte: %v: %+v", args, err, r)
		}
	}
}

// tamper is a proxy that changes the byte at the offset, in both directions.
func tamper(t *testing.T, target string, offset int64) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		in, err := l.Accept()
		if err != nil {
			return
		}
		defer in.Close()
		out, err := net.Dial("tcp", target)
		if err != nil {
			return
		}
		defer out.Close()
		copyTampered := func(to io.Writer, from io.Reader) {
			if _, err := io.CopyN(to, from, offset); err != nil {
				return
			}
			b := make([]byte, 1)
			if _, err := io.ReadFull(from, b); err != nil {
				return
			}
			to.Write([]byte{b[0] ^ 1})
			io.Copy(to, from)
		}
		go copyTampered(out, in)
		copyTampered(in, out)
	}()
	return l.Addr().String()
}

// TestLossIsNeverHidden has a server that ends each connection after one
// answer: HTTP and gRPC clients by themselves would connect again and say nothing.
func TestLossIsNeverHidden(t *testing.T) {
	server := httptest.NewUnstartedServer(newHTTPServer().Handler)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetHTTP1(true)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	defer server.Close()
	addresses, _ := start(t, "127.0.0.1")
	addresses["h2c"], addresses["http"] = server.Listener.Addr().String(), server.Listener.Addr().String()
	for _, protocol := range protocols {
		addr := cutAfter(t, addresses[protocol])
		s, err := connect(t.Context(), protocol, addr.addr, patience)
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		if _, err := s.do(t.Context(), "one", patience); err != nil {
			t.Errorf("%s: first exchange: %v", protocol, err)
		}
		addr.cut()
		for range 2 {
			_, err := s.do(t.Context(), "two", patience)
			kind := ""
			if err != nil {
				kind = kindOf(err)
			}
			if kind != "eof" && kind != "reset" {
				t.Errorf("%s: exchange on a lost connection: %v (%s)", protocol, err, kind)
			}
		}
	}
}

// cuttable is a proxy that takes one connection after the other and can end them.
type cuttable struct {
	addr string
	cut  func()
}

func cutAfter(t *testing.T, target string) cuttable {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	conns := make(chan net.Conn, 16)
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			conns <- in
			go func() { io.Copy(out, in); out.Close() }()
			go func() { io.Copy(in, out); in.Close() }()
		}
	}()
	return cuttable{l.Addr().String(), func() { (<-conns).Close() }}
}

func TestKindsOfFailure(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	// noise sends something that is no answer, after a request or at once.
	noise := func(after bool) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				if after {
					conn.Read(make([]byte, 4096))
				}
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
				conn.Close()
			}
		}()
		return l.Addr().String()
	}
	// Greets as it should and then says something else than it was told.
	liar := &tcpServer{handle: func(conn net.Conn) error {
		if err := writeLine(conn, connAnswer(conn)); err != nil {
			return err
		}
		_, err := io.WriteString(conn, "something else\n")
		return err
	}}
	lies, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer liar.close()
	go liar.serve(lies)
	for _, c := range []struct{ protocol, addr, want string }{
		{"tcp", lies.Addr().String(), "exchange mismatch"},
		{"tcp", closed.Addr().String(), "connect refused"},
		{"grpc", closed.Addr().String(), "connect refused"},
		{"tcp", silent.Addr().String(), "connect timeout"},
		{"grpc", silent.Addr().String(), "exchange timeout"},
		{"h2c", silent.Addr().String(), "exchange timeout"},
		{"http", silent.Addr().String(), "exchange timeout"},
		{"tcp", noise(false), "connect mismatch"},
		{"http", noise(true), "exchange mismatch"},
		{"tcp", "no.such.host.invalid:80", "connect dns"},
	} {
		timeout := patience
		if c.addr == silent.Addr().String() {
			timeout = 200 * time.Millisecond
		}
		r := call(t.Context(), c.protocol, c.addr, "x", timeout)
		if r.OK || r.Failure == nil || r.Failure.Kind != c.want {
			t.Errorf("%s to %s: %+v, wanted %s", c.protocol, c.addr, r.Failure, c.want)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{}, {"sing"}, {"get"}, {"get", "server:80"}, {"get", "--protocol", "h3", "http://a"}, {"tcp", "a:1", "b:2"},
		{"bulk", "a:1"}, {"bulk", "--up", "-1", "a:1"}, {"hold", "--connections", "0", "a:1"},
		{"hold", "--interval", "0s", "a:1"}, {"load", "--duration", "100h", "a:1"},
		{"load", "--new-connection-ratio", "2", "a:1"}, {"load", "--protocol", "smtp", "a:1"}, {"serve", "here"},
	} {
		var out bytes.Buffer
		if err := Main(t.Context(), args, nil, &out, io.Discard); !errors.Is(err, ErrUsage) {
			t.Errorf("%q: %v, wanted a usage error", args, err)
		}
		if out.Len() > 0 {
			t.Errorf("%q printed %q", args, out.String())
		}
	}
}

func TestServeRefusesATakenPort(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	err = Serve(t.Context(), ServerOptions{HTTP: free.Addr().String(), Bulk: taken.Addr().String()})
	if err == nil || !strings.Contains(err.Error(), "serve bulk") || !strings.Contains(err.Error(), "in use") {
		t.Errorf("error %v", err)
	}
	again, err := net.Listen("tcp", free.Addr().String())
	if err != nil {
		t.Fatalf("a port is still held: %v", err)
	}
	again.Close()
}

func TestServeEndsWithOpenConnections(t *testing.T) {
	addresses, stop := start(t, "127.0.0.1")
	for _, protocol := range []string{"tcp", "http", "grpc"} {
		s, err := connect(t.Context(), protocol, addresses[protocol], patience)
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		if _, err := s.do(t.Context(), "x", patience); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	stop()
	if took := time.Since(begin); took > patience {
		t.Errorf("stopping took %v", took)
	}
}
