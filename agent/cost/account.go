package cost

import "time"

// connectionBytes is how many bytes cost a proxy as much CPU as one new connection
// does: 281 µs for a connection, 3.1 ns for a byte (docs/benchmarks.md, both
// proxies of the whole way).
const connectionBytes = 90_000

// add takes a reading that is elapsed after the one before it; had is what its pods
// have had since.
func (a *account) add(now time.Time, elapsed time.Duration, r Reading, had map[string]Traffic, shared bool) {
	taken := Cost{CPU: r.CPU - a.LastCPU}
	if taken.CPU < 0 {
		taken.CPU = r.CPU // its cgroup was made anew
	}
	a.LastCPU = r.CPU
	if !a.At.IsZero() {
		// Between two readings, memory is taken to be the mean of both.
		taken.PrivateByteSeconds = float64(a.Private+r.Private) / 2 * elapsed.Seconds()
		taken.PSSByteSeconds = float64(a.PSS+r.PSS) / 2 * elapsed.Seconds()
	}
	weights := a.Left
	if weights == nil {
		weights = map[string]float64{}
	}
	a.Left = nil
	for uid, p := range r.Pods {
		a.traffic(p.Namespace, had[uid], shared)
		weights[p.Namespace] += weight(had[uid])
	}
	a.CPU += taken.CPU
	a.PrivateByteSeconds += taken.PrivateByteSeconds
	a.PSSByteSeconds += taken.PSSByteSeconds
	a.Private, a.PSS, a.At = r.Private, r.PSS, now
	if shared {
		a.split(now, taken, weights)
	}
}

// traffic adds what a pod of a namespace has had.
func (a *account) traffic(namespace string, had Traffic, shared bool) {
	a.Traffic.plus(had)
	if shared {
		c := a.namespace(namespace)
		c.Traffic.plus(had)
		a.Namespaces[namespace] = c
	}
}

func (t *Traffic) plus(u Traffic) {
	t.BytesSent += u.BytesSent
	t.BytesReceived += u.BytesReceived
	t.Connections += u.Connections
}

func weight(t Traffic) float64 {
	return float64(t.BytesSent) + float64(t.BytesReceived) + connectionBytes*float64(t.Connections)
}

func (a *account) namespace(name string) Cost {
	if a.Namespaces == nil {
		a.Namespaces = map[string]Cost{}
	}
	c, ok := a.Namespaces[name]
	if !ok {
		if c.Since = a.At; c.Since.IsZero() {
			c.Since = a.Since
		}
	}
	return c
}

// split shares what a proxy took among the namespaces whose pods use it: by what
// they had of it, and equally where nobody had any.
func (a *account) split(now time.Time, taken Cost, weights map[string]float64) {
	total := 0.0
	for _, w := range weights {
		total += w
	}
	for name := range a.Namespaces {
		if _, ok := weights[name]; !ok {
			delete(a.Namespaces, name) // it has no pods here any more
		}
	}
	for name, w := range weights {
		share := 1 / float64(len(weights))
		if total > 0 {
			share = w / total
		}
		c := a.namespace(name)
		c.CPU += time.Duration(share * float64(taken.CPU))
		c.PrivateByteSeconds += share * taken.PrivateByteSeconds
		c.PSSByteSeconds += share * taken.PSSByteSeconds
		c.Private, c.PSS, c.At = int64(share*float64(a.Private)), int64(share*float64(a.PSS)), now
		a.Namespaces[name] = c
	}
}
