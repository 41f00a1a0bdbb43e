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
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

// SecretAuthority is the name of the Secret with the mesh's keys, in the operator's
// namespace. Replicas create it, and one of them succeeds. The leader alone
// changes it, one step of identity's at a time, and what somebody else changed
// meanwhile stays: the API server takes an update only of what was read.
const SecretAuthority = "bulkhead-ca"

// annotationProvisional marks an authority that was made before the first
// MeshTopology: agents need roots to talk to the operator, and the trust domain
// is the topology's to say. Nothing but the operator's own certificate was signed
// by it, so the first topology may have it replaced.
const annotationProvisional = "mesh.bulkhead.dev/provisional"

// AnnotationRotate of the Secret asks for another root, once for each value.
const AnnotationRotate = "mesh.bulkhead.dev/rotate-root"

const (
	serverTTL = 24 * time.Hour
	// authorityCheck is how often the authority's age is looked at.
	authorityCheck = time.Hour
	// issuerCheck is how often somebody else's issuer is read again, and what isn't
	// right is looked at (decision 29).
	issuerCheck = 10 * time.Second
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
	mesh      *mesh
	log       *slog.Logger
	now       func() time.Time
	leading   func() bool
	// event tells people about a version of a Secret; it never blocks.
	event func(secret *corev1.ObjectReference, kind, reason, note string)

	mu        sync.Mutex
	authority *identity.Authority
	// stored is what authority was read from. A Secret that is deleted is made again
	// from it: nothing that runs depends on an object that somebody removed.
	stored *corev1.Secret
	// trustDomain of the mesh; "" while the authority is provisional.
	trustDomain string
	server      *tls.Certificate
	serverEnd   time.Time // when it is replaced
}

// problem is what is wrong with a Secret, for people.
type problem struct {
	secret  *corev1.ObjectReference
	reason  string
	message string
}

func (p problem) Error() string { return p.message }

// sync loads the authority from its Secret, makes the Secret if there is none, and
// moves it on. What is wrong is told, not returned: the authority as it was stays
// in use, and nothing is overwritten. The answer is when to look again.
func (k *keeper) sync(ctx context.Context) (time.Duration, error) {
	var list v1alpha1.MeshTopologyList
	if err := k.cache.List(ctx, &list); err != nil {
		return 0, fmt.Errorf("list MeshTopologies: %w", err)
	}
	secret := &corev1.Secret{}
	err := k.cache.Get(ctx, k.key(), secret)
	if apierrors.IsNotFound(err) {
		// The cache may be behind another replica's: what exists stays.
		err = k.live.Get(ctx, k.key(), secret)
	}
	var wait time.Duration
	if apierrors.IsNotFound(err) {
		wait, err = k.create(ctx, translate.NewTopologies(list.Items, "", nil))
	} else if err != nil {
		return 0, fmt.Errorf("read Secret %s: %w", k.key(), err)
	} else {
		wait, err = k.load(ctx, secret, list.Items)
	}
	var p problem
	if errors.As(err, &p) {
		k.tell(p)
		return issuerCheck, nil
	}
	return wait, err
}

func (k *keeper) key() types.NamespacedName {
	return types.NamespacedName{Namespace: k.namespace, Name: SecretAuthority}
}

// reference names a Secret as it was read. Events with the same reason about the same
// thing are one for the API server, with the words of the first: the version makes
// those of another content another.
func reference(s *corev1.Secret) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Secret", Namespace: s.Namespace, Name: s.Name, UID: s.UID, ResourceVersion: s.ResourceVersion}
}

// load takes what the Secret holds, and has the leader move it on.
func (k *keeper) load(ctx context.Context, secret *corev1.Secret, list []v1alpha1.MeshTopology) (time.Duration, error) {
	a, err := identity.ParseAuthority(secret.Data)
	if err != nil {
		return 0, problem{reference(secret), translate.ReasonInvalidAuthority,
			fmt.Sprintf("Secret %s can't be read, what was read before stays in use: %v; restore it from a backup, or delete it: the operator writes it anew from what it holds, and if it was restarted since, every workload gets new roots", k.key(), err)}
	}
	if secret.Annotations[annotationProvisional] != "" {
		if topologies := translate.NewTopologies(list, "", nil); topologies.TrustDomain() != "" {
			return k.confirm(ctx, secret, a, topologies)
		}
		k.set(a, secret, true)
		return authorityCheck, nil
	}
	k.set(a, secret, false)
	return k.step(ctx, secret, a, translate.NewTopologies(list, a.TrustDomain(), nil))
}

