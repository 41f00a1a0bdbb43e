// Package uplink is the agent's one connection to the operator: TLS by the
// mesh's own roots, and the agent's projected token on every call.
package uplink

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// Options of a connection.
type Options struct {
	// Address of the operator, host:port or a gRPC target. Required.
	Address string
	// ServerName that the operator's certificate must have. Required.
	ServerName string
	// TokenFile holds the bearer token; it is read for each call, because the
	// kubelet replaces it. Required.
	TokenFile string
	// MaxBackoff between attempts to connect. Default 10 s.
	MaxBackoff time.Duration
}

// Roots are what the operator's certificate must chain to. The zero value trusts
// nobody. Its methods may be called from any goroutine.
type Roots struct{ pool atomic.Pointer[x509.CertPool] }

// SetPEM replaces the roots. Connections that exist stay.
func (r *Roots) SetPEM(pem []byte) error {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return errors.New("set the operator's roots: no certificate in the trust bundle")
	}
	r.pool.Store(pool)
	return nil
}

// Pool returns the roots, nil before there are any.
func (r *Roots) Pool() *x509.CertPool { return r.pool.Load() }

// Known reports whether there are roots.
func (r *Roots) Known() bool { return r.pool.Load() != nil }

// Dial returns a connection that connects when it is used and whenever it broke.
// The caller closes it.
func Dial(o Options, roots *Roots) (*grpc.ClientConn, error) {
	if o.Address == "" || o.ServerName == "" || o.TokenFile == "" {
		return nil, errors.New("dial operator: address, server name and token file are all required")
	}
	return grpc.NewClient(o.Address,
		grpc.WithTransportCredentials(&rootsTLS{roots: roots, serverName: o.ServerName}),
		grpc.WithAuthority(o.ServerName),
		// Or each look-up of the name waits for a TXT record that nobody has: ten
		// seconds where DNS doesn't answer.
		grpc.WithDisableServiceConfig(),
		grpc.WithPerRPCCredentials(token{o.TokenFile}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.4, MaxDelay: cmp.Or(o.MaxBackoff, 10*time.Second)},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 15 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true}),
		// Endpoints of a large service, several of them in one answer.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
		// An idle connection would be closed, and the next pod would wait for it.
		grpc.WithIdleTimeout(0),
	)
}

// rootsTLS is TLS whose roots are looked up at each handshake, so that a rotated
// authority needs no new connection object.
type rootsTLS struct {
	roots      *Roots
	serverName string
}

func (c *rootsTLS) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	pool := c.roots.pool.Load()
	if pool == nil {
		return nil, nil, errors.New("the mesh's trust bundle isn't known yet")
	}
	return credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: c.serverName, MinVersion: tls.VersionTLS13}).ClientHandshake(ctx, authority, conn)
}

func (c *rootsTLS) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a server")
}

func (c *rootsTLS) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (c *rootsTLS) Clone() credentials.TransportCredentials { d := *c; return &d }

func (c *rootsTLS) OverrideServerName(name string) error { c.serverName = name; return nil }

// token sends the content of a file as bearer token.
type token struct{ file string }

func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	b, err := os.ReadFile(t.file)
	if err != nil {
		return nil, fmt.Errorf("read agent's token: %w", err)
	}
	return map[string]string{"authorization": "Bearer " + strings.TrimSpace(string(b))}, nil
}

func (token) RequireTransportSecurity() bool { return true }
