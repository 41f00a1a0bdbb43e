package workloadapi

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/bulkhead-mesh/bulkhead/identity"
)

const (
	maxBundle = 256 << 10
	// maxToken is what is looked at of a token: others' may be longer than ours.
	maxToken = 16 << 10
)

// ErrNoKeys is SetBundle's of a bundle that says nothing of JWT-SVIDs.
var ErrNoKeys = errors.New("it has no key of JWT-SVIDs")

// SetBundle sets the keys that verify JWT-SVIDs, from a bundle in the SPIFFE
// format. The roots in it are of no concern here: Identities has them. On an
// error, which may be ErrNoKeys, the old keys stay.
func (s *Server) SetBundle(trustDomain string, document []byte) error {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return fmt.Errorf("set bundle: %w", err)
	}
	if len(document) > maxBundle {
		return fmt.Errorf("set bundle of %s: %d bytes, more than %d", td, len(document), maxBundle)
	}
	parsed, err := spiffebundle.Parse(td, document)
	if err != nil {
		return fmt.Errorf("set bundle of %s: %w", td, err)
	}
	bundle := parsed.JWTBundle()
	if bundle.Empty() {
		return fmt.Errorf("set bundle of %s: %w", td, ErrNoKeys)
	}
	set := jose.JSONWebKeySet{}
	for id, key := range bundle.JWTAuthorities() {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key, KeyID: id, Use: "jwt-svid"})
	}
	slices.SortFunc(set.Keys, func(a, b jose.JSONWebKey) int { return cmp.Compare(a.KeyID, b.KeyID) })
	encoded, err := json.Marshal(set)
	if err != nil {
		return fmt.Errorf("set bundle of %s: %w", td, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.jwts != nil && s.jwts.TrustDomain() == td && bytes.Equal(s.jwksJSON, encoded) {
		return nil
	}
	s.jwts, s.jwksJSON = bundle, encoded
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

func (s *Server) bundleChanged() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// FetchJWTBundles implements workload.SpiffeWorkloadAPIServer.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return follow(s, stream, func(identity.Pod) (*workload.JWTBundlesResponse, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.jwts == nil {
			return nil, nil
		}
		return &workload.JWTBundlesResponse{Bundles: map[string][]byte{s.jwts.TrustDomain().IDString(): s.jwksJSON}}, nil
	})
}

// FetchJWTSVID implements workload.SpiffeWorkloadAPIServer.
func (s *Server) FetchJWTSVID(ctx context.Context, r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	pod, err := s.authorize(ctx)
	if err != nil {
		return nil, err
	}
	if err := identity.CheckAudiences(r.GetAudience()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if id := r.GetSpiffeId(); id != "" && id != pod.Identity.String() {
		return nil, status.Errorf(codes.PermissionDenied, "the caller's identity is %s, not %.300q", pod.Identity, id)
	}
	token, err := s.tokens.get(ctx, pod, r.GetAudience())
	if err != nil {
		return nil, err
	}
	// Signing took a while.
	if now, err := s.authorize(ctx); err != nil {
		return nil, err
	} else if now != pod {
		return nil, status.Error(codes.Unavailable, "the pod has changed meanwhile")
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: pod.Identity.String(), Svid: token}}}, nil
}

// ValidateJWTSVID implements workload.SpiffeWorkloadAPIServer.
func (s *Server) ValidateJWTSVID(ctx context.Context, r *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if _, err := s.authorize(ctx); err != nil {
		return nil, err
	}
	switch {
	case r.GetAudience() == "":
		return nil, status.Error(codes.InvalidArgument, "audience must be given")
	case r.GetSvid() == "" || len(r.GetSvid()) > maxToken:
		return nil, status.Errorf(codes.InvalidArgument, "svid has %d bytes, must have 1 to %d", len(r.GetSvid()), maxToken)
	}
	s.mu.Lock()
	bundle := s.jwts
	s.mu.Unlock()
	if bundle == nil {
		return nil, status.Error(codes.Unavailable, "the keys of JWT-SVIDs aren't known yet")
	}
	svid, err := jwtsvid.ParseAndValidate(r.GetSvid(), bundle, []string{r.GetAudience()})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	claims, err := structpb.NewStruct(svid.Claims)
	if err != nil {
		return nil, status.Error(codes.Internal, errors.Join(errors.New("the token's claims can't be told"), err).Error())
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: claims}, nil
}
