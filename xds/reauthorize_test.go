package xds

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A token that ends while a stream goes on ends the stream, an API server that is
// away doesn't.
func TestStreamsAuthorizeAgain(t *testing.T) {
	var calls atomic.Int32
	var answer atomic.Uint32 // a code
	m := newMesh(t, ServerOptions{Reauthorize: 20 * time.Millisecond, Authorize: func(ctx context.Context) (StreamIdentity, error) {
		calls.Add(1)
		if code := codes.Code(answer.Load()); code != codes.OK {
			return StreamIdentity{}, status.Error(code, "as the test wants")
		}
		return authorizeAll(ctx)
	}})
	c := m.dial(teamA)
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
	again := func() {
		t.Helper()
		for end, had := time.Now().Add(testTime), calls.Load(); calls.Load() < had+2; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("not authorised again")
			}
		}
	}
	again()
	answer.Store(uint32(codes.Unavailable))
	again()
	c.settled()
	answer.Store(uint32(codes.Unauthenticated))
	c.wantEnd(codes.Unavailable, "authorise again")
}
