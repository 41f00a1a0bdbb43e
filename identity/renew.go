package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// signTimeout is for one call of the Signer.
	signTimeout = 10 * time.Second
	// signsAtOnce bounds the calls in flight: a node that starts has all to sign.
	signsAtOnce = 8
	// Failures are retried after 100 ms, doubling to 15 s, each ±20 %.
	firstRetry = 100 * time.Millisecond
	lastRetry  = 15 * time.Second
	// denialRetry is when a pod that was denied may be asked for again: a denial
	// can be the truth of an operator that didn't see a new namespace's label yet.
	denialRetry = 15 * time.Second
	// soonestRenewal keeps certificates that come half spent (the intermediate ends
	// soon, the clocks differ) from being renewed without a pause.
	soonestRenewal = 5 * time.Second
	// longestWait is for clocks that are set: timers don't follow them.
	longestWait = time.Minute
	// fileRetry is for files that couldn't be written or removed.
	fileRetry = 10 * time.Second
)

// entry is an identity with pods. Guarded by Store.mu.
type entry struct {
	id         model.Identity
	pods       map[string]*attempts // by UID
	credential *credential          // nil: none that can be used
	busy       bool                 // a goroutine of Run's is having it signed
	failures   int                  // in a row
	retryAt    time.Time            // not before
	lastErr    error
	keepErr    error // why credential isn't in its file
}

// attempts are those of one pod.
type attempts struct {
	pod         Pod
	failures    int
	denial      error
	deniedUntil time.Time
}

func (e *entry) has(t model.Tenant) bool {
	for _, a := range e.pods {
		if a.pod.Tenant == t {
			return true
		}
	}
	return false
}

func (e *entry) ready(now time.Time) bool {
	return e.credential != nil && e.credential.verified && now.Before(e.credential.notAfter)
}

// denied returns a pod's denial if all are denied and nothing is valid.
func (e *entry) denied(now time.Time) error {
	if e.ready(now) {
		return nil
	}
	var denial error
	for _, a := range e.pods {
		if a.denial == nil {
			return nil
		}
		denial = a.denial
	}
	return denial
}

// due is when to have the entry signed.
func (e *entry) due(now time.Time) time.Time {
	if e.ready(now) && e.credential.renewAt.After(e.retryAt) {
		return e.credential.renewAt
	}
	return e.retryAt
}

// next picks the pod to sign for: one that isn't denied and failed least, so that
// a pod that is just going doesn't stand in the others' way. Without any it
// returns when there is one again.
func (e *entry) next(now time.Time) (best *attempts, wait time.Time) {
	for _, a := range e.pods {
		if a.deniedUntil.After(now) {
			if wait.IsZero() || a.deniedUntil.Before(wait) {
				wait = a.deniedUntil
			}
			continue
		}
		if best == nil || a.failures < best.failures || (a.failures == best.failures && a.pod.UID < best.pod.UID) {
			best = a
		}
	}
	return best, wait
}

// Run has certificates signed as pods come, and again at half of their life
// ±10 %, at most 8 at once, until ctx ends. It returns nil, with no goroutine
// left. It must run at most once at a time.
func (s *Store) Run(ctx context.Context) error {
	var workers sync.WaitGroup
	defer workers.Wait()
	free := make(chan struct{}, signsAtOnce)
	for {
		wait := s.start(ctx, &workers, free)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-s.wake:
			timer.Stop()
		}
	}
}

// start starts what is due and returns how long there is nothing to do.
func (s *Store) start(ctx context.Context, workers *sync.WaitGroup, slots chan struct{}) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	wait := longestWait
	if len(s.stale) > 0 {
		s.removeStale()
		wait = fileRetry
	}
	if again := s.keepAgain(); again > 0 {
		wait = min(wait, again)
	}
	if s.bundle == nil {
		return wait // nothing could be verified
	}
	now := s.now()
	for _, e := range s.entries {
		if e.busy {
			continue
		}
		if due := e.due(now); due.After(now) {
			wait = min(wait, due.Sub(now))
			continue
		}
		a, later := e.next(now)
		if a == nil {
			e.retryAt = later
			wait = min(wait, later.Sub(now))
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			return wait // who frees a slot wakes Run
		}
		e.busy = true
		pod := a.pod
		workers.Go(func() {
			c, err := s.sign(ctx, pod)
			s.mu.Lock()
			<-slots
			e.busy = false
			if ctx.Err() == nil || err == nil {
				s.signed(e, a, c, err)
			}
			s.broadcast()
			s.mu.Unlock()
		})
	}
	return wait
}

