package workloadapi

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/identity"
)

func TestPodsGetTheirServiceAccountsIdentity(t *testing.T) {
	n := newNode(t, web1, web2, db)
	for _, p := range []identity.Pod{web1, web2, db} {
		f := n.fetch(inPod(p))
		want := p.Identity.String()
		if f.ID != want || f.X509Error != "" {
			t.Errorf("%s has the X.509-SVID of %q, %s", p.Name, f.ID, f.X509Error)
		}
		if f.Subject != want || f.JWTError != "" || f.Valid != want {
			t.Errorf("%s has the JWT-SVID of %q, valid %q, %s", p.Name, f.Subject, f.Valid, f.JWTError)
		}
		if f.Bundles != 1 {
			t.Errorf("%s has %d bundles", p.Name, f.Bundles)
		}
		wantCode(t, "a token for another audience", f.WrongAudience, "InvalidArgument")
		wantCode(t, "another identity's token", f.ForeignID, "PermissionDenied")
		wantCode(t, "no audience", f.NoAudience, "InvalidArgument")
	}
	anybody := inPod(web1)
	anybody.uid = 1000
	if f := n.fetch(anybody); f.ID != web1.Identity.String() {
		t.Errorf("a process that isn't root: %+v", f)
	}
	// One token of web, whose pods share it, and one of db.
	if got := n.operator.asked; len(got) != 2 {
		t.Errorf("the operator was asked for tokens by %v", got)
	}
	if s := n.log.String(); strings.Contains(s, "eyJ") || strings.Contains(s, "PRIVATE") {
		t.Error("the log has a token or a key")
	}
}

func TestRotationIsPushed(t *testing.T) {
	n := newNode(t, web1)
	p := n.run(inPod(web1), "watch")
	first := until(p, "an SVID", func(u update) bool { return u.Serial != "" })
	if first.Roots != 1 || first.Error != "" {
		t.Fatalf("first: %+v", first)
	}
	// Another root, beside the old one, is pushed at once. The keys of JWT-SVIDs too.
	other := must[*identity.Authority](t)(identity.NewAuthority(trustDomain, time.Now()))
	check(t, n.store.SetBundle(trustDomain, append(n.operator.x509.Roots(), other.Roots()...)))
	both := until(p, "both roots", func(u update) bool { return u.Roots == 2 })
	if both.Serial != first.Serial || both.Error != "" {
		t.Errorf("with both roots: %+v", both)
	}
	// Without the old one there is another certificate.
	n.operator.change(func() { n.operator.x509 = other })
	check(t, n.store.SetBundle(trustDomain, other.Roots()))
	last := until(p, "the new certificate", func(u update) bool { return u.Roots == 1 && u.Serial != "" })
	if last.Serial == first.Serial || last.Error != "" {
		t.Errorf("with the new root: %+v", last)
	}
	n.operator.change(func() {
		n.operator.jwts = must[*identity.JWTAuthority](t)(n.operator.jwts.Rotate(time.Now().Add(identity.JWTKeyLifetime)))
	})
	n.publish()
	until(p, "two keys of JWT-SVIDs", func(u update) bool { return u.JWT == 2 })
}

func TestPodThatLeavesIsRefused(t *testing.T) {
	n := newNode(t, web1)
	p := n.run(inPod(web1), "watch")
	first := until(p, "an SVID", func(u update) bool { return u.Serial != "" })
	_, c := n.passed(inPod(web1))
	ctx, cancel := context.WithTimeout(withHeader(t.Context()), patience)
	defer cancel()
	bundles, err := client(t, c).FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	check(t, err)
	_, err = bundles.Recv()
	check(t, err)
	n.store.SetPods([]identity.Pod{db})
	refused := until(p, "the refusal", func(u update) bool { return u.Error != "" })
	wantCode(t, "a pod that left", refused.Error, "PermissionDenied")
	if _, err := bundles.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("the bundles of a pod that left: %v", err)
	}
	n.store.SetPods([]identity.Pod{web1, db})
	again := until(p, "an SVID again", func(u update) bool { return u.Serial != "" })
	if again.Serial == first.Serial {
		t.Error("the key of a pod that left is used again")
	}
}

func TestClientsComeBackToAnotherAgent(t *testing.T) {
	n := newNode(t, web1)
	p := n.run(inPod(web1), "watch")
	until(p, "an SVID", func(u update) bool { return u.Serial != "" })
	for range 2 {
		n.stop()
		until(p, "an error", func(u update) bool { return u.Error != "" })
		n.start(n.root())
		until(p, "an SVID after the restart", func(u update) bool { return u.Serial != "" })
	}
	p.in.Close()
	eventually(t, "no connection to be left", func() error {
		if n.limits.open() != 0 {
			return errNotYet
		}
		return nil
	})
}

