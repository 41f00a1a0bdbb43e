package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	mathrand "math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// rotating is a mesh on a clock of its own: a Secret that two replicas step, nodes
// that learn of the bundle late, and have certificates.
type rotating struct {
	t      *testing.T
	random *mathrand.Rand
	now    time.Time
	wanted Wanted
	ttl    time.Duration
	secret map[string][]byte
	// replicas hold what they read last; the second may be behind.
	replicas [2]*Authority
	nodes    []*rotatingNode
	phases   []Phase
}

type rotatingNode struct {
	dead   bool // hears nothing and renews nothing
	bundle [][]byte
	chain  []*x509.Certificate
	half   time.Time
	key    *ecdsa.PrivateKey
}

func newRotating(t *testing.T, seed uint64) *rotating {
	r := &rotating{t: t, random: mathrand.New(mathrand.NewPCG(seed, 1)), now: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), ttl: 30 * time.Minute}
	a := must[*Authority](t)(NewAuthority("cluster.local", r.now))
	r.secret = a.Data()
	for range 3 {
		r.nodes = append(r.nodes, &rotatingNode{bundle: a.Roots(), key: testKey(t)})
	}
	return r
}

func (r *rotating) stored() *Authority {
	return must[*Authority](r.t)(ParseAuthority(r.secret))
}

// minute lets one pass.
func (r *rotating) minute() {
	t := r.t
	t.Helper()
	r.now = r.now.Add(time.Minute)
	current := r.stored()
	for i := range r.replicas {
		if r.replicas[i] == nil || i == 0 || r.random.IntN(3) == 0 { // the second may be behind for a while
			r.replicas[i] = current
		}
	}
	for _, n := range r.nodes {
		if !n.dead && r.random.IntN(4) == 0 {
			n.bundle = current.Roots()
		}
	}
	w := r.wanted
	w.TTL, w.Acknowledged = r.ttl, true
	for _, n := range r.nodes {
		w.Acknowledged = w.Acknowledged && BundleDigest(n.bundle) == BundleDigest(current.Roots())
	}
	// Both step what is stored, and the second to store is refused; either may die
	// before it stores.
	next, change, err := current.Step(w, r.now)
	if err != nil {
		t.Fatal(err)
	}
	if change != "" && r.random.IntN(3) > 0 {
		r.secret = next.SetData(r.secret)
		r.phases = append(r.phases, next.state.Phase)
		t.Logf("%s: %s", r.now.Format("15:04"), change)
	}
	for _, n := range r.nodes {
		if n.dead || r.now.Before(n.half) {
			continue
		}
		by := r.replicas[r.random.IntN(len(r.replicas))]
		csr := must[[]byte](t)(NewCSR(n.key, reviews))
		n.chain = must[[]*x509.Certificate](t)(parseDER(must[[][]byte](t)(by.Sign(csr, reviews, r.ttl, r.now))))
		n.half = n.chain[0].NotBefore.Add(n.chain[0].NotAfter.Sub(n.chain[0].NotBefore) / 2)
	}
	r.check()
}

// check has everybody who has a valid certificate verify everybody else's.
func (r *rotating) check() {
	r.t.Helper()
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	for i, server := range r.nodes {
		bundle := must[*x509bundle.Bundle](r.t)(x509bundle.ParseRaw(td, bytes.Join(server.bundle, nil)))
		for j, client := range r.nodes {
			if len(server.chain) == 0 || len(client.chain) == 0 || !r.now.Before(server.chain[0].NotAfter) || !r.now.Before(client.chain[0].NotAfter) {
				continue
			}
			if _, _, err := x509svid.Verify(client.chain, bundle, x509svid.WithTime(r.now)); err != nil {
				r.t.Fatalf("%s, phase %q: node %d doesn't take node %d's certificate: %v", r.now.Format("15:04"), r.stored().state.Phase, i, j, err)
			}
		}
	}
}

