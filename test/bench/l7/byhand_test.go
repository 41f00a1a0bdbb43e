package l7

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"text/template"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// What somebody would write who wants requests read at the client, mutual TLS to the
// server's proxy, and nothing else.
var (
	clientByHand = template.Must(template.New("client").Parse(`
stats_config: {stats_matcher: {reject_all: true}}
static_resources:
  listeners:
{{- range .}}
  - name: l{{.Port}}
    address: {socket_address: {address: 127.0.0.1, port_value: {{.Port}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: l7
          generate_request_id: false
          route_config:
            virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: c{{.Port}}, timeout: 0s}}]}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router, suppress_envoy_headers: true}
{{- end}}
  clusters:
{{- range .}}
  - name: c{{.Port}}
    type: STATIC
    circuit_breakers: {thresholds: [{max_connections: 100000, max_requests: 100000, max_pending_requests: 100000}]}
    load_assignment: {cluster_name: c{{.Port}}, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: {{.Server}}, port_value: {{.Port}}}}}}]}]}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        use_downstream_protocol_config: {http_protocol_options: {}, http2_protocol_options: {}}
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
          tls_certificates: [{certificate_chain: {filename: cert.pem}, private_key: {filename: key.pem}}]
          validation_context: {trusted_ca: {filename: ca.pem}}
{{- end}}
`))
	serverByHand = template.Must(template.New("server").Parse(`
stats_config: {stats_matcher: {reject_all: true}}
static_resources:
  listeners:
{{- range .}}
  - name: l{{.Port}}
    address: {socket_address: {address: 0.0.0.0, port_value: {{.Port}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: tcp, cluster: c{{.Port}}}
      transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
            tls_certificates: [{certificate_chain: {filename: cert.pem}, private_key: {filename: key.pem}}]
            validation_context: {trusted_ca: {filename: ca.pem}}
{{- end}}
  clusters:
{{- range .}}
  - name: c{{.Port}}
    type: STATIC
    circuit_breakers: {thresholds: [{max_connections: 100000}]}
    load_assignment: {cluster_name: c{{.Port}}, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: {{.Target}}}}}}]}]}
{{- end}}
`))
)

// byHandUser is whose the two Envoys are.
const byHandUser = 1337

// port is one of the two Envoys'.
type port struct {
	Port, Target uint16
	Server       string
}

// startByHand runs the two Envoys in the pods of client and server, and returns their
// PIDs.
func startByHand(b *testing.B, client, server *lab.Host) []int {
	b.Helper()
	var ports []port
	for _, w := range ways {
		if w.byHand {
			ports = append(ports, port{w.port, targets[w.protocol], server.V4.String()})
		}
	}
	envoy, err := dist.Fetch(b.Context(), dist.Default)
	lab.Check(b, err)
	dir := b.TempDir()
	// The test's folder is root's alone, and so is the cache.
	lab.Check(b, os.Chmod(dir, 0o755))
	lab.Check(b, os.Chmod(filepath.Dir(dir), 0o755))
	if out, err := exec.Command("cp", envoy.Binary, filepath.Join(dir, "envoy")).CombinedOutput(); err != nil {
		b.Fatalf("copy Envoy: %v: %s", err, out)
	}
	writeCertificates(b, dir)
	start := func(h *lab.Host, config *template.Template) int {
		var text bytes.Buffer
		lab.Check(b, config.Execute(&text, ports))
		file := filepath.Join(dir, h.Name+".yaml")
		lab.Check(b, os.WriteFile(file, text.Bytes(), 0o644))
		log, err := os.Create(filepath.Join(dir, h.Name+".log"))
		lab.Check(b, err)
		defer log.Close()
		cmd := exec.Command(filepath.Join(dir, "envoy"), "--config-path", file, "--disable-hot-restart", "--concurrency", "2", "--log-level", "warning")
		cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Credential: &syscall.Credential{Uid: byHandUser, Gid: byHandUser}}
		h.Do(b, func() { lab.Check(b, cmd.Start()) })
		container.Put(b, "envoy-"+h.Name, cmd.Process.Pid, container.Pod)
		b.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		lab.Eventually(b, h.Name+"'s Envoy", func() error {
			var err error
			h.Do(b, func() {
				var c net.Conn
				if c, err = net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Port), time.Second); err == nil {
					c.Close()
				}
			})
			if err != nil {
				said, _ := os.ReadFile(log.Name())
				return fmt.Errorf("%w: %s", err, said)
			}
			return nil
		})
		return cmd.Process.Pid
	}
	return []int{start(client, clientByHand), start(server, serverByHand)}
}

// writeCertificates writes an authority, and a certificate for both ends.
func writeCertificates(b *testing.B, dir string) {
	b.Helper()
	issue := func(template, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		lab.Check(b, err)
		if parent == nil {
			parent, signer = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
		lab.Check(b, err)
		cert, err := x509.ParseCertificate(der)
		lab.Check(b, err)
		return key, cert
	}
	from, to := time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	caKey, ca := issue(&x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: from, NotAfter: to,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil)
	key, cert := issue(&x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "end"}, NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}, ca, caKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	lab.Check(b, err)
	for name, block := range map[string]*pem.Block{
		"ca.pem": {Type: "CERTIFICATE", Bytes: ca.Raw}, "cert.pem": {Type: "CERTIFICATE", Bytes: cert.Raw}, "key.pem": {Type: "PRIVATE KEY", Bytes: der},
	} {
		lab.Check(b, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o644)) // of this hour, for the two Envoys' user
	}
}
