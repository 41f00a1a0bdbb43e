package controllers

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"maps"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

// signing is a cluster with two replicas' keepers on a clock of its own.
type signing struct {
	*cluster
	now      time.Time
	keepers  [2]*keeper
	topology *v1alpha1.MeshTopology
}

func newSigning(t *testing.T) *signing {
	t.Helper()
	s := &signing{topology: newTopology("t", "mesh"), now: time.Now()}
	s.cluster = newCluster(t, s.topology, newNamespace("a", "mesh"), newNode("n1", "10.0.1.0/24"), newPod("one", "n1", "10.0.1.1"))
	for i := range s.keepers {
		s.keepers[i] = s.keeper()
		s.keepers[i].now = func() time.Time { return s.now }
	}
	w := s.writer()
	if err := w.writePlan(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	s.settle()
	return s
}

// settle lets both replicas look until there is nothing to do, and n1's agent not
// answer.
func (s *signing) settle() {
	s.t.Helper()
	for range 4 {
		for _, k := range s.keepers {
			if _, err := k.sync(s.t.Context()); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	a := s.keepers[0].Authority()
	b := s.keepers[1].Authority()
	if !slices.EqualFunc(a.Roots(), b.Roots(), bytes.Equal) {
		s.t.Error("two replicas have two authorities")
	}
}

func (s *signing) authority() *identity.Authority {
	a := s.keepers[1].Authority()
	return a
}

// trust has n1's agent say what its proxies trust.
func (s *signing) trust(digest string) {
	s.t.Helper()
	np := s.nodeProxy("n1")
	np.Status.AgentVersion, np.Status.TrustBundle = "test", digest
	if err := s.Status().Update(s.t.Context(), np); err != nil {
		s.t.Fatal(err)
	}
	if err := s.syncReport(s.t.Context(), "n1"); err != nil {
		s.t.Fatal(err)
	}
}

func (s *signing) secret(name string) *corev1.Secret {
	s.t.Helper()
	secret := &corev1.Secret{}
	if err := s.Get(s.t.Context(), client.ObjectKey{Namespace: "bulkhead-system", Name: name}, secret); err != nil {
		s.t.Fatal(err)
	}
	return secret
}

// put writes a Secret, whatever was there.
func (s *signing) put(name string, data map[string][]byte) {
	s.t.Helper()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "bulkhead-system", Name: name}, Data: data}
	var have corev1.Secret
	err := s.Get(s.t.Context(), client.ObjectKeyFromObject(secret), &have)
	if err == nil {
		have.Data = data
		err = s.Update(s.t.Context(), &have)
	} else {
		err = s.Create(s.t.Context(), secret)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// condition is what the topology says of identities.
func (s *signing) condition(reason string, says ...string) {
	s.t.Helper()
	if err := s.writer().writeTopology(s.t.Context(), "t"); err != nil {
		s.t.Fatal(err)
	}
	if err := s.Get(s.t.Context(), client.ObjectKeyFromObject(s.topology), s.topology); err != nil {
		s.t.Fatal(err)
	}
	c := meta.FindStatusCondition(s.topology.Status.Conditions, v1alpha1.ConditionIdentityReady)
	if c == nil || c.Reason != reason {
		s.t.Fatalf("condition %+v, want %s", c, reason)
	}
	for _, text := range says {
		if !strings.Contains(c.Message, text) {
			s.t.Errorf("the condition says %q, nothing of %q", c.Message, text)
		}
	}
}

// told checks that an event said so, and forgets all.
func (s *signing) told(says string) {
	s.t.Helper()
	if !slices.ContainsFunc(s.events, func(e string) bool { return strings.Contains(e, says) }) {
		s.t.Errorf("events %q, none says %q", s.events, says)
	}
	s.events = nil
}

func TestBadAuthoritySecret(t *testing.T) {
	s := newSigning(t)
	s.condition("Ready", "the mesh's own")
	good, before := s.secret(SecretAuthority).Data, s.authority()
	other, err := identity.NewAuthority("td", s.now)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]map[string][]byte{
		"garbage":     {identity.DataIntermediate: []byte("x")},
		"no roots":    {identity.DataRoots: nil},
		"another key": {identity.DataIntermediateKey: other.Data()[identity.DataIntermediateKey]},
	} {
		bad := maps.Clone(good)
		maps.Copy(bad, change)
		s.put(SecretAuthority, bad)
		version := s.secret(SecretAuthority).ResourceVersion
		s.settle()
		if s.secret(SecretAuthority).ResourceVersion != version {
			t.Errorf("%s: the Secret was overwritten", name)
		}
		if s.authority() != before {
			t.Errorf("%s: what was in use isn't any more", name)
		}
		s.condition("InvalidAuthority", "bulkhead-system/bulkhead-ca", "restore it from a backup")
		s.told("bulkhead-ca InvalidAuthority")
		s.settle()
		if len(s.events) > 0 {
			t.Errorf("%s: told again: %q", name, s.events)
		}
		s.put(SecretAuthority, good)
		s.settle()
		s.condition("Ready")
	}

	// A replica that starts with a bad Secret has nothing, and makes nothing.
	s.put(SecretAuthority, map[string][]byte{identity.DataRoots: []byte("x")})
	k := s.keeper()
	if _, err := k.sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a := k.Authority(); a != nil {
		t.Error("an authority came from nowhere")
	}

	// Deleted: it is made again from what runs.
	if err := s.Delete(t.Context(), s.secret(SecretAuthority)); err != nil {
		t.Fatal(err)
	}
	s.settle()
	if now := s.authority(); !bytes.Equal(now.Roots()[0], before.Roots()[0]) || !maps.EqualFunc(s.secret(SecretAuthority).Data, good, bytes.Equal) {
		t.Error("a deleted Secret ends in other roots")
	}
	s.told("bulkhead-ca Restored")

	// Everything has ended.
	s.now = s.now.Add(identity.RootLifetime + time.Hour)
	for _, k := range s.keepers {
		k.leading = func() bool { return false } // nobody renews it
	}
	s.settle()
	s.condition("AuthorityExpired", "ended at")
}

func TestRotationOnRequest(t *testing.T) {
	s := newSigning(t)
	old := s.authority()
	s.trust(identity.BundleDigest(old.Roots()))
	secret := s.secret(SecretAuthority)
	secret.Annotations = map[string]string{AnnotationRotate: "today"}
	if err := s.Update(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	s.settle()
	if len(s.authority().Roots()) != 2 {
		t.Fatal("no new root")
	}
	s.condition("ChangingRoots", "nodes that don't yet: 1")
	w := s.writer()
	w.keeper = s.keepers[0]
	if err := w.writeMembership(t.Context(), struct{}{}); err != nil {
		t.Fatal(err)
	}
	var bundle corev1.ConfigMap
	if err := s.Get(t.Context(), client.ObjectKey{Namespace: "bulkhead-system", Name: ConfigMapTrustBundle}, &bundle); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(bundle.Data["ca.crt"], "BEGIN CERTIFICATE"); n != 2 {
		t.Errorf("%d roots in the ConfigMap", n)
	}
	s.now = s.now.Add(30 * time.Minute)
	s.settle()
	if phase, _, _ := s.authority().Rotation(); phase != identity.PhasePublishing {
		t.Fatalf("phase %q: a node doesn't trust the root yet", phase)
	}
	s.trust(identity.BundleDigest(s.authority().Roots()))
	s.settle()
	if phase, _, _ := s.authority().Rotation(); phase != identity.PhaseRetiring {
		t.Fatalf("phase %q, and all nodes trust the root", phase)
	}
	s.condition("ChangingRoots", "the old one is trusted until")
	s.now = s.now.Add(2 * time.Hour)
	s.settle()
	if now := s.authority(); len(now.Roots()) != 1 || bytes.Equal(now.Roots()[0], old.Roots()[0]) {
		t.Errorf("%d roots, not the new one alone", len(now.Roots()))
	}
	s.condition("Ready")
	s.told("bulkhead-ca Changed")
}

// corporate is somebody else's root, and makes a Secret as cert-manager does.
type corporate struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	root *x509.Certificate
}

func newCorporate(t *testing.T, now time.Time) *corporate {
	c := &corporate{t: t, key: newECDSA(t)}
	c.root = c.sign(nil, &c.key.PublicKey, now)
	return c
}

func newECDSA(t *testing.T) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (c *corporate) sign(parent *x509.Certificate, key *ecdsa.PublicKey, now time.Time) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		c.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: "corporate " + serial.String()}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		c.t.Fatal(err)
	}
	return cert
}