func (r *rotating) run(minutes int) {
	r.t.Helper()
	for range minutes {
		r.minute()
	}
}

func TestRootRotation(t *testing.T) {
	for seed := range uint64(2) {
		r := newRotating(t, seed)
		r.run(60)
		old := r.stored()
		r.wanted.Request = "please"
		r.nodes[2].dead = seed%2 == 1
		if seed%2 == 0 {
			r.ttl = 10 * time.Minute // what lives longer is still out there
		}
		r.run(200)
		now := r.stored()
		if now.state.Phase != PhaseStable || len(now.Roots()) != 1 || bytes.Equal(now.Roots()[0], old.Roots()[0]) || now.Sequence() != old.Sequence()+2 {
			t.Errorf("seed %d: %d roots, sequence %d after %d, phase %q", seed, len(now.Roots()), now.Sequence(), old.Sequence(), now.state.Phase)
		}
		for _, secret := range [][]byte{encodeKey(old.issuer.rootKey), encodeKey(old.issuer.key)} {
			for name, v := range r.secret {
				if bytes.Contains(v, secret) {
					t.Errorf("the old root's keys are still in %s", name)
				}
			}
		}
		// Once for each request.
		r.run(60)
		if again := r.stored(); !bytes.Equal(again.Roots()[0], now.Roots()[0]) {
			t.Error("the roots were changed again")
		}
	}
}

func TestRotationWaits(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	a := must[*Authority](t)(NewAuthority("cluster.local", now))
	w := Wanted{TTL: time.Hour, Request: "1"}
	step := func(at time.Duration, changes bool) {
		t.Helper()
		next, change, err := a.Step(w, now.Add(at))
		if err != nil || (change != "") != changes {
			t.Fatalf("after %v: %q, %v", at, change, err)
		}
		a = must[*Authority](t)(ParseAuthority(next.Data()))
	}
	signer := func(at time.Duration) *x509.Certificate {
		chain := must[[][]byte](t)(a.Sign(must[[]byte](t)(NewCSR(testKey(t), reviews)), reviews, 24*time.Hour, now.Add(at)))
		leaf := must[*x509.Certificate](t)(x509.ParseCertificate(chain[0]))
		if life := leaf.NotAfter.Sub(now.Add(at)); life > time.Hour {
			t.Errorf("signed for %v, longer than is on record", life)
		}
		return must[*x509.Certificate](t)(x509.ParseCertificate(chain[1]))
	}
	step(0, true) // the TTL
	step(0, true) // the new root
	first := signer(0)
	step(time.Minute, false)
	w.Acknowledged = true
	step(time.Minute, false) // too soon for those who read the bundle now and then
	w.Acknowledged = false
	step(time.Hour, false)
	if len(a.Roots()) != 2 || !signer(time.Hour).Equal(first) {
		t.Error("signed under the new root before it is trusted")
	}
	order := a.Roots()
	w.Acknowledged = true
	step(time.Hour, true)
	if signer(time.Hour).Equal(first) || !slices.EqualFunc(order, a.Roots(), bytes.Equal) {
		t.Error("the old issuer still signs, or the bundle changed with the issuer")
	}
	switched := time.Hour
	step(switched+time.Hour, false) // nothing of the old has a second to live, but for clocks
	w.TTL = 10 * time.Minute        // no reason to end it sooner
	step(switched+time.Hour, true)
	step(switched+time.Hour+clockMargin-time.Second, false)
	step(switched+time.Hour+clockMargin, true)
	if len(a.Roots()) != 1 {
		t.Errorf("%d roots", len(a.Roots()))
	}
	step(switched+2*time.Hour, false)

	// Nobody answers: it goes on when the silent have nothing valid left.
	w = Wanted{TTL: 10 * time.Minute, Request: "2"}
	at := 24 * time.Hour
	step(at, true)
	step(at+10*time.Minute+clockMargin-time.Second, false)
	step(at+10*time.Minute+clockMargin, true)
	if phase, _, _ := a.Rotation(); phase != PhaseRetiring {
		t.Errorf("phase %q", phase)
	}

	// By age.
	aged := must[*Authority](t)(NewAuthority("cluster.local", now))
	if next, change, err := aged.Step(Wanted{TTL: DefaultTTL}, now.Add(RootLifetime-rootRenewal+time.Hour)); err != nil || change == "" {
		t.Errorf("%q, %v", change, err)
	} else if next, _, err = next.Step(Wanted{TTL: DefaultTTL}, now.Add(RootLifetime-rootRenewal+time.Hour)); err != nil || len(next.Roots()) != 2 {
		t.Errorf("a root of %v isn't replaced: %v", RootLifetime-rootRenewal, err)
	}
}

