package isolation

import (
	"fmt"
	"io/fs"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Hits are how often a tenant met its limits since its cgroup was made. It is
// comparable.
type Hits struct {
	// Since when they are counted.
	Since time.Time
	// Throttled are periods of 100 ms in which its CPU quota was used up, and
	// ThrottledFor is for how long threads waited then, summed up.
	Throttled    uint64
	ThrottledFor time.Duration
	// MemoryHigh is how often it was slowed down beyond that. Version 1 doesn't.
	MemoryHigh uint64
	OOMKills   uint64
	// Pids is how often a thread was refused.
	Pids uint64
}

// Hits reads a tenant's; it costs three small files. The error wraps
// fs.ErrNotExist if there is no such tenant.
func (m *Manager) Hits(name model.Tenant) (Hits, error) {
	t := m.tenant(name)
	if t == nil {
		return Hits{}, fmt.Errorf("read hits of %s: %w", name, fs.ErrNotExist)
	}
	h := m.cgroups.hits(t.file)
	t.mu.Lock()
	h.Since = t.since
	t.mu.Unlock()
	return h, nil
}

func (c *cgroups) hits(tenant string) Hits {
	h := Hits{OOMKills: c.oomKills(tenant)}
	if dir, v2 := c.dir(tenant, "cpu"); dir != "" {
		stat := readTable(dir, "cpu.stat")
		h.Throttled = uint64(stat["nr_throttled"])
		h.ThrottledFor = throttled(stat, v2)
	}
	if dir, v2 := c.dir(tenant, "memory"); dir != "" && v2 {
		h.MemoryHigh = uint64(readTable(dir, "memory.events")["high"])
	}
	if dir, _ := c.dir(tenant, "pids"); dir != "" {
		h.Pids = uint64(readTable(dir, "pids.events")["max"])
	}
	return h
}

// throttled reads cpu.stat of either version.
func throttled(stat map[string]int64, v2 bool) time.Duration {
	if v2 {
		return time.Duration(stat["throttled_usec"]) * time.Microsecond
	}
	return time.Duration(stat["throttled_time"])
}
