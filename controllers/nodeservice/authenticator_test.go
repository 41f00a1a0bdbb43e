package nodeservice

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// reviewer answers as the API server does.
type reviewer struct {
	calls  atomic.Int32
	answer func(*authenticationv1.TokenReview) error
	hold   chan struct{}
}

func (r *reviewer) Create(ctx context.Context, t *authenticationv1.TokenReview, _ metav1.CreateOptions) (*authenticationv1.TokenReview, error) {
	r.calls.Add(1)
	if r.hold != nil {
		<-r.hold
	}
	out := t.DeepCopy()
	out.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: t.Spec.Audiences, User: authenticationv1.UserInfo{
		Username: DefaultUsername, Extra: map[string]authenticationv1.ExtraValue{nodeNameExtra: {"node-1"}},
	}}
	if r.answer != nil {
		if err := r.answer(out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func withToken(ctx context.Context, values ...string) context.Context {
	return metadata.NewIncomingContext(ctx, metadata.MD{"authorization": values})
}

func TestAuthenticateRefuses(t *testing.T) {
	const secret = "s3cr3t"
	for name, c := range map[string]struct {
		values []string
		answer func(*authenticationv1.TokenReview) error
		code   codes.Code
		asked  int32
	}{
		"none":           {code: codes.Unauthenticated},
		"two":            {values: []string{"Bearer a", "Bearer b"}, code: codes.Unauthenticated},
		"basic":          {values: []string{"Basic " + secret}, code: codes.Unauthenticated},
		"empty":          {values: []string{"Bearer "}, code: codes.Unauthenticated},
		"huge":           {values: []string{"Bearer " + strings.Repeat("a", maxToken+1)}, code: codes.Unauthenticated},
		"invalid":        {answer: func(r *authenticationv1.TokenReview) error { r.Status.Authenticated = false; return nil }, code: codes.Unauthenticated, asked: 1},
		"no audience":    {answer: func(r *authenticationv1.TokenReview) error { r.Status.Audiences = nil; return nil }, code: codes.Unauthenticated, asked: 1},
		"other audience": {answer: func(r *authenticationv1.TokenReview) error { r.Status.Audiences = []string{"api"}; return nil }, code: codes.Unauthenticated, asked: 1},
		"other account":  {answer: func(r *authenticationv1.TokenReview) error { r.Status.User.Username += "x"; return nil }, code: codes.Unauthenticated, asked: 1},
		"no node":        {answer: func(r *authenticationv1.TokenReview) error { r.Status.User.Extra = nil; return nil }, code: codes.Unauthenticated, asked: 1},
		"empty node":     {answer: func(r *authenticationv1.TokenReview) error { r.Status.User.Extra[nodeNameExtra][0] = ""; return nil }, code: codes.Unauthenticated, asked: 1},
		"two nodes": {answer: func(r *authenticationv1.TokenReview) error {
			r.Status.User.Extra[nodeNameExtra] = []string{"a", "b"}
			return nil
		}, code: codes.Unauthenticated, asked: 1},
		"API server away": {answer: func(*authenticationv1.TokenReview) error { return errors.New("connection refused") }, code: codes.Unavailable, asked: 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := &reviewer{answer: c.answer}
			a := NewAuthenticator(AuthenticatorOptions{Reviews: r})
			if c.asked > 0 {
				c.values = []string{"Bearer " + secret}
			}
			for range 2 { // a refusal is never remembered as anything else
				caller, err := a.Authenticate(withToken(t.Context(), c.values...))
				if status.Code(err) != c.code || caller != (Caller{}) {
					t.Errorf("%+v, %v, want %v", caller, err, c.code)
				}
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the error has the token: %v", err)
				}
			}
			if r.calls.Load() != 2*c.asked || len(a.cache) != 0 {
				t.Errorf("asked %d times, %d cached", r.calls.Load(), len(a.cache))
			}
		})
	}
}

func TestAuthenticateCaches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &reviewer{hold: make(chan struct{})}
		a := NewAuthenticator(AuthenticatorOptions{Reviews: r, CacheTime: time.Hour})
		authenticate := func(ctx context.Context, token string) error {
			c, err := a.Authenticate(withToken(ctx, "Bearer "+token))
			if err == nil && c.Node != "node-1" {
				err = fmt.Errorf("node %q", c.Node)
			}
			return err
		}
		// All at once is one review, which doesn't end with who came first.
		first, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() {
			if err := authenticate(first, "a"); status.Code(err) != codes.Canceled {
				t.Errorf("cancelled: %v", err)
			}
		})
		synctest.Wait()
		for range 10 {
			all.Go(func() {
				if err := authenticate(t.Context(), "a"); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(r.hold)
		all.Wait()
		if n := r.calls.Load(); n != 1 {
			t.Errorf("%d reviews of one token", n)
		}
		time.Sleep(MaxCacheTime - time.Millisecond)
		if err := authenticate(t.Context(), "a"); err != nil || r.calls.Load() != 1 {
			t.Errorf("within a minute: %v, %d reviews", err, r.calls.Load())
		}
		time.Sleep(time.Millisecond)
		r.answer = func(r *authenticationv1.TokenReview) error { r.Status.Authenticated = false; return nil }
		if err := authenticate(t.Context(), "a"); status.Code(err) != codes.Unauthenticated {
			t.Errorf("a revoked token after a minute: %v", err)
		}
		r.answer = nil
		for i := range cacheLimit + 10 {
			if err := authenticate(t.Context(), fmt.Sprint(i)); err != nil {
				t.Fatal(err)
			}
		}
		if len(a.cache) != cacheLimit {
			t.Errorf("%d tokens cached", len(a.cache))
		}
	})
}
