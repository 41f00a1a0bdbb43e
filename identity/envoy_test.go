package identity

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	echov3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/echo/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// TestEnvoy serves with the secrets of one identity and takes another's, of the
// same mesh only: both directions go through chains and constraints as Sign and
// the Store make them.
func TestEnvoy(t *testing.T) {
	dir := keyDir(t)
	n := newNode(t, dir)
	n.start()
	defer func() { n.stop() }()
	n.bundle()
	n.SetPods([]Pod{pod("1", reviews), pod("2", other)})
	n.ready("1")
	n.ready("2")

	pack := func(m proto.Message) *anypb.Any { return must[*anypb.Any](t)(anypb.New(m)) }
	var secrets []*tlsv3.Secret
	for _, name := range []string{reviews.String(), RootCA} {
		r, _ := n.Secret(teamA, name)
		s := &tlsv3.Secret{}
		if err := r.GetResource().UnmarshalTo(s); err != nil {
			t.Fatal(err)
		}
		secrets = append(secrets, s)
	}
	socket := filepath.Join(t.TempDir(), "s")
	bootstrap := must[[]byte](t)(protojson.Marshal(&bootstrapv3.Bootstrap{
		Node: &corev3.Node{Id: "identity-test", Cluster: "test"},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{
			Secrets: secrets,
			Listeners: []*listenerv3.Listener{{
				Name:    "tls",
				Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: socket}}},
				FilterChains: []*listenerv3.FilterChain{{
					Filters: []*listenerv3.Filter{{Name: "envoy.filters.network.echo", ConfigType: &listenerv3.Filter_TypedConfig{
						TypedConfig: pack(&echov3.Echo{}),
					}}},
					TransportSocket: &corev3.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &corev3.TransportSocket_TypedConfig{
						TypedConfig: pack(&tlsv3.DownstreamTlsContext{
							RequireClientCertificate: wrapperspb.Bool(true),
							CommonTlsContext: &tlsv3.CommonTlsContext{
								TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{Name: reviews.String()}},
								ValidationContextType: &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{
									ValidationContextSdsSecretConfig: &tlsv3.SdsSecretConfig{Name: RootCA},
								},
							},
						}),
					}},
				}},
			}},
		},
	}))
	envoy, err := dist.Fetch(t.Context(), dist.Default)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(envoy.Binary, "--config-yaml", string(bootstrap), "--disable-hot-restart", "--concurrency", "1", "-l", "warning")
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() {
		cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("Envoy: %s", &log)
		}
	}()
	for deadline := time.Now().Add(time.Minute); ; {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
			break
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("Envoy ended: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("Envoy doesn't listen: %v", err)
		}
	}

	call := func(client tls.Certificate) (string, string, error) {
		c := must[net.Conn](t)(net.Dial("unix", socket))
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		pool := x509.NewCertPool()
		pool.AddCert(n.signer.authority.issuer.roots[0])
		var server string
		conn := tls.Client(c, &tls.Config{
			Certificates: []tls.Certificate{client}, InsecureSkipVerify: true, // the name is a URI: below
			VerifyConnection: func(s tls.ConnectionState) error {
				server = s.PeerCertificates[0].URIs[0].String()
				between := x509.NewCertPool()
				for _, c := range s.PeerCertificates[1:] {
					between.AddCert(c)
				}
				_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between})
				return err
			},
		})
		if _, err := conn.Write([]byte("hello")); err != nil {
			return "", server, err
		}
		body := make([]byte, 5)
		n, err := io.ReadFull(conn, body)
		return string(body[:n]), server, err
	}
	client, _, _ := n.certificate(teamB, other)
	if body, server, err := call(client); body != "hello" || server != reviews.String() {
		t.Errorf("Envoy as %q said %q: %v", server, body, err)
	}

	key := testKey(t)
	stranger := must[*Authority](t)(NewAuthority("cluster.local", time.Now()))
	chain := must[[][]byte](t)(stranger.Sign(must[[]byte](t)(NewCSR(key, other)), other, time.Hour, time.Now()))
	if body, _, err := call(tls.Certificate{Certificate: chain, PrivateKey: key}); err == nil || body != "" {
		t.Errorf("Envoy talked (%q, %v) to a client of another root", body, err)
	}
	// The same intermediate, but beyond its constraint.
	outside := must[*x509.Certificate](t)(n.signer.authority.issuer.signLeaf(&x509.Certificate{
		URIs: append(client.Leaf.URIs[:0:0], uri("spiffe://elsewhere/ns/team-b/sa/reviews")), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, &key.PublicKey, time.Hour, time.Now()))
	if body, _, err := call(tls.Certificate{Certificate: [][]byte{outside.Raw, client.Certificate[1]}, PrivateKey: key}); err == nil || body != "" {
		t.Errorf("Envoy talked (%q, %v) to a client of another trust domain", body, err)
	}
}
