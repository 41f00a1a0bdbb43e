package debug

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Subresource of TenantProxy that RBAC speaks of.
const Subresource = "debug"

const metricsPath = "/metrics"

// maxToken is about ten times what a token has.
const maxToken = 16 << 10

// Reviews asks the API server; any client.Client can.
type Reviews interface {
	Create(ctx context.Context, o client.Object, opts ...client.CreateOption) error
}

// refusal is an error with the status that goes with it.
type refusal struct {
	code int
	err  error
}

func (r refusal) Error() string { return r.err.Error() }

// authenticate returns who asks with a token for the audience. Errors never contain the token.
func (s *Server) authenticate(ctx context.Context, r *http.Request, audience string) (authenticationv1.UserInfo, error) {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || token == "" || len(token) > maxToken {
		return authenticationv1.UserInfo{}, refusal{http.StatusUnauthorized,
			fmt.Errorf("show a token: kubectl create token NAME --audience %s", audience)}
	}
	if !s.pace.mayAsk(r.RemoteAddr, time.Now()) {
		return authenticationv1.UserInfo{}, refusal{http.StatusTooManyRequests, errors.New("too many tokens are shown here: try again")}
	}
	review := authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
	if err := s.o.Reviews.Create(ctx, &review); err != nil {
		return authenticationv1.UserInfo{}, refusal{http.StatusServiceUnavailable, errors.New("the API server doesn't say whose the token is")}
	}
	// An authenticator that doesn't know of audiences names none.
	if !review.Status.Authenticated || !slices.Contains(review.Status.Audiences, audience) {
		return authenticationv1.UserInfo{}, refusal{http.StatusUnauthorized,
			fmt.Errorf("the token isn't valid here: it must be for the audience %s", audience)}
	}
	return review.Status.User, nil
}

// authorize asks whether a user may. A proxy of all tenants is in no namespace, so
// the right has to be for all of them.
func (s *Server) authorize(ctx context.Context, user authenticationv1.UserInfo, q Request) error {
	verb := "get"
	if q.Set {
		verb = "update"
	}
	allowed, err := s.review(ctx, user, authorizationv1.SubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
		Group: v1alpha1.GroupVersion.Group, Version: v1alpha1.GroupVersion.Version, Resource: "tenantproxies", Subresource: Subresource,
		Namespace: q.Tenant.Namespace, Name: q.Tenant.String(), Verb: verb,
	}})
	if err == nil && !allowed {
		where := "all namespaces"
		if q.Tenant.Namespace != "" {
			where = "namespace " + q.Tenant.Namespace
		}
		err = refusal{http.StatusForbidden, fmt.Errorf("%s may not %s tenantproxies/%s in %s", user.Username, verb, Subresource, where)}
	}
	return err
}

// authorizePath asks whether a user may get what is no resource.
func (s *Server) authorizePath(ctx context.Context, user authenticationv1.UserInfo, path string) error {
	allowed, err := s.review(ctx, user, authorizationv1.SubjectAccessReviewSpec{
		NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: path, Verb: "get"}})
	if err == nil && !allowed {
		err = refusal{http.StatusForbidden, fmt.Errorf("%s may not get %s: bind it to the ClusterRole bulkhead-metrics", user.Username, path)}
	}
	return err
}

// review asks the API server whether a user may what the spec says.
func (s *Server) review(ctx context.Context, user authenticationv1.UserInfo, spec authorizationv1.SubjectAccessReviewSpec) (allowed bool, err error) {
	spec.User, spec.UID, spec.Groups = user.Username, user.UID, user.Groups
	spec.Extra = map[string]authorizationv1.ExtraValue{}
	for k, v := range user.Extra {
		spec.Extra[k] = authorizationv1.ExtraValue(v)
	}
	review := authorizationv1.SubjectAccessReview{Spec: spec}
	if err := s.o.Reviews.Create(ctx, &review); err != nil {
		return false, refusal{http.StatusServiceUnavailable, errors.New("the API server doesn't say whether this is allowed")}
	}
	return review.Status.Allowed && !review.Status.Denied, nil
}
