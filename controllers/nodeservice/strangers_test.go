package nodeservice

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
)

func from(ctx context.Context, address string) context.Context {
	return peer.NewContext(ctx, &peer.Peer{Addr: &net.TCPAddr{IP: net.ParseIP(address), Port: 1234}})
}

// Somebody without a token of an agent shows as many others as there is time for. Agents
// are heard all the same: those that were before at once, and others in their turn.
func TestStrangersDontKeepAgentsOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &reviewer{answer: func(r *authenticationv1.TokenReview) error {
			time.Sleep(time.Second)
			r.Status.Authenticated = !strings.HasPrefix(r.Spec.Token, "made up")
			return nil
		}}
		a := NewAuthenticator(AuthenticatorOptions{Reviews: r})
		agent := func(address, token string) time.Duration {
			began := time.Now()
			if _, err := a.Authenticate(from(withToken(t.Context(), "Bearer "+token), address)); err != nil {
				t.Errorf("agent at %s after %v: %v", address, time.Since(began), err)
			}
			return time.Since(began)
		}
		agent("192.0.2.1", "first") // is known from here on

		hostile, stop := context.WithCancel(t.Context())
		var strangers sync.WaitGroup
		for n := range 1000 {
			strangers.Go(func() {
				address := fmt.Sprintf("10.1.0.%d", n%20)
				for i := 0; hostile.Err() == nil; i++ {
					_, err := a.Authenticate(from(withToken(hostile, fmt.Sprintf("Bearer made up %d %d", n, i)), address))
					if code := status.Code(err); code != codes.Unauthenticated && code != codes.Unavailable && hostile.Err() == nil {
						t.Errorf("a stranger: %v", err)
					}
					time.Sleep(time.Second)
				}
			})
		}
		time.Sleep(MaxCacheTime + time.Second) // the first one's token has to be reviewed again
		if took := agent("192.0.2.1", "first"); took > time.Second {
			t.Errorf("an agent that is known waited for %v", took)
		}
		if took := agent("192.0.2.2", "second"); took > 5*time.Second {
			t.Errorf("a new agent waited for %v", took)
		}
		stop()
		strangers.Wait()
		time.Sleep(2 * reviewTimeout) // reviews end by themselves
	})
}
