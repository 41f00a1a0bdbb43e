package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// maxChain is how many certificates a chain may have: a leaf and three
// authorities between it and the root.
const maxChain = 4

// credential is a key and its chain. It is immutable but for verified.
type credential struct {
	id       model.Identity
	chain    []*x509.Certificate
	keyPEM   []byte
	resource *discoveryv3.Resource
	renewAt  time.Time
	notAfter time.Time // the earliest of the chain
	// verified: it chained to the bundle when that was set. Guarded by Store.mu.
	verified bool
}

// newCredential checks that chain is key's and is a workload's, but not whom it
// chains to.
func newCredential(chain []*x509.Certificate, key *ecdsa.PrivateKey) (*credential, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, fmt.Errorf("the chain has %d certificates, must be 1 to %d", len(chain), maxChain)
	}
	leaf := chain[0]
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return nil, errors.New("the certificate is of another key")
	}
	spiffeID, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return nil, err
	}
	id, err := model.ParseIdentity(spiffeID.String())
	if err != nil {
		return nil, err
	}
	c := &credential{id: id, chain: chain, keyPEM: encodeKey(key), notAfter: leaf.NotAfter}
	for _, over := range chain[1:] {
		c.notAfter = earlier(c.notAfter, over.NotAfter)
	}
	half := c.notAfter.Sub(leaf.NotBefore) / 2
	c.renewAt = leaf.NotBefore.Add(time.Duration(float64(half) * (0.9 + 0.2*rand.Float64())))
	c.resource, err = certificateResource(c)
	return c, err
}

// verify is what a peer does, so that no proxy is given what no peer takes.
func (c *credential) verify(bundle *x509bundle.Bundle, now time.Time) error {
	_, _, err := x509svid.Verify(c.chain, bundle, x509svid.WithTime(now))
	return err
}

func (c *credential) chainPEM() []byte {
	var out []byte
	for _, cert := range c.chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: cert.Raw})...)
	}
	return out
}

// encode is the file's content: the chain, then the key.
func (c *credential) encode() []byte { return append(c.chainPEM(), c.keyPEM...) }

// parseCredential is the inverse of encode. Its errors don't quote data.
func parseCredential(data []byte) (*credential, error) {
	at := bytes.Index(data, []byte("-----BEGIN "+pemKey))
	if at < 0 {
		return nil, errors.New("it has no key")
	}
	chain, err := parseCertificates(data[:at], maxChain)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(data[at:])
	if err != nil {
		return nil, err
	}
	return newCredential(chain, key)
}
