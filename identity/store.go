package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// DefaultDir is where a node's keys lie.
const DefaultDir = "/run/bulkhead/keys"

// Signer has a CSR signed for a pod of this node; on the node, by the operator.
type Signer interface {
	// Sign returns DER certificates, leaf first. An error that is, or wraps, a gRPC
	// PermissionDenied says that it won't be signed for that pod; all others are
	// passing. It is called concurrently, with a deadline.
	Sign(ctx context.Context, csrDER []byte, pod Pod) (chain [][]byte, err error)
}

// Pod is a pod of this node that has an identity.
type Pod struct {
	UID, Namespace, Name string
	Identity             model.Identity
	Tenant               model.Tenant
}

// StoreOptions configure a Store.
type StoreOptions struct {
	// Dir is where keys and chains lie, nothing else: mode 0700, a tmpfs of its own
	// (16 MiB, nosuid, nodev, noexec, and noswap if the kernel has it). OpenStore
	// mounts it; it stays when the process ends, until Uninstall. Default DefaultDir.
	Dir string
	// Signer is required.
	Signer Signer
	// Log gets no key material. Default slog.Default().
	Log *slog.Logger
}

// Errors of WaitReady.
var (
	// ErrUnknownPod: neither SetPods nor AddPods named the pod, or SetPods does no longer.
	ErrUnknownPod = errors.New("not a pod of this node with an identity")
	// ErrDenied: the operator refuses to sign for every pod of the identity here.
	// The operator's status is wrapped as well.
	ErrDenied = errors.New("signing is denied")
)

// Store holds the keys and certificates of the identities that have pods on this
// node: one P-256 key for each, new with every certificate. It is safe for
// concurrent use. There is nothing to close: Run ends with its context, and the
// files are meant to be found again. Only one process may use a Dir.
//
// Two tenants with pods of one identity (their pods share a service account, but
// not a proxy) are given the same key.
type Store struct {
	dir    string
	signer Signer
	log    *slog.Logger
	now    func() time.Time
	wake   chan struct{} // tells Run to look again

	mu        sync.Mutex
	bundle    *x509bundle.Bundle    // nil before SetBundle
	rootCA    *discoveryv3.Resource // of bundle
	digest    string                // of bundle
	found     map[model.Identity]*credential
	podsKnown bool
	pods      map[string]Pod // by UID
	entries   map[model.Identity]*entry
	formers   map[model.Tenant][]model.Identity
	stale     map[string]struct{} // files that couldn't be removed
	keepAt    time.Time           // when to write again those that couldn't be written
	watches   map[model.Tenant]chan struct{}
	changed   chan struct{} // closed and replaced with every change; for WaitReady
}

