package nodeservice

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What an agent's token must say.
const (
	DefaultAudience = "bulkhead-operator"
	DefaultUsername = "system:serviceaccount:bulkhead-system:bulkhead-agent"
	// nodeNameExtra is set by the API server for tokens that are bound to a pod,
	// from the pod's own spec: the one thing of a request that names the node.
	nodeNameExtra = "authentication.kubernetes.io/node-name"
)

const (
	// MaxCacheTime is the longest that an answer of the API server is reused, and so
	// how long a token works that was revoked or has expired since.
	MaxCacheTime = time.Minute
	// cacheLimit is how many tokens are remembered: one a node, and those renewed.
	// Only tokens that were accepted are, so that nobody can fill it with others.
	cacheLimit = 8192
	// maxToken is about ten times what a projected token has.
	maxToken = 16 << 10
	// reviewsAtOnce bounds what callers without a valid token cost the API server. Those
	// from where an agent called before have as many of their own.
	reviewsAtOnce = 32
	reviewTimeout = 10 * time.Second
	// reviewsPerSource is how many of them may be of one address: an agent has one
	// token, and another when that is renewed.
	reviewsPerSource = 4
	// knownFor is how long an address is where an agent called.
	knownFor = time.Hour
)

// Caller is who called.
type Caller struct {
	// Node runs the agent that the token belongs to.
	Node string
}

// TokenReviewer asks the API server about a token; of client-go, it is
// kubernetes.Interface.AuthenticationV1().TokenReviews().
type TokenReviewer interface {
	Create(context.Context, *authenticationv1.TokenReview, metav1.CreateOptions) (*authenticationv1.TokenReview, error)
}

// AuthenticatorOptions configure an Authenticator.
type AuthenticatorOptions struct {
	// Reviews is required.
	Reviews TokenReviewer
	// Audience the token must have. Default DefaultAudience.
	Audience string
	// Username of the agents' service account. Default DefaultUsername.
	Username string
	// CacheTime is how long an accepted token isn't asked for again; at most, and
	// by default, MaxCacheTime.
	CacheTime time.Duration
}

// Authenticator tells nodes by their agents' tokens. It is safe for concurrent
// use and has nothing to close.
type Authenticator struct {
	o      AuthenticatorOptions
	now    func() time.Time
	flight singleflight.Group
	// reviews of strangers, and of who is known.
	reviews, known chan struct{}

	mu    sync.Mutex
	cache map[[sha256.Size]byte]accepted
	// sources are where agents called, until when; reviewing is how many reviews of each
	// address wait or are under way.
	sources   map[netip.Addr]time.Time
	reviewing map[netip.Addr]int
}

type accepted struct {
	caller Caller
	until  time.Time
}

// NewAuthenticator panics without Reviews.
func NewAuthenticator(o AuthenticatorOptions) *Authenticator {
	if o.Reviews == nil {
		panic("nodeservice: AuthenticatorOptions.Reviews is required")
	}
	if o.Audience == "" {
		o.Audience = DefaultAudience
	}
	if o.Username == "" {
		o.Username = DefaultUsername
	}
	if o.CacheTime <= 0 || o.CacheTime > MaxCacheTime {
		o.CacheTime = MaxCacheTime
	}
	return &Authenticator{
		o: o, now: time.Now, reviews: make(chan struct{}, reviewsAtOnce), known: make(chan struct{}, reviewsAtOnce),
		cache: map[[sha256.Size]byte]accepted{}, sources: map[netip.Addr]time.Time{}, reviewing: map[netip.Addr]int{},
	}
}

// Authenticate returns who calls, by the metadata of an incoming call. Errors are
// Unauthenticated for a token that isn't an agent's, Unavailable if the API server
// doesn't say, or the context's. They never contain the token.
func (a *Authenticator) Authenticate(ctx context.Context) (Caller, error) {
	token, err := bearer(ctx)
	if err != nil {
		return Caller{}, status.Error(codes.Unauthenticated, err.Error())
	}
	// Tokens themselves are kept nowhere.
	hash := sha256.Sum256([]byte(token))
	if c, ok := a.cached(hash); ok {
		return c, nil
	}
	source := sourceOf(ctx)
	// An agent opens all its streams at once. The review isn't the first caller's
	// alone, so it doesn't end with that one's context.
	result := a.flight.DoChan(string(hash[:]), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reviewTimeout)
		defer cancel()
		slots, ok := a.enter(source)
		if !ok {
			return Caller{}, status.Errorf(codes.Unavailable, "review token: %d tokens from %s are being reviewed: try again", reviewsPerSource, source)
		}
		defer a.leave(source)
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		case <-ctx.Done():
			return Caller{}, status.Error(codes.Unavailable, "review token: too many reviews at once")
		}
		started := a.now()
		c, err := a.review(ctx, token)
		if err == nil {
			a.remember(hash, c, started.Add(a.o.CacheTime))
			a.knows(source)
		}
		return c, err
	})
	select {
	case r := <-result:
		return r.Val.(Caller), r.Err
	case <-ctx.Done():
		return Caller{}, status.FromContextError(ctx.Err()).Err()
	}
}

