package identity

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/bulkhead-mesh/bulkhead/model"
)

var jwtID = model.Identity{TrustDomain: "example.org", Namespace: "team-a", ServiceAccount: "web"}

// published is what a peer knows of an authority: what the bundle says.
func published(t *testing.T, a *JWTAuthority) *jwtbundle.Bundle {
	t.Helper()
	return publishedBundle(t, a).JWTBundle()
}

var x509Authority = sync.OnceValues(func() (*Authority, error) { return NewAuthority("example.org", time.Now()) })

func publishedBundle(t *testing.T, a *JWTAuthority) *spiffebundle.Bundle {
	t.Helper()
	x, err := x509Authority()
	if err != nil {
		t.Fatal(err)
	}
	b, err := x.BundleDocument(a)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("example.org"), b)
	if err != nil {
		t.Fatal(err)
	}
	return bundle
}

func newJWTs(t *testing.T) *JWTAuthority {
	t.Helper()
	a, err := NewJWTAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func rotated(t *testing.T, a *JWTAuthority) *JWTAuthority {
	t.Helper()
	next, err := a.Rotate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return next
}

func signJWT(t *testing.T, a *JWTAuthority, ttl time.Duration, audiences ...string) (string, time.Time) {
	t.Helper()
	token, expires, err := a.Sign(jwtID, audiences, ttl, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return token, expires
}

func TestJWTIsValidForItsAudiencesUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newJWTs(t)
		bundle := published(t, a)
		token, expires := signJWT(t, a, 5*time.Minute, "db", "cache")
		for _, audience := range []string{"db", "cache"} {
			svid, err := jwtsvid.ParseAndValidate(token, bundle, []string{audience})
			if err != nil {
				t.Fatalf("for %s: %v", audience, err)
			}
			if svid.ID.String() != jwtID.String() || !svid.Expiry.Equal(expires) {
				t.Errorf("token is %s's until %s", svid.ID, svid.Expiry)
			}
		}
		if _, err := jwtsvid.ParseAndValidate(token, bundle, []string{"other"}); err == nil {
			t.Error("another audience takes it")
		}
		if _, err := jwtsvid.ParseAndValidate(token, published(t, newJWTs(t)), []string{"db"}); err == nil {
			t.Error("another authority's bundle verifies it")
		}
		if got := time.Until(expires); got > 5*time.Minute || got < 5*time.Minute-time.Second {
			t.Errorf("it lives %s", got)
		}
		time.Sleep(5*time.Minute + 2*time.Minute) // go-spiffe allows a minute for clocks
		if _, err := jwtsvid.ParseAndValidate(token, bundle, []string{"db"}); err == nil {
			t.Error("it is valid after its end")
		}
	})
}

func TestJWTLifetimeIsBounded(t *testing.T) {
	a := newJWTs(t)
	for ttl, want := range map[time.Duration]time.Duration{0: MinJWTTTL, 365 * 24 * time.Hour: MaxJWTTTL} {
		_, expires := signJWT(t, a, ttl, "db")
		if got := time.Until(expires); got > want || got < want-2*time.Second {
			t.Errorf("TTL %s gives %s, want %s", ttl, got, want)
		}
	}
}

// A key is in the bundle for JWTPublishAhead before it signs anything, and each
// token can be verified, by who learns of bundles late, until it has expired.
func TestJWTKeysRotateWithoutATokenThatNobodyCanVerify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newJWTs(t)
		const step = 10 * time.Minute
		type seen struct {
			token   string
			expires time.Time
		}
		var tokens []seen
		late := published(t, a) // a peer that learns of bundles an hour late
		var pipeline []*jwtbundle.Bundle
		ids := map[string]bool{}
		sequence := uint64(0)
		for range 4 * JWTKeyLifetime / step {
			before := a
			a = rotated(t, a)
			b := publishedBundle(t, a)
			if n, ok := b.SequenceNumber(); !ok || a != before && n <= sequence || a == before && sequence != 0 && n != sequence {
				t.Fatalf("sequence %d after %d", n, sequence)
			} else {
				sequence = n
			}
			if len(b.X509Authorities()) != 1 {
				t.Fatalf("%d roots", len(b.X509Authorities()))
			}
			if again := rotated(t, a); again != a {
				t.Fatal("Rotate isn't idempotent")
			}
			pipeline = append(pipeline, published(t, a))
			if n := int(JWTPublishAhead/step) - 1; len(pipeline) > n {
				late, pipeline = pipeline[0], pipeline[1:]
			}
			token, expires := signJWT(t, a, MaxJWTTTL, "db")
			if _, err := jwtsvid.ParseAndValidate(token, late, []string{"db"}); err != nil {
				t.Fatalf("a new token can't be verified by who has the bundle of an hour ago: %v", err)
			}
			tokens = append(tokens, seen{token, expires})
			for _, s := range tokens {
				if time.Now().After(s.expires) {
					continue
				}
				if _, err := jwtsvid.ParseAndValidate(s.token, published(t, a), []string{"db"}); err != nil {
					t.Fatalf("a token that hasn't expired can't be verified any more: %v", err)
				}
			}
			for _, k := range a.keys {
				ids[k.id] = true
			}
			if len(a.keys) > 2 {
				t.Fatalf("%d keys at once", len(a.keys))
			}
			time.Sleep(step)
		}
		if len(ids) != 5 {
			t.Errorf("%d keys in four lifetimes, want 5", len(ids))
		}
		if len(a.keys) != 1 {
			time.Sleep(JWTPublishAhead + jwtKeyStays + time.Minute)
			if a = rotated(t, a); len(a.keys) != 1 {
				t.Errorf("%d keys stay", len(a.keys))
			}
		}
	})
}

