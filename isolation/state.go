package isolation

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// tenantState is what the next manager has to know of a tenant.
type tenantState struct {
	Tenant string `json:"tenant"`
	Index  uint16 `json:"index"`
	Boot   string `json:"boot"`
	MTU    int    `json:"mtu"`
	Limits Limits `json:"limits"`
	// Workers that are wanted, 0 by default.
	Workers int `json:"workers,omitempty"`
	// Since when it is there, and counts.
	Since time.Time `json:"since,omitzero"`
	// OOMKills that were put down to a process.
	OOMKills  uint64         `json:"oomKills"`
	Processes []processState `json:"processes,omitempty"`
}

// processState is a wanted generation, with the process that was started for it.
type processState struct {
	Generation int    `json:"generation"`
	Version    string `json:"version"`
	// PID is 0 when there is none right now.
	PID        int    `json:"pid"`
	StartTicks uint64 `json:"startTicks"`
	// Tree is what it runs from.
	Tree      string    `json:"tree"`
	StartedAt time.Time `json:"startedAt"`
	Restarts  int       `json:"restarts"`
	// Workers that it was started with.
	Workers int `json:"workers,omitempty"`
	// Served says that it was live once, and so may have connections.
	Served bool `json:"served"`
	Exit   Exit `json:"exit"`
	// LogStart is where in the log it began.
	LogStart int64 `json:"logStart"`
	// DrainUntil isn't zero once it is to end: then at the latest.
	DrainUntil time.Time `json:"drainUntil,omitzero"`
}

// readState refuses what isn't whole: the caller removes what belongs to it.
func readState(path string) (tenantState, model.Tenant, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return tenantState{}, model.Tenant{}, fmt.Errorf("read state: %w", err)
	}
	var s tenantState
	if err := json.Unmarshal(data, &s); err != nil {
		return s, model.Tenant{}, fmt.Errorf("read state %s: %w", path, err)
	}
	t, err := model.ParseTenant(s.Tenant)
	if err == nil && t.FileName() != filepath.Base(path) {
		err = fmt.Errorf("it is of tenant %s", t)
	}
	if err == nil && (s.Index < 1 || s.Index > maxIndex) {
		err = fmt.Errorf("index %d", s.Index)
	}
	if err != nil {
		return s, t, fmt.Errorf("read state %s: %w", path, err)
	}
	return s, t, nil
}

func writeState(path string, s tenantState) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return writeAtomic(path, data)
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove file: %w", err)
	}
	return nil
}

// bootID tells boots apart: pids and start times mean nothing across them.
func bootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// startTicks is when the process started, in clock ticks since boot. With the
// pid it names a process for good.
func startTicks(pid int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("look at process %d: %w", pid, err)
	}
	// The name before may hold anything, parentheses too.
	_, rest, ok := cutLast(string(data), ") ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return 0, fmt.Errorf("look at process %d: unknown format", pid)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
