package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Keys of the Secret that holds an Authority. All values are PEM.
const (
	// DataRoots are the roots that peers trust: the authority's own first, then
	// any that are still (or already) trusted while roots change.
	DataRoots = "root.crt"
	// DataRootKey is the key of the first root. It is kept so that the operator can
	// make the next intermediate without a change of trust. Who reads the Secret can
	// sign for as long as the root lives, rather than as long as the intermediate
	// does; who doesn't want that takes this key out of the Secret, keeps it
	// elsewhere and renews the intermediate by hand.
	DataRootKey         = "root.key"
	DataIntermediate    = "intermediate.crt"
	DataIntermediateKey = "intermediate.key"
)

// MaxRoots is how many roots a mesh may trust at once: one, or two while roots
// change, and some to spare.
const MaxRoots = 8

const (
	maxServerNames       = 16
	maxAuthorityDataSize = 64 << 10
)

// Lifetimes. What is signed starts up to MaxBackdate in the past, for clocks
// that are behind, and ends no later than what signed it.
const (
	RootLifetime         = 10 * 365 * 24 * time.Hour
	IntermediateLifetime = 365 * 24 * time.Hour
	MaxBackdate          = 5 * time.Minute
	// DefaultTTL is how long a workload's certificate lives unless the operator is
	// told otherwise; Sign takes MinTTL to MaxTTL.
	DefaultTTL = time.Hour
	MinTTL     = time.Minute
	MaxTTL     = 30 * 24 * time.Hour
)

// ErrNoRootKey is Renew's when the root's key isn't in the Secret.
var ErrNoRootKey = errors.New("the authority has no root key")

// Authority signs the identities of one trust domain. It is immutable and safe
// for concurrent use. The root and its intermediate are P-256 and constrained to
// URIs of the trust domain and to no IP address; DNS names aren't constrained,
// since the operator's own server certificate needs one.
type Authority struct {
	trustDomain     spiffeid.TrustDomain
	roots           []*x509.Certificate // own first
	rootKey         *ecdsa.PrivateKey   // may be nil
	intermediate    *x509.Certificate
	intermediateKey *ecdsa.PrivateKey
}

// NewAuthority makes a root that lives RootLifetime and an intermediate that
// lives IntermediateLifetime.
func NewAuthority(trustDomain string, now time.Time) (*Authority, error) {
	td, err := parseTrustDomain(trustDomain)
	if err != nil {
		return nil, fmt.Errorf("make authority: %w", err)
	}
	key, err := newKey()
	if err != nil {
		return nil, fmt.Errorf("make root: %w", err)
	}
	t := authorityTemplate(td, "root", RootLifetime, now)
	t.MaxPathLen = 1
	root, err := create(t, t, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make root: %w", err)
	}
	return (&Authority{trustDomain: td, roots: []*x509.Certificate{root}, rootKey: key}).Renew(now)
}

// NeedsRenewal reports whether less than a third of the intermediate's life is
// left: time to store what Renew returns.
func (a *Authority) NeedsRenewal(now time.Time) bool {
	life := a.intermediate.NotAfter.Sub(a.intermediate.NotBefore)
	return now.After(a.intermediate.NotAfter.Add(-life / 3))
}

// Renew returns the authority with a new intermediate under the same root.
// Certificates of the old one stay valid, since they carry it. The error is
// ErrNoRootKey without the root's key.
func (a *Authority) Renew(now time.Time) (*Authority, error) {
	if a.rootKey == nil {
		return nil, fmt.Errorf("renew intermediate: %w: put %s back into the Secret, or replace the intermediate by hand", ErrNoRootKey, DataRootKey)
	}
	key, err := newKey()
	if err != nil {
		return nil, fmt.Errorf("renew intermediate: %w", err)
	}
	t := authorityTemplate(a.trustDomain, "intermediate", IntermediateLifetime, now)
	t.MaxPathLenZero = true
	t.NotAfter = earlier(t.NotAfter, a.roots[0].NotAfter)
	intermediate, err := create(t, a.roots[0], &key.PublicKey, a.rootKey)
	if err != nil {
		return nil, fmt.Errorf("renew intermediate: %w", err)
	}
	return &Authority{trustDomain: a.trustDomain, roots: a.roots, rootKey: a.rootKey, intermediate: intermediate, intermediateKey: key}, nil
}