// foreignCA is somebody else's public key infrastructure, as cert-manager writes it.
type foreignCA struct {
	t            *testing.T
	root         *x509.Certificate
	rootKey      crypto.Signer
	intermediate *x509.Certificate
}

func newForeignCA(t *testing.T, now time.Time) *foreignCA {
	f := &foreignCA{t: t, rootKey: must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))}
	f.root = f.make(nil, "corporate root", f.rootKey, now, nil)
	return f
}

func (f *foreignCA) make(parent *x509.Certificate, name string, key crypto.Signer, now time.Time, change func(*x509.Certificate)) *x509.Certificate {
	f.t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(mathrand.Int64()), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(90 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	if change != nil {
		change(template)
	}
	if parent == nil {
		parent = template
	}
	der := must[[]byte](f.t)(x509.CreateCertificate(rand.Reader, template, parent, key.Public(), f.rootKey))
	return must[*x509.Certificate](f.t)(x509.ParseCertificate(der))
}

// secret makes an intermediate and is the Secret with it.
func (f *foreignCA) secret(key crypto.Signer, now time.Time, change func(*x509.Certificate)) map[string][]byte {
	f.t.Helper()
	f.intermediate = f.make(f.root, "mesh issuer", key, now, change)
	return map[string][]byte{DataIssuerChain: encodeAll([]*x509.Certificate{f.intermediate}), DataIssuerKey: encodeKey(key), DataIssuerRoots: encodeAll([]*x509.Certificate{f.root})}
}

func TestImportedIssuer(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	f := newForeignCA(t, now)
	servers := []string{"bulkhead-operator.bulkhead-system.svc"}
	key := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)) // cert-manager's default
	data := f.secret(key, now, nil)
	data[DataIssuerKey] = pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	data[DataIssuerChain] = append(data[DataIssuerChain], data[DataIssuerRoots]...) // with the root, as some write it
	imported := must[*Issuer](t)(ParseIssuer(data, "cluster.local", servers, now))

	a := must[*Authority](t)(ParseAuthority(ImportAuthority(imported, "Secret x").Data()))
	chain := must[[][]byte](t)(a.Sign(must[[]byte](t)(NewCSR(testKey(t), reviews)), reviews, time.Hour, now))
	bundle := must[*x509bundle.Bundle](t)(x509bundle.ParseRaw(spiffeid.RequireTrustDomainFromString("cluster.local"), f.root.Raw))
	if id, _, err := x509svid.ParseAndVerify(chain, bundle, x509svid.WithTime(now)); err != nil || id.String() != reviews.String() || len(chain) != 2 {
		t.Errorf("%q with %d certificates: %v", id, len(chain), err)
	}
	if _, err := a.Renew(now); !errors.Is(err, ErrNoRootKey) {
		t.Errorf("renewed somebody else's intermediate: %v", err)
	}

	// A root that signs by itself is sent to nobody.
	rootOnly := map[string][]byte{DataIssuerChain: encodeAll([]*x509.Certificate{f.root}), DataIssuerKey: encodeKey(f.rootKey), DataIssuerRoots: encodeAll([]*x509.Certificate{f.root})}
	direct := must[*Authority](t)(ParseAuthority(ImportAuthority(must[*Issuer](t)(ParseIssuer(rootOnly, "cluster.local", servers, now)), "Secret y").Data()))
	if chain = must[[][]byte](t)(direct.Sign(must[[]byte](t)(NewCSR(testKey(t), reviews)), reviews, time.Hour, now)); len(chain) != 1 {
		t.Errorf("%d certificates", len(chain))
	}

	good := f.secret(testKey(t), now, nil)
	for name, c := range map[string]struct {
		change map[string][]byte
		says   string
	}{
		"no chain":           {map[string][]byte{DataIssuerChain: nil}, "tls.crt is missing"},
		"no key":             {map[string][]byte{DataIssuerKey: nil}, "tls.key is missing"},
		"no roots":           {map[string][]byte{DataIssuerRoots: nil}, "ca.crt is missing"},
		"garbage":            {map[string][]byte{DataIssuerChain: []byte("x")}, "tls.crt: must be PEM"},
		"another's key":      {map[string][]byte{DataIssuerKey: encodeKey(testKey(t))}, "tls.key isn't the key of the first certificate of tls.crt"},
		"another's root":     {map[string][]byte{DataIssuerRoots: encodeAll([]*x509.Certificate{newForeignCA(t, now).root})}, "tls.crt: peers wouldn't take"},
		"weak key":           {f.secret(must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 1024)), now, nil), "tls.key: must be"},
		"no authority":       {f.secret(testKey(t), now, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }), "set isCA: true"},
		"expired":            {f.secret(testKey(t), now.Add(-100*24*time.Hour), nil), "ended at"},
		"not yet":            {f.secret(testKey(t), now.Add(time.Hour), nil), "is valid from"},
		"other trust domain": {f.secret(testKey(t), now, func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://elsewhere")} }), "the trust domain is"},
		"constrained to others": {f.secret(testKey(t), now, func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"elsewhere"}, true
		}), "peers wouldn't take"},
		"not for the operator": {f.secret(testKey(t), now, func(c *x509.Certificate) {
			c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, true
		}), "agents wouldn't take"},
	} {
		bad := map[string][]byte{}
		for k, v := range good {
			bad[k] = v
		}
		for k, v := range c.change {
			bad[k] = v
		}
		if i, err := ParseIssuer(bad, "cluster.local", servers, now); i != nil || err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "PRIVATE") {
			t.Errorf("%s: %v, should say %q", name, err, c.says)
		}
	}
	if _, err := ParseIssuer(good, "Not A Domain", servers, now); err == nil {
		t.Error("took an invalid trust domain")
	}
}

