package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// RootCA is the name of the secret with all roots; the others are named by
// SPIFFE ID. It is what the operator's configuration calls it.
const RootCA = "ROOTCA"

// Secret returns the Envoy secret of that name for a tenant's proxy: RootCA for
// every tenant, a SPIFFE ID only for a tenant with a live pod of that identity, or
// which SetFormers names.
// Without one, denied tells whether the tenant can't have it as things are (no
// such pod here, no such name, or the operator refuses to sign) or it is about
// to come. Before the first SetPods nothing named by a SPIFFE ID is denied.
//
// The resource holds a private key: don't log it, don't change it. Its version
// is a hash of the certificates and tells nothing of the key.
func (s *Store) Secret(tenant model.Tenant, name string) (r *discoveryv3.Resource, denied bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name == RootCA {
		return s.rootCA, false
	}
	id, err := model.ParseIdentity(name)
	if err != nil {
		return nil, true
	}
	if !s.podsKnown {
		return nil, false
	}
	e := s.entries[id]
	if e == nil || !e.has(tenant) && !slices.Contains(s.formers[tenant], id) {
		return nil, true
	}
	now := s.now()
	if e.ready(now) {
		return e.credential.resource, false
	}
	return nil, e.denied(now) != nil
}

// Changed returns a channel that is closed once an answer of Secret for the
// tenant may have changed since the call. Nobody has to wait for it.
func (s *Store) Changed(tenant model.Tenant) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.watches[tenant]
	if c == nil {
		c = make(chan struct{})
		s.watches[tenant] = c
	}
	return c
}

func certificateResource(c *credential) (*discoveryv3.Resource, error) {
	var ders [][]byte
	for _, cert := range c.chain {
		ders = append(ders, cert.Raw)
	}
	return secretResource(&tlsv3.Secret{
		Name: c.id.String(),
		Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(c.chainPEM()),
			PrivateKey:       inline(c.keyPEM),
		}},
	}, ders)
}

func rootsResource(roots [][]byte) (*discoveryv3.Resource, error) {
	return secretResource(&tlsv3.Secret{
		Name: RootCA,
		Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			TrustedCa: inline(encodeCertificates(roots)),
		}},
	}, roots)
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// secretResource wraps a secret; certificates, DER and delimited by themselves,
// are what its version is made of.
func secretResource(s *tlsv3.Secret, certificates [][]byte) (*discoveryv3.Resource, error) {
	body, err := anypb.New(s)
	if err != nil {
		return nil, fmt.Errorf("encode secret %s: %w", s.GetName(), err)
	}
	h := sha256.New()
	for _, der := range certificates {
		h.Write(der)
	}
	return &discoveryv3.Resource{Name: s.GetName(), Version: hex.EncodeToString(h.Sum(nil)[:16]), Resource: body}, nil
}