func (c *corporate) secret(now time.Time) map[string][]byte {
	key := newECDSA(c.t)
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		c.t.Fatal(err)
	}
	block := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	return map[string][]byte{
		identity.DataIssuerChain: block("CERTIFICATE", c.sign(c.root, &key.PublicKey, now).Raw),
		identity.DataIssuerKey:   block("EC PRIVATE KEY", der), identity.DataIssuerRoots: block("CERTIFICATE", c.root.Raw),
	}
}

func TestIssuerSecret(t *testing.T) {
	s := newSigning(t)
	own := s.authority()
	s.trust(identity.BundleDigest(own.Roots()))
	s.topology.Spec.Identity.IssuerSecret = "bulkhead-issuer"
	if err := s.Update(t.Context(), s.topology); err != nil {
		t.Fatal(err)
	}
	if err := s.syncTopologies(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.settle()
	s.condition("InvalidIssuer", "Secret bulkhead-system/bulkhead-issuer: it doesn't exist")
	s.told("bulkhead-issuer InvalidIssuer")
	if s.authority() != own {
		t.Error("what was in use isn't any more")
	}
	theirs := newCorporate(t, s.now)
	bad := theirs.secret(s.now)
	bad[identity.DataIssuerKey] = theirs.secret(s.now)[identity.DataIssuerKey]
	s.put("bulkhead-issuer", bad)
	s.settle()
	s.condition("InvalidIssuer", "tls.key isn't the key")
	s.told("bulkhead-issuer InvalidIssuer: Secret bulkhead-system/bulkhead-issuer: tls.key isn't the key")
	s.put("bulkhead-issuer", theirs.secret(s.now.Add(-48*time.Hour)))
	s.settle()
	s.condition("InvalidIssuer", "ended at")
	s.told("bulkhead-issuer InvalidIssuer")
	// Or the API server would take it for the event before.
	if now := s.secret("bulkhead-issuer"); s.about.ResourceVersion == "" || s.about.ResourceVersion != now.ResourceVersion || s.about.UID != now.UID {
		t.Errorf("the event is about version %q, it is %q", s.about.ResourceVersion, now.ResourceVersion)
	}

	s.put("bulkhead-issuer", theirs.secret(s.now))
	s.settle()
	s.condition("ChangingRoots")
	s.trust(identity.BundleDigest(s.authority().Roots()))
	s.now = s.now.Add(3 * time.Minute)
	s.settle()
	if s.authority().Source() != "Secret bulkhead-system/bulkhead-issuer" {
		t.Fatalf("signed by %q", s.authority().Source())
	}
	s.now = s.now.Add(2 * time.Hour)
	s.settle()
	if roots := s.authority().Roots(); len(roots) != 1 || !bytes.Equal(roots[0], theirs.root.Raw) {
		t.Fatalf("%d roots", len(roots))
	}
	s.condition("Ready", "Secret bulkhead-system/bulkhead-issuer")

	// cert-manager renews it; no restart.
	chain := s.secret(SecretAuthority).Data[identity.DataIntermediate]
	s.put("bulkhead-issuer", theirs.secret(s.now))
	s.settle()
	renewed := s.secret(SecretAuthority).Data[identity.DataIntermediate]
	if bytes.Equal(chain, renewed) {
		t.Error("a renewed issuer isn't taken up")
	}
	// It breaks: a replica that starts now still has it.
	s.put("bulkhead-issuer", map[string][]byte{identity.DataIssuerChain: []byte("x")})
	s.settle()
	k := s.keeper()
	k.now = func() time.Time { return s.now }
	if _, err := k.sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a := k.Authority(); a == nil || a.Source() == "" || !bytes.Equal(s.secret(SecretAuthority).Data[identity.DataIntermediate], renewed) {
		t.Error("a broken issuer took the old one with it")
	}
	s.condition("InvalidIssuer", "tls.key is missing")
	if ttl := s.CertificateTTL("a"); ttl != time.Hour {
		t.Errorf("TTL %v", ttl)
	}

	// A younger topology can't say otherwise, but how long its own certificates live.
	young := newTopology("young", "mesh2")
	young.CreationTimestamp = metav1.NewTime(born.Add(time.Hour))
	young.Spec.Identity = v1alpha1.IdentitySpec{CertificateTTL: "6h", IssuerSecret: "mine"}
	if err := s.Create(t.Context(), young); err != nil {
		t.Fatal(err)
	}
	if err := s.syncTopologies(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.put("bulkhead-issuer", theirs.secret(s.now))
	s.settle()
	if got := s.topologies.LongestTTL(); got != 6*time.Hour {
		t.Errorf("longest TTL %v", got)
	}
	s.topology = young
	if err := s.writer().writeTopology(t.Context(), "young"); err != nil {
		t.Fatal(err)
	}
	if err := s.Get(t.Context(), client.ObjectKeyFromObject(young), young); err != nil {
		t.Fatal(err)
	}
	if c := meta.FindStatusCondition(young.Status.Conditions, v1alpha1.ConditionIdentityReady); c == nil || c.Reason != "OlderDecides" {
		t.Errorf("condition %+v", c)
	}
}

// A leader that doesn't know that it is none any more changes nothing.
func TestTwoLeaders(t *testing.T) {
	s := newSigning(t)
	stale := s.secret(SecretAuthority)
	stale.Annotations = map[string]string{AnnotationRotate: "seen by the old leader"}
	current := s.secret(SecretAuthority)
	current.Annotations = map[string]string{AnnotationRotate: "1"}
	if err := s.Update(t.Context(), current); err != nil {
		t.Fatal(err)
	}
	s.settle()
	before := s.secret(SecretAuthority)
	a, err := identity.ParseAuthority(stale.Data)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.keepers[0].step(t.Context(), stale, a, s.topologies); err != nil {
		t.Fatal(err)
	}
	if now := s.secret(SecretAuthority); now.ResourceVersion != before.ResourceVersion || len(s.authority().Roots()) != 2 {
		t.Error("an old leader wrote over what a new one did")
	}
}
