package pki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

var server = Request{CommonName: "api", DNSNames: []string{"kubernetes"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Server: true}

func newTestCA(t *testing.T, dir string) *CA {
	t.Helper()
	c, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func issue(t *testing.T, c *CA, name string, req Request) tls.Certificate {
	t.Helper()
	cert, key, err := c.Issue(name, req)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// serve answers with the user and groups of the client's certificate.
func serve(t *testing.T, c *CA) *httptest.Server {
	t.Helper()
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(c.CertPEM())
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		subject := r.TLS.PeerCertificates[0].Subject
		fmt.Fprint(w, subject.CommonName, subject.Organization)
	}))
	s.TLS = &tls.Config{
		Certificates: []tls.Certificate{issue(t, c, "api", server)},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    clients,
	}
	s.Config.ErrorLog = nil
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func get(t *testing.T, url string, c, signer *CA, req Request) (string, error) {
	t.Helper()
	cert, key, err := signer.Issue("client", req)
	if err != nil {
		t.Fatal(err)
	}
	read := func(path string) []byte {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	config, err := clientcmd.RESTConfigFromKubeConfig(Kubeconfig(url, c.CertPEM(), read(cert), read(key), "a: \"name\""))
	if err != nil {
		t.Fatal(err)
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	resp, err := client.Get(config.Host)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// A client with a kubeconfig file meets a server, as in a cluster.
func TestHandshake(t *testing.T) {
	c, other := newTestCA(t, t.TempDir()), newTestCA(t, t.TempDir())
	s := serve(t, c)
	admin := Request{CommonName: "admin", Organizations: []string{"system:masters"}, Client: true}
	notClient := admin
	notClient.Client, notClient.Server = false, true
	if got, err := get(t, s.URL, c, c, admin); err != nil || got != "admin[system:masters]" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := get(t, s.URL, c, other, admin); err == nil {
		t.Errorf("a client of another authority got %q", got)
	}
	if got, err := get(t, s.URL, other, c, admin); err == nil {
		t.Errorf("a server of another authority gave %q", got)
	}
	if got, err := get(t, s.URL, c, c, notClient); err == nil {
		t.Errorf("a client with a server's certificate got %q", got)
	}
}

func TestIssueKeepsWhatFits(t *testing.T) {
	dir := t.TempDir()
	first := issue(t, newTestCA(t, dir), "api", server)
	same := func(pair tls.Certificate) bool { return bytes.Equal(pair.Certificate[0], first.Certificate[0]) }
	if !same(issue(t, newTestCA(t, dir), "api", server)) {
		t.Error("another run does not keep the certificate")
	}
	info, err := os.Stat(filepath.Join(dir, "api.key"))
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("key has mode %v, %v", info.Mode(), err)
	}
	cn, org, dns, ip, use := server, server, server, server, server
	cn.CommonName = "b"
	org.Organizations = []string{"o"}
	dns.DNSNames = append([]string{"kubernetes.default"}, server.DNSNames...)
	ip.IPs = []net.IP{net.IPv4(127, 0, 0, 2)}
	use.Client = true
	for what, req := range map[string]Request{"common name": cn, "organization": org, "DNS name": dns, "IP": ip, "usage": use} {
		issue(t, newTestCA(t, dir), "api", server)
		before, err := os.ReadFile(filepath.Join(dir, "api.crt"))
		if err != nil {
			t.Fatal(err)
		}
		issue(t, newTestCA(t, dir), "api", req)
		after, err := os.ReadFile(filepath.Join(dir, "api.crt"))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(before, after) {
			t.Errorf("another %s does not make another certificate", what)
		}
	}
}

func TestNewAfterTimeAndDamage(t *testing.T) {
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		later  time.Duration
		keeps  bool
	}{
		{name: "nothing", keeps: true},
		{name: "ten months", later: 300 * 24 * time.Hour, keeps: true},
		{name: "nearly a year", later: 340 * 24 * time.Hour},
		{name: "before its time", later: -48 * time.Hour},
		{name: "no certificate", damage: func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "ca.crt")); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "key of another", damage: func(t *testing.T, dir string) {
			_, key, err := newKey()
			if err != nil {
				t.Fatal(err)
			}
			if err := write(filepath.Join(dir, "ca.key"), key, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "empty key", damage: func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "ca.key"), 0); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "key for all to read", damage: func(t *testing.T, dir string) {
			if err := os.Chmod(filepath.Join(dir, "ca.key"), 0o644); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			first := newTestCA(t, dir)
			leaf := issue(t, first, "api", server)
			if tc.damage != nil {
				tc.damage(t, dir)
			}
			now := func() time.Time { return time.Now().Add(tc.later) }
			second, err := newCA(dir, now)
			if err != nil {
				t.Fatal(err)
			}
			if kept := bytes.Equal(first.CertPEM(), second.CertPEM()); kept != tc.keeps {
				t.Errorf("kept is %v, want %v", kept, tc.keeps)
			}
			again := issue(t, second, "api", server)
			if kept := bytes.Equal(leaf.Certificate[0], again.Certificate[0]); kept != tc.keeps {
				t.Errorf("leaf kept is %v, want %v", kept, tc.keeps)
			}
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM(second.CertPEM())
			if _, err := again.Leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now()}); err != nil {
				t.Error(err)
			}
			info, err := os.Stat(second.KeyPath())
			if err != nil || info.Mode() != 0o600 {
				t.Errorf("key has mode %v, %v", info.Mode(), err)
			}
		})
	}
}

func TestServiceAccountKey(t *testing.T) {
	dir := t.TempDir()
	read := func() (priv, pub []byte) {
		t.Helper()
		privPath, pubPath, err := ServiceAccountKey(dir)
		if err != nil {
			t.Fatal(err)
		}
		if priv, err = os.ReadFile(privPath); err != nil {
			t.Fatal(err)
		}
		if pub, err = os.ReadFile(pubPath); err != nil {
			t.Fatal(err)
		}
		return priv, pub
	}
	priv, pub := read()
	// Killed between the two files.
	if err := os.Remove(filepath.Join(dir, "sa.pub")); err != nil {
		t.Fatal(err)
	}
	if priv2, pub2 := read(); !bytes.Equal(priv, priv2) || !bytes.Equal(pub, pub2) {
		t.Error("the pair is not kept")
	}
	if err := os.Remove(filepath.Join(dir, "sa.key")); err != nil {
		t.Fatal(err)
	}
	if priv2, pub2 := read(); bytes.Equal(priv, priv2) || bytes.Equal(pub, pub2) {
		t.Error("a lost key keeps its public half")
	}
}
