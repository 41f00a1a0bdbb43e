package isolation

import (
	"errors"
	"fmt"
)

// LimitAll bounds all tenants of the node together, at once, beside what bounds
// each: CPUWeight is theirs beside the node's other cgroups of the same level, and
// 0 pids are no limit. Beyond MemoryMax the kernel ends one of their processes, the
// largest as a rule. What the kernel refuses is told, and the rest in force.
func (m *Manager) LimitAll(l Limits) error {
	if err := l.validate(); err != nil {
		return fmt.Errorf("limit all tenants: %w", err)
	}
	m.limiting.Lock()
	defer m.limiting.Unlock()
	before := m.cgroups.quota.Swap(l.CPUMillis)
	var errs []error
	// Version 1 wants no child's quota above its parent's at any moment.
	if l.CPUMillis > 0 && (before == 0 || l.CPUMillis < before) {
		errs = append(errs, m.limitEach())
	}
	errs = append(errs, m.cgroups.limitAll(l))
	if before > 0 && (l.CPUMillis == 0 || l.CPUMillis > before) {
		errs = append(errs, m.limitEach())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("limit all tenants: %w", err)
	}
	m.all.Store(&l)
	return nil
}

// limitEach applies each tenant's own limits anew.
func (m *Manager) limitEach() error {
	var errs []error
	for _, name := range m.Tenants() {
		t, err := m.lock(name, false)
		if errors.Is(err, ErrEnding) {
			continue
		}
		if err != nil || t == nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, t.limit())
		t.op.Unlock()
	}
	return errors.Join(errs...)
}

// AllLimits are what the kernel enforces for all tenants together, and what of it
// the node can't hold as it is meant. It doesn't wait for a LimitAll.
func (m *Manager) AllLimits() (have Limits, unenforced []string) {
	return m.cgroups.limits(everyone), m.cgroups.unenforced(everyone, *m.all.Load())
}