func TestJWTAuthorityInASecret(t *testing.T) {
	a := newJWTs(t)
	next, err := a.Rotate(time.Now().Add(JWTKeyLifetime))
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseJWTAuthority(next.Data())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(back.Data()[DataJWTKeys], next.Data()[DataJWTKeys]) {
		t.Error("it is another after Data and ParseJWTAuthority")
	}
	token, _ := signJWT(t, back, time.Minute, "db")
	if _, err := jwtsvid.ParseAndValidate(token, published(t, next), []string{"db"}); err != nil {
		t.Error(err)
	}
	one, two := string(a.Data()[DataJWTKeys]), string(next.Data()[DataJWTKeys])
	for name, data := range map[string]string{
		"nothing": "", "no list": "{}", "no keys": "[]", "text": "keys", "a key without a time": strings.Replace(one, "signsFrom", "since", 1),
		"no PEM":         `[{"signsFrom":"2026-01-01T00:00:00Z","key":"secret"}]`,
		"a key twice":    "[" + strings.Trim(one, "[]") + "," + strings.Trim(strings.Replace(one, `"signsFrom":"2`, `"signsFrom":"3`, 1), "[]") + "]",
		"out of order":   "[" + strings.Trim(one, "[]") + "," + strings.Trim(one, "[]") + "]",
		"too many bytes": two + strings.Repeat(" ", maxAuthorityDataSize),
	} {
		if _, err := ParseJWTAuthority(map[string][]byte{DataJWTKeys: []byte(data)}); err == nil {
			t.Errorf("%s: taken", name)
		} else if strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "BEGIN") {
			t.Errorf("%s: the error tells what is in the Secret: %v", name, err)
		}
	}
}

func TestAudiencesAreBounded(t *testing.T) {
	many := strings.Split(strings.Repeat("a,", MaxJWTAudiences)+"a", ",")
	for i := range many {
		many[i] += strings.Repeat("x", i)
	}
	for name, audiences := range map[string][]string{
		"none": nil, "empty": {""}, "too many": many, "too long": {strings.Repeat("a", MaxJWTAudienceSize+1)},
		"twice": {"a", "a"}, "control": {"a\nb"}, "not UTF-8": {"\xff"}, "no-break space": {"a\u00a0b"}, "direction": {"a\u202eb"},
	} {
		if _, _, err := newJWTs(t).Sign(jwtID, audiences, time.Minute, time.Now()); !errors.Is(err, ErrAudience) {
			t.Errorf("%s: %v", name, err)
		}
	}
	most := func(s string) (out []string) {
		for i := range MaxJWTAudiences {
			out = append(out, strings.Repeat(s, MaxJWTAudienceSize-1)+string(rune('a'+i)))
		}
		return out
	}
	long := model.Identity{TrustDomain: strings.Repeat("a.", 100) + "b", Namespace: strings.Repeat("n", 63), ServiceAccount: strings.Repeat("s", 253)}
	if _, _, err := newJWTs(t).Sign(long, most("x"), time.Minute, time.Now()); err != nil {
		t.Error(err)
	}
	// JSON makes six bytes of each.
	if _, _, err := newJWTs(t).Sign(long, most("<"), time.Minute, time.Now()); !errors.Is(err, ErrAudience) {
		t.Errorf("a token without bounds: %v", err)
	}
}
