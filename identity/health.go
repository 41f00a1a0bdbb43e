package identity

import (
	"time"
)

// Health is how a node's certificates are.
type Health struct {
	// Identities that have pods here.
	Identities int
	// Overdue are those whose certificate should have been replaced: half of what
	// was left of it at its renewal has passed as well. Expired have none that is
	// valid any more, and did have one.
	Overdue, Expired int
	// First is one of the worse kind whose certificate ends, or ended, first, at
	// FirstEnd, and LastError what the last attempt to renew it failed with, if it
	// did.
	First     string
	FirstEnd  time.Time
	LastError error
	// Unkept are those whose certificate is in no file: it is served, but is signed
	// again when the agent starts again, for which the operator has to be there.
	// KeepError is why one of them isn't.
	Unkept    int
	KeepError error
}

// Health tells of certificates that aren't renewed in time.
func (s *Store) Health() Health {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	h := Health{Identities: len(s.entries)}
	for _, e := range s.entries {
		c := e.credential
		if e.keepErr != nil {
			h.Unkept++
			h.KeepError = e.keepErr
		}
		if c == nil {
			continue // waited for by its pods, which haven't started
		}
		expired := !now.Before(c.notAfter)
		switch {
		case expired:
			h.Expired++
		case now.After(c.renewAt.Add(c.notAfter.Sub(c.renewAt) / 2)):
			h.Overdue++
		default:
			continue
		}
		if h.First == "" || c.notAfter.Before(h.FirstEnd) {
			h.First, h.FirstEnd, h.LastError = e.id.String(), c.notAfter, e.lastErr
		}
	}
	return h
}

// Bundle is a digest of the roots that SetBundle set last, and the version of the
// secret RootCA with them; "" before there are any.
func (s *Store) Bundle() (digest, version string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.digest, s.rootCA.GetVersion()
}