// OpenStore mounts Dir if it isn't mounted, and reads what a former process left
// there. A credential found is used, without a new signature, once SetPods or AddPods
// names a pod of its identity and it verifies against SetBundle's roots; what SetPods
// first leaves out is removed.
func OpenStore(o StoreOptions) (*Store, error) {
	if o.Signer == nil {
		return nil, errors.New("open key store: StoreOptions.Signer is required")
	}
	if o.Dir == "" {
		o.Dir = DefaultDir
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if err := openDir(o.Dir, o.Log); err != nil {
		return nil, fmt.Errorf("open key store: %w", err)
	}
	found, err := readDir(o.Dir, o.Log)
	if err != nil {
		return nil, fmt.Errorf("open key store: %w", err)
	}
	return &Store{
		dir: o.Dir, signer: o.Signer, log: o.Log, now: time.Now, wake: make(chan struct{}, 1),
		found: found, pods: map[string]Pod{}, entries: map[model.Identity]*entry{}, stale: map[string]struct{}{},
		watches: map[model.Tenant]chan struct{}{}, changed: make(chan struct{}),
	}, nil
}

// SetPods says which pods with an identity the node has now: all of them. An
// identity that has none any more loses its key and its file before SetPods
// returns, and its secret is denied. Pods without an identity are ignored.
func (s *Store) SetPods(pods []Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := map[string]Pod{}
	for _, p := range pods {
		if p.UID != "" && !p.Identity.IsZero() {
			now[p.UID] = p
		}
	}
	touched := map[model.Tenant]struct{}{}
	for uid, p := range s.pods {
		if now[uid] == p {
			continue
		}
		touched[p.Tenant] = struct{}{}
		delete(s.entries[p.Identity].pods, uid)
	}
	for uid, p := range now {
		if s.pods[uid] == p {
			continue
		}
		touched[p.Tenant] = struct{}{}
		s.add(p)
	}
	for id, e := range s.entries {
		if len(e.pods) == 0 {
			delete(s.entries, id)
			s.stale[fileName(id)] = struct{}{}
		}
	}
	for id := range s.found {
		s.stale[fileName(id)] = struct{}{}
	}
	s.pods, s.found = now, nil
	s.removeStale()
	if !s.podsKnown {
		s.podsKnown = true
		s.notifyAll()
		return
	}
	for t := range touched {
		s.notify(t)
	}
	// Channels of tenants that left are held by nobody.
	for t := range s.watches {
		if !slices.ContainsFunc(pods, func(p Pod) bool { return p.Tenant == t }) {
			s.notify(t)
		}
	}
	s.broadcast()
}

// AddPods says which pods have come, and nothing of others: who knows all of them may
// have much else to do before SetPods.
func (s *Store) AddPods(pods []Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	touched := map[model.Tenant]struct{}{}
	for _, p := range pods {
		if _, known := s.pods[p.UID]; known || p.UID == "" || p.Identity.IsZero() {
			continue
		}
		touched[p.Tenant] = struct{}{}
		s.pods[p.UID] = p
		s.add(p)
	}
	if len(touched) == 0 {
		return
	}
	for t := range touched {
		s.notify(t)
	}
	s.broadcast()
}

// add has a pod be one of its identity's; s.mu is held.
func (s *Store) add(p Pod) {
	e := s.entries[p.Identity]
	if e == nil {
		e = &entry{id: p.Identity, pods: map[string]*attempts{}}
		if c := s.found[p.Identity]; c != nil {
			e.credential = c
			delete(s.found, p.Identity)
			s.check(e, s.now()) // before Run looks at it, which has signed what isn't verified
		}
		s.entries[p.Identity] = e
	}
	e.pods[p.UID] = &attempts{pod: p}
	e.retryAt = time.Time{} // somebody waits, and this pod wasn't tried
}

// SetFormers says of which identities, that have pods here, a tenant goes on to get
// the certificates although its pods are other tenants' now: it has connections of
// theirs to finish. Call it before SetPods takes the pods from the tenant.
func (s *Store) SetFormers(formers map[model.Tenant][]model.Identity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.formers
	s.formers = formers
	for _, t := range slices.Concat(slices.Collect(maps.Keys(was)), slices.Collect(maps.Keys(formers))) {
		if !slices.Equal(was[t], formers[t]) {
			s.notify(t)
		}
	}
}

// SetBundle sets the roots (DER, 1 to MaxRoots) that peers' certificates must
// chain to. Certificates that don't chain to them any more are replaced; until
// then, proxies keep what they have. On an error the old bundle stays.
func (s *Store) SetBundle(trustDomain string, rootsDER [][]byte) error {
	td, err := parseTrustDomain(trustDomain)
	if err != nil {
		return fmt.Errorf("set trust bundle: %w", err)
	}
	if len(rootsDER) == 0 || len(rootsDER) > MaxRoots {
		return fmt.Errorf("set trust bundle of %s: %d roots, must be 1 to %d", td, len(rootsDER), MaxRoots)
	}
	var roots []*x509.Certificate
	for i, der := range rootsDER {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("set trust bundle of %s: root %d: %w", td, i, err)
		}
		if !c.BasicConstraintsValid || !c.IsCA {
			return fmt.Errorf("set trust bundle of %s: root %d isn't an authority's certificate", td, i)
		}
		roots = append(roots, c)
	}
	rootCA, err := rootsResource(rootsDER)
	if err != nil {
		return fmt.Errorf("set trust bundle of %s: %w", td, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bundle != nil && s.bundle.TrustDomain() == td && s.rootCA.GetVersion() == rootCA.GetVersion() {
		return nil
	}
	s.bundle, s.rootCA, s.digest = x509bundle.FromX509Authorities(td, roots), rootCA, BundleDigest(rootsDER)
	for _, e := range s.entries {
		if e.credential != nil {
			e.credential.verified = false
		}
		e.retryAt, e.failures = time.Time{}, 0
	}
	s.notifyAll()
	return nil
}

// WaitReady returns nil once the pod's identity has a certificate that peers
// take. The error wraps ErrUnknownPod, ErrDenied or the context's, and says what
// the last attempt failed with. SetPods or AddPods must have named the pod before.
func (s *Store) WaitReady(ctx context.Context, podUID string) error {
	for {
		s.mu.Lock()
		p, ok := s.pods[podUID]
		changed := s.changed
		var ready bool
		var denied, missing error
		if ok {
			e, now := s.entries[p.Identity], s.now()
			s.check(e, now)
			ready, denied, missing = e.ready(now), e.denied(now), s.missing(e)
		}
		s.mu.Unlock()
		switch {
		case !ok:
			return fmt.Errorf("wait for the certificate of pod %s: %w", podUID, ErrUnknownPod)
		case ready:
			return nil
		case denied != nil:
			return fmt.Errorf("wait for the certificate of %s for pod %s/%s: %w: %w", p.Identity, p.Namespace, p.Name, ErrDenied, denied)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for the certificate of %s for pod %s/%s: %w (%w)", p.Identity, p.Namespace, p.Name, context.Cause(ctx), missing)
		}
	}
}

// missing says what a certificate is waiting for.
func (s *Store) missing(e *entry) error {
	switch {
	case s.bundle == nil:
		return errors.New("there is no trust bundle yet")
	case e.lastErr != nil:
		return fmt.Errorf("last attempt: %w", e.lastErr)
	}
	return errors.New("not signed yet")
}

// check verifies a credential that the bundle or a restart made doubtful.
func (s *Store) check(e *entry, now time.Time) {
	c := e.credential
	if c == nil || c.verified || s.bundle == nil {
		return
	}
	if err := c.verify(s.bundle, now); err != nil {
		s.log.Info("replacing a certificate that doesn't verify", "identity", e.id.String(), "error", err)
		e.credential = nil // its file is overwritten by the next, and is as useless
		return
	}
	c.verified = true
}

// notifyAll is for changes that may concern everybody.
func (s *Store) notifyAll() {
	now := s.now()
	for _, e := range s.entries {
		s.check(e, now)
	}
	for t := range s.watches {
		s.notify(t)
	}
	s.broadcast()
}

// notify tells those who watch a tenant; s.mu is held.
func (s *Store) notify(t model.Tenant) {
	if c := s.watches[t]; c != nil {
		close(c)
		delete(s.watches, t)
	}
}

// broadcast tells WaitReady and Run; s.mu is held.
func (s *Store) broadcast() {
	close(s.changed)
	s.changed = make(chan struct{})
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// removeStale removes files of identities that are gone; what can't be removed is
// tried again.
func (s *Store) removeStale() {
	for name := range s.stale {
		path := filepath.Join(s.dir, name)
		if err := errors.Join(removeFile(path), removeFile(path+tempSuffix)); err != nil {
			s.log.Error("key file can't be removed, trying again", "file", path, "error", err)
			continue
		}
		delete(s.stale, name)
	}
}