// ParseAuthority is the inverse of Data. It checks that keys and certificates
// belong together and to one trust domain; not that they are valid now.
// Errors name the key of data that is wrong and never its value.
func ParseAuthority(data map[string][]byte) (*Authority, error) {
	size := 0
	for _, v := range data {
		size += len(v)
	}
	if size > maxAuthorityDataSize {
		return nil, fmt.Errorf("parse authority: %d bytes, more than %d", size, maxAuthorityDataSize)
	}
	a := &Authority{}
	var err error
	if a.roots, err = parseCertificates(data[DataRoots], MaxRoots); err != nil {
		return nil, fmt.Errorf("parse authority: %s: %w", DataRoots, err)
	}
	intermediates, err := parseCertificates(data[DataIntermediate], 1)
	if err != nil {
		return nil, fmt.Errorf("parse authority: %s: %w", DataIntermediate, err)
	}
	a.intermediate = intermediates[0]
	if a.intermediateKey, err = parseKey(data[DataIntermediateKey]); err != nil {
		return nil, fmt.Errorf("parse authority: %s: %w", DataIntermediateKey, err)
	}
	if !a.intermediateKey.PublicKey.Equal(a.intermediate.PublicKey) {
		return nil, fmt.Errorf("parse authority: %s isn't the key of %s", DataIntermediateKey, DataIntermediate)
	}
	if len(data[DataRootKey]) > 0 {
		if a.rootKey, err = parseKey(data[DataRootKey]); err != nil {
			return nil, fmt.Errorf("parse authority: %s: %w", DataRootKey, err)
		}
		if !a.rootKey.PublicKey.Equal(a.roots[0].PublicKey) {
			return nil, fmt.Errorf("parse authority: %s isn't the key of the first certificate of %s", DataRootKey, DataRoots)
		}
	}
	for _, c := range append([]*x509.Certificate{a.intermediate}, a.roots...) {
		if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return nil, fmt.Errorf("parse authority: certificate %q isn't an authority's", c.Subject)
		}
	}
	if err := a.intermediate.CheckSignatureFrom(a.roots[0]); err != nil {
		return nil, fmt.Errorf("parse authority: %s isn't signed by the first certificate of %s: %w", DataIntermediate, DataRoots, err)
	}
	if len(a.intermediate.URIs) != 1 {
		return nil, fmt.Errorf("parse authority: %s must have one URI, spiffe://<trust domain>", DataIntermediate)
	}
	id, err := spiffeid.FromURI(a.intermediate.URIs[0])
	if err != nil || id.Path() != "" {
		return nil, fmt.Errorf("parse authority: %s: URI %q isn't spiffe://<trust domain>", DataIntermediate, a.intermediate.URIs[0])
	}
	if a.trustDomain, err = parseTrustDomain(id.TrustDomain().Name()); err != nil {
		return nil, fmt.Errorf("parse authority: %s: %w", DataIntermediate, err)
	}
	return a, nil
}

// Data is the content of the Secret that holds the authority, keys included.
func (a *Authority) Data() map[string][]byte {
	data := map[string][]byte{
		DataIntermediate:    pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: a.intermediate.Raw}),
		DataIntermediateKey: encodeKey(a.intermediateKey),
		DataRoots:           encodeCertificates(a.Roots()),
	}
	if a.rootKey != nil {
		data[DataRootKey] = encodeKey(a.rootKey)
	}
	return data
}

// Roots are the DER certificates that peers trust, the authority's own first.
func (a *Authority) Roots() [][]byte {
	var roots [][]byte
	for _, c := range a.roots {
		roots = append(roots, bytes.Clone(c.Raw))
	}
	return roots
}