// create makes the authority, a provisional one without a trust domain, or makes
// its Secret again.
func (k *keeper) create(ctx context.Context, topologies translate.Topologies) (time.Duration, error) {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: k.namespace, Name: SecretAuthority, Labels: map[string]string{"app.kubernetes.io/part-of": "bulkhead"}}}
	k.mu.Lock()
	stored := k.stored
	k.mu.Unlock()
	var a *identity.Authority
	var err error
	switch trustDomain := topologies.TrustDomain(); {
	case stored != nil:
		a, err = identity.ParseAuthority(stored.Data)
		secret.Data, secret.Annotations = stored.Data, stored.Annotations
	case trustDomain == "":
		a, err = identity.NewAuthority(translate.DefaultTrustDomain, k.now())
		secret.Annotations = map[string]string{annotationProvisional: "true"}
	default:
		a, err = k.first(ctx, topologies)
	}
	if err != nil {
		return 0, err
	}
	if stored == nil {
		secret.Data = a.Data()
	}
	err = k.writer.Create(ctx, secret)
	if apierrors.IsAlreadyExists(err) {
		return time.Second, nil // another replica was first: take its
	} else if err != nil {
		return 0, fmt.Errorf("create Secret %s: %w", k.key(), err)
	}
	provisional := secret.Annotations[annotationProvisional] != ""
	k.log.Info("authority created", "trustDomain", a.TrustDomain(), "provisional", provisional, "restored", stored != nil)
	if stored != nil {
		k.event(reference(secret), corev1.EventTypeWarning, "Restored", "the Secret was deleted; the operator made it again from what it holds")
	}
	k.set(a, secret, provisional)
	return issuerCheck, nil
}

// first makes the authority that a mesh begins with.
func (k *keeper) first(ctx context.Context, topologies translate.Topologies) (*identity.Authority, error) {
	if name, _ := topologies.Issuer(); name != "" {
		i, err := k.issuer(ctx, name, topologies.TrustDomain())
		if err != nil {
			return nil, err
		}
		return identity.ImportAuthority(i, k.source(name)), nil
	}
	a, err := identity.NewAuthority(topologies.TrustDomain(), k.now())
	if err != nil {
		return nil, problem{reference(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: k.namespace, Name: SecretAuthority}}), translate.ReasonInvalidTrustDomain,
			fmt.Sprintf("MeshTopology %s: spec.trustDomain: %v; delete it and create it with another one", topologies.Names()[0], err)}
	}
	return a, nil
}

// confirm makes a provisional authority the mesh's, for the trust domain of its
// first topology. Replicas race: the API server takes one of them.
func (k *keeper) confirm(ctx context.Context, secret *corev1.Secret, a *identity.Authority, topologies translate.Topologies) (time.Duration, error) {
	name, _ := topologies.Issuer()
	if name != "" || a.TrustDomain() != topologies.TrustDomain() {
		next, err := k.first(ctx, topologies)
		if err != nil {
			k.set(a, secret, true)
			return 0, err
		}
		a = next
	}
	confirmed, err := k.update(ctx, secret, a, func(s *corev1.Secret) { delete(s.Annotations, annotationProvisional) })
	if err != nil || confirmed == nil {
		return time.Second, err
	}
	k.log.Info("authority confirmed", "trustDomain", a.TrustDomain(), "source", a.Source())
	k.set(a, confirmed, false)
	return issuerCheck, nil
}

// step has the leader do what is due, and tells how the authority is.
func (k *keeper) step(ctx context.Context, secret *corev1.Secret, a *identity.Authority, topologies translate.Topologies) (time.Duration, error) {
	w := identity.Wanted{TTL: topologies.LongestTTL(), Request: secret.Annotations[AnnotationRotate], Acknowledged: len(k.mesh.untrusting(identity.BundleDigest(a.Roots()))) == 0}
	wait := authorityCheck
	if due := a.Due(); !due.IsZero() {
		wait = min(wait, max(due.Sub(k.now()), time.Second))
	}
	var wrong error
	if name, _ := topologies.Issuer(); name != "" {
		wait = min(wait, issuerCheck)
		w.Source = k.source(name)
		w.Imported, wrong = k.issuer(ctx, name, a.TrustDomain())
	}
	if phase, _, _ := a.Rotation(); phase == identity.PhasePublishing {
		wait = min(wait, issuerCheck)
	}
	if k.leading() {
		next, change, err := a.Step(w, k.now())
		switch {
		case errors.Is(err, identity.ErrNoRootKey):
			wrong = errors.Join(wrong, problem{reference(secret), translate.ReasonNoRootKey, fmt.Sprintf("Secret %s: the intermediate ends soon: %v", k.key(), err)})
		case err != nil:
			return 0, fmt.Errorf("move Secret %s on: %w", k.key(), err)
		case change != "":
			done, err := k.update(ctx, secret, next, nil)
			if err != nil || done == nil {
				return time.Second, err
			}
			k.log.Info("authority changed", "change", change, "sequence", next.Sequence())
			k.event(reference(done), corev1.EventTypeNormal, "Changed", change)
			return time.Second, nil // the cache has it by then, or the update is refused
		}
	}
	if wrong != nil {
		return 0, wrong
	}
	if err := a.Usable(k.dnsNames, k.now()); err != nil {
		return 0, problem{reference(secret), translate.ReasonAuthorityExpired, fmt.Sprintf("Secret %s: nothing can be signed: %v; replace what ended, or delete the Secret and restart the operator for new roots", k.key(), err)}
	}
	k.mesh.setAuthorityView(k.view(a))
	return wait, nil
}

