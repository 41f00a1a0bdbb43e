package xds

import "testing"

// only is the one stream that is open.
func (m *mesh) only() *stream {
	m.t.Helper()
	m.server.mu.Lock()
	defer m.server.mu.Unlock()
	for st := range m.server.streams {
		return st
	}
	m.t.Fatal("no stream is open")
	return nil
}

// wildcard reports whether all of a type was asked for.
func (st *stream) wildcard(typeURL string) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.types[typeURL] != nil && st.types[typeURL].wildcard
}

// wantFirst waits for so many resources of a type. No empty response, which would say
// that there are none, may come before.
func (c *client) wantFirst(typeURL string, resources int) {
	c.t.Helper()
	for resources > 0 {
		r := c.next()
		if len(r.Resources) == 0 {
			c.t.Fatalf("an empty %s response came with %d resources still to come", shortType(r.TypeUrl), resources)
		}
		if r.TypeUrl == typeURL {
			resources -= len(r.Resources)
		}
		c.ack(r)
	}
}

// While a request for all of a type and for more names than may come at once is still
// being taken in, something else is sent.
func TestWildcardWhileNamesWait(t *testing.T) {
	for name, later := range map[string]bool{"first request": false, "later request": true} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, ServerOptions{MaxNames: 1, NamesPerSecond: 1e-9})
			c := m.dial(teamA)
			c.subscribe(TypeEndpoints, vipName)
			c.want(TypeEndpoints, vipName)
			c.unsubscribe(TypeEndpoints, vipName)
			c.subscribe(TypeEndpoints, vipName) // the second, and last, of the burst
			c.want(TypeEndpoints, vipName)
			if later {
				c.handled()
			}
			c.subscribe(TypeCluster, "*", vipName)
			st := m.only()
			eventually(t, "all clusters are asked for", func() bool { return st.wildcard(TypeCluster) })
			m.must(m.store.SetService(withEndpoint(testService, "10.1.0.77:8080")))
			c.wantFirst(TypeCluster, len(staticNames))
		})
	}
}

// A request for all of a type comes while something else is being sent.
func TestWildcardDuringFlush(t *testing.T) {
	m := newMesh(t, ServerOptions{})
	c := m.dial(teamA)
	c.subscribe(TypeEndpoints, vipName)
	c.want(TypeEndpoints, vipName)
	st := m.only()
	func() {
		m.store.mu.Lock() // the sender can't look anything up
		defer m.store.mu.Unlock()
		st.mark(TypeEndpoints, vipName, true)
		eventually(t, "the sender has begun", func() bool {
			st.mu.Lock()
			defer st.mu.Unlock()
			return len(st.dirty.names) == 0
		})
		c.subscribe(TypeListener, "*")
		eventually(t, "all listeners are asked for", func() bool { return st.wildcard(TypeListener) })
	}()
	c.wantFirst(TypeListener, len(listenerNames))
}
