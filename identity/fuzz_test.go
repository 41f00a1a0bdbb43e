package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// FuzzCSR: whatever a node sends, a certificate comes out only with the identity
// that was checked, no other name, and no authority.
func FuzzCSR(f *testing.F) {
	a, err := NewAuthority("cluster.local", time.Now())
	if err != nil {
		f.Fatal(err)
	}
	key, err := newKey()
	if err != nil {
		f.Fatal(err)
	}
	for _, r := range []x509.CertificateRequest{
		{URIs: []*url.URL{uri(reviews.String())}},
		{URIs: []*url.URL{uri(other.String())}},
		{URIs: []*url.URL{uri(reviews.String()), uri(other.String())}},
		{URIs: []*url.URL{uri(reviews.String())}, DNSNames: []string{"a"}},
		{URIs: []*url.URL{uri(reviews.String())}, Subject: pkix.Name{CommonName: "x"}},
		{URIs: []*url.URL{uri(reviews.String())}, ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Value: []byte{0x30, 3, 1, 1, 0xff}}}},
	} {
		der, err := x509.CreateCertificateRequest(rand.Reader, &r, key)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der)
	}
	f.Add([]byte{})
	f.Add(make([]byte, MaxCSRSize+1))
	f.Fuzz(func(t *testing.T, der []byte) {
		now := time.Now()
		chain, err := a.Sign(der, reviews, time.Hour, now)
		if err != nil {
			if chain != nil {
				t.Fatal("certificates with an error")
			}
			return
		}
		leaf, err := x509.ParseCertificate(chain[0])
		if err != nil {
			t.Fatal(err)
		}
		id, err := x509svid.IDFromCert(leaf)
		if err != nil || id.String() != reviews.String() || leaf.IsCA || len(leaf.URIs) != 1 || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 || len(leaf.Subject.Names) > 0 {
			t.Fatalf("signed %q, %+v: %v", id, leaf.Subject, err)
		}
		if r, err := x509.ParseCertificateRequest(der); err != nil || r.CheckSignature() != nil {
			t.Fatal("signed a key whose owner didn't ask")
		}
	})
}

// FuzzSPIFFEID: our SPIFFE IDs are SPIFFE's, are written one way, and a
// certificate's is what was asked for.
func FuzzSPIFFEID(f *testing.F) {
	for _, s := range []string{
		reviews.String(), "spiffe://a/ns/b/sa/c", "spiffe://cluster.local", "spiffe://cluster.local/ns/a/sa/b/", "spiffe://cluster.local/ns/a/sa/b?c",
		"spiffe://cluster.local:80/ns/a/sa/b", "SPIFFE://cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/../sa/b", "spiffe://cluster.local/ns/a%2fb/sa/c", "", "none", RootCA,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := model.ParseIdentity(s)
		if err != nil {
			return
		}
		if id.String() != s {
			t.Fatalf("%q is written %q", s, id)
		}
		theirs, err := spiffeid.FromString(s)
		if err != nil || theirs.TrustDomain().Name() != id.TrustDomain {
			t.Fatalf("%q is no SPIFFE ID: %v", s, err)
		}
		u, err := url.Parse(s)
		if err != nil || workloadTemplate(id).URIs[0].String() != s || u.String() != s {
			t.Fatalf("a certificate would have %q for %q: %v", workloadTemplate(id).URIs[0], s, err)
		}
	})
}

// FuzzParseAuthority: what lies in a Secret never ends the operator, or is told.
func FuzzParseAuthority(f *testing.F) {
	a, err := NewAuthority("cluster.local", time.Now())
	if err != nil {
		f.Fatal(err)
	}
	d := a.Data()
	f.Add(d[DataRoots], d[DataIntermediate], d[DataIntermediateKey], d[DataState])
	f.Add(d[DataIntermediate], d[DataRoots], d[DataRootKey], []byte("{}"))
	f.Add([]byte("x"), []byte{}, []byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"), []byte(`{"phase":"Publishing","ttl":"-1h"}`))
	f.Fuzz(func(t *testing.T, roots, chain, key, state []byte) {
		a, err := ParseAuthority(map[string][]byte{DataRoots: roots, DataIntermediate: chain, DataIntermediateKey: key, DataState: state})
		if err != nil {
			if len(key) > 200 && strings.Contains(err.Error(), string(key[100:140])) {
				t.Fatal("the error has the key")
			}
			return
		}
		again, err := ParseAuthority(a.Data())
		if err != nil || !bytes.Equal(again.Data()[DataIntermediateKey], a.Data()[DataIntermediateKey]) {
			t.Fatalf("written and read again: %v", err)
		}
		if _, _, err := a.Step(Wanted{}, time.Now()); err != nil && !strings.Contains(err.Error(), "root key") {
			t.Log(err)
		}
	})
}

// What an Istio ambient node proxy wants of its peers, by ztunnel's own rules: one
// URI as the only name, both usages, a signature key, leaf first and no root, and
// nothing above that ends before the leaf.
func TestAmbientCertificate(t *testing.T) {
	now := time.Now()
	a := must[*Authority](t)(NewAuthority("cluster.local", now))
	chain := must[[]*x509.Certificate](t)(parseDER(must[[][]byte](t)(a.Sign(must[[]byte](t)(NewCSR(testKey(t), reviews)), reviews, time.Hour, now))))
	leaf := chain[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != reviews.String() || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 {
		t.Errorf("names %v %v", leaf.URIs, leaf.DNSNames)
	}
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature || leaf.IsCA || !leaf.BasicConstraintsValid {
		t.Errorf("usage %v, CA %v", leaf.KeyUsage, leaf.IsCA)
	}
	usages := map[x509.ExtKeyUsage]bool{}
	for _, u := range leaf.ExtKeyUsage {
		usages[u] = true
	}
	if len(usages) != 2 || !usages[x509.ExtKeyUsageServerAuth] || !usages[x509.ExtKeyUsageClientAuth] {
		t.Errorf("extended usages %v", leaf.ExtKeyUsage)
	}
	if _, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || leaf.SignatureAlgorithm != x509.ECDSAWithSHA256 || leaf.SerialNumber.Sign() <= 0 || leaf.Version != 3 {
		t.Errorf("key %T, %v, serial %v", leaf.PublicKey, leaf.SignatureAlgorithm, leaf.SerialNumber)
	}
	// With an empty subject, the name must be critical (RFC 5280, 4.2.1.6).
	for _, e := range leaf.Extensions {
		if e.Id.Equal(oidSubjectAltName) && !e.Critical {
			t.Error("the only name isn't critical")
		}
	}
	for i, c := range chain[1:] {
		if err := chain[i].CheckSignatureFrom(c); err != nil || !c.IsCA || selfSigned(c) || c.NotAfter.Before(leaf.NotAfter) || c.NotBefore.After(leaf.NotBefore) {
			t.Errorf("certificate %d of the chain: %v", i+1, err)
		}
	}
	if len(chain) != 2 {
		t.Errorf("%d certificates", len(chain))
	}
}

func BenchmarkSign(b *testing.B) {
	now := time.Now()
	a, err := NewAuthority("cluster.local", now)
	if err != nil {
		b.Fatal(err)
	}
	key, err := newKey()
	if err != nil {
		b.Fatal(err)
	}
	csr, err := NewCSR(key, reviews)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := a.Sign(csr, reviews, time.Hour, now); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "SVIDs/s")
}
