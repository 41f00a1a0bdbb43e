package xds

import (
	"maps"
	"slices"
	"time"
)

// What may have changed at a proxy is gathered for a moment, then looked up and sent.
// What changes all the time, such as the endpoints of pods that crash in a loop, would
// have that moment for nothing: each change costs the operator, the agent and the proxy
// as much as the last. So what has changed often lately is gathered for longer, alone:
// a service of one team doesn't hold another's back, in a proxy that uses both.
const (
	// freeChanges of one resource may come in a row before it is one that changes often.
	freeChanges = 8
	// forgetChange is after how long one of them is forgotten.
	forgetChange = time.Second
	// oftenFor is for how long one that changed often is that yet, once it is quiet.
	oftenFor = 2 * time.Second
)

// changed is the account of one resource at one proxy: when its last change is paid for.
type changed struct{ paid time.Time }

// note notes that one was sent.
func (c *changed) note(now time.Time) {
	if first := now.Add(-freeChanges * forgetChange); c.paid.Before(first) {
		c.paid = first
	}
	c.paid = c.paid.Add(forgetChange)
	if last := now.Add(oftenFor); c.paid.After(last) {
		c.paid = last
	}
}

func (c *changed) often(now time.Time) bool { return c.paid.After(now) }

// gathering is names by type, and since when there are any.
type gathering struct {
	names map[string]map[string]struct{}
	since time.Time
}

func (g *gathering) add(typeURL, name string, now time.Time) {
	if len(g.names) == 0 {
		g.names, g.since = map[string]map[string]struct{}{}, now
	}
	if g.names[typeURL] == nil {
		g.names[typeURL] = map[string]struct{}{}
	}
	g.names[typeURL][name] = struct{}{}
}

func (g *gathering) addAll(all map[string]map[string]struct{}, now time.Time) {
	for typeURL, names := range all {
		for name := range names {
			g.add(typeURL, name, now)
		}
	}
}

// wait is for how long names are gathered yet; false if there are none.
func (g *gathering) wait(now time.Time, gather time.Duration) (time.Duration, bool) {
	return max(0, gather-now.Sub(g.since)), len(g.names) > 0
}

// parts is what is gathered of what changes often. It is sent in parts, over as much
// time: all at once, it would keep the node's CPUs from others for as long as it takes.
type parts struct {
	gathering
	sending []resourceKey
	size    int // of a part
	next    time.Time
}

// due is in how long a part is to be sent; false if there is none.
func (p *parts) due(now time.Time, gather time.Duration) (time.Duration, bool) {
	if len(p.sending) > 0 {
		return max(0, p.next.Sub(now)), true
	}
	return p.wait(now, gather)
}

// take returns the part that is due. Parts are apart from each other, and go on for as
// long as names are gathered.
func (p *parts) take(now time.Time, apart, gather time.Duration) []resourceKey {
	if wait, any := p.due(now, gather); !any || wait > 0 {
		return nil
	}
	if len(p.sending) == 0 {
		for typeURL, names := range p.names {
			for name := range names {
				p.sending = append(p.sending, resourceKey{typeURL, name})
			}
		}
		p.gathering = gathering{}
		n := max(1, int(gather/apart))
		p.size = (len(p.sending) + n - 1) / n
	}
	part := p.sending[:min(p.size, len(p.sending))]
	p.sending, p.next = p.sending[len(part):], now.Add(apart)
	return part
}

// mark notes that a name may have changed. Nothing is sent before more changes
// had the time to come, unless urgent. Where it has changed often lately, more may come.
func (st *stream) mark(typeURL, name string, urgent bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.markLocked(typeURL, name, urgent)
}

func (st *stream) markLocked(typeURL, name string, urgent bool) {
	sub := st.types[typeURL]
	if sub == nil || !has(sub.names, name) && !(name == wildcardName && sub.wildcard) {
		return
	}
	now := time.Now()
	if h := sub.held[name]; !urgent && typeURL != TypeListener && h != nil && h.changed.often(now) {
		st.later.add(typeURL, name, now)
	} else {
		st.dirty.add(typeURL, name, now)
		st.urgent = st.urgent || urgent
	}
	st.wake()
}

// markAll marks all names of a type.
func (st *stream) markAll(typeURL string) {
	st.mu.Lock()
	var names []string
	if sub := st.types[typeURL]; sub != nil {
		names = slices.Collect(maps.Keys(sub.names))
	}
	st.mu.Unlock()
	for _, name := range names {
		st.mark(typeURL, name, false)
	}
}

// patience is how long to wait for further changes; false if there is nothing to
// send, or too much under way already.
func (st *stream) patience() (time.Duration, bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.unanswered) >= maxUnanswered {
		return 0, false
	}
	if st.urgent {
		return 0, true
	}
	now := time.Now()
	wait, any := st.dirty.wait(now, st.server.opts.Coalesce)
	if w, some := st.later.due(now, st.server.opts.CoalesceOften); some && (!any || w < wait) {
		return w, true
	}
	return wait, any
}

// take returns what is to be sent now. st.mu is held.
func (st *stream) take() map[string]map[string]struct{} {
	now := time.Now()
	for _, r := range st.later.take(now, st.server.opts.Coalesce, st.server.opts.CoalesceOften) {
		st.dirty.add(r.typeURL, r.name, now)
	}
	names := st.dirty.names
	st.dirty, st.urgent = gathering{}, false
	return names
}

// postpone takes back what couldn't be sent. The answer that makes room wakes the
// sender.
func (st *stream) postpone(dirty map[string]map[string]struct{}) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.dirty.addAll(dirty, time.Now())
	st.urgent = true
}