func TestTokensAreSignedAgainAtHalfOfTheirLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &operator{jwts: must[*identity.JWTAuthority](t)(identity.NewJWTAuthority(time.Now()))}
		tokens := newTokens(o) // that live 5 minutes
		get := func(audiences ...string) (string, error) { return tokens.get(t.Context(), web1, audiences) }
		first := must[string](t)(get("db"))
		time.Sleep(2 * time.Minute)
		if again := must[string](t)(get("db")); again != first || len(o.asked) != 1 {
			t.Error("a fresh token isn't used again")
		}
		if other := must[string](t)(get("db", "x")); other == first {
			t.Error("other audiences get the same token")
		}
		time.Sleep(time.Minute)
		if again := must[string](t)(get("db")); again == first || len(o.asked) != 3 {
			t.Error("a half-spent token is used on")
		}
		// The operator being away is survived until it expires.
		time.Sleep(4 * time.Minute)
		o.refuse = status.Error(codes.Unavailable, "away")
		if _, err := get("db"); err != nil {
			t.Errorf("with the operator away: %v", err)
		}
		// What it denies isn't given.
		o.refuse = status.Error(codes.PermissionDenied, "pod has finished")
		if _, err := get("db"); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "finished") {
			t.Errorf("denied: %v", err)
		}
		o.refuse = status.Error(codes.Unavailable, "away")
		time.Sleep(2 * time.Minute)
		if _, err := get("db"); status.Code(err) != codes.Unavailable {
			t.Errorf("with an expired token: %v", err)
		}
		o.refuse = nil
		for i := range 3 * tokensPerIdentity {
			must[string](t)(get(strings.Repeat("a", i+1)))
		}
		if got := len(tokens.all[web1.Identity]); got != tokensPerIdentity {
			t.Errorf("%d tokens are remembered", got)
		}
	})
}

// A pod that asks for ever other tokens has few of them signed, and others theirs.
func TestOnePodDoesntHaveTheOperatorBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &operator{jwts: must[*identity.JWTAuthority](t)(identity.NewJWTAuthority(time.Now()))}
		var mu sync.Mutex
		busy, most, signed := 0, 0, 0
		count := func(by int) {
			mu.Lock()
			defer mu.Unlock()
			busy += by
			most = max(most, busy)
			signed += max(0, by)
		}
		tokens := newTokens(slowSigner{o, func() { count(1) }, func() { count(-1) }})
		hostile, stop := context.WithCancel(t.Context())
		var callers sync.WaitGroup
		for n := range callsPerPod {
			callers.Go(func() {
				for i := 0; hostile.Err() == nil; i++ {
					_, err := tokens.get(hostile, web1, []string{fmt.Sprint(n, ".", i)})
					if code := status.Code(err); err != nil && code != codes.ResourceExhausted && hostile.Err() == nil {
						t.Errorf("the pod's call: %v", err)
					}
					time.Sleep(time.Second)
				}
			})
		}
		time.Sleep(time.Minute)
		mu.Lock()
		if most > signsPerPod || signed > signsAtOnce+60*signsPerSecond+1 {
			t.Errorf("%d at a time are signed for one pod, and %d in a minute", most, signed)
		}
		mu.Unlock()
		if _, err := tokens.get(t.Context(), db, []string{"x"}); err != nil {
			t.Errorf("another pod's call: %v", err)
		}
		stop()
		callers.Wait()
		time.Sleep(time.Minute)
		if _, err := tokens.get(t.Context(), web2, []string{"y"}); err != nil {
			t.Errorf("a third pod's call: %v", err)
		}
		if len(tokens.signs) != 1 {
			t.Errorf("%d pods are remembered, of which one asked lately", len(tokens.signs))
		}
	})
}

// slowSigner takes half a second.
type slowSigner struct {
	JWTSigner
	begins, ends func()
}

func (s slowSigner) SignJWT(ctx context.Context, pod identity.Pod, audiences []string) (string, error) {
	if pod == web1 {
		s.begins()
		defer s.ends()
	}
	time.Sleep(time.Second / 2)
	return s.JWTSigner.SignJWT(ctx, pod, audiences)
}

type signFunc func() (string, error)

func (f signFunc) SignJWT(context.Context, identity.Pod, []string) (string, error) { return f() }

func TestTokensOfAnotherIdentityAreRefused(t *testing.T) {
	o := &operator{jwts: must[*identity.JWTAuthority](t)(identity.NewJWTAuthority(time.Now()))}
	for name, sign := range map[string]func() (string, error){
		"other identity": func() (string, error) { return o.SignJWT(t.Context(), db, []string{"x"}) },
		"other audience": func() (string, error) { return o.SignJWT(t.Context(), web1, []string{"y"}) },
		"no token":       func() (string, error) { return "token", nil },
		"huge":           func() (string, error) { return strings.Repeat("a", identity.MaxJWTSize+1), nil },
	} {
		tokens := newTokens(signFunc(sign))
		if got, err := tokens.get(t.Context(), web1, []string{"x"}); err == nil {
			t.Errorf("%s: %q", name, got)
		}
	}
}
