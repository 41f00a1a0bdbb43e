package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Keys of a Secret that somebody else's authority is in, as cert-manager writes
// it. All values are PEM.
const (
	DataIssuerChain = "tls.crt" // the intermediate, then what is between it and a root
	DataIssuerKey   = "tls.key" // of the first of them: ECDSA P-256 or P-384, or RSA of 2048 bits or more
	DataIssuerRoots = "ca.crt"  // the roots that peers trust
)

// Issuer is a key that signs identities of one trust domain, with the
// certificates that lead from it to a root. It is immutable and safe for
// concurrent use.
type Issuer struct {
	trustDomain spiffeid.TrustDomain
	roots       []*x509.Certificate // the one that signed the chain among them
	rootKey     *ecdsa.PrivateKey   // of roots[0]; nil if it isn't ours, or kept elsewhere
	chain       []*x509.Certificate // the one that signs first; a root only if it signs itself
	key         crypto.Signer
}

// newIssuer makes a root that lives RootLifetime and an intermediate that lives
// IntermediateLifetime.
func newIssuer(td spiffeid.TrustDomain, now time.Time) (*Issuer, error) {
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
	return (&Issuer{trustDomain: td, roots: []*x509.Certificate{root}, rootKey: key}).renew(now)
}

// renew returns the issuer with a new intermediate under the same root.
func (i *Issuer) renew(now time.Time) (*Issuer, error) {
	if i.rootKey == nil {
		return nil, fmt.Errorf("renew intermediate: %w: put %s back into the Secret, or replace the intermediate by hand", ErrNoRootKey, DataRootKey)
	}
	key, err := newKey()
	if err != nil {
		return nil, fmt.Errorf("renew intermediate: %w", err)
	}
	t := authorityTemplate(i.trustDomain, "intermediate", IntermediateLifetime, now)
	t.MaxPathLenZero = true
	t.NotAfter = earlier(t.NotAfter, i.roots[0].NotAfter)
	intermediate, err := create(t, i.roots[0], &key.PublicKey, i.rootKey)
	if err != nil {
		return nil, fmt.Errorf("renew intermediate: %w", err)
	}
	return &Issuer{trustDomain: i.trustDomain, roots: i.roots, rootKey: i.rootKey, chain: []*x509.Certificate{intermediate}, key: key}, nil
}

// ParseIssuer reads what DataIssuerChain, DataIssuerKey and DataIssuerRoots hold,
// and checks that peers take what it signs now for the trust domain, and agents
// what it signs for servers of the given DNS names. Errors name the key of data
// that is wrong and never its value.
func ParseIssuer(data map[string][]byte, trustDomain string, servers []string, now time.Time) (*Issuer, error) {
	td, err := parseTrustDomain(trustDomain)
	if err != nil {
		return nil, err
	}
	if size := dataSize(data); size > maxAuthorityDataSize {
		return nil, fmt.Errorf("%d bytes, more than %d", size, maxAuthorityDataSize)
	}
	for _, name := range []string{DataIssuerChain, DataIssuerKey, DataIssuerRoots} {
		if len(data[name]) == 0 {
			return nil, fmt.Errorf("%s is missing", name)
		}
	}
	i := &Issuer{trustDomain: td}
	if i.chain, err = parseCertificates(data[DataIssuerChain], maxChain); err != nil {
		return nil, fmt.Errorf("%s: %w", DataIssuerChain, err)
	}
	if i.key, err = parseSigner(data[DataIssuerKey]); err != nil {
		return nil, fmt.Errorf("%s: %w", DataIssuerKey, err)
	}
	if i.roots, err = parseCertificates(data[DataIssuerRoots], MaxRoots/2); err != nil {
		return nil, fmt.Errorf("%s: %w", DataIssuerRoots, err)
	}
	// A root at the end of the chain is no use to peers, who have it or don't.
	for len(i.chain) > 1 && selfSigned(i.chain[len(i.chain)-1]) {
		i.chain = i.chain[:len(i.chain)-1]
	}
	if !samePublicKey(i.key, i.chain[0]) {
		return nil, fmt.Errorf("%s isn't the key of the first certificate of %s", DataIssuerKey, DataIssuerChain)
	}
	if len(i.chain) == maxChain {
		return nil, fmt.Errorf("%s: %d certificates below the root, more than %d", DataIssuerChain, len(i.chain), maxChain-1)
	}
	for _, c := range i.roots {
		if !isAuthority(c) {
			return nil, fmt.Errorf("%s: certificate %q isn't an authority's", DataIssuerRoots, c.Subject)
		}
	}
	for _, c := range i.chain {
		if !isAuthority(c) {
			return nil, fmt.Errorf("%s: certificate %q isn't an authority's (with cert-manager, set isCA: true)", DataIssuerChain, c.Subject)
		}
		for _, u := range c.URIs {
			if id, err := spiffeid.FromURI(u); err != nil || id.TrustDomain() != td {
				return nil, fmt.Errorf("%s: certificate %q is for %q, and the trust domain is %q", DataIssuerChain, c.Subject, u, td)
			}
		}
	}
	if err := i.usable(servers, now); err != nil {
		return nil, fmt.Errorf("%s: %w", DataIssuerChain, err)
	}
	return i, nil
}

