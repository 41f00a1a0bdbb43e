package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/bulkhead-mesh/bulkhead/agent/cni"
)

// sandboxRecord is a pod's network as far as steering needs it.
type sandboxRecord struct {
	// ContainerID is empty for pods that were found running.
	ContainerID string           `json:"containerID,omitempty"`
	UID         string           `json:"uid"`
	Namespace   string           `json:"namespace"`
	Name        string           `json:"name"`
	IPs         []netip.Addr     `json:"ips"`
	Ifindex     int              `json:"ifindex"`
	Ifname      string           `json:"ifname"`
	MTU         int              `json:"mtu"`
	MAC         net.HardwareAddr `json:"mac"`
	// Netns is the path of the pod's network namespace as this process sees it, if
	// it is known; of a pod that was found running, its processes show it.
	Netns string `json:"netns,omitempty"`
	// Left says that it was let go from the mesh as it ran: it may have connections
	// in the clear.
	Left bool `json:"left,omitempty"`
}

// sandboxes are the node's pods of the mesh whose network is known. They are kept
// under /run, so that the next agent knows them without asking each process. The
// methods may be called from any goroutine.
type sandboxes struct {
	dir string
	log *slog.Logger

	mu sync.Mutex
	// byUID holds the newest sandbox of each pod.
	byUID map[string]sandboxRecord
}

func openSandboxes(dir string, log *slog.Logger) (*sandboxes, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open sandboxes: %w", err)
	}
	s := &sandboxes{dir: dir, log: log, byUID: map[string]sandboxRecord{}}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		var r sandboxRecord
		b, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil || r.UID == "" || filepath.Base(file) != r.UID+".json" {
			// Half-written by an agent that died: the pod is found anew.
			os.Remove(file)
			continue
		}
		s.byUID[r.UID] = r
	}
	return s, nil
}

// put records a pod's newest sandbox.
func (s *sandboxes) put(r sandboxRecord) error {
	if r.UID == "" || strings.ContainsAny(r.UID, "/.") {
		return fmt.Errorf("pod %s/%s has no usable UID: %q", r.Namespace, r.Name, r.UID)
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	file := filepath.Join(s.dir, r.UID+".json")
	if err := os.WriteFile(file+".tmp", b, 0o600); err != nil {
		return fmt.Errorf("record sandbox: %w", err)
	}
	if err := os.Rename(file+".tmp", file); err != nil {
		return fmt.Errorf("record sandbox: %w", err)
	}
	s.byUID[r.UID] = r
	return nil
}

func (s *sandboxes) get(uid string) (sandboxRecord, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.byUID[uid]
	return r, ok
}

// at returns the UID of the pod that has an address, "" if there is none, or more
// than one: of a pod that has just gone the record may still be there.
func (s *sandboxes) at(ip netip.Addr) (uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.byUID {
		if !slices.Contains(r.IPs, ip) {
			continue
		}
		if uid != "" {
			return ""
		}
		uid = r.UID
	}
	return uid
}

// drop forgets a pod.
func (s *sandboxes) drop(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLocked(uid)
}

func (s *sandboxes) dropLocked(uid string) {
	delete(s.byUID, uid)
	if err := os.Remove(filepath.Join(s.dir, uid+".json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Error("sandbox stays on record", "pod", uid, "error", err)
	}
}

// dropContainers forgets the sandboxes whose container f names. A pod's older
// sandbox may be deleted after its newer one was added: that one stays.
func (s *sandboxes) dropContainers(f func(containerID string) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, r := range s.byUID {
		if r.ContainerID != "" && f(r.ContainerID) {
			s.dropLocked(uid)
		}
	}
}

// uids returns all pods on record.
func (s *sandboxes) uids() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var uids []string
	for uid := range s.byUID {
		uids = append(uids, uid)
	}
	return uids
}

// membership is the last ConfigMap bulkhead-membership, also on disk for the CNI
// plugin.
type membership struct {
	file string

	mu    sync.Mutex
	known bool
	m     cni.Membership
}

func (m *membership) set(b []byte) error {
	var parsed cni.Membership
	if err := json.Unmarshal(b, &parsed); err != nil {
		return fmt.Errorf("ConfigMap %s: %w", membershipConfigMap, err)
	}
	if err := os.MkdirAll(filepath.Dir(m.file), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(m.file+".tmp", b, 0o644); err != nil {
		return err
	}
	if err := os.Rename(m.file+".tmp", m.file); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.known, m.m = true, parsed
	return nil
}

// load reads what an earlier agent left, until the API answers.
func (m *membership) load() error {
	b, err := os.ReadFile(m.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := json.Unmarshal(b, &m.m); err != nil {
		return fmt.Errorf("%s: %w", m.file, err)
	}
	m.known = true
	return nil
}

// has reports whether the namespace is a member; known is false before anything
// could tell.
func (m *membership) has(namespace string) (member, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.m.Has(namespace), m.known
}
