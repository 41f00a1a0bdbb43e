package cost

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"sync"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Reading is what was read of one tenant.
type Reading struct {
	// CPU since the tenant's cgroup was made.
	CPU time.Duration
	// Private and PSS are bytes now.
	Private, PSS int64
	// Pods of the tenant, by UID.
	Pods map[string]PodReading
	// Unread says that it couldn't be read: the account stays as it is, and the
	// next reading counts what was missed, but for the memory. Pods are its pods.
	Unread bool
}

// PodReading is what was read of one pod since it was steered.
type PodReading struct {
	Namespace string
	Traffic
}

// Traffic of pods.
type Traffic struct {
	// BytesSent are by the pods, BytesReceived to them: of TCP, with its headers.
	BytesSent     uint64 `json:"bytesSent,omitempty"`
	BytesReceived uint64 `json:"bytesReceived,omitempty"`
	// Connections are new ones of either direction that a proxy took.
	Connections uint64 `json:"connections,omitempty"`
}

// Cost is what was taken since a time. All but Private and PSS only grow while
// Since stays.
type Cost struct {
	Since, At time.Time
	CPU       time.Duration
	// PrivateByteSeconds and PSSByteSeconds are memory times how long it was held.
	PrivateByteSeconds, PSSByteSeconds float64
	// Private and PSS are bytes at the time At.
	Private, PSS int64
	Traffic
}

// Account is one tenant's.
type Account struct {
	Cost
	// Namespaces have shares of a proxy that pods of several use, by what their
	// pods had of bytes and connections; CPU and memory are estimates.
	Namespaces map[string]Cost
}

// Meter keeps the accounts of a node's tenants. It is safe for concurrent use.
type Meter struct {
	file string
	mu   sync.Mutex
	s    state
}

// state is what the file holds.
type state struct {
	// Boot is when the last readings were taken, by the clock that no one sets.
	Boot    time.Duration       `json:"boot"`
	Tenants map[string]*account `json:"tenants"`
	// Pods has what was read last of each, by UID: they can change tenants.
	Pods map[string]Traffic `json:"pods"`
	// Begun says that whoever isn't there has come since.
	Begun bool `json:"begun"`
}

// account is an Account, and the CPU that was read last.
type account struct {
	Account
	LastCPU time.Duration `json:"lastCPU"`
	// Left are the weights of pods that have gone since the last reading, by namespace.
	Left map[string]float64 `json:"left,omitempty"`
}

// Open returns a meter that goes on where the one that wrote the file stopped; the
// file may be gone, and should be where a reboot removes it. One that can't be read
// is told by the error, and counting begins anew: the Meter is never nil.
func Open(file string) (*Meter, error) {
	m := &Meter{file: file, s: state{Tenants: map[string]*account{}, Pods: map[string]Traffic{}}}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return m, fmt.Errorf("read costs: %w", err)
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return m, fmt.Errorf("read costs from %s: %w", file, err)
	}
	if s.Tenants != nil && s.Pods != nil {
		m.s = s
	}
	return m, nil
}

// Add takes the readings of all tenants that are on the node, at the time now,
// with boot as the time since the node started (CLOCK_BOOTTIME). Accounts of other
// tenants are closed: one that comes back begins anew. The error is of writing the
// file; what was read counts.
func (m *Meter) Add(now time.Time, boot time.Duration, readings map[model.Tenant]Reading) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := state{Boot: boot, Tenants: make(map[string]*account, len(readings)), Pods: map[string]Traffic{}, Begun: true}
	elapsed := max(boot-m.s.Boot, 0)
	for t, r := range readings {
		a := m.s.Tenants[t.String()]
		if r.Unread {
			if a != nil {
				next.Tenants[t.String()] = a
			}
			for uid := range r.Pods {
				if last, ok := m.s.Pods[uid]; ok {
					next.Pods[uid] = last
				}
			}
			continue
		}
		if a == nil {
			a = &account{Account: Account{Cost: Cost{Since: now}}}
			if !m.s.Begun {
				a.LastCPU = r.CPU // it isn't known what was counted before
			}
		}
		had := map[string]Traffic{}
		for uid, p := range r.Pods {
			had[uid] = m.since(uid, p.Traffic)
			next.Pods[uid] = p.Traffic
		}
		a.add(now, elapsed, r, had, t.Scope == model.ScopeNode)
		next.Tenants[t.String()] = a
	}
	m.s = next
	return m.write()
}

// since is what a pod has had since it was read last.
func (m *Meter) since(uid string, now Traffic) Traffic {
	last, known := m.s.Pods[uid]
	if !known && !m.s.Begun {
		last = now
	}
	if now.BytesSent < last.BytesSent || now.BytesReceived < last.BytesReceived || now.Connections < last.Connections {
		last = Traffic{} // it was steered anew
	}
	return Traffic{now.BytesSent - last.BytesSent, now.BytesReceived - last.BytesReceived, now.Connections - last.Connections}
}

// Leave takes the last reading of a pod before its counters go.
func (m *Meter) Leave(t model.Tenant, uid string, r PodReading) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a := m.s.Tenants[t.String()]; a != nil {
		had := m.since(uid, r.Traffic)
		a.traffic(r.Namespace, had, t.Scope == model.ScopeNode)
		if a.Left == nil {
			a.Left = map[string]float64{}
		}
		a.Left[r.Namespace] += weight(had)
		m.s.Pods[uid] = r.Traffic // until the next Add
	}
}

// Account returns a tenant's; false before its first reading.
func (m *Meter) Account(t model.Tenant) (Account, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a := m.s.Tenants[t.String()]
	if a == nil {
		return Account{}, false
	}
	out := a.Account
	out.Namespaces = maps.Clone(a.Namespaces)
	return out, true
}

// write replaces the file.
func (m *Meter) write() error {
	b, err := json.Marshal(m.s)
	if err != nil {
		return fmt.Errorf("write costs: %w", err)
	}
	next := m.file + ".next"
	if err := os.WriteFile(next, b, 0o600); err != nil {
		return fmt.Errorf("write costs: %w", err)
	}
	if err := os.Rename(next, m.file); err != nil {
		return fmt.Errorf("write costs: %w", err)
	}
	return nil
}
