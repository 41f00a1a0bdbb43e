package xds

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// peer is another proxy's end of tunnels and the application behind it: it answers
// each request with who the tunnel's certificate says that asks, and from where.
type peer struct {
	// conns are the connections within tunnels that it has had.
	conns atomic.Int64
	// allow decides on a CONNECT by the peer's identity; without it all are allowed.
	allow atomic.Value // func(id string) int
}

// peerAnswer is a peer's answer to a request.
type peerAnswer struct {
	ID, Source, Sender string
	// Tunnel and Conn number what the request came in.
	Tunnel, Conn int64
}

type tunnelKey struct{}

// servePeer listens at address:15008 in place of Envoy's own listener, which has all
// other addresses.
func servePeer(t *testing.T, ca *authority, id, address string) *peer {
	t.Helper()
	p := &peer{}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	listen := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); e != nil {
			return e
		}
		return err
	}}
	l, err := listen.Listen(t.Context(), "tcp", net.JoinHostPort(address, fmt.Sprint(PortInbound)))
	if err != nil {
		t.Fatal(err)
	}
	var tunnels atomic.Int64
	inner := newConnListener(l.Addr())
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	application := &http.Server{
		Protocols: protocols,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, tunnelKey{}, c.(*peerConn).from)
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			a := r.Context().Value(tunnelKey{}).(peerAnswer)
			a.Sender = r.Header.Get("X-Sender")
			w.Header().Set("X-App", address)
			json.NewEncoder(w).Encode(a)
		}),
	}
	end := &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{ca.certificate(id)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots,
			MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}},
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, tunnelKey{}, tunnels.Add(1))
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			source, _, _ := net.SplitHostPort(r.RemoteAddr)
			from := peerAnswer{Source: source, Tunnel: r.Context().Value(tunnelKey{}).(int64)}
			for _, u := range r.TLS.PeerCertificates[0].URIs {
				from.ID += u.String()
			}
			if r.Method != http.MethodConnect {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			if allow, ok := p.allow.Load().(func(string) int); ok {
				if code := allow(from.ID); code != http.StatusOK {
					w.WriteHeader(code)
					return
				}
			}
			from.Conn = p.conns.Add(1)
			w.WriteHeader(http.StatusOK)
			if err := http.NewResponseController(w).Flush(); err != nil {
				return
			}
			near, application := net.Pipe()
			defer near.Close()
			if !inner.give(&peerConn{application, from}) {
				return
			}
			go func() {
				defer near.Close()
				io.Copy(near, r.Body)
			}()
			io.Copy(flushed{w}, near)
		}),
	}
	go application.Serve(inner)
	go end.ServeTLS(l, "", "")
	t.Cleanup(func() { application.Close(); end.Close() })
	return p
}

// peerConn is a connection within a tunnel.
type peerConn struct {
	net.Conn
	from peerAnswer
}

// flushed writes what is to be sent at once.
type flushed struct{ w http.ResponseWriter }

func (f flushed) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = http.NewResponseController(f.w).Flush()
	}
	return n, err
}

// connListener accepts the connections that it is given.
type connListener struct {
	addr  net.Addr
	conns chan net.Conn
	ctx   context.Context
	end   context.CancelFunc
}

func newConnListener(addr net.Addr) *connListener {
	l := &connListener{addr: addr, conns: make(chan net.Conn)}
	l.ctx, l.end = context.WithCancel(context.Background())
	return l
}

func (l *connListener) give(c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.ctx.Done():
		return false
	}
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l *connListener) Close() error   { l.end(); return nil }
func (l *connListener) Addr() net.Addr { return l.addr }