// sign makes a key and has it signed.
func (s *Store) sign(ctx context.Context, pod Pod) (*credential, error) {
	key, err := newKey()
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	csr, err := NewCSR(key, pod.Identity)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	ders, err := s.signer.Sign(ctx, csr, pod)
	if err != nil {
		return nil, err
	}
	if len(ders) > maxChain {
		return nil, fmt.Errorf("the operator's chain has %d certificates, more than %d", len(ders), maxChain)
	}
	var chain []*x509.Certificate
	for _, der := range ders {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("the operator's chain: %w", err)
		}
		chain = append(chain, cert)
	}
	c, err := newCredential(chain, key)
	if err != nil {
		return nil, fmt.Errorf("the operator's chain: %w", err)
	}
	if c.id != pod.Identity {
		return nil, fmt.Errorf("the operator's chain is for %s", c.id)
	}
	return c, nil
}

// signed takes in what an attempt came to; s.mu is held.
func (s *Store) signed(e *entry, a *attempts, c *credential, err error) {
	if s.entries[e.id] != e {
		return // the identity's last pod went: the key is dropped with c
	}
	now := s.now()
	if err == nil {
		// The bundle may have changed since the CSR.
		if err = c.verify(s.bundle, now); err != nil {
			err = fmt.Errorf("the operator's chain doesn't verify against the trust bundle: %w", err)
		}
	}
	log := s.log.With("identity", e.id.String(), "pod", a.pod.Namespace+"/"+a.pod.Name, "pod_uid", a.pod.UID)
	if err != nil {
		e.lastErr = err
		if codeOf(err) == codes.PermissionDenied {
			log.Warn("signing denied", "error", err)
			a.denial, a.deniedUntil = err, now.Add(denialRetry)
			// The other pods are asked for at once; with none left, next tells when.
			e.retryAt = now
		} else {
			a.failures++
			wait := min(firstRetry<<min(e.failures, 16), lastRetry)
			e.failures++
			e.retryAt = now.Add(time.Duration(float64(wait) * (0.8 + 0.4*rand.Float64())))
			log.Warn("signing failed, trying again", "error", err, "failures", e.failures, "has_valid", e.ready(now))
		}
		s.notifyEntry(e)
		return
	}
	c.verified = true
	e.credential, e.failures, e.lastErr = c, 0, nil
	s.keep(e)
	e.retryAt = now.Add(max(c.notAfter.Sub(now)/4, soonestRenewal))
	for _, other := range e.pods {
		other.failures = 0
	}
	a.denial, a.deniedUntil = nil, time.Time{}
	log.Info("certificate signed", "expires", c.notAfter, "renewal", c.renewAt, "serial", c.chain[0].SerialNumber.Text(16))
	s.notifyEntry(e)
}

// keep writes an entry's credential for the next start. If that fails it is used
// all the same; the file has what it had, and is written again.
func (s *Store) keep(e *entry) {
	path := filepath.Join(s.dir, fileName(e.id))
	delete(s.stale, fileName(e.id))
	err := writeFile(path, e.credential.encode())
	if (err == nil) != (e.keepErr == nil) { // once each
		if err != nil {
			s.log.Error("key can't be kept for the next start, trying again", "identity", e.id.String(), "file", path, "error", err)
		} else {
			s.log.Info("key is kept for the next start", "identity", e.id.String(), "file", path)
		}
	}
	if e.keepErr = err; err != nil {
		s.keepAt = s.now().Add(fileRetry)
	}
}

// keepAgain tries those that couldn't be kept, all of them at a time, and returns
// when to come back; 0 is for never.
func (s *Store) keepAgain() time.Duration {
	due, left := !s.now().Before(s.keepAt), false
	for _, e := range s.entries {
		if e.keepErr == nil {
			continue
		}
		if e.credential == nil {
			e.keepErr = nil // it isn't worth it
			continue
		}
		if due {
			s.keep(e)
		}
		left = left || e.keepErr != nil
	}
	if !left {
		return 0
	}
	return s.keepAt.Sub(s.now())
}

// notifyEntry tells the watchers of all tenants that have the identity.
func (s *Store) notifyEntry(e *entry) {
	for _, a := range e.pods {
		s.notify(a.pod.Tenant)
	}
}

// codeOf is the gRPC code of err or of what it wraps; Unknown if there is none.
func codeOf(err error) codes.Code {
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		return st.GRPCStatus().Code()
	}
	return codes.Unknown
}
