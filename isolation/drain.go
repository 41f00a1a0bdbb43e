package isolation

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	drainFirst = 50 * time.Millisecond
	drainLast  = time.Second
)

// errNoStats also is what a proxy without listeners gets: it waits for its
// deadline, since nobody can tell.
var errNoStats = errors.New("count connections: Envoy has no listener, or its statistics are off")

// SetLeaving has a tenant's proxies take their leave of tunnels, or not any more:
// peers get a GOAWAY with the next answer and open a new one elsewhere, for which
// nobody waits, and what is in the tunnel goes on. Unlike a drain it can be taken
// back. It ends with the process; of a tenant that isn't there it is no error. It doesn't
// wait until the proxies have heard of it, which is up to them: of several calls they hear
// the last one last.
func (m *Manager) SetLeaving(name model.Tenant, leaving bool) {
	t := m.tenant(name)
	if t == nil {
		return
	}
	t.mu.Lock()
	t.leaving = leaving
	telling := t.telling
	t.telling = true
	t.mu.Unlock()
	if !telling {
		m.background(t.tellLeaving)
	}
}

// tellLeaving tells the proxies until they have heard what was said last.
func (t *tenant) tellLeaving() {
	for told, leaving := false, false; ; told = true {
		t.mu.Lock()
		if told && leaving == t.leaving {
			t.telling = false
			t.mu.Unlock()
			return
		}
		leaving = t.leaving
		t.mu.Unlock()
		path := "/healthcheck/ok"
		if leaving {
			path = "/healthcheck/fail"
		}
		for _, p := range t.list() {
			if state, _, _ := p.snapshot(); state.PID == 0 || !state.Served {
				continue
			}
			if _, err := adminAsk(t.m.ctx, t.netns(), p.state.Generation, http.MethodPost, path, adminTimeout, 64); err != nil {
				t.m.log.Warn("A proxy hasn't heard whether it is to take its leave of tunnels.", "tenant", t.name, "leaving", leaving, "error", err)
			}
		}
	}
}

// startDrain has the process finish its connections by itself, and returns false
// if there are none to finish.
func (t *tenant) startDrain(p *process, d time.Duration) bool {
	p.mu.Lock()
	if p.running == nil || !p.state.Served {
		p.mu.Unlock()
		return false
	}
	if p.state.DrainUntil.IsZero() {
		p.state.DrainUntil = time.Now().Add(d)
	}
	p.mu.Unlock()
	// The deadline is on disk first: who is killed now doesn't prolong it.
	p.persist()
	p.drainOnce.Do(func() { close(p.draining) })
	return true
}

// startEnd has the process ended by its supervisor, and forgotten then: to everyone else
// it is one whose time to drain is over.
func (t *tenant) startEnd(p *process) {
	p.mu.Lock()
	news := p.state.DrainUntil.IsZero() || p.state.DrainUntil.After(time.Now())
	if news {
		p.state.DrainUntil = time.Now()
	}
	p.mu.Unlock()
	if news {
		p.persist()
	}
	p.endOnce.Do(func() { close(p.end) })
}

// drain asks Envoy to take its leave of all clients, and returns when the process
// has ended, because nothing was left or at the deadline, or ctx is over.
func (p *process) drain(ctx context.Context, r *running) {
	p.mu.Lock()
	until, generation := p.state.DrainUntil, p.state.Generation
	p.mu.Unlock()
	netns := p.tenant.netns()
	asked := false
	for interval := drainFirst; time.Now().Before(until); interval = min(2*interval, drainLast) {
		if !asked {
			// HTTP/2 peers, the ends of tunnels, get a GOAWAY and connect elsewhere.
			_, err := adminAsk(ctx, netns, generation, http.MethodPost, "/drain_listeners?graceful", adminTimeout, 64)
			asked = err == nil
		}
		if n, err := connections(ctx, netns, generation); asked && err == nil && n == 0 {
			break
		}
		if r.wait(ctx, min(interval, time.Until(until))) || ctx.Err() != nil {
			return
		}
	}
	if ctx.Err() != nil {
		return
	}
	if err := r.terminate(termGrace); err != nil {
		p.tenant.m.log.Error("Can't end a proxy.", "tenant", p.tenant.name, "error", err)
	}
}

// connections counts what Envoy's listeners have open, internal ones too. Its own
// word is enough: a proxy that lies lives until the deadline at most.
func connections(ctx context.Context, netns string, generation int) (int, error) {
	filter := url.QueryEscape(`^listener\..*downstream_cx_active$`)
	body, err := adminGet(ctx, netns, generation, "/stats?type=Gauges&filter="+filter, adminLimit)
	if err != nil {
		return 0, err
	}
	total, found := 0, false
	for line := range strings.Lines(string(body)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), ": ")
		// The question is a connection itself.
		if !ok || strings.HasPrefix(name, "listener.admin.") {
			continue
		}
		n, err := strconv.Atoi(value)
		if err != nil {
			return 0, fmt.Errorf("count connections: %q", line)
		}
		total, found = total+n, true
	}
	if !found {
		return 0, errNoStats
	}
	return total, nil
}

// drained forgets a process that drained, or wasn't waited for, and has ended.
func (t *tenant) drained(p *process) {
	p.mu.Lock()
	over := !p.state.DrainUntil.IsZero() && p.state.PID == 0
	p.mu.Unlock()
	if !over {
		return
	}
	t.op.Lock()
	defer t.op.Unlock()
	mine, others := false, false
	for _, other := range t.list() {
		mine = mine || other == p
		others = others || other != p && other.state.Generation == p.state.Generation
	}
	if t.deleted || !mine {
		return
	}
	t.forget(p, !others)
	if err := t.persist(); err != nil {
		t.m.log.Error("Can't keep the state of a tenant.", "tenant", t.name, "error", err)
	}
	t.changed()
}
