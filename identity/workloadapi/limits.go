package workloadapi

import (
	"sync"

	"golang.org/x/time/rate"
)

// What one pod may have at once, and what processes of one uid in it may. Callers
// that are in no pod share what a pod has.
const (
	connsPerPod = 64
	connsPerUID = 32
	callsPerPod = 128
	callsPerUID = 64
	// Calls and connections a second that a pod may begin, and how many at once.
	startsPerSecond = 50
	startsAtOnce    = 200
	// Refusals a second that are logged of each, and how many at once.
	logsPerSecond = 1
	logsAtOnce    = 10
)

// limits count what pods have. The zero UID is for callers that are in none.
type limits struct {
	mu    sync.Mutex
	pods  map[string]*usage // by UID
	conns int
}

// usage of a pod.
type usage struct {
	conns, calls count
	starts, logs *rate.Limiter
}

// count is of all, and by uid.
type count struct {
	all int
	by  map[uint32]int
}

func (c *count) add(uid uint32, most, mostOfUID int) bool {
	if c.all >= most || c.by[uid] >= mostOfUID {
		return false
	}
	if c.by == nil {
		c.by = map[uint32]int{}
	}
	c.all++
	c.by[uid]++
	return true
}

func (c *count) remove(uid uint32) {
	c.all--
	if c.by[uid]--; c.by[uid] == 0 {
		delete(c.by, uid)
	}
}

// connect counts a connection; ok is false if the pod has too many, or too many
// lately. Otherwise disconnect must be called.
func (l *limits) connect(pod string, uid uint32) (ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.pods[pod]
	if u == nil {
		// What a pod that left had is forgotten once it could begin anew anyway.
		for name, u := range l.pods {
			if u.conns.all == 0 && u.starts.Tokens() >= startsAtOnce {
				delete(l.pods, name)
			}
		}
		u = &usage{starts: rate.NewLimiter(startsPerSecond, startsAtOnce), logs: rate.NewLimiter(logsPerSecond, logsAtOnce)}
		l.pods[pod] = u
	}
	if !u.starts.Allow() || !u.conns.add(uid, connsPerPod, connsPerUID) {
		return false
	}
	l.conns++
	return true
}

func (l *limits) disconnect(pod string, uid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pods[pod].conns.remove(uid)
	l.conns--
}

// call counts a call on a connection of the pod's; if ok, done must be called.
func (l *limits) call(pod string, uid uint32) (done func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.pods[pod]
	if u == nil || !u.starts.Allow() || !u.calls.add(uid, callsPerPod, callsPerUID) {
		return nil, false
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		u.calls.remove(uid)
	}, true
}

// mayLog reports whether a refusal of the pod's is logged: one that is refused all
// the time mustn't keep another's out of the log, or fill it.
func (l *limits) mayLog(pod string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.pods[pod]
	return u != nil && u.logs.Allow()
}

// open is how many connections there are.
func (l *limits) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conns
}
