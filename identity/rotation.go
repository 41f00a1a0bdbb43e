package identity

import (
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Phase of a change of roots. Both roots are trusted in both phases.
type Phase string

// The phases, in their order.
const (
	// PhaseStable: no change is under way.
	PhaseStable Phase = ""
	// PhasePublishing: the new root is in the bundle, the old issuer signs.
	PhasePublishing Phase = "Publishing"
	// PhaseRetiring: the new issuer signs, and certificates of the old one live.
	PhaseRetiring Phase = "Retiring"
)

const (
	// publishAtLeast is how long a new root is published before anything is signed
	// under it, however soon agents say that they have it: others read the bundle too.
	publishAtLeast = 2 * RefreshHint
	// clockMargin is added where it counts that certificates have ended: replicas and
	// nodes may be behind in what they know and in their clocks.
	clockMargin = 5 * time.Minute
	// A root of its own is replaced when less than this is left of it, so that
	// intermediates have their whole life.
	rootRenewal = 2 * IntermediateLifetime
)

// state is what has to be known of an authority beside keys and certificates.
type state struct {
	// TrustDomain, in the Secret only.
	TrustDomain string `json:"trustDomain,omitempty"`
	// Sequence grows with each change of the roots that are trusted.
	Sequence uint64 `json:"sequence"`
	Phase    Phase  `json:"phase,omitempty"`
	// Since when the phase is so, and when it ends at the latest.
	Since time.Time `json:"since,omitzero"`
	Until time.Time `json:"until,omitzero"`
	// TTL is the longest that anything is signed with.
	TTL duration `json:"ttl,omitempty"`
	// LongerUntil is when all that was signed with a longer one has ended.
	LongerUntil time.Time `json:"longerUntil,omitzero"`
	// Request is the last one for other roots that was answered.
	Request string `json:"request,omitempty"`
	// Source says where issuer and next were imported from; "" for our own.
	Source     string `json:"source,omitempty"`
	NextSource string `json:"nextSource,omitempty"`
}

// duration is written as text.
type duration time.Duration

// MarshalText implements encoding.TextMarshaler.
func (d duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = duration(v)
	return err
}

// Wanted is what an authority should be like.
type Wanted struct {
	// TTL is the longest that workloads' certificates are to live; 0 is DefaultTTL.
	TTL time.Duration
	// Request asks for a root of its own to be replaced, once for each value; "" asks
	// for nothing.
	Request string
	// Source names where the issuer is imported from; "" wants one of its own.
	Source string
	// Imported is what is there now; nil, if that can't be used, changes nothing.
	Imported *Issuer
	// Acknowledged says that everybody who verifies certificates trusts all of
	// Roots.
	Acknowledged bool
}

// Step returns the authority as it is to be stored next, and what that changes;
// itself and "" if nothing is due. It is pure but for keys that it makes, and each
// step is safe by itself: a step that isn't stored is made again, and of two that
// race only one may be stored. No certificate that is valid loses its root, and
// nothing is signed under a root before everybody trusts it, or, for those who
// don't say so, before the longest-lived certificate has ended that they could
// have.
func (a *Authority) Step(w Wanted, now time.Time) (*Authority, string, error) {
	if w.Source != "" && w.Imported != nil && w.Imported.trustDomain != a.issuer.trustDomain {
		return nil, "", fmt.Errorf("step authority of %s: what is imported is for %s", a.TrustDomain(), w.Imported.trustDomain)
	}
	for _, step := range []func(Wanted, time.Time) (*Authority, string, error){
		a.stepTTL, a.stepPhase, a.stepSource, a.stepRequest, a.stepAge,
	} {
		if next, change, err := step(w, now); err != nil || change != "" {
			return next, change, err
		}
	}
	return a, "", nil
}

// Due is when Step may have something to do that only time brings; the zero time
// if nothing.
func (a *Authority) Due() time.Time { return a.state.Until }

// Rotation tells which phase a change of roots is in, since when, and when it ends
// at the latest.
func (a *Authority) Rotation() (phase Phase, since, until time.Time) {
	return a.state.Phase, a.state.Since, a.state.Until
}

// Source is where the issuer that signs was imported from; "" for one of its own.
func (a *Authority) Source() string { return a.state.Source }

// Sequence grows with each change of Roots.
func (a *Authority) Sequence() uint64 { return a.state.Sequence }

// stepTTL keeps account of how long certificates may live that are out there. Sign
// signs with no longer TTL than is stored.
func (a *Authority) stepTTL(w Wanted, now time.Time) (*Authority, string, error) {
	had, want := time.Duration(a.state.TTL), min(max(cmp.Or(w.TTL, DefaultTTL), MinTTL), MaxTTL)
	if had == want {
		return a, "", nil
	}
	next := *a
	next.state.TTL = duration(want)
	if had > want {
		next.state.LongerUntil = later(a.state.LongerUntil, now.Add(had+clockMargin))
	}
	return &next, fmt.Sprintf("certificates live for %v", want), nil
}

// longest is when the last of what is signed now has ended.
func (a *Authority) longest(now time.Time) time.Time {
	return later(a.state.LongerUntil, now.Add(cmp.Or(time.Duration(a.state.TTL), DefaultTTL)+clockMargin))
}

// stepPhase moves a change of roots on.
func (a *Authority) stepPhase(w Wanted, now time.Time) (*Authority, string, error) {
	next := *a
	switch a.state.Phase {
	case PhasePublishing:
		if a.next == nil { // taken out of the Secret by hand
			next.state.endPhase()
			return &next, "change of roots given up: the next issuer is gone", nil
		}
		trusted := w.Acknowledged && !now.Before(a.state.Since.Add(publishAtLeast))
		if !trusted && now.Before(a.state.Until) && now.Before(a.issuer.end()) {
			return a, "", nil
		}
		next.issuer, next.next = a.next, nil
		next.old = missingFrom(a.next.roots, append(slices.Clone(a.old), a.issuer.roots...))
		next.state.Source, next.state.NextSource = a.state.NextSource, ""
		next.state.Phase, next.state.Since, next.state.Until = PhaseRetiring, now, a.longest(now)
		how := "all nodes trust it"
		if !trusted {
			how = "the time to trust it is over"
		}
		return &next, "certificates are signed under the new root: " + how, nil
	case PhaseRetiring:
		if now.Before(a.state.Until) {
			return a, "", nil
		}
		next.old = nil
		next.state.endPhase()
		if len(next.Roots()) != len(a.Roots()) {
			next.state.Sequence++
		}
		return &next, "the old root isn't trusted any more: all certificates under it have ended", nil
	}
	return a, "", nil
}

// stepSource follows where the issuer is to come from, and its renewals there.
func (a *Authority) stepSource(w Wanted, now time.Time) (*Authority, string, error) {
	next := *a
	source, issuer := a.state.Source, a.issuer
	if a.next != nil {
		source, issuer = a.state.NextSource, a.next
	}
	switch {
	case w.Source == "" && source == "":
		return a, "", nil
	case w.Source == "" && a.next != nil && a.state.Source == "":
		next.next = nil
		next.state.endPhase()
		next.state.Sequence++
		return &next, "change of roots given up: an issuer of its own is wanted again", nil
	case w.Source == "":
		own, err := newIssuer(a.issuer.trustDomain, now)
		if err != nil {
			return nil, "", err
		}
		return a.publish(own, "", now)
	case w.Imported == nil, source == w.Source && issuer.same(w.Imported):
		return a, "", nil
	case a.state.Source == w.Source && a.issuer.same(w.Imported): // what is signed with is wanted, what is published isn't
		next.next = nil
		next.state.endPhase()
		next.state.Sequence++
		return &next, "change of roots given up: the issuer is as before", nil
	case len(missingFrom(issuer.roots, w.Imported.roots)) == 0 && len(missingFrom(w.Imported.roots, issuer.roots)) == 0:
		// The same roots: peers take its certificates at once.
		if a.next != nil {
			next.next, next.state.NextSource = w.Imported, w.Source
		} else {
			next.issuer, next.state.Source = w.Imported, w.Source
		}
		return &next, "issuer taken from " + w.Source, nil
	}
	return a.publish(w.Imported, w.Source, now)
}

// publish begins a change of roots.
func (a *Authority) publish(i *Issuer, source string, now time.Time) (*Authority, string, error) {
	if a.state.Phase == PhaseRetiring {
		return a, "", nil // one after the other
	}
	next := *a
	next.next, next.state.NextSource = i, source
	next.state.Phase, next.state.Since, next.state.Until = PhasePublishing, now, a.longest(now)
	next.state.Sequence++
	if n := len(next.Roots()); n > MaxRoots {
		return nil, "", fmt.Errorf("change roots: %d would be trusted at once, more than %d", n, MaxRoots)
	}
	if source == "" {
		return &next, "a new root of its own is published", nil
	}
	return &next, "a new root is published, from " + source, nil
}

// stepRequest answers requests for another root.
func (a *Authority) stepRequest(w Wanted, now time.Time) (*Authority, string, error) {
	if w.Request == "" || w.Request == a.state.Request || a.state.Phase != PhaseStable {
		return a, "", nil
	}
	next := *a
	next.state.Request = w.Request
	if w.Source != "" || a.state.Source != "" {
		return &next, "request for another root refused: it is for the owner of " + cmp.Or(w.Source, a.state.Source) + " to change it", nil
	}
	own, err := newIssuer(a.issuer.trustDomain, now)
	if err != nil {
		return nil, "", err
	}
	return next.publish(own, "", now)
}

// stepAge renews what is its own.
func (a *Authority) stepAge(_ Wanted, now time.Time) (*Authority, string, error) {
	if a.state.Source != "" {
		return a, "", nil
	}
	if a.state.Phase == PhaseStable && now.After(a.issuer.roots[0].NotAfter.Add(-rootRenewal)) {
		own, err := newIssuer(a.issuer.trustDomain, now)
		if err != nil {
			return nil, "", err
		}
		return a.publish(own, "", now)
	}
	if !a.issuer.needsRenewal(now) || !now.Before(a.issuer.roots[0].NotAfter) {
		return a, "", nil
	}
	next, err := a.Renew(now)
	if errors.Is(err, ErrNoRootKey) {
		return a, "", err
	} else if err != nil {
		return nil, "", err
	}
	return next, "intermediate renewed", nil
}

func (s *state) endPhase() {
	s.Phase, s.Since, s.Until, s.NextSource = PhaseStable, time.Time{}, time.Time{}, ""
}

// missingFrom returns those of list that have hasn't.
func missingFrom(have, list []*x509.Certificate) (missing []*x509.Certificate) {
	for _, c := range list {
		if !slices.ContainsFunc(have, c.Equal) {
			missing = append(missing, c)
		}
	}
	return missing
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
