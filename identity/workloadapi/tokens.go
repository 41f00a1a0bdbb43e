package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	signTimeout = 10 * time.Second
	// tokensPerIdentity are remembered, in memory alone: 16 of at most 8 KiB.
	tokensPerIdentity = 16
	// What is signed for one pod at a time, a second, and beyond that at once. The
	// operator reads the pod for each, and has so many calls of a node at a time.
	signsPerPod    = 4
	signsPerSecond = 2
	signsAtOnce    = 64
)

var errTooManyTokens = status.Error(codes.ResourceExhausted, "the pod has too many JWT-SVIDs signed, or had just now: ask for the same audiences again, or later")

// tokens has JWT-SVIDs signed, and gives one again until half of its life is over:
// an application that fetches one for each of its requests costs the operator
// nothing. It is safe for concurrent use.
type tokens struct {
	signer JWTSigner
	flight *singleflight.Group

	mu  *sync.Mutex
	all map[model.Identity]map[string]token // by audiences
	// signs are what pods had signed, by UID.
	signs map[string]*signs
}

// signs of a pod.
type signs struct {
	busy int
	rate *rate.Limiter
}

type token struct {
	svid             string
	renewAt, expires time.Time
}

func newTokens(signer JWTSigner) tokens {
	return tokens{signer: signer, flight: &singleflight.Group{}, mu: &sync.Mutex{}, all: map[model.Identity]map[string]token{}, signs: map[string]*signs{}}
}

// get returns a token of the pod's identity. The audiences are checked. Errors are
// statuses.
func (t *tokens) get(ctx context.Context, pod identity.Pod, audiences []string) (string, error) {
	key := strings.Join(audiences, "\x00") // which isn't printable
	have, now := t.cached(pod.Identity, key), time.Now()
	if now.Before(have.renewAt) {
		return have.svid, nil
	}
	// By pod, since one may be refused what another gets.
	result := t.flight.DoChan(pod.UID+"\x00"+key, func() (any, error) {
		if !t.enter(pod.UID) {
			return "", errTooManyTokens
		}
		defer t.leave(pod.UID)
		// It isn't the first caller's alone.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), signTimeout)
		defer cancel()
		signed, err := t.sign(ctx, pod, audiences)
		if err == nil {
			t.remember(pod.Identity, key, signed)
		}
		return signed.svid, err
	})
	select {
	case r := <-result:
		if r.Err == nil {
			return r.Val.(string), nil
		}
		var st interface{ GRPCStatus() *status.Status }
		if errors.As(r.Err, &st) && st.GRPCStatus().Code() == codes.PermissionDenied {
			return "", status.Errorf(codes.PermissionDenied, "the operator signs no JWT-SVID for the pod: %s", st.GRPCStatus().Message())
		}
		// The operator being away is survived as long as there is a token.
		if now.Before(have.expires) {
			return have.svid, nil
		}
		if errors.Is(r.Err, errTooManyTokens) {
			return "", r.Err
		}
		return "", status.Errorf(codes.Unavailable, "no JWT-SVID can be signed now: %v", r.Err)
	case <-ctx.Done():
		return "", status.FromContextError(ctx.Err()).Err()
	}
}

// enter counts a signature of a pod's, unless it has too many. If ok, leave must be
// called.
func (t *tokens) enter(pod string) (ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.signs[pod]
	if s == nil {
		// Of one that left nothing is kept once it could begin anew anyway.
		maps.DeleteFunc(t.signs, func(_ string, s *signs) bool { return s.busy == 0 && s.rate.Tokens() >= signsAtOnce })
		s = &signs{rate: rate.NewLimiter(signsPerSecond, signsAtOnce)}
		t.signs[pod] = s
	}
	if s.busy >= signsPerPod || !s.rate.Allow() {
		return false
	}
	s.busy++
	return true
}

func (t *tokens) leave(pod string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.signs[pod].busy--
}

func (t *tokens) sign(ctx context.Context, pod identity.Pod, audiences []string) (token, error) {
	now := time.Now()
	signed, err := t.signer.SignJWT(ctx, pod, audiences)
	if err != nil {
		return token{}, err
	}
	if len(signed) > identity.MaxJWTSize {
		return token{}, fmt.Errorf("the operator's token has %d bytes, more than %d", len(signed), identity.MaxJWTSize)
	}
	svid, err := jwtsvid.ParseInsecure(signed, audiences)
	if err != nil {
		return token{}, fmt.Errorf("the operator's token: %w", err)
	}
	if svid.ID.String() != pod.Identity.String() {
		return token{}, fmt.Errorf("the operator's token is for %s", svid.ID)
	}
	return token{svid: signed, renewAt: now.Add(svid.Expiry.Sub(now) / 2), expires: svid.Expiry}, nil
}

func (t *tokens) cached(id model.Identity, key string) token {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.all[id][key]
}

func (t *tokens) remember(id model.Identity, key string, k token) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	for id, of := range t.all {
		for key, k := range of {
			if !now.Before(k.expires) {
				delete(of, key)
			}
		}
		if len(of) == 0 {
			delete(t.all, id)
		}
	}
	of := t.all[id]
	if of == nil {
		of = map[string]token{}
		t.all[id] = of
	}
	if _, known := of[key]; !known && len(of) >= tokensPerIdentity {
		first := ""
		for key, k := range of {
			if first == "" || k.expires.Before(of[first].expires) {
				first = key
			}
		}
		delete(of, first)
	}
	of[key] = k
}