// sourceOf is the address that a call came from; zero if nobody says.
func sourceOf(ctx context.Context) netip.Addr {
	if p, ok := peer.FromContext(ctx); ok {
		return addrOf(p.Addr)
	}
	return netip.Addr{}
}

// addrOf is the address of a TCP peer; else the zero one.
func addrOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// enter counts a review and returns whose slots it waits for: every pod can make up
// tokens, and has to wait for others that do alone. If ok, leave must be called.
func (a *Authenticator) enter(source netip.Addr) (slots chan struct{}, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if source.IsValid() && a.reviewing[source] >= reviewsPerSource {
		return nil, false
	}
	a.reviewing[source]++
	if until, known := a.sources[source]; known && a.now().Before(until) {
		return a.known, true
	}
	return a.reviews, true
}

func (a *Authenticator) leave(source netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.reviewing[source]--; a.reviewing[source] == 0 {
		delete(a.reviewing, source)
	}
}

// knows remembers where an agent called.
func (a *Authenticator) knows(source netip.Addr) {
	if !source.IsValid() {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	if _, known := a.sources[source]; !known && len(a.sources) >= cacheLimit {
		maps.DeleteFunc(a.sources, func(_ netip.Addr, until time.Time) bool { return !now.Before(until) })
		for s := range a.sources {
			if len(a.sources) < cacheLimit {
				break
			}
			delete(a.sources, s) // any: it waits among strangers once
		}
	}
	a.sources[source] = now.Add(knownFor)
}

func bearer(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	if len(values) != 1 {
		return "", fmt.Errorf("the call has %d authorization values, must have one", len(values))
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "bearer") || token == "" {
		return "", errors.New("the call's authorization must be a bearer token")
	}
	if len(token) > maxToken {
		return "", fmt.Errorf("the call's token has %d bytes, more than %d", len(token), maxToken)
	}
	return token, nil
}

func (a *Authenticator) cached(hash [sha256.Size]byte) (Caller, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, ok := a.cache[hash]
	if ok && !a.now().Before(c.until) {
		delete(a.cache, hash)
		ok = false
	}
	return c.caller, ok
}

func (a *Authenticator) remember(hash [sha256.Size]byte, c Caller, until time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.cache) >= cacheLimit {
		now := a.now()
		for h, c := range a.cache {
			if !now.Before(c.until) {
				delete(a.cache, h)
			}
		}
	}
	for h := range a.cache {
		if len(a.cache) < cacheLimit {
			break
		}
		delete(a.cache, h) // any: it costs its node one review
	}
	a.cache[hash] = accepted{c, until}
}

func (a *Authenticator) review(ctx context.Context, token string) (Caller, error) {
	r, err := a.o.Reviews.Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{a.o.Audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return Caller{}, status.Errorf(codes.Unavailable, "review token: %v", err)
	}
	s := r.Status
	deny := func(format string, args ...any) (Caller, error) {
		return Caller{}, status.Errorf(codes.Unauthenticated, "the call's token "+format, args...)
	}
	if !s.Authenticated {
		return deny("isn't valid for audience %q", a.o.Audience)
	}
	// A server that doesn't know audiences says none.
	if !slices.Contains(s.Audiences, a.o.Audience) {
		return deny("isn't for audience %q", a.o.Audience)
	}
	if s.User.Username != a.o.Username {
		return deny("is %q's, must be %q's", s.User.Username, a.o.Username)
	}
	node := s.User.Extra[nodeNameExtra]
	if len(node) != 1 || node[0] == "" {
		return deny("doesn't name a node (%s): it must be projected into a pod, by Kubernetes 1.30 or later", nodeNameExtra)
	}
	return Caller{Node: node[0]}, nil
}
