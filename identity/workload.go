package identity

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// X509SVID is what a workload needs to speak as itself.
type X509SVID struct {
	ID model.Identity
	// Chain is DER certificates one after the other, leaf first, without the root.
	Chain []byte
	// Key is the leaf's, PKCS #8.
	Key     []byte
	Expires time.Time
}

// Pod returns a pod that SetPods named last, or AddPods since. known is false before the
// first call of SetPods, when nobody can tell of those that aren't there.
func (s *Store) Pod(uid string) (p Pod, ok, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok = s.pods[uid]
	return p, ok, s.podsKnown
}

// X509SVID returns what a pod speaks with; ok is false as long as there is nothing
// that peers take. The error wraps ErrUnknownPod or ErrDenied. It holds a private
// key: don't log it. Changed of the pod's tenant tells of another one.
func (s *Store) X509SVID(podUID string) (svid X509SVID, ok bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, found := s.pods[podUID]
	if !found {
		return X509SVID{}, false, fmt.Errorf("X.509-SVID of pod %s: %w", podUID, ErrUnknownPod)
	}
	e, now := s.entries[p.Identity], s.now()
	s.check(e, now)
	if !e.ready(now) {
		if denied := e.denied(now); denied != nil {
			return X509SVID{}, false, fmt.Errorf("X.509-SVID of pod %s/%s: %w: %w", p.Namespace, p.Name, ErrDenied, denied)
		}
		return X509SVID{}, false, nil
	}
	c := e.credential
	svid = X509SVID{ID: c.id, Expires: c.notAfter}
	for _, cert := range c.chain {
		svid.Chain = append(svid.Chain, cert.Raw...)
	}
	block, _ := pem.Decode(c.keyPEM)
	svid.Key = bytes.Clone(block.Bytes)
	return svid, true, nil
}

// Roots returns the trust domain and the roots of SetBundle, DER one after the
// other; "" and nil before its first call. Changed of any tenant tells of others.
func (s *Store) Roots() (trustDomain string, roots []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bundle == nil {
		return "", nil
	}
	for _, c := range s.bundle.X509Authorities() {
		roots = append(roots, c.Raw...)
	}
	return s.bundle.TrustDomain().Name(), roots
}
