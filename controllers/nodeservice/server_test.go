package nodeservice

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

// An agent gets a server's certificate for the node that its token names.
func TestSignServerCertificate(t *testing.T) {
	w := newWorld(t)
	s := w.service()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := identity.NewServerCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.SignServerCertificate(t.Context(), &nodev1alpha1.SignServerCertificateRequest{Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(r.Chain[0])
	if err != nil || len(r.Chain) != 2 || !slices.Equal(leaf.DNSNames, []string{"node-1.agent.bulkhead", "metrics.bulkhead"}) || len(leaf.URIs) > 0 {
		t.Errorf("%d certificates, for %v %v, %v", len(r.Chain), leaf.DNSNames, leaf.URIs, err)
	}
	ask := func(csr []byte) codes.Code {
		_, err := s.SignServerCertificate(t.Context(), &nodev1alpha1.SignServerCertificateRequest{Csr: csr})
		return status.Code(err)
	}
	if code := ask(csrFor(t, reviews)); code != codes.InvalidArgument {
		t.Errorf("a workload's CSR: %s", code)
	}
	authority := w.authority
	w.authority = nil
	if code := ask(csr); code != codes.Unavailable {
		t.Errorf("without an authority: %s", code)
	}
	w.authority = authority
	w.caller = status.Error(codes.Unauthenticated, "nobody")
	if code := ask(csr); code != codes.Unauthenticated {
		t.Errorf("without a token: %s", code)
	}
}