// The issuer moves between ours and somebody else's, and is renewed there.
func TestIssuerMoves(t *testing.T) {
	r := newRotating(t, 7)
	r.run(60)
	f := newForeignCA(t, r.now)
	issuer := func(name string) {
		t.Helper()
		r.wanted.Source = name
		r.wanted.Imported = must[*Issuer](t)(ParseIssuer(f.secret(testKey(t), r.now, nil), "cluster.local", nil, r.now))
	}
	issuer("Secret corporate")
	r.run(150)
	a := r.stored()
	if a.Source() != "Secret corporate" || len(a.Roots()) != 1 || !bytes.Equal(a.Roots()[0], f.root.Raw) || !a.issuer.chain[0].Equal(f.intermediate) {
		t.Fatalf("imported: source %q, %d roots, phase %q", a.Source(), len(a.Roots()), a.state.Phase)
	}
	if len(r.secret[DataRootKey]) > 0 {
		t.Error("our own root's key is still kept")
	}
	issuer("Secret corporate") // renewed under the same root: at once
	r.run(5)
	if now := r.stored(); !now.issuer.chain[0].Equal(f.intermediate) || now.Sequence() != a.Sequence() {
		t.Error("a renewed intermediate isn't taken, or took a change of roots")
	}
	r.wanted.Request = "please" // isn't ours to answer
	r.run(5)
	if now := r.stored(); now.state.Phase != PhaseStable || len(now.Roots()) != 1 {
		t.Error("somebody else's root was replaced")
	}
	r.wanted.Imported = nil // unreadable now
	r.run(60)
	if now := r.stored(); now.Source() != "Secret corporate" || now.Sequence() != a.Sequence() {
		t.Error("an issuer that can't be read was replaced")
	}
	f = newForeignCA(t, r.now) // another root
	issuer("Secret corporate")
	for r.stored().state.Phase != PhaseRetiring {
		r.minute()
	}
	f = newForeignCA(t, r.now) // and another, before the first is done
	issuer("Secret corporate")
	r.run(10)
	if now := r.stored(); now.state.Phase != PhaseRetiring || now.next != nil {
		t.Errorf("phase %q: two changes at once", now.state.Phase)
	}
	r.run(200)
	if now := r.stored(); len(now.Roots()) != 1 || !bytes.Equal(now.Roots()[0], f.root.Raw) {
		t.Error("another root isn't taken")
	}
	r.wanted.Source, r.wanted.Imported = "", nil
	r.run(150)
	if now := r.stored(); now.Source() != "" || len(now.Roots()) != 1 || now.issuer.rootKey == nil {
		t.Errorf("not its own again: source %q, phase %q", now.Source(), now.state.Phase)
	}

	// A change of mind before anything is signed.
	before := r.stored().Roots()
	issuer("Secret corporate")
	r.nodes[0].dead = true
	for r.stored().state.Phase != PhasePublishing {
		r.minute()
	}
	r.wanted.Source, r.wanted.Imported = "", nil
	r.run(10)
	if now := r.stored(); now.state.Phase != PhaseStable || !slices.EqualFunc(now.Roots(), before, bytes.Equal) {
		t.Errorf("phase %q, %d roots", now.state.Phase, len(now.Roots()))
	}
}