// usable returns an error unless peers take what the issuer signs now: the chain
// leads to one of the roots, all of it is valid, and no constraint of it is in
// the way.
func (i *Issuer) usable(servers []string, now time.Time) error {
	for _, c := range i.chain {
		if err := validAt(c, now); err != nil {
			return err
		}
	}
	key, err := newKey()
	if err != nil {
		return err
	}
	probe := model.Identity{TrustDomain: i.trustDomain.Name(), Namespace: "probe", ServiceAccount: "probe"}
	leaf, err := i.signLeaf(workloadTemplate(probe), &key.PublicKey, MinTTL, now)
	if err != nil {
		return err
	}
	c, err := newCredential(append([]*x509.Certificate{leaf}, i.sent()...), key)
	if err != nil {
		return err
	}
	if err := c.verify(x509bundle.FromX509Authorities(i.trustDomain, i.roots), now); err != nil {
		return fmt.Errorf("peers wouldn't take what it signs: %w", err)
	}
	if len(servers) == 0 {
		return nil
	}
	if leaf, err = i.signLeaf(serverTemplate(servers), &key.PublicKey, MinTTL, now); err != nil {
		return err
	}
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now, DNSName: servers[0]}
	for _, c := range i.roots {
		o.Roots.AddCert(c)
	}
	for _, c := range i.sent() {
		o.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(o); err != nil {
		return fmt.Errorf("agents wouldn't take what it signs for the operator: %w", err)
	}
	return nil
}

// sent is what goes with a leaf: the chain without what signs itself.
func (i *Issuer) sent() []*x509.Certificate {
	if selfSigned(i.chain[0]) {
		return nil
	}
	return i.chain
}

// end is when the first certificate of the chain or the last root ends.
func (i *Issuer) end() time.Time {
	end := i.chain[0].NotAfter
	for _, c := range i.chain[1:] {
		end = earlier(end, c.NotAfter)
	}
	return earlier(end, slices.MaxFunc(i.roots, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter)
}

// needsRenewal reports whether less than a third of the intermediate's life is left.
func (i *Issuer) needsRenewal(now time.Time) bool {
	life := i.chain[0].NotAfter.Sub(i.chain[0].NotBefore)
	return now.After(i.chain[0].NotAfter.Add(-life / 3))
}

// same reports whether two issuers sign with the same chain and are trusted by
// the same roots.
func (i *Issuer) same(o *Issuer) bool {
	return i.trustDomain == o.trustDomain && slices.EqualFunc(i.chain, o.chain, (*x509.Certificate).Equal) && slices.EqualFunc(i.roots, o.roots, (*x509.Certificate).Equal)
}

// signLeaf fills in what all leaves have and signs. It ends with the issuer at the
// latest.
func (i *Issuer) signLeaf(t *x509.Certificate, key *ecdsa.PublicKey, ttl time.Duration, now time.Time) (*x509.Certificate, error) {
	end := i.end()
	if !now.Before(end) {
		return nil, fmt.Errorf("what signs ended at %s", end.Format(time.RFC3339))
	}
	ttl = min(max(ttl, MinTTL), MaxTTL)
	t.NotBefore = now.Add(-min(MaxBackdate, ttl/10))
	t.NotAfter = earlier(now.Add(ttl), end)
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.BasicConstraintsValid = true
	return create(t, i.chain[0], key, i.key)
}

func validAt(c *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(c.NotBefore):
		return fmt.Errorf("certificate %q is valid from %s only", c.Subject, c.NotBefore.Format(time.RFC3339))
	case !now.Before(c.NotAfter):
		return fmt.Errorf("certificate %q ended at %s", c.Subject, c.NotAfter.Format(time.RFC3339))
	}
	return nil
}

func isAuthority(c *x509.Certificate) bool {
	return c.BasicConstraintsValid && c.IsCA && (c.KeyUsage == 0 || c.KeyUsage&x509.KeyUsageCertSign != 0)
}

func selfSigned(c *x509.Certificate) bool {
	return bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignatureFrom(c) == nil
}

func samePublicKey(key crypto.Signer, c *x509.Certificate) bool {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(c.PublicKey)
}

// checkSigner refuses keys that some peer wouldn't take.
func checkSigner(key any) (crypto.Signer, error) {
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return k, nil
		}
	case *rsa.PrivateKey:
		if k.N.BitLen() >= 2048 {
			return k, nil
		}
	}
	return nil, errors.New("must be an ECDSA key of P-256 or P-384, or an RSA key of 2048 bits or more")
}
