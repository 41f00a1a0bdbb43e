package steer

import "log/slog"

// Cut counts connections that pods lose when they join, move or leave, by the tenant that
// has too many of them written down.
type Cut map[uint16]uint64

// Add counts what a pod loses, and says so.
func (c Cut) Add(log *slog.Logger, uid string, tenant uint16, lost int) {
	if lost == 0 {
		return
	}
	c[tenant] += uint64(lost)
	log.Warn("A pod that moves loses connections: as many of its tenant stay as may", "pod", uid, "tenant", tenant, "lost", lost)
}
