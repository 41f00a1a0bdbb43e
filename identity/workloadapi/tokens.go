package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	signTimeout = 10 * time.Second
	// tokensPerIdentity are remembered, in memory alone: 16 of at most 8 KiB.
	tokensPerIdentity = 16
)

// tokens has JWT-SVIDs signed, and gives one again until half of its life is over:
// an application that fetches one for each of its requests costs the operator
// nothing. It is safe for concurrent use.
type tokens struct {
	signer JWTSigner
	flight *singleflight.Group

	mu  *sync.Mutex
	all map[model.Identity]map[string]token // by audiences
}

type token struct {
	svid             string
	renewAt, expires time.Time
}

func newTokens(signer JWTSigner) tokens {
	return tokens{signer: signer, flight: &singleflight.Group{}, mu: &sync.Mutex{}, all: map[model.Identity]map[string]token{}}
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
		return "", status.Errorf(codes.Unavailable, "no JWT-SVID can be signed now: %v", r.Err)
	case <-ctx.Done():
		return "", status.FromContextError(ctx.Err()).Err()
	}
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