func TestBundleDocument(t *testing.T) {
	now := time.Now()
	a := must[*Authority](t)(NewAuthority("cluster.local", now))
	a, _, err := a.Step(Wanted{TTL: time.Hour}, now)
	if err == nil {
		a, _, err = a.Step(Wanted{TTL: time.Hour, Request: "1"}, now)
	}
	if err != nil {
		t.Fatal(err)
	}
	b := must[*spiffebundle.Bundle](t)(spiffebundle.Parse(a.issuer.trustDomain, must[[]byte](t)(a.BundleDocument(nil))))
	sequence, _ := b.SequenceNumber()
	hint, _ := b.RefreshHint()
	if len(b.X509Authorities()) != 2 || sequence != a.Sequence() || sequence != 2 || hint != RefreshHint {
		t.Errorf("%d authorities, sequence %d, hint %v", len(b.X509Authorities()), sequence, hint)
	}
	if roots := a.Roots(); BundleDigest(roots) == BundleDigest(roots[:1]) || BundleDigest(roots) != BundleDigest([][]byte{roots[1], roots[0]}) {
		t.Error("the digest isn't the set's")
	}
}

// A Secret keeps what others put into it, and loses what isn't the authority's any
// more.
func TestSetData(t *testing.T) {
	a := must[*Authority](t)(NewAuthority("cluster.local", time.Now()))
	data := a.SetData(map[string][]byte{"other": []byte("x"), DataOldRoots: []byte("gone"), DataNextPrefix + DataRootKey: []byte("gone")})
	if string(data["other"]) != "x" || data[DataOldRoots] != nil || data[DataNextPrefix+DataRootKey] != nil || len(data) != 6 {
		t.Errorf("%d keys", len(data))
	}
	data[DataState] = []byte(`{"phase":"Nonsense"}`)
	if _, err := ParseAuthority(data); err == nil || !strings.Contains(err.Error(), DataState) {
		t.Errorf("unknown phase: %v", err)
	}
}
