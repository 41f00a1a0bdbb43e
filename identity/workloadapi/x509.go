package workloadapi

import (
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/identity"
)

// follow sends what build makes, now and whenever it is something else, for as
// long as the caller is a pod of the mesh. build returns nil if there is nothing
// to send yet.
func follow[T any, M interface {
	*T
	proto.Message
}](s *Server, stream grpc.ServerStreamingServer[T], build func(identity.Pod) (M, error)) error {
	ctx := stream.Context()
	pod, err := s.authorize(ctx)
	if err != nil {
		return err
	}
	var sent M
	for {
		// Before what they tell of is read.
		identities, bundle := s.o.Identities.Changed(pod.Tenant), s.bundleChanged()
		now, err := s.authorize(ctx)
		if err != nil {
			return err
		}
		if now != pod {
			pod = now
			continue
		}
		m, err := build(pod)
		if err != nil {
			return err
		}
		if m != nil && !proto.Equal(m, sent) {
			if err := stream.Send(m); err != nil {
				return err
			}
			sent = m
		}
		timer := time.NewTimer(recheck)
		select {
		case <-identities:
		case <-bundle:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return status.FromContextError(ctx.Err()).Err()
		}
		timer.Stop()
	}
}

// FetchX509SVID implements workload.SpiffeWorkloadAPIServer. There is one SVID; of
// other trust domains there is nothing to say.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(s, stream, func(pod identity.Pod) (*workload.X509SVIDResponse, error) {
		svid, ok, err := s.o.Identities.X509SVID(pod.UID)
		switch {
		case errors.Is(err, identity.ErrUnknownPod), errors.Is(err, identity.ErrDenied):
			return nil, status.Error(codes.PermissionDenied, err.Error())
		case err != nil:
			return nil, status.Error(codes.Internal, err.Error())
		}
		_, roots := s.o.Identities.Roots()
		if !ok || len(roots) == 0 {
			return nil, nil
		}
		return &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
			SpiffeId: svid.ID.String(), X509Svid: svid.Chain, X509SvidKey: svid.Key, Bundle: roots,
		}}}, nil
	})
}

// FetchX509Bundles implements workload.SpiffeWorkloadAPIServer.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(s, stream, func(identity.Pod) (*workload.X509BundlesResponse, error) {
		trustDomain, roots := s.o.Identities.Roots()
		if len(roots) == 0 {
			return nil, nil
		}
		return &workload.X509BundlesResponse{Bundles: map[string][]byte{"spiffe://" + trustDomain: roots}}, nil
	})
}