// update stores the authority; nil says that the Secret isn't what was read.
func (k *keeper) update(ctx context.Context, secret *corev1.Secret, a *identity.Authority, change func(*corev1.Secret)) (*corev1.Secret, error) {
	secret = secret.DeepCopy()
	secret.Data = a.SetData(secret.Data)
	if change != nil {
		change(secret)
	}
	err := k.writer.Update(ctx, secret)
	if apierrors.IsConflict(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("update Secret %s: %w", k.key(), err)
	}
	return secret, nil
}

// issuer reads somebody else's issuer. It is read live, by name: see issuerCheck.
func (k *keeper) issuer(ctx context.Context, name, trustDomain string) (*identity.Issuer, error) {
	key := types.NamespacedName{Namespace: k.namespace, Name: name}
	var secret corev1.Secret
	wrong := func(what string) error {
		about := reference(&secret)
		about.Namespace, about.Name = key.Namespace, key.Name
		return problem{about, translate.ReasonInvalidIssuer, fmt.Sprintf("Secret %s: %s; the issuer as it was stays in use", key, what)}
	}
	switch err := k.live.Get(ctx, key, &secret); {
	case apierrors.IsNotFound(err):
		return nil, wrong("it doesn't exist: create it, for example as secretName of a cert-manager Certificate, or correct spec.identity.issuerSecret")
	case apierrors.IsForbidden(err):
		return nil, wrong("the operator may not read it: add its name to resourceNames in Role bulkhead-operator")
	case err != nil:
		return nil, fmt.Errorf("read Secret %s: %w", key, err)
	}
	i, err := identity.ParseIssuer(secret.Data, trustDomain, k.dnsNames, k.now())
	if err != nil {
		return nil, wrong(err.Error())
	}
	return i, nil
}

func (k *keeper) source(name string) string { return "Secret " + k.namespace + "/" + name }

// tell tells people what is wrong, once.
func (k *keeper) tell(p problem) {
	if !k.mesh.setAuthorityView(translate.AuthorityView{Reason: p.reason, Message: p.message}) {
		return
	}
	k.log.Error("authority isn't as wanted", "secret", p.secret.Namespace+"/"+p.secret.Name, "reason", p.reason, "error", p.message)
	if k.leading() {
		k.event(p.secret, corev1.EventTypeWarning, p.reason, p.message)
	}
}

// view is how an authority is with which nothing is wrong.
func (k *keeper) view(a *identity.Authority) (v translate.AuthorityView) {
	v.State = "certificates are signed by an authority of the mesh's own"
	if a.Source() != "" {
		v.State = "certificates are signed by " + a.Source()
	}
	switch phase, since, until := a.Rotation(); phase {
	case identity.PhasePublishing:
		missing := k.mesh.untrusting(identity.BundleDigest(a.Roots()))
		v.Changing = fmt.Sprintf("a new root is published since %s; certificates are signed under it when all nodes trust it, or at %s (nodes that don't yet: %d)",
			since.UTC().Format(time.RFC3339), until.UTC().Format(time.RFC3339), len(missing))
	case identity.PhaseRetiring:
		v.Changing = fmt.Sprintf("certificates are signed under the new root since %s; the old one is trusted until %s", since.UTC().Format(time.RFC3339), until.UTC().Format(time.RFC3339))
	}
	return v
}

func (k *keeper) set(a *identity.Authority, secret *corev1.Secret, provisional bool) {
	trustDomain := a.TrustDomain()
	if provisional {
		trustDomain = "" // the first topology's to say
	}
	k.mu.Lock()
	same := k.authority != nil && sameData(k.authority.Data(), a.Data()) && k.trustDomain == trustDomain
	k.stored = secret.DeepCopy()
	if !same {
		k.authority, k.trustDomain, k.server = a, trustDomain, nil
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
func (k *keeper) Authority() *identity.Authority {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.authority
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
	a := k.Authority()
	if a == nil {
		return "", ""
	}
	var out bytes.Buffer
	for _, der := range a.Roots() {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a Buffer never fails
	}
	return a.TrustDomain(), out.String()
}
