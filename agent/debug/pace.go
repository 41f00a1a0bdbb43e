package debug

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Tokens a second that an agent has reviewed, and how many at once. All agents are one
// user to the API server, which has what one of them asks wait for what others do: so
// whoever shows them made up tokens would keep their own questions waiting. Who was let
// in from the same address lately doesn't wait for those who weren't.
const (
	strangersPerSecond = 5
	strangersAtOnce    = 40
	knownPerSecond     = 20
	knownAtOnce        = 80
	knownFor           = time.Hour
	knownLimit         = 1024
)

// pace is how fast tokens are reviewed. It is safe for concurrent use.
type pace struct {
	strangers, known *rate.Limiter

	mu sync.Mutex
	// until when sources are known.
	until map[netip.Prefix]time.Time
}

func newPace() *pace {
	return &pace{strangers: rate.NewLimiter(strangersPerSecond, strangersAtOnce), known: rate.NewLimiter(knownPerSecond, knownAtOnce), until: map[netip.Prefix]time.Time{}}
}

// mayAsk reports whether a token from an address is to be reviewed now.
func (p *pace) mayAsk(address string, now time.Time) bool {
	p.mu.Lock()
	known := now.Before(p.until[sourceOfText(address)])
	p.mu.Unlock()
	if known {
		return p.known.AllowN(now, 1)
	}
	return p.strangers.AllowN(now, 1)
}

// letIn says that somebody at an address may what he asked for.
func (p *pace) letIn(address string, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	source := sourceOfText(address)
	if _, known := p.until[source]; !known && len(p.until) >= knownLimit {
		for s := range p.until {
			delete(p.until, s) // any: it is a stranger's turn once
			break
		}
	}
	p.until[source] = now.Add(knownFor)
}

// sourceOfText is sourceOf an address and port as http.Request has them.
func sourceOfText(address string) netip.Prefix {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return netip.Prefix{}
	}
	return sourceOf(net.TCPAddrFromAddrPort(a))
}
