package nodeservice

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

// JWTAuthorities tells the authority of JWT-SVIDs.
type JWTAuthorities interface {
	// JWTAuthority returns the current one, nil before it is loaded, and how long
	// JWT-SVIDs are to live (0: identity.DefaultJWTTTL).
	JWTAuthority() (*identity.JWTAuthority, time.Duration)
}

// signsJWTPerNode is how many calls of SignJWT one node may have in flight.
const signsJWTPerNode = 32

// newJWTCounter counts the answers to requests for JWT-SVIDs. The log has who was
// refused and why.
func newJWTCounter() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "bulkhead_jwt_svid_requests_total",
		Help: "Requests of agents for JWT-SVIDs, by the gRPC code of the answer.",
	}, []string{"code"})
}

// SignJWT implements nodev1alpha1.NodeServiceServer.
func (s *Service) SignJWT(ctx context.Context, r *nodev1alpha1.SignJWTRequest) (*nodev1alpha1.SignJWTResponse, error) {
	token, err := s.signJWT(ctx, r)
	s.jwts.WithLabelValues(status.Code(err).String()).Inc()
	if err != nil {
		return nil, err
	}
	return &nodev1alpha1.SignJWTResponse{Token: token}, nil
}

func (s *Service) signJWT(ctx context.Context, r *nodev1alpha1.SignJWTRequest) (string, error) {
	caller, done, err := s.enter(ctx, "SignJWT", signsJWTPerNode)
	if err != nil {
		return "", err
	}
	defer done()
	ref := podRef{UID: r.GetPodUid(), Namespace: r.GetPodNamespace(), Name: r.GetPodName()}
	// Before the API server is asked: this much the agent could have checked itself.
	if err := identity.CheckAudiences(r.GetAudiences()); err != nil {
		return "", s.refused(caller, "SignJWT", ref, status.Errorf(codes.InvalidArgument, "pod %s: %v", ref, err))
	}
	if s.o.JWTs == nil {
		return "", status.Error(codes.Unimplemented, "no JWT-SVIDs are signed here")
	}
	authority, ttl := s.o.JWTs.JWTAuthority()
	if authority == nil {
		return "", status.Error(codes.Unavailable, "the keys of JWT-SVIDs aren't loaded yet")
	}
	p, err := s.member(ctx, s.o.JWTPods, caller, ref)
	if err != nil {
		return "", s.refused(caller, "SignJWT", ref, err)
	}
	if ttl <= 0 {
		ttl = identity.DefaultJWTTTL
	}
	token, expires, err := authority.Sign(p.identity, r.GetAudiences(), ttl, s.now())
	switch {
	case errors.Is(err, identity.ErrAudience):
		return "", s.refused(caller, "SignJWT", ref, status.Errorf(codes.InvalidArgument, "pod %s: %v", ref, err))
	case err != nil:
		return "", status.Errorf(codes.Unavailable, "pod %s: %v", ref, err)
	}
	s.o.Log.Debug("JWT-SVID signed", "node", caller.Node, "pod", ref.String(), "identity", p.identity.String(), "audiences", r.GetAudiences(), "expires", expires)
	return token, nil
}
