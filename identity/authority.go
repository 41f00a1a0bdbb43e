package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// MaxRoots is how many roots a mesh may trust at once: an issuer's and, while
// roots change, another's.
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
	// DefaultTTL is how long a workload's certificate lives unless its MeshTopology
	// says otherwise; Sign takes MinTTL to MaxTTL.
	DefaultTTL = time.Hour
	MinTTL     = 5 * time.Minute
	MaxTTL     = 30 * 24 * time.Hour
)

// ErrNoRootKey is Renew's when the root's key isn't in the Secret.
var ErrNoRootKey = errors.New("the authority has no root key")

// Authority signs the identities of one trust domain: with one issuer, and while
// roots change, it knows the next or remembers the last. It is immutable and safe
// for concurrent use. Roots and intermediates of its own making are P-256 and
// constrained to URIs of the trust domain and to no IP address; DNS names aren't
// constrained, since the operator's own server certificate needs one.
type Authority struct {
	issuer *Issuer
	next   *Issuer             // trusted already, and signs after issuer; nil mostly
	old    []*x509.Certificate // trusted still, signed before issuer
	state  state
}

// NewAuthority makes an authority with a root of its own.
func NewAuthority(trustDomain string, now time.Time) (*Authority, error) {
	td, err := parseTrustDomain(trustDomain)
	if err != nil {
		return nil, fmt.Errorf("make authority: %w", err)
	}
	i, err := newIssuer(td, now)
	if err != nil {
		return nil, fmt.Errorf("make authority: %w", err)
	}
	return &Authority{issuer: i, state: state{Sequence: 1}}, nil
}

// ImportAuthority makes an authority that signs with somebody else's issuer; from
// names where that came from.
func ImportAuthority(i *Issuer, from string) *Authority {
	return &Authority{issuer: i, state: state{Sequence: 1, Source: from}}
}

// NeedsRenewal reports whether less than a third of the intermediate's life is
// left: time to store what Renew returns.
func (a *Authority) NeedsRenewal(now time.Time) bool { return a.issuer.needsRenewal(now) }

// Renew returns the authority with a new intermediate under the same root.
// Certificates of the old one stay valid, since they carry it. The error is
// ErrNoRootKey without the root's key.
func (a *Authority) Renew(now time.Time) (*Authority, error) {
	i, err := a.issuer.renew(now)
	if err != nil {
		return nil, err
	}
	next := *a
	next.issuer = i
	return &next, nil
}

// Roots are the DER certificates that peers trust. The order stays while an issuer
// takes over from another.
func (a *Authority) Roots() [][]byte {
	lists := [][]*x509.Certificate{a.old, a.issuer.roots}
	if a.next != nil {
		lists = append(lists, a.next.roots)
	}
	var roots [][]byte
	for _, list := range lists {
		for _, c := range list {
			if !slices.ContainsFunc(roots, func(have []byte) bool { return bytes.Equal(have, c.Raw) }) {
				roots = append(roots, bytes.Clone(c.Raw))
			}
		}
	}
	return roots
}

// TrustDomain is the first part of every identity that the authority signs.
func (a *Authority) TrustDomain() string { return a.issuer.trustDomain.Name() }

// Usable returns an error that says why if peers wouldn't take what the authority
// signs now, or agents what it signs for servers of the given DNS names.
func (a *Authority) Usable(servers []string, now time.Time) error {
	return a.issuer.usable(servers, now)
}

// Sign signs the key of a CSR for a workload and returns the chain, leaf first,
// without the root. The certificate has want's SPIFFE ID as its only name,
// whatever else the CSR says, which must say no more (see ErrCSR and
// ErrOtherIdentity). ttl is taken to the nearest of MinTTL and MaxTTL, is no longer
// than the longest that Step knows of, and the certificate ends with the
// intermediate at the latest.
func (a *Authority) Sign(csrDER []byte, want model.Identity, ttl time.Duration, now time.Time) ([][]byte, error) {
	if want.TrustDomain != a.TrustDomain() {
		return nil, fmt.Errorf("sign %s: this is the authority of trust domain %q", want, a.TrustDomain())
	}
	key, err := checkCSR(csrDER, want)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", want, err)
	}
	leaf, err := a.issuer.signLeaf(workloadTemplate(want), key, a.bounded(ttl), now)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", want, err)
	}
	return a.withChain(leaf), nil
}

// bounded is a TTL that a change of roots allows for: the old root isn't trusted
// for longer than the longest that is stored.
func (a *Authority) bounded(ttl time.Duration) time.Duration {
	if longest := time.Duration(a.state.TTL); longest > 0 {
		return min(ttl, longest)
	}
	return ttl
}

// withChain is what peers are sent, leaf first.
func (a *Authority) withChain(leaf *x509.Certificate) [][]byte {
	chain := [][]byte{leaf.Raw}
	for _, c := range a.issuer.sent() {
		chain = append(chain, bytes.Clone(c.Raw))
	}
	return chain
}

// workloadTemplate has the SPIFFE ID as its only name.
func workloadTemplate(id model.Identity) *x509.Certificate {
	return &x509.Certificate{
		URIs:        []*url.URL{{Scheme: "spiffe", Host: id.TrustDomain, Path: "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
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
	leaf, err := a.issuer.signLeaf(serverTemplate(dnsNames), &key.PublicKey, ttl, now)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make server certificate for %q: %w", dnsNames, err)
	}
	return tls.Certificate{Certificate: a.withChain(leaf), PrivateKey: key, Leaf: leaf}, nil
}

func serverTemplate(dnsNames []string) *x509.Certificate {
	return &x509.Certificate{DNSNames: dnsNames, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
}

// AgentServerName is the DNS name of a node's agent as a server.
func AgentServerName(node string) string { return node + ".agent.bulkhead" }

// MetricsServerName is the DNS name that all agents have besides: who scrapes them
// knows them by their addresses. No node's own name is the same.
const MetricsServerName = "metrics.bulkhead"

// SignServer signs the key of a CSR that has no names (else ErrCSR) for a server
// with DNS names, and returns the chain, leaf first, without the root. ttl is
// as in Sign.
func (a *Authority) SignServer(csrDER []byte, dnsNames []string, ttl time.Duration, now time.Time) ([][]byte, error) {
	r, key, err := parseCSR(csrDER)
	if err == nil && len(r.Extensions) > 0 {
		err = fmt.Errorf("%w: a server's must ask for no name and no extension", ErrCSR)
	}
	if err != nil {
		return nil, fmt.Errorf("sign for server %s: %w", strings.Join(dnsNames, ", "), err)
	}
	leaf, err := a.issuer.signLeaf(serverTemplate(dnsNames), key, a.bounded(ttl), now)
	if err != nil {
		return nil, fmt.Errorf("sign for server %s: %w", strings.Join(dnsNames, ", "), err)
	}
	return a.withChain(leaf), nil
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

func create(t, parent *x509.Certificate, key *ecdsa.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
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
