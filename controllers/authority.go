package controllers

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

// SecretAuthority is the name of the Secret with the mesh's keys, in the
// operator's namespace. Replicas create it, one of them succeeds; after that only
// its intermediate is renewed.
const SecretAuthority = "bulkhead-ca"

// annotationProvisional marks an authority that was made before the first
// MeshTopology: agents need roots to talk to the operator, and the trust domain
// is the topology's to say. Nothing but the operator's own certificate was signed
// by it, so the first topology may have it replaced.
const annotationProvisional = "mesh.bulkhead.dev/provisional"

const (
	serverTTL = 24 * time.Hour
	// authorityCheck is how often the authority's age is looked at.
	authorityCheck = time.Hour
)

var errNoAuthority = errors.New("the mesh's authority isn't loaded yet: see Secret bulkhead-ca")

// keeper holds the authority and the operator's own certificate. It is safe for
// concurrent use.
type keeper struct {
	cache     client.Reader
	live      client.Reader // the API server
	writer    client.Writer
	namespace string
	dnsNames  []string
	ttl       time.Duration // of workloads' certificates; 0 is the default
	mesh      *mesh
	log       *slog.Logger
	now       func() time.Time
	leading   func() bool

	mu        sync.Mutex
	authority *identity.Authority
	// trustDomain of the mesh; "" while the authority is provisional.
	trustDomain string
	changed     chan struct{} // closed and replaced with the authority
	server      *tls.Certificate
	serverEnd   time.Time // when it is replaced
}

// sync loads the authority from its Secret, and makes the Secret if there is none.
// The answer is when to look again.
func (k *keeper) sync(ctx context.Context) (time.Duration, error) {
	key := client.ObjectKey{Namespace: k.namespace, Name: SecretAuthority}
	var list v1alpha1.MeshTopologyList
	if err := k.cache.List(ctx, &list); err != nil {
		return 0, fmt.Errorf("list MeshTopologies: %w", err)
	}
	wanted := translate.NewTopologies(list.Items, "", nil).TrustDomain()
	var secret corev1.Secret
	err := k.cache.Get(ctx, key, &secret)
	if apierrors.IsNotFound(err) {
		// The cache may be behind another replica's: what exists stays.
		err = k.live.Get(ctx, key, &secret)
	}
	if apierrors.IsNotFound(err) {
		return k.create(ctx, wanted)
	} else if err != nil {
		return 0, fmt.Errorf("read Secret %s: %w", key, err)
	}
	a, err := identity.ParseAuthority(secret.Data)
	if err != nil {
		return 0, fmt.Errorf("read Secret %s (restore it from a backup; without one, delete it, and every workload gets new roots): %w", key, err)
	}
	provisional := secret.Annotations[annotationProvisional] != ""
	if provisional && wanted != "" {
		return k.confirm(ctx, &secret, a, wanted)
	}
	k.set(a, provisional)
	if k.leading() && a.NeedsRenewal(k.now()) {
		if err := k.renew(ctx, &secret, a); err != nil {
			return 0, err
		}
	}
	return authorityCheck, nil
}

// create makes the authority, a provisional one without a trust domain.
func (k *keeper) create(ctx context.Context, trustDomain string) (time.Duration, error) {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: k.namespace, Name: SecretAuthority, Labels: map[string]string{"app.kubernetes.io/part-of": "bulkhead"}}}
	provisional := trustDomain == ""
	if provisional {
		trustDomain = translate.DefaultTrustDomain
		secret.Annotations = map[string]string{annotationProvisional: "true"}
	}
	a, err := identity.NewAuthority(trustDomain, k.now())
	if err != nil {
		return 0, fmt.Errorf("make an authority for %q: %w", trustDomain, err)
	}
	secret.Data = a.Data()
	err = k.writer.Create(ctx, secret)
	if apierrors.IsAlreadyExists(err) {
		return time.Second, nil // another replica was first: take its
	} else if err != nil {
		return 0, fmt.Errorf("create Secret %s/%s: %w", k.namespace, SecretAuthority, err)
	}
	k.log.Info("authority created", "trustDomain", trustDomain, "provisional", provisional)
	k.set(a, provisional)
	return authorityCheck, nil
}

