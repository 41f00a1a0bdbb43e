package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/bulkhead-mesh/bulkhead/model"
)

var (
	reviews = model.Identity{TrustDomain: "cluster.local", Namespace: "team-a", ServiceAccount: "reviews"}
	ratings = model.Identity{TrustDomain: "cluster.local", Namespace: "team-a", ServiceAccount: "ratings"}
	other   = model.Identity{TrustDomain: "cluster.local", Namespace: "team-b", ServiceAccount: "reviews"}
	late    = model.Identity{TrustDomain: "cluster.local", Namespace: "team-a", ServiceAccount: "late"}
)

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func testKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	return must[*ecdsa.PrivateKey](t)(newKey())
}

func uri(s string) *url.URL { u, _ := url.Parse(s); return u }

func TestSignRefuses(t *testing.T) {
	a := must[*Authority](t)(NewAuthority("cluster.local", time.Now()))
	p384 := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	id := uri(reviews.String())
	caFlag := pkix.Extension{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}
	// The parser of the standard library doesn't see a registered ID (tag 8).
	registered := append([]byte{0x86, byte(len(reviews.String()))}, reviews.String()...)
	registered = append(registered, 0x88, 2, 0x2a, 3)
	registered = append([]byte{0x30, byte(len(registered))}, registered...)
	for name, c := range map[string]struct {
		request x509.CertificateRequest
		key     *ecdsa.PrivateKey
		change  func([]byte) []byte
		want    error
	}{
		"wrong URI":            {request: x509.CertificateRequest{URIs: []*url.URL{uri(other.String())}}, want: ErrOtherIdentity},
		"other trust domain":   {request: x509.CertificateRequest{URIs: []*url.URL{uri("spiffe://evil/ns/team-a/sa/reviews")}}, want: ErrOtherIdentity},
		"query":                {request: x509.CertificateRequest{URIs: []*url.URL{uri(reviews.String() + "?a")}}, want: ErrOtherIdentity},
		"two URIs":             {request: x509.CertificateRequest{URIs: []*url.URL{id, uri(other.String())}}, want: ErrCSR},
		"the URI twice":        {request: x509.CertificateRequest{URIs: []*url.URL{id, id}}, want: ErrCSR},
		"no URI":               {want: ErrCSR},
		"DNS name":             {request: x509.CertificateRequest{URIs: []*url.URL{id}, DNSNames: []string{"a.b"}}, want: ErrCSR},
		"IP address":           {request: x509.CertificateRequest{URIs: []*url.URL{id}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}}, want: ErrCSR},
		"email":                {request: x509.CertificateRequest{URIs: []*url.URL{id}, EmailAddresses: []string{"a@b.c"}}, want: ErrCSR},
		"name of unknown kind": {request: x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oidSubjectAltName, Value: registered}}}, want: ErrCSR},
		"subject":              {request: x509.CertificateRequest{URIs: []*url.URL{id}, Subject: pkix.Name{CommonName: "admin"}}, want: ErrCSR},
		"CA flag":              {request: x509.CertificateRequest{URIs: []*url.URL{id}, ExtraExtensions: []pkix.Extension{caFlag}}, want: ErrCSR},
		"bad signature":        {request: x509.CertificateRequest{URIs: []*url.URL{id}}, want: ErrCSR, change: func(b []byte) []byte { b[len(b)-1] ^= 1; return b }},
		"swapped URI":          {request: x509.CertificateRequest{URIs: []*url.URL{uri(ratings.String())}}, want: ErrCSR, change: func(b []byte) []byte { return bytes.Replace(b, []byte("ratings"), []byte("reviews"), 1) }},
		"garbage":              {want: ErrCSR, change: func([]byte) []byte { return []byte("garbage") }},
		"too large":            {want: ErrCSR, change: func([]byte) []byte { return make([]byte, MaxCSRSize+1) }},
		"P-384":                {request: x509.CertificateRequest{URIs: []*url.URL{id}}, key: p384, want: ErrCSR},
	} {
		t.Run(name, func(t *testing.T) {
			key := c.key
			if key == nil {
				key = testKey(t)
			}
			der := must[[]byte](t)(x509.CreateCertificateRequest(rand.Reader, &c.request, key))
			if c.change != nil {
				der = c.change(der)
			}
			if chain, err := a.Sign(der, reviews, time.Hour, time.Now()); !errors.Is(err, c.want) || chain != nil {
				t.Errorf("Sign: %d certificates and %v, want %v", len(chain), err, c.want)
			}
		})
	}
	foreign := model.Identity{TrustDomain: "elsewhere", Namespace: "team-a", ServiceAccount: "reviews"}
	csr := must[[]byte](t)(NewCSR(testKey(t), foreign))
	if _, err := a.Sign(csr, foreign, time.Hour, time.Now()); err == nil {
		t.Error("signed for a trust domain that isn't the authority's")
	}
}