// TrustDomain is the first part of every identity that the authority signs.
func (a *Authority) TrustDomain() string { return a.trustDomain.Name() }

// Sign signs the key of a CSR for a workload and returns the chain, leaf first,
// without the root. The certificate has want's SPIFFE ID as its only name,
// whatever else the CSR says, which must say no more (see ErrCSR and
// ErrOtherIdentity). ttl is taken to the nearest of MinTTL and MaxTTL, and the
// certificate ends with the intermediate at the latest.
func (a *Authority) Sign(csrDER []byte, want model.Identity, ttl time.Duration, now time.Time) ([][]byte, error) {
	if want.TrustDomain != a.TrustDomain() {
		return nil, fmt.Errorf("sign %s: this is the authority of trust domain %q", want, a.TrustDomain())
	}
	key, err := checkCSR(csrDER, want)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", want, err)
	}
	id, err := url.Parse(want.String())
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", want, err)
	}
	leaf, err := a.leaf(&x509.Certificate{
		URIs:        []*url.URL{id},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, key, ttl, now)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", want, err)
	}
	return [][]byte{leaf.Raw, bytes.Clone(a.intermediate.Raw)}, nil
}

// ServerCertificate makes a key and signs it for the operator's own DNS names, 1
// to 16 of them. The caller makes another one in time; ttl is as in Sign.
func (a *Authority) ServerCertificate(dnsNames []string, ttl time.Duration, now time.Time) (tls.Certificate, error) {
	if len(dnsNames) == 0 || len(dnsNames) > maxServerNames {
		return tls.Certificate{}, fmt.Errorf("make server certificate: %d names, must be 1 to %d", len(dnsNames), maxServerNames)
	}
	key, err := newKey()
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make server certificate: %w", err)
	}
	leaf, err := a.leaf(&x509.Certificate{DNSNames: dnsNames, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, &key.PublicKey, ttl, now)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make server certificate for %q: %w", dnsNames, err)
	}
	return tls.Certificate{Certificate: [][]byte{leaf.Raw, bytes.Clone(a.intermediate.Raw)}, PrivateKey: key, Leaf: leaf}, nil
}

// leaf fills in what all leaves have and signs.
func (a *Authority) leaf(t *x509.Certificate, key *ecdsa.PublicKey, ttl time.Duration, now time.Time) (*x509.Certificate, error) {
	if !now.Before(a.intermediate.NotAfter) {
		return nil, fmt.Errorf("the intermediate ended at %s: renew it", a.intermediate.NotAfter.Format(time.RFC3339))
	}
	ttl = min(max(ttl, MinTTL), MaxTTL)
	t.NotBefore = now.Add(-min(MaxBackdate, ttl/10))
	t.NotAfter = earlier(now.Add(ttl), a.intermediate.NotAfter)
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.BasicConstraintsValid = true
	return create(t, a.intermediate, key, a.intermediateKey)
}

func authorityTemplate(td spiffeid.TrustDomain, name string, life time.Duration, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: "Bulkhead " + name, Organization: []string{td.Name()}},
		URIs:      []*url.URL{td.ID().URL()},
		NotBefore: now.Add(-MaxBackdate), NotAfter: now.Add(life),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		PermittedDNSDomainsCritical: true, // makes the whole extension critical
		PermittedURIDomains:         []string{td.Name()},
		ExcludedIPRanges: []*net.IPNet{
			{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
			{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
		},
	}
}

func create(t, parent *x509.Certificate, key *ecdsa.PublicKey, signer *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func parseTrustDomain(name string) (spiffeid.TrustDomain, error) {
	// The model is stricter than SPIFFE; ask both with an identity of that domain.
	if _, err := model.ParseIdentity(model.Identity{TrustDomain: name, Namespace: "a", ServiceAccount: "a"}.String()); err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q isn't a lower-case DNS name", name)
	}
	return spiffeid.TrustDomainFromString(name)
}

func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