// confirm makes a provisional authority the mesh's, for the trust domain of its
// first topology. Replicas race: the API server takes one of them.
func (k *keeper) confirm(ctx context.Context, secret *corev1.Secret, a *identity.Authority, trustDomain string) (time.Duration, error) {
	secret = secret.DeepCopy()
	delete(secret.Annotations, annotationProvisional)
	if a.TrustDomain() != trustDomain {
		next, err := identity.NewAuthority(trustDomain, k.now())
		if err != nil {
			return 0, fmt.Errorf("make an authority for %q: %w", trustDomain, err)
		}
		a, secret.Data = next, next.Data()
	}
	err := k.writer.Update(ctx, secret)
	if apierrors.IsConflict(err) {
		return time.Second, nil
	} else if err != nil {
		return 0, fmt.Errorf("update Secret %s/%s: %w", k.namespace, SecretAuthority, err)
	}
	k.log.Info("authority confirmed", "trustDomain", trustDomain)
	k.set(a, false)
	return authorityCheck, nil
}

// renew replaces the intermediate; a Secret that changed since it was read stays.
func (k *keeper) renew(ctx context.Context, secret *corev1.Secret, a *identity.Authority) error {
	next, err := a.Renew(k.now())
	if errors.Is(err, identity.ErrNoRootKey) {
		k.log.Error("the authority's intermediate ends soon and its root key isn't in the Secret: renew it by hand", "secret", SecretAuthority)
		return nil
	} else if err != nil {
		return fmt.Errorf("renew the authority: %w", err)
	}
	secret = secret.DeepCopy()
	secret.Data = next.Data()
	if err := k.writer.Update(ctx, secret); err != nil {
		return fmt.Errorf("update Secret %s/%s: %w", k.namespace, SecretAuthority, err)
	}
	k.log.Info("authority's intermediate renewed")
	return nil
}

func (k *keeper) set(a *identity.Authority, provisional bool) {
	trustDomain := a.TrustDomain()
	if provisional {
		trustDomain = "" // the first topology's to say
	}
	k.mu.Lock()
	same := k.authority != nil && sameData(k.authority.Data(), a.Data()) && k.trustDomain == trustDomain
	if !same {
		k.authority, k.trustDomain, k.server = a, trustDomain, nil
		if k.changed != nil {
			close(k.changed)
		}
		k.changed = make(chan struct{})
	}
	k.mu.Unlock()
	if !same {
		k.mesh.setAuthority(trustDomain)
	}
}

func sameData(a, b map[string][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for key := range a {
		if !bytes.Equal(a[key], b[key]) {
			return false
		}
	}
	return true
}

// Authority implements nodeservice.Authorities.
func (k *keeper) Authority() (*identity.Authority, time.Duration, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.changed == nil {
		k.changed = make(chan struct{})
	}
	return k.authority, k.ttl, k.changed
}

// certificate is a tls.Config's GetCertificate. It is replaced at half of its life.
func (k *keeper) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.now()
	if k.server != nil && now.Before(k.serverEnd) {
		return k.server, nil
	}
	if k.authority == nil {
		return nil, errNoAuthority
	}
	c, err := k.authority.ServerCertificate(k.dnsNames, serverTTL, now)
	if err != nil {
		return nil, fmt.Errorf("make the server's certificate: %w", err)
	}
	k.server, k.serverEnd = &c, now.Add(serverTTL/2)
	return k.server, nil
}

// bundle is the roots as PEM, "" before there are any.
func (k *keeper) bundle() (trustDomain, roots string) {
	a, _, _ := k.Authority()
	if a == nil {
		return "", ""
	}
	var out bytes.Buffer
	for _, der := range a.Roots() {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a Buffer never fails
	}
	return a.TrustDomain(), out.String()
}