// TestChain reads what Sign returns as peers do: go-spiffe, a TLS handshake of
// crypto/tls, and openssl, whose name constraints are BoringSSL's.
func TestChain(t *testing.T) {
	now := time.Now()
	made := must[*Authority](t)(NewAuthority("cluster.local", now))
	a := must[*Authority](t)(ParseAuthority(made.Data()))
	svid := func(id model.Identity) *x509svid.SVID {
		t.Helper()
		key := testKey(t)
		chain := must[[][]byte](t)(a.Sign(must[[]byte](t)(NewCSR(key, id)), id, time.Hour, now))
		return must[*x509svid.SVID](t)(x509svid.ParseRaw(bytes.Join(chain, nil), must[[]byte](t)(x509.MarshalPKCS8PrivateKey(key))))
	}
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	bundle := must[*x509bundle.Bundle](t)(x509bundle.ParseRaw(td, bytes.Join(a.Roots(), nil)))
	client, server := svid(reviews), svid(ratings)
	if id, _, err := x509svid.Verify(client.Certificates, bundle); err != nil || id.String() != reviews.String() {
		t.Fatalf("verified as %q: %v", id, err)
	}
	leaf := client.Certificates[0]
	if life := leaf.NotAfter.Sub(now); leaf.IsCA || life > time.Hour || life < time.Hour-2*time.Second {
		t.Errorf("leaf: CA %v, ends in %v", leaf.IsCA, life)
	}

	handshake := func(wanted model.Identity) error {
		c, s := net.Pipe()
		defer c.Close()
		defer s.Close()
		clientConf := tlsconfig.MTLSClientConfig(client, bundle, tlsconfig.AuthorizeID(spiffeid.RequireFromString(wanted.String())))
		serverConf := tlsconfig.MTLSServerConfig(server, bundle, tlsconfig.AuthorizeID(spiffeid.RequireFromString(reviews.String())))
		done := make(chan error, 1)
		go func() { done <- tls.Server(s, serverConf).Handshake() }()
		err := tls.Client(c, clientConf).Handshake()
		c.Close()
		return errors.Join(err, <-done)
	}
	if err := handshake(ratings); err != nil {
		t.Errorf("handshake: %v", err)
	}
	if err := handshake(other); err == nil {
		t.Error("the client took ratings for another")
	}

	// The constraints hold a stolen intermediate key to its trust domain.
	foreign := must[*x509.Certificate](t)(a.issuer.signLeaf(&x509.Certificate{URIs: []*url.URL{uri("spiffe://elsewhere/ns/a/sa/b")}}, &testKey(t).PublicKey, time.Hour, now))
	verify := func(c *x509.Certificate) error {
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		roots.AddCert(a.issuer.roots[0])
		between.AddCert(a.issuer.chain[0])
		_, err := c.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err
	}
	if err := verify(foreign); err == nil || !strings.Contains(err.Error(), "permitted") {
		t.Errorf("a certificate of another trust domain: %v", err)
	}

	own := must[tls.Certificate](t)(a.ServerCertificate([]string{"bulkhead-operator.bulkhead-system.svc"}, time.Hour, now))
	pool := x509.NewCertPool()
	pool.AddCert(a.issuer.roots[0])
	c, s := net.Pipe()
	defer s.Close()
	go tls.Server(s, &tls.Config{Certificates: []tls.Certificate{own}}).Handshake()
	if err := tls.Client(c, &tls.Config{RootCAs: pool, ServerName: "bulkhead-operator.bulkhead-system.svc", MinVersion: tls.VersionTLS13}).Handshake(); err != nil {
		t.Errorf("operator's certificate: %v", err)
	}
	c.Close()

	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("no openssl")
	}
	dir := t.TempDir()
	write := func(name string, ders ...[]byte) string {
		path := filepath.Join(dir, name)
		if err := writeFile(path, encodeCertificates(ders)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root, between := write("root", a.Roots()...), write("between", a.issuer.chain[0].Raw)
	check := func(c *x509.Certificate) error {
		return exec.Command(openssl, "verify", "-x509_strict", "-CAfile", root, "-untrusted", between, write("leaf", c.Raw)).Run()
	}
	if err := check(leaf); err != nil {
		t.Errorf("openssl refuses a leaf: %v", err)
	}
	if err := check(foreign); err == nil {
		t.Error("openssl takes a certificate of another trust domain")
	}
}

func TestAuthorityLife(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	first := must[*Authority](t)(NewAuthority("cluster.local", now))
	late := now.Add(IntermediateLifetime - 10*time.Minute)
	if first.NeedsRenewal(now.Add(IntermediateLifetime/2)) || !first.NeedsRenewal(late) {
		t.Error("renewal isn't due in the last third")
	}
	key := testKey(t)
	csr := must[[]byte](t)(NewCSR(key, reviews))
	chain := must[[][]byte](t)(first.Sign(csr, reviews, time.Hour, late))
	if leaf := must[*x509.Certificate](t)(x509.ParseCertificate(chain[0])); leaf.NotAfter.After(first.issuer.chain[0].NotAfter) {
		t.Error("a leaf outlives the intermediate")
	}
	if _, err := first.Sign(csr, reviews, time.Hour, now.Add(IntermediateLifetime)); err == nil {
		t.Error("signed with an intermediate that ended")
	}
	second := must[*Authority](t)(first.Renew(late))
	bundle := must[*x509bundle.Bundle](t)(x509bundle.ParseRaw(first.issuer.trustDomain, bytes.Join(second.Roots(), nil)))
	for _, a := range []*Authority{first, second} {
		chain := must[[][]byte](t)(a.Sign(csr, reviews, time.Hour, late))
		if _, _, err := x509svid.ParseAndVerify(chain, bundle, x509svid.WithTime(late)); err != nil {
			t.Error(err)
		}
	}

	data := second.Data()
	delete(data, DataRootKey)
	keyless := must[*Authority](t)(ParseAuthority(data))
	if _, err := keyless.Renew(late); !errors.Is(err, ErrNoRootKey) {
		t.Errorf("renewed without the root's key: %v", err)
	}
	for name, change := range map[string]func(map[string][]byte){
		"other root": func(d map[string][]byte) {
			d[DataRoots] = freshData(t, "cluster.local")[DataRoots]
			delete(d, DataRootKey)
		},
		"other key":          func(d map[string][]byte) { d[DataIntermediateKey] = freshData(t, "cluster.local")[DataIntermediateKey] },
		"other root key":     func(d map[string][]byte) { d[DataRootKey] = freshData(t, "cluster.local")[DataRootKey] },
		"no intermediate":    func(d map[string][]byte) { delete(d, DataIntermediate) },
		"key as certificate": func(d map[string][]byte) { d[DataRoots] = d[DataIntermediateKey] },
		"leaf as authority": func(d map[string][]byte) {
			d[DataIntermediate], d[DataIntermediateKey] = encodeCertificates(chain[:1]), encodeKey(key)
		},
		"too large": func(d map[string][]byte) { d["x"] = make([]byte, maxAuthorityDataSize) },
	} {
		d := second.Data()
		change(d)
		if _, err := ParseAuthority(d); err == nil || strings.Contains(err.Error(), "MIG") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := NewAuthority("Not A Domain", now); err == nil {
		t.Error("made an authority of a trust domain that no identity can have")
	}
}

func freshData(t *testing.T, trustDomain string) map[string][]byte {
	t.Helper()
	return must[*Authority](t)(NewAuthority(trustDomain, time.Now())).Data()
}
