package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// A server's certificate is for its one DNS name, and no workload's.
func TestSignServer(t *testing.T) {
	now := time.Now()
	a, err := NewAuthority("cluster.local", now)
	if err != nil {
		t.Fatal(err)
	}
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := NewServerCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.SignServer(csr, []string{AgentServerName("node1")}, time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	root, _ := x509.ParseCertificate(a.Roots()[0])
	intermediate, _ := x509.ParseCertificate(chain[1])
	roots.AddCert(root)
	between.AddCert(intermediate)
	verify := func(name string, usage x509.ExtKeyUsage) error {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: name, KeyUsages: []x509.ExtKeyUsage{usage}})
		return err
	}
	if err := verify("node1.agent.bulkhead", x509.ExtKeyUsageServerAuth); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"node2.agent.bulkhead", "node1", "bulkhead-operator.bulkhead-system.svc"} {
		if verify(name, x509.ExtKeyUsageServerAuth) == nil {
			t.Errorf("it is %s's too", name)
		}
	}
	if verify("node1.agent.bulkhead", x509.ExtKeyUsageClientAuth) == nil {
		t.Error("it is a client's")
	}
	if len(leaf.URIs)+len(leaf.IPAddresses) > 0 || leaf.IsCA || !key.PublicKey.Equal(leaf.PublicKey) || leaf.NotAfter.After(now.Add(time.Hour)) {
		t.Errorf("%v %v %v, ends %s", leaf.URIs, leaf.IPAddresses, leaf.IsCA, leaf.NotAfter)
	}

	workloads, err := NewCSR(key, model.Identity{TrustDomain: "cluster.local", Namespace: "a", ServiceAccount: "b"})
	if err != nil {
		t.Fatal(err)
	}
	named, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"other.agent.bulkhead"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	large, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewServerCSR(large)
	if err != nil {
		t.Fatal(err)
	}
	for what, bad := range map[string][]byte{"a workload's": workloads, "with a name": named, "of another kind of key": other, "broken": csr[:20], "empty": nil} {
		if _, err := a.SignServer(bad, []string{AgentServerName("node1")}, time.Hour, now); !errors.Is(err, ErrCSR) {
			t.Errorf("a CSR that is %s: %v", what, err)
		}
	}
	if _, err := a.Sign(csr, model.Identity{TrustDomain: "cluster.local", Namespace: "a", ServiceAccount: "b"}, time.Hour, now); !errors.Is(err, ErrCSR) {
		t.Errorf("a server's CSR, signed for a workload: %v", err)
	}
}
