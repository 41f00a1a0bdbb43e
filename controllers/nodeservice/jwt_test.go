package nodeservice

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

type jwtAuthorities struct {
	authority *identity.JWTAuthority
	ttl       time.Duration
}

func (j jwtAuthorities) JWTAuthority() (*identity.JWTAuthority, time.Duration) {
	return j.authority, j.ttl
}

func newJWTs(t *testing.T) *identity.JWTAuthority {
	t.Helper()
	a, err := identity.NewJWTAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func jwtRequest(audiences ...string) *nodev1alpha1.SignJWTRequest {
	return &nodev1alpha1.SignJWTRequest{PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0", Audiences: audiences}
}

// The same pods that get no certificate get no token, for the same reasons.
func TestSignJWTChecksThePod(t *testing.T) {
	for name, c := range podCases {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c.change(w, w.pods["team-a/reviews-0"])
			var log bytes.Buffer
			s := w.service(func(o *Options) {
				o.JWTs, o.Log = jwtAuthorities{authority: newJWTs(t)}, slog.New(slog.NewTextHandler(&log, nil))
			})
			r, err := s.SignJWT(t.Context(), jwtRequest("db"))
			if status.Code(err) != c.code || (r != nil) != (err == nil) {
				t.Errorf("%v, want %v", err, c.code)
			}
			if got := testutil.ToFloat64(s.jwts.WithLabelValues(c.code.String())); got != 1 {
				t.Errorf("counted %v answers of %v", got, c.code)
			}
			if c.code == codes.PermissionDenied && (!strings.Contains(log.String(), "node-1") || !strings.Contains(log.String(), "team-a/reviews-0")) {
				t.Errorf("the log doesn't say who was refused: %s", log.String())
			}
			if len(s.inFlight) != 0 {
				t.Errorf("still counted: %v", s.inFlight)
			}
		})
	}
}

// slowPods answer nobody in time.
type slowPods struct{}

func (slowPods) Live(ctx context.Context, _, _ string) (*corev1.Pod, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// Certificates don't wait for what applications ask for.
func TestJWTsHaveTheirOwnWayToPods(t *testing.T) {
	w := newWorld(t)
	s := w.service(func(o *Options) { o.JWTs, o.JWTPods = jwtAuthorities{authority: newJWTs(t)}, slowPods{} })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := s.SignJWT(ctx, jwtRequest("db")); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a JWT-SVID, whose pods can't be read: %v", err)
	}
	if _, err := s.SignCertificate(t.Context(), &nodev1alpha1.SignCertificateRequest{PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0", Csr: csrFor(t, reviews)}); err != nil {
		t.Errorf("a certificate: %v", err)
	}
}

func TestSignJWT(t *testing.T) {
	w := newWorld(t)
	authority := newJWTs(t)
	s := w.service(func(o *Options) { o.JWTs = jwtAuthorities{authority: authority} })
	r, err := s.SignJWT(t.Context(), jwtRequest("db", "cache"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := w.authority.BundleDocument(authority)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("cluster.local"), b)
	if err != nil {
		t.Fatal(err)
	}
	if len(bundle.X509Authorities()) != 1 {
		t.Errorf("the bundle has %d roots", len(bundle.X509Authorities()))
	}
	svid, err := jwtsvid.ParseAndValidate(r.GetToken(), bundle, []string{"cache"})
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID.String() != reviews.String() {
		t.Errorf("the token is %s's", svid.ID)
	}
	if life := time.Until(svid.Expiry); life > identity.DefaultJWTTTL || life < identity.DefaultJWTTTL-10*time.Second {
		t.Errorf("it lives %s", life)
	}

	for name, c := range map[string]struct {
		request *nodev1alpha1.SignJWTRequest
		jwts    JWTAuthorities
		code    codes.Code
	}{
		"no audience":  {jwtRequest(), jwtAuthorities{authority: authority}, codes.InvalidArgument},
		"empty one":    {jwtRequest(""), jwtAuthorities{authority: authority}, codes.InvalidArgument},
		"long one":     {jwtRequest(strings.Repeat("a", 257)), jwtAuthorities{authority: authority}, codes.InvalidArgument},
		"huge token":   {jwtRequest("1"+strings.Repeat("<", 255), "2"+strings.Repeat("<", 255), "3"+strings.Repeat("<", 255), "4"+strings.Repeat("<", 255)), jwtAuthorities{authority: authority}, codes.InvalidArgument},
		"no pod":       {&nodev1alpha1.SignJWTRequest{Audiences: []string{"db"}}, jwtAuthorities{authority: authority}, codes.InvalidArgument},
		"not loaded":   {jwtRequest("db"), jwtAuthorities{}, codes.Unavailable},
		"not provided": {jwtRequest("db"), nil, codes.Unimplemented},
	} {
		s := w.service(func(o *Options) { o.JWTs = c.jwts })
		if r, err := s.SignJWT(t.Context(), c.request); status.Code(err) != c.code || r != nil {
			t.Errorf("%s: %v, want %v", name, err, c.code)
		}
	}
}
