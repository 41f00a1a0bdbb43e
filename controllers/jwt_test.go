package controllers

import (
	"bytes"
	"context"
	"crypto/x509"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
)

func (c *cluster) jwtKeeper() *jwtKeeper {
	return &jwtKeeper{live: c.WithWatch, writer: c.WithWatch, namespace: "bulkhead-system", log: slog.New(slog.DiscardHandler), now: time.Now,
		leading: func() bool { return true }, event: func(string, string) {}, changed: func() {}}
}

func (c *cluster) secret(name string) (s corev1.Secret) {
	c.t.Helper()
	if err := c.Get(c.t.Context(), client.ObjectKey{Namespace: "bulkhead-system", Name: name}, &s); err != nil {
		c.t.Fatal(err)
	}
	return s
}

func syncJWTs(t *testing.T, keepers ...*jwtKeeper) {
	t.Helper()
	for _, k := range keepers {
		if _, err := k.sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func token(t *testing.T, k *jwtKeeper) string {
	t.Helper()
	a, _ := k.JWTAuthority()
	token, _, err := a.Sign(model.Identity{TrustDomain: "td", Namespace: "a", ServiceAccount: "b"}, []string{"db"}, time.Hour, k.now())
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// verify checks a token by what the ConfigMap says.
func (c *cluster) verify(token string) error {
	c.t.Helper()
	var m corev1.ConfigMap
	if err := c.Get(c.t.Context(), client.ObjectKey{Namespace: "bulkhead-system", Name: ConfigMapTrustBundle}, &m); err != nil {
		c.t.Fatal(err)
	}
	b, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString(m.Data["trustDomain"]), []byte(m.Data[bundleKey]))
	if err != nil {
		return err
	}
	_, err = jwtsvid.ParseAndValidate(token, b, []string{"db"})
	return err
}

func TestReplicasShareOneSetOfJWTKeys(t *testing.T) {
	c := newCluster(t)
	first, second := c.jwtKeeper(), c.jwtKeeper()
	// Both find none; the second's creation comes when the first's is there.
	second.live = interceptor.NewClient(c.WithWatch, interceptor.Funcs{Get: func(ctx context.Context, w client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
		if a, _ := first.JWTAuthority(); a == nil {
			syncJWTs(t, first)
			return apierrors.NewNotFound(schema.GroupResource{Resource: "secrets"}, key.Name)
		}
		return w.Get(ctx, key, o, opts...)
	}})
	syncJWTs(t, second)
	if a, _ := second.JWTAuthority(); a != nil {
		t.Error("the second made keys of its own")
	}
	syncJWTs(t, second)
	a, _ := first.JWTAuthority()
	b, _ := second.JWTAuthority()
	if !sameData(a.Data(), b.Data()) {
		t.Error("two replicas have two sets of keys")
	}

	// Of two leaders (one doesn't know yet that it isn't) one rotates.
	later := func() time.Time { return time.Now().Add(identity.JWTKeyLifetime) }
	first.now, second.now = later, later
	raced := false
	second.writer = interceptor.NewClient(c.WithWatch, interceptor.Funcs{Update: func(ctx context.Context, w client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
		if !raced {
			raced = true
			syncJWTs(t, first)
		}
		return w.Update(ctx, o, opts...)
	}})
	syncJWTs(t, second)
	rotated := c.secret(SecretJWT)
	syncJWTs(t, second, first)
	a, _ = first.JWTAuthority()
	b, _ = second.JWTAuthority()
	if !raced || !sameData(a.Data(), b.Data()) || !sameData(a.Data(), c.secret(SecretJWT).Data) || c.secret(SecretJWT).ResourceVersion != rotated.ResourceVersion {
		t.Error("two leaders rotated")
	}
	// Who doesn't lead doesn't write.
	third := c.jwtKeeper()
	third.leading, third.now = func() bool { return false }, func() time.Time { return time.Now().Add(10 * identity.JWTKeyLifetime) }
	syncJWTs(t, third)
	if c.secret(SecretJWT).ResourceVersion != rotated.ResourceVersion {
		t.Error("a replica that doesn't lead rotated")
	}
}

func TestBadJWTSecretChangesNothing(t *testing.T) {
	c := newCluster(t, newTopology("t", "mesh"))
	k := c.jwtKeeper()
	var events []string
	k.event = func(reason, note string) { events = append(events, reason+" "+note) }
	syncJWTs(t, k)
	before, _ := k.JWTAuthority()
	s := c.secret(SecretJWT)
	good := s.Data
	s.Data = map[string][]byte{identity.DataJWTKeys: []byte("[]")}
	if err := c.Update(t.Context(), &s); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		_, err := k.sync(t.Context())
		if err == nil {
			t.Fatal("it is taken")
		}
		k.tell(err)
	}
	if after, _ := k.JWTAuthority(); after != before {
		t.Error("what signs has changed")
	}
	if !sameData(c.secret(SecretJWT).Data, s.Data) {
		t.Error("the Secret was overwritten")
	}
	if len(events) != 1 || !strings.Contains(events[0], "bulkhead-jwt") || !strings.Contains(events[0], "delete it") {
		t.Errorf("events %q", events)
	}
	s = c.secret(SecretJWT)
	s.Data = good
	if err := c.Update(t.Context(), &s); err != nil {
		t.Fatal(err)
	}
	syncJWTs(t, k)
	k.tell(nil)
	if len(events) != 1 {
		t.Errorf("events %q", events)
	}
}

func TestJWTKeysArePublished(t *testing.T) {
	c := newCluster(t, newTopology("t", "mesh"))
	w := c.writer()
	write := func() {
		t.Helper()
		if err := w.writeMembership(t.Context(), struct{}{}); err != nil {
			t.Fatal(err)
		}
	}
	changes := 0
	w.jwts.changed = func() { changes++ }
	if _, err := w.keeper.sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	syncJWTs(t, w.jwts)
	write()
	old := token(t, w.jwts)
	if err := c.verify(old); err != nil {
		t.Error(err)
	}
	// A key is published before it signs.
	w.jwts.now = func() time.Time {
		return time.Now().Add(identity.JWTKeyLifetime - identity.JWTPublishAhead + time.Minute)
	}
	syncJWTs(t, w.jwts)
	write()
	next, _ := w.jwts.JWTAuthority()
	early, _, err := next.Sign(model.Identity{TrustDomain: "td", Namespace: "a", ServiceAccount: "b"}, []string{"db"}, time.Hour, time.Now().Add(identity.JWTKeyLifetime+time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Split(early, ".")[0] == strings.Split(old, ".")[0] {
		t.Fatal("the next key doesn't sign when it should")
	}
	// Its times are those of then; the signature is what counts.
	if err := c.verify(early); err != nil && !strings.Contains(err.Error(), "issued in the future") {
		t.Errorf("the next key isn't published: %v", err)
	}
	if err := c.verify(old); err != nil {
		t.Errorf("the last key's tokens can't be verified: %v", err)
	}
	if changes != 2 {
		t.Errorf("%d changes told, want 2", changes)
	}
	// A new leader that can't read them leaves them there.
	w.jwts = c.jwtKeeper()
	write()
	if err := c.verify(old); err != nil {
		t.Errorf("a new leader took the keys away: %v", err)
	}
}

// A leader that can't read the keys of JWT-SVIDs publishes new roots all the same,
// beside the keys that another one published.
func TestRootsDontWaitForJWTKeys(t *testing.T) {
	c := newCluster(t, newTopology("t", "mesh"))
	w := c.writer()
	publish := func() (document string, b *spiffebundle.Bundle) {
		t.Helper()
		for range 4 { // one step each
			if _, err := w.keeper.sync(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 { // the second time changes nothing
			if err := w.writeMembership(t.Context(), struct{}{}); err != nil {
				t.Fatal(err)
			}
			var m corev1.ConfigMap
			if err := c.Get(t.Context(), client.ObjectKey{Namespace: "bulkhead-system", Name: ConfigMapTrustBundle}, &m); err != nil {
				t.Fatal(err)
			}
			if document != "" && document != m.Data[bundleKey] {
				t.Error("it is published anew without a change")
			}
			document = m.Data[bundleKey]
		}
		b, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("td"), []byte(document))
		if err != nil {
			t.Fatal(err)
		}
		roots := w.keeper.Authority().Roots()
		if !slices.EqualFunc(b.X509Authorities(), roots, func(c *x509.Certificate, der []byte) bool { return bytes.Equal(c.Raw, der) }) {
			t.Errorf("%d roots are published, of %d", len(b.X509Authorities()), len(roots))
		}
		return document, b
	}
	rotate := func(request string) {
		t.Helper()
		s := c.secret(SecretAuthority)
		s.Annotations = map[string]string{AnnotationRotate: request}
		if err := c.Update(t.Context(), &s); err != nil {
			t.Fatal(err)
		}
	}
	sequence := func(b *spiffebundle.Bundle) uint64 {
		n, _ := b.SequenceNumber()
		return n
	}
	// Nobody has published any: the roots alone.
	_, alone := publish()
	if n := len(alone.JWTAuthorities()); n != 0 {
		t.Errorf("%d keys of JWT-SVIDs from nowhere", n)
	}
	syncJWTs(t, w.jwts)
	_, whole := publish()
	signed := token(t, w.jwts)

	readable := w.jwts
	w.jwts = c.jwtKeeper() // a new leader's
	rotate("today")
	document, blind := publish()
	if len(blind.X509Authorities()) != 2 {
		t.Fatal("the new root isn't there")
	}
	if err := c.verify(signed); err != nil {
		t.Errorf("the tokens of the keys that were published: %v", err)
	}
	// As the numbers of those who know the keys.
	w.jwts = readable
	if again, _ := publish(); again != document {
		t.Errorf("with the keys it would have been\n%s, it was\n%s", again, document)
	}
	if !(sequence(alone) < sequence(whole) && sequence(whole) < sequence(blind)) {
		t.Errorf("sequence numbers %d, %d, %d", sequence(alone), sequence(whole), sequence(blind))
	}
	// What somebody else made of it is no reason to keep roots back.
	var m corev1.ConfigMap
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: "bulkhead-system", Name: ConfigMapTrustBundle}, &m); err != nil {
		t.Fatal(err)
	}
	m.Data[bundleKey] = "{"
	if err := c.Update(t.Context(), &m); err != nil {
		t.Fatal(err)
	}
	w.jwts = c.jwtKeeper()
	publish()
}

func TestJWTTTLIsValidated(t *testing.T) {
	for _, ttl := range []time.Duration{time.Second, 2 * time.Hour, -time.Minute} {
		if err := Run(t.Context(), Options{Config: &rest.Config{}, JWTTTL: ttl}); err == nil || !strings.Contains(err.Error(), "JWT") {
			t.Errorf("TTL %s: %v", ttl, err)
		}
	}
}
