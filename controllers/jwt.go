package controllers

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/identity"
)

// SecretJWT is the name of the Secret with the keys of JWT-SVIDs, in the
// operator's namespace.
const SecretJWT = "bulkhead-jwt"

const (
	// jwtCheck is how often the Secret is read. A replica may be that much behind:
	// a key is published for much longer before it signs.
	jwtCheck = 30 * time.Second
	jwtRetry = time.Second
)

// jwtKeeper holds the authority of JWT-SVIDs, on every replica; the leader's
// rotates its keys. It is safe for concurrent use.
type jwtKeeper struct {
	live      client.Reader // the API server: cached is the authority's Secret alone
	writer    client.Writer
	namespace string
	ttl       time.Duration // of JWT-SVIDs; 0 is the default
	log       *slog.Logger
	now       func() time.Time
	leading   func() bool
	// event tells of a Secret that can't be used; it never blocks.
	event func(reason, note string)
	// changed is called when there are other keys.
	changed func()

	mu        sync.Mutex
	authority *identity.JWTAuthority
	problem   string // told last
}

// JWTAuthority implements nodeservice.JWTAuthorities.
func (k *jwtKeeper) JWTAuthority() (*identity.JWTAuthority, time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.authority, k.ttl
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (k *jwtKeeper) NeedLeaderElection() bool { return false }

// Start implements manager.Runnable: it keeps the authority up to date until ctx
// ends.
func (k *jwtKeeper) Start(ctx context.Context) error {
	for {
		wait, err := k.sync(ctx)
		if err != nil {
			wait = jwtCheck
			if a, _ := k.JWTAuthority(); a == nil {
				wait = jwtRetry
			}
		}
		if ctx.Err() == nil {
			k.tell(err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// tell says once what is wrong, and once that it isn't any more.
func (k *jwtKeeper) tell(err error) {
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	k.mu.Lock()
	same := problem == k.problem
	k.problem = problem
	k.mu.Unlock()
	switch {
	case same:
	case err == nil:
		k.log.Info("the keys of JWT-SVIDs are in order again")
	default:
		k.log.Error("the keys of JWT-SVIDs stay as they were", "error", err)
		if k.leading() {
			k.event("InvalidJWTKeys", problem)
		}
	}
}

// sync loads the authority from its Secret, makes the Secret if there is none, and
// on the leader rotates it. What can't be read is left as it is, here and there.
// The answer is when to look again.
func (k *jwtKeeper) sync(ctx context.Context) (time.Duration, error) {
	key := client.ObjectKey{Namespace: k.namespace, Name: SecretJWT}
	var secret corev1.Secret
	err := k.live.Get(ctx, key, &secret)
	if apierrors.IsNotFound(err) {
		return k.create(ctx)
	} else if err != nil {
		return 0, fmt.Errorf("read Secret %s: %w", key, err)
	}
	a, err := identity.ParseJWTAuthority(secret.Data)
	if err != nil {
		return 0, fmt.Errorf("read Secret %s (restore it from a backup, or delete it: new keys are made, and JWT-SVIDs that were signed become invalid): %w", key, err)
	}
	if k.leading() {
		next, err := a.Rotate(k.now())
		if err != nil {
			return 0, err
		}
		if next != a {
			changed := secret.DeepCopy()
			changed.Data = next.Data()
			err := k.writer.Update(ctx, changed) // of this very version
			if apierrors.IsConflict(err) {
				return jwtRetry, nil
			} else if err != nil {
				return 0, fmt.Errorf("update Secret %s: %w", key, err)
			}
			k.log.Info("keys of JWT-SVIDs rotated")
			a = next
		}
	}
	k.set(a)
	return jwtCheck, nil
}

func (k *jwtKeeper) create(ctx context.Context) (time.Duration, error) {
	a, err := identity.NewJWTAuthority(k.now())
	if err != nil {
		return 0, err
	}
	err = k.writer.Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: k.namespace, Name: SecretJWT, Labels: map[string]string{"app.kubernetes.io/part-of": "bulkhead"}},
		Data:       a.Data(),
	})
	if apierrors.IsAlreadyExists(err) {
		return jwtRetry, nil // another replica was first: take its
	} else if err != nil {
		return 0, fmt.Errorf("create Secret %s/%s: %w", k.namespace, SecretJWT, err)
	}
	k.log.Info("keys of JWT-SVIDs created")
	k.set(a)
	return jwtCheck, nil
}

func (k *jwtKeeper) set(a *identity.JWTAuthority) {
	k.mu.Lock()
	same := k.authority != nil && sameData(k.authority.Data(), a.Data())
	if !same {
		k.authority = a
	}
	k.mu.Unlock()
	if !same {
		k.changed()
	}
}
