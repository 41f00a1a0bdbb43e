package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Why a CSR is refused.
var (
	// ErrCSR: it isn't one that NewCSR makes.
	ErrCSR = errors.New("not a workload's CSR")
	// ErrOtherIdentity: it asks for somebody else's SPIFFE ID.
	ErrOtherIdentity = errors.New("the CSR is for another identity")
)

// MaxCSRSize is how many bytes of DER a CSR may have; NewCSR's have about 300
// beside the SPIFFE ID.
const MaxCSRSize = 4 << 10

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// NewCSR asks, in DER, for a certificate of id for a P-256 key.
func NewCSR(key *ecdsa.PrivateKey, id model.Identity) ([]byte, error) {
	u, err := url.Parse(id.String())
	if err != nil || id.IsZero() {
		return nil, fmt.Errorf("make CSR: %w: %q", model.ErrIdentity, id)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}}, key)
	if err != nil {
		return nil, fmt.Errorf("make CSR: %w", err)
	}
	return der, nil
}

// NewServerCSR asks, in DER, for a server's certificate for a P-256 key. The name
// is the signer's to know.
func NewServerCSR(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("make CSR: %w", err)
	}
	return der, nil
}

// parseCSR returns a CSR that has a P-256 key, which signed it, and no subject.
func parseCSR(der []byte) (*x509.CertificateRequest, *ecdsa.PublicKey, error) {
	if len(der) > MaxCSRSize {
		return nil, nil, fmt.Errorf("%w: %d bytes, more than %d", ErrCSR, len(der), MaxCSRSize)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrCSR, err)
	}
	key, ok := r.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, nil, fmt.Errorf("%w: its key isn't P-256", ErrCSR)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, nil, fmt.Errorf("%w: its signature isn't its key's", ErrCSR)
	}
	if len(r.Subject.Names) > 0 {
		return nil, nil, fmt.Errorf("%w: it has the subject %q, must have none", ErrCSR, r.Subject)
	}
	return r, key, nil
}

// checkCSR returns the key of a CSR that asks for want and for nothing else.
func checkCSR(der []byte, want model.Identity) (*ecdsa.PublicKey, error) {
	r, key, err := parseCSR(der)
	if err != nil {
		return nil, err
	}
	// Extensions that are asked for are refused rather than ignored: who asks for
	// an authority's certificate would believe to have got one.
	if len(r.Extensions) != 1 || !r.Extensions[0].Id.Equal(oidSubjectAltName) {
		return nil, fmt.Errorf("%w: it must ask for a subject alternative name and no other extension", ErrCSR)
	}
	if len(r.URIs) != 1 || len(r.DNSNames)+len(r.IPAddresses)+len(r.EmailAddresses) > 0 {
		return nil, fmt.Errorf("%w: it must have one URI and no other name", ErrCSR)
	}
	if got := r.URIs[0].String(); got != want.String() {
		return nil, fmt.Errorf("%w: %q", ErrOtherIdentity, got)
	}
	// Exactly these bytes: the parser skips kinds of names that it doesn't know.
	only, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(want.String())}})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCSR, err)
	}
	if !bytes.Equal(r.Extensions[0].Value, only) {
		return nil, fmt.Errorf("%w: it must have one URI and no other name", ErrCSR)
	}
	return key, nil
}
